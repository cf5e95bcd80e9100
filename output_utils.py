"""The files of a search run: written so that nothing is lost, read so that a run goes on where it stopped.

X.jsonl       one line per finished search; at the end in the order of global_idx
X.meta.json   arguments, versions, both models; what a second start is compared with
X.tree.jsonl  one line per finished round of each search: the journal, and what the viewer reads

Both .jsonl files only grow. A last line without its newline is torn: it is cut off, said, and done again.
"""

import contextlib
import fcntl
import json
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cli_utils import UserError
from search_utils import Round, SearchTask

logger = logging.getLogger(__name__)

FORMAT = 1
# Flags that change where and how fast a run goes, not what comes out; every other one must stay as it was.
FREE_ARGUMENTS = {
    "attention_impl", "batch_size", "device", "value_device", "value_cache_gb", "sglang_url", "sglang_port",
"sglang_args", "piref_gpu_util", "request_timeout", "tracker", "neptune_project", "num_repetitions",
    "output_path", "benchmark", "piref_model", "classifier_ckpt_path", "engine", "value_dtype",
}  # fmt: skip
FSYNC_SECONDS = 1.0

Key = tuple[int, int]  # data_idx, repeat_idx


class OutputError(RuntimeError):
    """The files cannot be written (disk full, say). What was written stays whole; the message is one line."""


class LineFile:
    """A .jsonl file that grows by whole lines. A line that cannot be written whole is taken back."""

    def __init__(self, path: Path):
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._synced = time.monotonic()

    def append(self, row: dict[str, Any]) -> None:
        data = memoryview(_to_line(row))
        end = os.fstat(self._fd).st_size
        try:
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, end)
            raise OutputError(
                f"cannot write {self.path}: {error.strerror}; the same command goes on from here"
            ) from error
        if time.monotonic() - self._synced > FSYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror}") from error
        self._synced = time.monotonic()

    def lock(self) -> bool:
        """Take the file for this process; False where another one has it. The lock ends with the process."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def drop_torn_line(self) -> None:
        """Cut off what follows the last newline."""
        end = os.fstat(self._fd).st_size
        keep = end
        while keep and os.pread(self._fd, 1, keep - 1) != b"\n":
            step = min(keep, 1 << 16)
            newline = os.pread(self._fd, step, keep - step).rfind(b"\n")
            keep = keep - step + newline + 1 if newline >= 0 else keep - step
        if keep < end:
            logger.warning("%s: its last line is torn (%d bytes); it is dropped and done again", self.path, end - keep)
            os.ftruncate(self._fd, keep)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _to_line(row: dict[str, Any]) -> bytes:
    try:
        text = json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:  # a lone surrogate in a problem's text: escaped, so that the file stays UTF-8
        text = json.dumps(row, separators=(",", ":")).encode()
    return text + b"\n"


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(byte offset, row) of each line. Raises UserError naming a line that is not a JSON object."""
    offset = 0
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("not an object")
            except ValueError as error:
                raise UserError(f"{path}, line {number}, is damaged ({error}); move the file away") from error
            yield offset, row
            offset += len(line)


def write_json(path: Path, value: Any) -> None:
    """Write beside, fsync, rename: a reader finds the old file or the new one, never half of one."""
    beside = path.with_name(path.name + ".tmp")
    try:
        with beside.open("w", encoding="utf-8") as stream:
            json.dump(value, stream, indent=1, ensure_ascii=False)
            stream.write("\n")
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise OutputError(f"cannot write {path}: {error.strerror}") from error


# ---------------------------------------------------------------------------------------------------------------------
# The paths, and whether they can be used


@dataclass(frozen=True)
class RunPaths:
    """The three files of `--output_path X.jsonl`."""

    results: Path
    meta: Path
    tree: Path

    @classmethod
    def of(cls, output_path: str) -> "RunPaths":
        results = Path(output_path)
        stem = results.name.removesuffix(".jsonl")
        return cls(results, results.with_name(stem + ".meta.json"), results.with_name(stem + ".tree.jsonl"))


def check_output_path(output_path: str) -> RunPaths:
    """Raises UserError for a path that cannot be written, before anything is loaded."""
    if not output_path.endswith(".jsonl") or Path(output_path).name == ".jsonl":
        raise UserError(f"--output_path {output_path!r} must be a file name that ends in .jsonl")
    paths = RunPaths.of(output_path)
    folder = paths.results.parent
    if not folder.is_dir():
        raise UserError(f"--output_path {output_path}: the folder {folder} does not exist; make it first")
    if not os.access(folder, os.W_OK):
        raise UserError(f"--output_path {output_path}: the folder {folder} cannot be written to")
    for path in (paths.results, paths.meta, paths.tree):
        if path.exists() and (not path.is_file() or not os.access(path, os.W_OK)):
            raise UserError(f"--output_path {output_path}: {path} is not a file that can be written to")
    return paths


# ---------------------------------------------------------------------------------------------------------------------
# A run


@dataclass
class RunFiles:
    """The open files of one run, and what an earlier start left: finished searches, and rounds of unfinished ones."""

    paths: RunPaths
    meta: dict[str, Any]
    results: LineFile
    tree: LineFile
    finished: dict[Key, dict[str, Any]] = field(default_factory=dict)  # without generated_ids
    rounds: dict[Key, list[Round]] = field(default_factory=dict)

    @classmethod
    def open(cls, paths: RunPaths, meta: dict[str, Any]) -> "RunFiles":
        """Lock the files, compare `meta` with an earlier start's, read what is there. Raises UserError, OutputError."""
        try:
            tree = LineFile(paths.tree)
        except OSError as error:
            raise UserError(f"--output_path: {paths.tree} cannot be opened ({error.strerror})") from error
        if not tree.lock():
            tree.close()
            raise UserError(
                f"another process is writing to {paths.results}; wait for it, or give another --output_path"
            )
        try:
            earlier = _read_meta(paths)
            if earlier is not None:
                check_same_run(earlier, meta, paths)
            meta["sessions"] = (earlier or {}).get("sessions", [])
            meta["started"] = (earlier or meta)["started"]
            meta["tracker_ids"] = (earlier or {}).get("tracker_ids", {})
            meta["sessions"].append({"started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "ended": None, "seconds": 0.0})
            write_json(paths.meta, meta)
            run = cls(paths, meta, LineFile(paths.results), tree)
            run._read()
            return run
        except BaseException:
            tree.close()
            raise

    def _read(self) -> None:
        self.results.drop_torn_line()
        self.tree.drop_torn_line()
        for _, row in read_lines(self.paths.results):
            row.pop("generated_ids")
            self.finished[row["data_idx"], row["repeat_idx"]] = row
        for _, row in read_lines(self.paths.tree):
            key = row["data_idx"], row["repeat_idx"]
            if key in self.finished:
                continue
            rounds = self.rounds.setdefault(key, [])
            if row["round"] != len(rounds):
                raise UserError(f"{self.paths.tree} is damaged: problem {key[0]}, repetition {key[1]} lacks a round")
            rounds.append(Round(**{name: row[name] for name in Round.__dataclass_fields__}))

    def add_round(self, task: SearchTask, record: Round, texts: list[str]) -> None:
        row = {"data_idx": task.data_idx, "repeat_idx": task.repeat_idx} | vars(record) | {"text": texts}
        if record.round == 0:
            row["prompt_ids"] = list(task.prompt_ids)
        self.tree.append(row)

    def add_result(self, row: dict[str, Any]) -> None:
        self.results.append(row)
        self.rounds.pop((row["data_idx"], row["repeat_idx"]), None)
        self.finished[row["data_idx"], row["repeat_idx"]] = {k: v for k, v in row.items() if k != "generated_ids"}

    def sort_results(self) -> None:
        """Put the lines in the order of global_idx: copied beside, then renamed; never the whole file in memory."""
        places = [(row["global_idx"], offset) for offset, row in read_lines(self.paths.results)]
        if places == sorted(places):
            return
        beside = self.paths.results.with_name(self.paths.results.name + ".tmp")
        try:
            with self.paths.results.open("rb") as source, beside.open("wb") as target:
                for _, offset in sorted(places):
                    source.seek(offset)
                    target.write(source.readline())
                target.flush()
                os.fsync(target.fileno())
            beside.replace(self.paths.results)
        except OSError as error:
            with contextlib.suppress(OSError):
                beside.unlink()
            raise OutputError(f"cannot sort {self.paths.results}: {error.strerror}; all its lines are there") from error
        self.results.close()
        self.results = LineFile(self.paths.results)

    def note_session(self, seconds: float, hardware: str) -> None:
        """Note in the meta file how long this start has run, and on what."""
        ended = {"ended": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "seconds": seconds, "hardware": hardware}
        self.meta["sessions"][-1] |= ended
        with contextlib.suppress(OutputError):  # a full disk has been told already; the record of it is not worth more
            write_json(self.paths.meta, self.meta)

    def __enter__(self) -> "RunFiles":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Flush and unlock."""
        try:
            self.results.sync()
            self.tree.sync()
        finally:
            self.results.close()
            self.tree.close()


# ---------------------------------------------------------------------------------------------------------------------
# Is it the same run?


def _read_meta(paths: RunPaths) -> dict[str, Any] | None:
    if not any(path.exists() and path.stat().st_size for path in (paths.results, paths.tree)):
        return None  # nothing has come of an earlier start
    if not paths.meta.exists():
        if paths.results.exists() and paths.results.stat().st_size:
            raise UserError(f"{paths.results} exists, but not its {paths.meta.name}; give another --output_path")
        return None
    try:
        meta = json.loads(paths.meta.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{paths.meta} is not JSON ({error}); give another --output_path") from error
    if meta.get("format") != FORMAT:
        raise UserError(
            f"{paths.meta} has format {meta.get('format')!r}, this program writes {FORMAT}; give another path"
        )
    return meta


def check_same_run(earlier: dict[str, Any], now: dict[str, Any], paths: RunPaths) -> None:
    """Raises UserError naming what differs between an earlier start and this one, if it changes results."""
    differences = [
        f"--{name} was {was!r} and is {now['arguments'].get(name)!r}"
        for name, was in earlier["arguments"].items()
        if name not in FREE_ARGUMENTS and now["arguments"].get(name) != was
    ]
    for what, label in (
        (("problems_sha256",), "the benchmark's problems"),
        (("generator", "fingerprint"), "the generator's weights"),
        (("value_model", "fingerprint"), "the value model's weights"),
        (("numerics",), "engine and dtypes"),
    ):
        was, is_now = _pick(earlier, what), _pick(now, what)
        if was != is_now:
            shown = f" ({was} -> {is_now})" if what == ("numerics",) else ""
            differences.append(f"{label} differ{shown}")
    had, has = earlier["arguments"]["num_repetitions"], now["arguments"]["num_repetitions"]
    if has < had:
        differences.append(f"--num_repetitions was {had} and is {has} (it may only grow)")
    if differences:
        raise UserError(
            f"{paths.results} holds another configuration: {'; '.join(differences)}. Give another --output_path, or the "
            "earlier settings to go on"
        )


def _pick(meta: dict[str, Any], keys: tuple[str, ...]) -> Any:
    value: Any = meta
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value
