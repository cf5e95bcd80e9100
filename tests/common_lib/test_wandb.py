"""Weights & Biases: what a run leaves on disk, what it leaves alone, and a host that is not there or goes away."""

import http.server
import json
import logging
import signal
import struct
import sys
import threading
import time
from types import SimpleNamespace
from typing import ClassVar

import pytest

from common_lib import trackers
from common_lib.cli import UserError
from common_lib.tracking import make_tracker

KEY = "a" * 40


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    """No key, no settings of this machine; files in a folder of the test."""
    for name in ("API_KEY", "BASE_URL", "MODE", "PROJECT", "ENTITY", "DIR", "SERVICE", "IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "settings"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def real():
    return pytest.importorskip("wandb", reason="wandb is optional and not installed")


def stored(path):
    """The records of a .wandb file: blocks of 32 KiB of (checksum, length, type, part), after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole, records = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(Record.FromString(whole))
            whole = b""
    return records


def histories(records):
    """(step, {name: value}) of each line of metrics."""
    lines = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            lines.append((items["_step"], {name: value for name, value in items.items() if not name.startswith("_")}))
    return lines


def configs(records):
    found = {}
    for record in records:
        part = record.config if record.HasField("config") else record.run.config if record.HasField("run") else None
        for item in part.update if part else ():
            found[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    return found


def files(folder, of="offline-run-*"):
    return sorted(folder.glob(f"wandb/{of}/*.wandb"))


def test_offline_it_keeps_configs_names_steps_and_tags_and_a_resumed_run_goes_on(real, tmp_path, capfd):
    """Two sessions, read back: of the same run, the second with the steps that followed."""
    alone = (sys.exit, sys.excepthook, sys.stdout, sys.stderr)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    run_id = None
    for session, step in enumerate((8, 16)):
        tracker = make_tracker("wandb", "lab/search", "aime 24/beam2", tags=["test-tag"], resume_id=run_id)
        run_id = run_id or tracker.id
        assert not logging.getLogger("wandb.sdk.lib.asyncio_manager").isEnabledFor(logging.ERROR)
        assert (tracker.id, alone) == (run_id, (sys.exit, sys.excepthook, sys.stdout, sys.stderr))
        tracker.log_configs({"search": {"num_blocks": 8, "stops": [1, 2]}, "none": None, "session": session})
        tracker.log_metrics({"aime-24/maj_m": 0.5 + session / 4, "aime-24/maj_ci": None}, step=step)
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == handlers
        tracker.close()
        (path,) = [path for path in files(tmp_path) if str(path.parent) in tracker.where]
        assert "offline (no WANDB_API_KEY): `wandb sync " in tracker.where
        records = stored(path)
        (run,) = [record.run for record in records if record.HasField("run")]
        assert (run.run_id, run.entity, run.project, list(run.tags)) == (run_id, "lab", "search", ["test-tag"])
        assert histories(records) == [(step, {"aime-24/maj_m": 0.5 + session / 4})]
        config = configs(records)
        assert {name: config[name] for name in ("search/num_blocks", "search/stops", "none", "session")} == {
            "search/num_blocks": 8, "search/stops": "[1, 2]", "none": "None", "session": session,
        }  # fmt: skip
        time.sleep(1.0 * (session == 0))  # a folder is named by the second
    assert len(files(tmp_path)) == 2 and {path.name for path in tmp_path.iterdir()} <= {"wandb", "settings", "cache"}
    assert "".join(capfd.readouterr()) == ""


def test_an_earlier_step_is_left_out_and_said(real, tmp_path, caplog):
    tracker = make_tracker("wandb", "search")
    for step in (8, 16, 4, 24):
        tracker.log_metrics({"a": float(step)}, step=step)
    tracker.close()
    assert [step for step, _ in histories(stored(*files(tmp_path)))] == [8, 16, 24]
    assert caplog.text.count("step 4 comes after 16") == 1


def test_a_host_that_is_not_there_leaves_the_run_offline(real, tmp_path, monkeypatch, caplog, capfd):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(trackers.WandbTracker, "start_seconds", 1.0)
    start = time.monotonic()
    tracker = make_tracker("wandb", "search")
    tracker.log_metrics({"a": 1.0}, step=1)
    tracker.close()
    assert time.monotonic() - start < 20
    assert "offline (its host did not take the run)" in tracker.where and "kept offline" in caplog.text
    assert histories(stored(*files(tmp_path))) == [(1, {"a": 1.0})]
    assert KEY not in "".join(capfd.readouterr()) + caplog.text + tracker.where
    assert files(tmp_path, "run-*") == [] and not list(tmp_path.glob("wandb/run-*"))  # what the try had begun


class Host(http.server.BaseHTTPRequestHandler):
    """W&B's host: takes a run, then answers nothing."""

    asked: ClassVar[list[str]] = []

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        entity = {"id": "e", "name": "lab"}
        bucket = {"id": "b", "name": request["variables"].get("name"), "displayName": "r", "config": "{}", "sweepName": None,
                  "historyLineCount": 0, "project": {"id": "p", "name": "search", "entity": entity}}  # fmt: skip
        answers = {
            "RunResumeStatus": {"model": {"id": "p", "name": "search", "entity": entity, "bucket": None}},
            "UpsertBucket": {"upsertBucket": {"bucket": bucket, "inserted": True}},
            "Viewer": {"viewer": {"id": "1", "entity": "lab", "username": "me", "flags": "{}", "teams": {"edges": []}}},
        }
        for name, answer in answers.items():
            if name in request["query"]:
                self.asked.append(name)
                text = json.dumps({"data": answer}).encode()
                self.send_response(200)
                self.send_header("content-length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)
                return
        self.server.gone.wait(60)

    def log_message(self, *_):
        pass


def test_a_host_that_goes_away_delays_the_end_by_the_timeout_only(real, tmp_path, monkeypatch, caplog):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Host)
    server.daemon_threads, server.gone = True, threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    tracker = make_tracker("wandb", "lab/search", resume_id="run-1")
    assert tracker.where.startswith("wandb project lab/search, run run-1; if the host fails, `wandb sync ")
    assert "RunResumeStatus" in Host.asked  # it goes on with a run of this id
    service = trackers._wandb_service(real)
    tracker.close_seconds = 2.0
    tracker.log_metrics({"a": 1.0}, step=1)
    start = time.monotonic()
    tracker.close()
    server.gone.set()
    server.shutdown()
    assert time.monotonic() - start < 10
    assert service.wait(5) != 0  # nothing of it is left to be waited for
    assert "not all was sent" in caplog.text and "`wandb sync " in caplog.text
    assert histories(stored(*files(tmp_path, "run-*"))) == [(1, {"a": 1.0})]


# ---------------------------------------------------------------------------------------------------------------------
# What wandb is given, by a stand-in


class FakeWandb:
    """The module and its run, noting every call."""

    def __init__(self):
        self.started, self.calls, self.step = [], [], 0
        self.Settings = lambda **settings: settings
        self.config = SimpleNamespace(update=lambda configs, **_: self.calls.append(("config", configs)))
        self.settings = SimpleNamespace(sync_dir="FOLDER")

    def setup(self, settings=None):
        return None

    def init(self, **given):
        self.started.append(given)
        if given["mode"] in self.refused:
            raise OSError(f"{KEY} is refused")
        return self

    refused = ()

    def log(self, metrics, step):
        self.step = step
        self.calls.append((step, metrics))

    def finish(self):
        self.calls.append("finish")

    def teardown(self):
        self.calls.append("teardown")


@pytest.fixture
def fake(monkeypatch):
    module = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


@pytest.mark.parametrize(
    ("environment", "mode"),
    [
        ({}, "offline"),
        ({"WANDB_API_KEY": KEY}, "online"),
        ({"WANDB_IDENTITY_TOKEN_FILE": "f"}, "online"),
        ({"WANDB_API_KEY": KEY, "WANDB_MODE": "Offline"}, "offline"),
        ({"netrc": "machine api.wandb.ai login user password secret"}, "online"),
        ({"netrc": "machine other.host login user password secret"}, "offline"),
        ({"netrc": "machine own.host login user password secret", "WANDB_BASE_URL": "https://own.host/x"}, "online"),
        ({"netrc": "no netrc at all"}, "offline"),
    ],
)
def test_where_it_sends(fake, monkeypatch, tmp_path, environment, mode):
    """Decided before wandb could ask for a key in the terminal."""
    for name, value in environment.items():
        if name == "netrc":
            (tmp_path / "netrc").write_text(value)
        else:
            monkeypatch.setenv(name, value)
    tracker = make_tracker("wandb", resume_id="run-1")
    tracker.close()
    (given,) = fake.started
    assert (given["mode"], given["resume"]) == (mode, "allow" if mode == "online" else None)
    assert (given["id"], given["name"], given["project"], given["entity"]) == ("run-1", "run-1", trackers.PROJECT, None)
    assert ("offline" in tracker.where) == (mode == "offline")
    settings = given["settings"]
    assert settings["silent"] and settings["console"] == "off" and settings["disable_code"] and settings["disable_git"]
    assert fake.calls == ["finish", "teardown"]


def test_disabled_it_keeps_nothing_and_says_so(fake, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_MODE", "Disabled")
    tracker = make_tracker("wandb", resume_id="run-1")
    tracker.log_metrics({"a": 1.0}, step=1)
    tracker.close()
    assert (tracker.where, tracker.id) == ("not tracked: WANDB_MODE is disabled", "run-1")  # a later start may go on
    assert fake.started == fake.calls == list(tmp_path.iterdir()) == []


def test_a_host_is_waited_for_ten_seconds_and_earlier_sessions_keep_their_folders(fake, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    folders = [tmp_path / f"wandb/run-2026010{day}_000000-run-1" for day in (1, 2)]
    folders[0].mkdir(parents=True)
    init = fake.init

    def refused(**given):
        if given["mode"] == "online":
            folders[1].mkdir()
            raise TimeoutError("no answer")
        return init(**given)

    monkeypatch.setattr(fake, "init", refused)
    make_tracker("wandb", resume_id="run-1").close()
    assert [folder.exists() for folder in folders] == [True, False]
    assert fake.started[0]["settings"]["init_timeout"] == 10.0


def test_the_projects_of_flags_and_environment(fake, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "of-environment")
    for project in (None, "mine", "lab/mine"):
        make_tracker("wandb", project).close()
    assert [(given["entity"], given["project"]) for given in fake.started] == [
        (None, "of-environment"), (None, "mine"), ("lab", "mine"),
    ]  # fmt: skip
    for project in ("a/b/c", "a b", "a/", "x#y"):
        with pytest.raises(UserError, match="PROJECT or ENTITY/PROJECT"):
            make_tracker("wandb", project)


def test_an_earlier_step_is_not_given_to_it(fake, caplog):
    tracker = make_tracker("wandb")
    for step in (8, 4, 8, 3):
        tracker.log_metrics({"a": 1.0}, step=step)
    tracker.close()
    assert [call[0] for call in fake.calls if isinstance(call, tuple)] == [8, 8]
    assert caplog.text.count("step 4 comes after 8") == 1 and "step 3" not in caplog.text


def test_its_end_is_waited_for_no_longer_than_the_timeout(fake, monkeypatch, caplog):
    """Then its process is ended, on which it waits."""
    gone = threading.Event()
    service = SimpleNamespace(kill=gone.set)
    connection = SimpleNamespace(_proc=SimpleNamespace(_process=service))
    monkeypatch.setattr(fake, "setup", lambda settings=None: SimpleNamespace(_connection=connection))
    monkeypatch.setattr(fake, "finish", lambda: gone.wait(60))
    tracker = make_tracker("wandb")
    tracker.close_seconds = 0.1
    start = time.monotonic()
    tracker.close()
    assert time.monotonic() - start < 20 and gone.is_set()
    assert "it took longer than 0.1 s); `wandb sync FOLDER` uploads it" in caplog.text
    assert fake.calls == ["teardown"]  # its own handler at exit has nothing left to wait for


def test_the_stop_button_stops_nothing_and_a_refused_key_is_not_shown(fake, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(fake, "refused", ("online",))
    tracker = make_tracker("wandb")
    fake.started[-1]["settings"]["stop_fn"]()
    tracker.close()
    assert [given["mode"] for given in fake.started] == ["online", "offline"]
    assert "<token> is refused" in caplog.text and KEY not in caplog.text
    assert "does not stop a run" in caplog.text


def test_all_trackers_are_given_the_same_names_and_steps(fake, monkeypatch):
    class FakeRun(FakeWandb):
        def log_metrics(self, metrics, step):
            self.log(metrics, step)

        def __getattr__(self, name):
            return lambda *_, **__: None

    neptune, trackio = FakeRun(), FakeRun()
    trackio.config = {}
    monkeypatch.setenv("NEPTUNE_MODE", "offline")
    monkeypatch.setitem(sys.modules, "neptune_scale", SimpleNamespace(Run=lambda **_: neptune))
    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(init=lambda **_: trackio, finish=lambda: None))
    for kind in ("neptune", "wandb", "trackio"):
        tracker = make_tracker(kind, "lab/search")
        for step in (1, 8):
            tracker.log_metrics({"a/b_m": step / 2, "left_out": None}, step=step)
        tracker.close()
    expected = [(1, {"a/b_m": 0.5}), (8, {"a/b_m": 4.0})]
    assert [[call for call in of.calls if isinstance(call, tuple)] for of in (neptune, fake, trackio)] == [expected] * 3
