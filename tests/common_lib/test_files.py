"""Whole lines, whole files, one process at a time: what a kill, a full disk or a second process leaves behind."""

import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from common_lib import files
from common_lib.cli import UserError
from common_lib.files import LineFile, OutputError, lock, read_rows, write_json, write_text, write_whole

ROOT = Path(__file__).resolve().parents[2]
ROWS = [{"a": 1, "text": "one"}, {"b": [1, 2], "text": "€\n"}]


def rows(path):
    return [row for _, row in read_rows(path)]


@pytest.fixture
def path(tmp_path):
    """Two lines, as LineFile writes them."""
    written = LineFile(tmp_path / "x.jsonl")
    for row in ROWS:
        written.append(row)
    written.close()
    written.close()
    return tmp_path / "x.jsonl"


def no_room_after(count: int):
    """An `os.write` that takes `count` bytes in all, a few at a time."""
    room, write = [count], os.write

    def nearly_full(fd, data):
        if not room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = write(fd, bytes(data[: min(3, room[0])]))
        room[0] -= taken
        return taken

    return nearly_full


# ---------------------------------------------------------------------------------------------------------------------
# Lines


def test_lines_are_compact_utf8_json_and_are_read_back_with_their_places(path):
    assert path.read_bytes() == '{"a":1,"text":"one"}\n{"b":[1,2],"text":"€\\n"}\n'.encode()
    assert list(read_rows(path)) == [(0, ROWS[0]), (21, ROWS[1])]


def test_places_count_blank_lines(tmp_path):
    (tmp_path / "x").write_bytes(b'\n{"a":1}\n \n\n{"b":2}\n{"c":3}')
    assert list(read_rows(tmp_path / "x")) == [(1, {"a": 1}), (12, {"b": 2}), (20, {"c": 3})]


def test_other_separators(tmp_path):
    file = LineFile(tmp_path / "x", separators=(", ", ": "))
    file.append({"a": 1, "b": 2})
    file.close()
    assert (tmp_path / "x").read_text() == '{"a": 1, "b": 2}\n'


def test_a_line_torn_at_any_byte_goes_and_only_that_one(path, caplog):
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for end in range(len(whole) + 1):
        path.write_bytes(whole[:end])
        caplog.clear()
        file = LineFile(path)
        kept = 0 if end < first else first if end < len(whole) else end
        assert path.read_bytes() == whole[:kept]
        assert ("torn" in caplog.text) == (end != kept)
        file.append({"c": 3})  # on a line of its own
        file.close()
        assert rows(path)[-1] == {"c": 3}


@pytest.mark.parametrize("length", [(1 << 16) - 1, 1 << 16, (1 << 16) + 1, 3 << 20])
@pytest.mark.parametrize("before", [b"", b'{"a":1}\n'])
def test_a_long_torn_line_goes_whole(tmp_path, before, length, caplog):
    (tmp_path / "x").write_bytes(before + b"x" * length)
    LineFile(tmp_path / "x").close()
    assert (tmp_path / "x").read_bytes() == before
    assert f"torn ({length} bytes)" in caplog.text


def test_a_long_whole_line_stays(tmp_path, caplog):
    (tmp_path / "x").write_bytes(b"x" * (3 << 20) + b"\n")
    LineFile(tmp_path / "x").close()
    assert (tmp_path / "x").stat().st_size == (3 << 20) + 1
    assert "torn" not in caplog.text


@pytest.mark.parametrize("length", [(1 << 16) - 1, 1 << 16, (1 << 16) + 1, 200_000, 3 << 20])
@pytest.mark.parametrize("rows_before", [1, 3])
def test_long_rows_before_a_torn_one_stay(tmp_path, length, rows_before):
    """Real lines are longer than a block that is looked at, also the one that ends where the torn one begins."""
    long = [{"row": number, "text": "x" * length} for number in range(rows_before)]
    file = LineFile(tmp_path / "x")
    for row in long:
        file.append(row)
    file.close()
    whole = (tmp_path / "x").read_bytes()
    for torn in (b"{", b"y" * (length + 7)):
        (tmp_path / "x").write_bytes(whole + torn)
        file = LineFile(tmp_path / "x")
        assert (tmp_path / "x").read_bytes() == whole
        file.append({"next": 1})
        file.close()
        found = list(read_rows(tmp_path / "x"))
        assert [row for _, row in found] == [*long, {"next": 1}]
        assert found[-1][0] == len(whole)
        with (tmp_path / "x").open("rb") as stream:  # each place is where its row begins
            for offset, row in found:
                stream.seek(offset)
                assert json.loads(stream.readline()) == row


def test_a_long_line_that_is_written_in_pieces_and_fails_is_taken_back_whole(path, monkeypatch):
    file, before, write = LineFile(path), path.read_bytes(), os.write
    room = [1 << 20]

    def in_pieces(fd, data):
        if room[0] <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        room[0] -= 1 << 16
        return write(fd, bytes(data[: 1 << 16]))

    monkeypatch.setattr(os, "write", in_pieces)
    with pytest.raises(OutputError):
        file.append({"text": "x" * (2 << 20)})
    assert path.read_bytes() == before
    room[0] = 4 << 20
    file.append({"text": "x" * (2 << 20)})
    file.close()
    assert rows(path) == [*ROWS, {"text": "x" * (2 << 20)}]


@pytest.mark.parametrize("room", [0, 1, 5, 8])
def test_a_line_that_does_not_fit_is_taken_back(path, monkeypatch, room):
    before = path.read_bytes()
    file = LineFile(path)
    monkeypatch.setattr(os, "write", no_room_after(room))
    with pytest.raises(OutputError) as error:
        file.append({"c": 3, "d": 4})
    assert str(error.value).startswith(f"cannot write {path}: No space left on device; make room")
    assert "\n" not in str(error.value)
    assert path.read_bytes() == before
    monkeypatch.undo()
    file.append({"d": 4})
    file.close()
    assert rows(path) == [*ROWS, {"d": 4}]


def test_an_interrupted_line_is_taken_back(path, monkeypatch):
    file, write = LineFile(path), os.write

    def interrupted(fd, data):
        write(fd, bytes(data[:4]))
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        file.append({"c": 3})
    monkeypatch.undo()
    file.close()
    assert rows(path) == ROWS


def test_a_file_that_cannot_be_opened_is_one_line(tmp_path):
    with pytest.raises(OutputError, match=f"cannot write {tmp_path}/nowhere/x: No such file or directory"):
        LineFile(tmp_path / "nowhere/x")


def test_a_lone_surrogate_is_escaped_and_read_back(tmp_path):
    file = LineFile(tmp_path / "x")
    file.append({"problem": "€ \ud800"})
    file.close()
    (tmp_path / "x").read_text(encoding="utf-8")
    assert rows(tmp_path / "x") == [{"problem": "€ \ud800"}]
    write_json(tmp_path / "y", {"problem": "\ud800"})
    assert json.loads((tmp_path / "y").read_text(encoding="utf-8")) == {"problem": "\ud800"}
    write_text(tmp_path / "z", "€ \ud800")
    assert (tmp_path / "z").read_text(encoding="utf-8") == "€ \\ud800"


def test_lines_are_made_durable_about_every_second(path, monkeypatch):
    synced, clock = [], [0.0]
    monkeypatch.setattr(files.time, "monotonic", lambda: clock[0])
    file = LineFile(path)
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(clock[0]))
    for clock[0] in (0.1, 0.9, 1.2, 1.3, 2.1, 2.3):
        file.append({"c": 3})
    file.close()
    assert synced == [1.2, 2.3, 2.3]


@pytest.mark.parametrize("line", ["{broken", "[1, 2]", "[" * 100_000])
def test_damage_in_the_middle_is_named(path, line):
    first, second = path.read_text().splitlines()
    path.write_text(f"{first}\n\n{line}\n{second}\n")
    with pytest.raises(UserError, match=r"x.jsonl, line 3, is damaged"):
        rows(path)


# ---------------------------------------------------------------------------------------------------------------------
# Whole files


def test_json_is_readable_and_ascii_where_asked(tmp_path):
    write_json(tmp_path / "x", {"a": "€"})
    assert (tmp_path / "x").read_text(encoding="utf-8") == '{\n "a": "€"\n}\n'
    write_json(tmp_path / "x", {"a": "€"}, ensure_ascii=True)
    assert (tmp_path / "x").read_text() == '{\n "a": "\\u20ac"\n}\n'


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyError("x"), KeyboardInterrupt()]
)
def test_an_error_leaves_the_old_file_whole_and_nothing_beside(path, error):
    before = path.read_bytes()

    def half(stream):
        stream.write(b"half")
        raise error

    expected = OutputError if isinstance(error, OSError) else type(error)
    for beside in (None, path.with_name("beside")):
        with pytest.raises(expected) as raised:
            write_whole(path, half, beside)
        assert path.read_bytes() == before
        assert list(path.parent.iterdir()) == [path]
    if expected is OutputError:
        assert str(raised.value).startswith(f"cannot write {path}: No space left on device")


def test_a_reader_never_finds_half_a_file(path, monkeypatch):
    """The old file is there until the new one is complete and durable, and whoever has it open keeps it."""
    before = path.read_bytes()
    beside = path.with_name("x.jsonl.tmp")
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append((path.read_bytes(), beside.read_bytes())))
    with path.open("rb") as reader:
        write_whole(path, lambda stream: stream.write(b"new"))
        assert reader.read() == before
    assert synced == [(before, b"new")]
    assert path.read_bytes() == b"new"


def test_a_full_disk_is_one_line_and_what_was_written_stays(small_disk):
    file, count = LineFile(small_disk / "x.jsonl"), 0
    with pytest.raises(OutputError, match="cannot write .*x.jsonl: No space left on device"):
        while True:
            file.append({"row": count, "text": "x" * 5000})
            count += 1
    file.close()
    assert [row["row"] for row in rows(small_disk / "x.jsonl")] == list(range(count)) != []
    with pytest.raises(OutputError, match="cannot write .*y: No space left on device"):
        write_text(small_disk / "y", "y" * 300_000)
    assert [path.name for path in small_disk.iterdir()] == ["x.jsonl"]


# ---------------------------------------------------------------------------------------------------------------------
# One process at a time

HOLDER = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from common_lib.files import lock
held = lock(Path(sys.argv[2]), "busy")
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """A second process that holds the lock until its stdin is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(ROOT), str(tmp_path / "lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def test_a_second_process_is_told(tmp_path, holder):
    with pytest.raises(UserError, match="another one writes here"):
        lock(tmp_path / "lock", "another one writes here")
    holder.kill()
    holder.wait()
    lock(tmp_path / "lock", "another one writes here").release()  # it goes with its process, however that ends


def test_the_lock_is_waited_for(tmp_path, holder):
    found = []
    waiting = threading.Thread(target=lambda: found.append(lock(tmp_path / "lock", "busy", patience_s=60)))
    waiting.start()
    holder.stdin.close()
    waiting.join(60)
    assert found and found[0].is_locked


def test_a_lock_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"{tmp_path}/file/lock cannot be made"):
        lock(tmp_path / "file/lock", "busy")


# ---------------------------------------------------------------------------------------------------------------------
# File systems without flock

NO_FLOCK_HOLDER = """
import fcntl, os, sys
from pathlib import Path

def flock(*_):
    raise OSError(int(sys.argv[1]), os.strerror(int(sys.argv[1])))

fcntl.flock = flock
sys.path.insert(0, sys.argv[2])
path = Path(sys.argv[3])
if sys.argv[4] == "training":
    from training_lib.checkpoints import lock_run
    held = lock_run(path)
elif sys.argv[4] == "search":
    from search_lib.run_files import RunFiles, check_output_path
    held = RunFiles(check_output_path(str(path / "x.jsonl")), {"arguments": {"num_repetitions": 1}, "num_problems": 1, "started": ""})
else:
    from common_lib.files import lock
    held = lock(path / "lock", "busy")
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def no_flock(monkeypatch):
    """No process of this test has flock; `no_flock(kind)` starts one that holds a lock in a folder."""
    started = []

    def start(folder, kind="plain", number=errno.ENOLCK):
        def flock(*_):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr("fcntl.flock", flock)
        process = subprocess.Popen(
            [sys.executable, "-c", NO_FLOCK_HOLDER, str(number), str(ROOT), str(folder), kind],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        started.append(process)
        assert process.stdout.readline() == b"held\n", process.communicate()
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            stream.close()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_without_flock_a_lock_file_is_used_and_said(tmp_path, no_flock, caplog, recwarn, number):
    process = no_flock(tmp_path, number=number)
    with pytest.raises(UserError) as told:
        lock(tmp_path / "lock", "another one writes here")
    assert caplog.messages == [
        f"{tmp_path}/lock: its file system has no locks (flock: {os.strerror(number)}); the file lock.pid is the lock"
    ]
    assert not recwarn.list  # the library's own, which names no file
    assert str(told.value).startswith(
        f"another one writes here ({tmp_path}/lock.pid is held by process {process.pid} on "
    )
    assert str(told.value).endswith("; if that is gone, remove the file)")
    process.kill()
    process.wait()
    held = lock(tmp_path / "lock", "another one writes here")  # it was killed and could not remove the file
    assert (tmp_path / "lock.pid").read_text().splitlines()[0] == str(os.getpid())
    held.release()
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
    lock(tmp_path / "lock", "another one writes here").release()  # what stays is not held


def test_a_dead_process_is_found_where_names_cannot_be_exchanged(tmp_path, no_flock, monkeypatch):
    """On NFS the lock library leaves such a file alone."""
    monkeypatch.setattr("filelock._soft.exchange_names", lambda *_: False)
    process = no_flock(tmp_path)
    with pytest.raises(UserError, match="busy"):
        lock(tmp_path / "lock", "busy")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lock", "lock.pid"]
    process.kill()
    process.wait()
    lock(tmp_path / "lock", "busy").release()


def test_a_lock_file_of_another_host_is_respected(tmp_path, no_flock):
    (tmp_path / "elsewhere").mkdir()
    no_flock(tmp_path / "elsewhere")
    marker = tmp_path / "lock.pid"
    for text, holder in (("4194000\nnode2\n", "process 4194000 on node2"), ("", "process ? on an unknown host")):
        marker.write_text(text)
        with pytest.raises(UserError) as told:
            lock(tmp_path / "lock", "busy")
        assert str(told.value) == f"busy ({marker} is held by {holder}; if that is gone, remove the file)"
        assert marker.read_text() == text
    marker.unlink()
    lock(tmp_path / "lock", "busy").release()


def test_a_lock_file_that_a_faster_process_has_taken_is_put_back(tmp_path, monkeypatch):
    marker = tmp_path / "lock.pid"
    marker.write_text("1\nnode1\n")
    answers = [
        (2**22 + 1, "here"),
        (1, "here"),
        (os.getpid(), "here"),
    ]  # what lies there, this host, what was moved aside
    monkeypatch.setattr(files, "_holder", lambda path: answers.pop(0))
    files._remove_stale(marker)
    assert marker.read_text() == "1\nnode1\n" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("kind", ["search", "training"])
def test_both_users_of_a_lock_do_without_flock(tmp_path, no_flock, kind):
    from search_lib.run_files import RunFiles, check_output_path
    from training_lib.checkpoints import lock_run

    process = no_flock(tmp_path, kind)
    with pytest.raises(
        UserError, match=rf"\.pid is held by process {process.pid} on .*; if that is gone, remove the file"
    ):
        if kind == "training":
            lock_run(tmp_path, patience_s=0.1)
        else:
            RunFiles(check_output_path(str(tmp_path / "x.jsonl")), {})
    process.communicate()  # it comes to its end
    if kind == "training":
        lock_run(tmp_path, patience_s=0.1).release()
