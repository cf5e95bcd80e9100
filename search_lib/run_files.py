"""The files of a search run: written so that nothing is lost, and a run goes on where it stopped.

X.jsonl            one line per finished search; at the end those that count, in the order of global_idx
X.uncounted.jsonl  with --stop, at the end: lines of searches that were finished though their problem was decided
X.meta.json        arguments, versions, both models; what a second start is compared with
X.tree.jsonl       one line per finished round of each search: the journal, and what a report's page shows

X.jsonl and the journal only grow while a run goes on. A last line without its newline is torn: it is cut off, said, and
done again. A line that is moved is in both files for a moment, never in none. How the files are read is in
search_lib/run_reader.py.
"""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from common_lib.cli import UserError
from common_lib.files import LineFile, OutputError, fsync, lock, output_errors, read_rows, write_json, write_whole
from common_lib.shards import Shard
from engine_lib.arguments import FREE_ARGUMENTS as ENGINE_ARGUMENTS
from engine_lib.arguments import LATER_ARGUMENTS
from search_lib.counted import STOP_KEYS, stop_settings
from search_lib.run_reader import FORMAT as FORMAT
from search_lib.run_reader import Journal, Key, RunPaths, read_meta, read_results
from search_lib.run_shards import whole_run
from search_lib.tree import Round, SearchTask

logger = logging.getLogger(__name__)

# Flags that change where and how fast a run goes, not what comes out; every other one must stay as it was.
FREE_ARGUMENTS = ENGINE_ARGUMENTS | {
    "batch_size", "value_device", "value_cache_gb", "value_batch_tokens", "tracker", "neptune_project", "num_repetitions",
    "output_path", "benchmark", "piref_model", "classifier_ckpt_path", "value_dtype", "value_engine", "value_url",
    "value_sglang_args", "stop", "alpha", "stop_vote",
}  # fmt: skip

# In bf16 the last bits of a value depend on what it was batched with and how, so with such values these of the free ones can
# change which candidates are kept; by what computes them.
ROUNDING = {
    "local": ("batch_size", "value_device", "value_cache_gb", "value_batch_tokens", "attention_impl"),
    "sglang": ("batch_size", "value_sglang_args"),
}


def check_output_path(output_path: str, shard: Shard | None = None) -> RunPaths:
    """Of this shard of the run, if it is one. Raises UserError for a path that cannot be written, before anything is
    loaded."""
    if not output_path.endswith(".jsonl") or Path(output_path).name == ".jsonl":
        raise UserError(f"--output_path {output_path!r} must be a file name that ends in .jsonl")
    if output_path.endswith((".tree.jsonl", ".uncounted.jsonl")):
        raise UserError(
            f"--output_path {output_path!r} is the name of another run's journal or uncounted lines; give another"
        )
    paths = RunPaths.of(output_path, shard)
    folder = paths.results.parent
    if not folder.is_dir():
        raise UserError(f"--output_path {output_path}: the folder {folder} does not exist; make it first")
    if not os.access(folder, os.W_OK):
        raise UserError(f"--output_path {output_path}: the folder {folder} cannot be written to")
    for path in (paths.results, paths.meta, paths.tree, paths.uncounted):
        if path.exists() and (not path.is_file() or not os.access(path, os.W_OK)):
            raise UserError(f"--output_path {output_path}: {path} is not a file that can be written to")
    return paths


class RunFiles:
    """The open files of one run, and what an earlier start left: finished searches, and rounds of unfinished ones."""

    finished: dict[Key, dict[str, Any]]  # without generated_ids; those in X.uncounted.jsonl too
    rounds: dict[Key, list[Round]]

    def __init__(self, paths: RunPaths, meta: dict[str, Any]):
        """Lock the files, compare `meta` with an earlier start's, read what is there. Raises UserError, OutputError."""
        self.paths, self.meta = paths, meta
        with contextlib.ExitStack() as stack:
            busy = f"another process is writing to {paths.results}; wait for it, or give another --output_path"
            stack.callback(lock(paths.lock, busy).release)
            self.tree = stack.enter_context(contextlib.closing(LineFile(paths.tree)))
            earlier = _earlier_meta(paths) or meta
            check_same_run(earlier, meta, paths)
            warn_of_rounding(earlier, meta)
            session = {"started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "ended": None, "seconds": 0.0}
            meta["sessions"] = [*earlier.get("sessions", []), session]
            meta["started"] = earlier["started"]
            meta["tracker_ids"] = earlier.get("tracker_ids", {})
            if stop_settings(earlier) == stop_settings(meta):  # else it says of other lines that they do not count
                meta |= {key: earlier[key] for key in STOP_KEYS if key in earlier}
            write_json(paths.meta, meta)
            self.results = LineFile(paths.results)
            stack.callback(lambda: self.results.close())
            self._read()
            self._opened = stack.pop_all()

    def _read(self) -> None:
        problems, uncounted = self.meta["num_problems"], self.paths.uncounted
        lines, _ = read_results(self.paths.results, problems)
        aside = read_results(uncounted, problems)[0] if uncounted.exists() else []
        self._aside = {_key(line): line["offset"] for line in aside}  # of X.uncounted.jsonl
        self.finished = {_key(line): line for line in [*aside, *lines]}
        journal = Journal(self.paths.tree)
        started = [(data_idx, repeat_idx) for data_idx, runs in journal.searches.items() for repeat_idx in runs]
        self.rounds = {key: journal.read(*key)[0].rounds for key in started if key not in self.finished}
        self._spent: dict[Key, tuple[int, int]] = {}  # tokens generated and scored of searches that are not finished
        for key, rounds in self.rounds.items():
            for record in rounds:
                self._spend(key, record)

    def _spend(self, key: Key, record: Round) -> None:
        generated, scored = self._spent.get(key, (0, 0))
        self._spent[key] = generated + sum(map(len, record.tokens)), scored + record.tokens_scored

    def add_round(self, task: SearchTask, record: Round, texts: list[str]) -> None:
        row = {"data_idx": task.data_idx, "repeat_idx": task.repeat_idx} | vars(record) | {"text": texts}
        if record.round == 0:
            row["prompt_ids"] = list(task.prompt_ids)
        self.tree.append(row)
        self._spend(_key(row), record)

    def add_result(self, row: dict[str, Any]) -> None:
        self.results.append(row)
        self.rounds.pop(_key(row), None)
        self._spent.pop(_key(row), None)
        self.finished[_key(row)] = {k: v for k, v in row.items() if k != "generated_ids"}

    def tokens_of(self, which: Callable[[Key], bool]) -> dict[str, int]:
        """Tokens generated and scored by some of the searches, unfinished ones as far as their rounds are written."""
        spent = [pair for key, pair in self._spent.items() if which(key)]
        spent += [
            (line["tokens_generated"], line["tokens_scored"]) for key, line in self.finished.items() if which(key)
        ]
        return {"generated": sum(pair[0] for pair in spent), "scored": sum(pair[1] for pair in spent)}

    # ------------------------------------------------------------------------------------------------- moving lines

    def take_back(self) -> None:
        """Put the lines of X.uncounted.jsonl behind those of X.jsonl, which may need them again."""
        if not self.paths.uncounted.exists():
            return
        here = [(self.paths.results, offset) for offset, _ in read_rows(self.paths.results)]
        known = {_key(line) for line in self.finished.values() if line.get("path") != self.paths.uncounted}
        there = [(self.paths.uncounted, offset) for key, offset in self._aside.items() if key not in known]
        self._write_results([*here, *there])
        with output_errors(self.paths.uncounted):
            self.paths.uncounted.unlink()
        self._aside = {}

    def sort_results(self, counts: Callable[[int, int], bool] = lambda data_idx, repeat_idx: True) -> None:
        """Put the lines that count (data_idx, repeat_idx) in the order of global_idx, and move the others to
        X.uncounted.jsonl. After a kill while lines were moved X.jsonl has all of them, and this does it again."""
        if any(counts(*key) == (key in self._aside) for key in self.finished):
            self.take_back()
        rows = [(row["global_idx"], offset, counts(*_key(row))) for offset, row in read_rows(self.paths.results)]
        if rows == sorted(rows) and all(counted for *_, counted in rows):
            return
        if moved := [(self.paths.results, offset) for _, offset, counted in sorted(rows) if not counted]:
            write_lines(self.paths.uncounted, moved)
        self._write_results([(self.paths.results, offset) for _, offset, counted in sorted(rows) if counted])

    def _write_results(self, places: Iterable[tuple[Path, int]]) -> None:
        write_lines(self.paths.results, places)
        self.results.close()
        self.results = LineFile(self.paths.results)

    # ------------------------------------------------------------------------------------------------- settings

    def note_session(self, seconds: float, hardware: str) -> None:
        """Note in the meta file how long this start has run, and on what."""
        ended = {"ended": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "seconds": seconds, "hardware": hardware}
        self.meta["sessions"][-1] |= ended
        with contextlib.suppress(OutputError):  # a full disk has been told already; the record of it is not worth more
            self.write_meta()

    def write_meta(self) -> None:
        write_json(self.paths.meta, self.meta)

    def __enter__(self) -> "RunFiles":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Flush and unlock."""
        self._opened.close()


def _key(row: Mapping[str, Any]) -> Key:
    return row["data_idx"], row["repeat_idx"]


def write_lines(path: Path, places: Iterable[tuple[Path, int]]) -> None:
    """Write a file whole, of lines of others or of itself: file and byte offset of each. Never all of it in memory.

    It is so after a power cut before anything that comes later is, where the file system can. Raises OutputError.
    """

    def copy(target: BinaryIO) -> None:
        sources: dict[Path, BinaryIO] = {}
        with contextlib.ExitStack() as stack:
            for source, offset in places:
                if source not in sources:
                    sources[source] = stack.enter_context(source.open("rb"))
                sources[source].seek(offset)
                target.write(sources[source].readline())

    write_whole(path, copy)
    with contextlib.suppress(OSError):
        fsync(path.parent)


def _earlier_meta(paths: RunPaths) -> dict[str, Any] | None:
    """The settings of an earlier start, None where nothing has come of it."""
    lines, journal = (
        [path for path in group if path.exists() and path.stat().st_size]
        for group in ((paths.results, paths.uncounted), (paths.tree,))
    )
    if not lines and not journal:
        return None
    meta = read_meta(paths.meta)
    if meta is None and lines:
        raise UserError(f"{lines[0]} exists, but not its {paths.meta.name}; give another --output_path")
    return meta


def check_same_run(earlier: dict[str, Any], now: dict[str, Any], paths: RunPaths) -> None:
    """Raises UserError naming what differs between an earlier start and this one, if it changes results."""
    differences = run_differences(earlier, now)
    had, has = earlier["arguments"]["num_repetitions"], now["arguments"]["num_repetitions"]
    if has < had:
        differences.append(f"--num_repetitions was {had} and is {has} (it may only grow)")
    if differences:
        raise UserError(
            f"{paths.results} holds another configuration: {'; '.join(differences)}. Give another --output_path, or the "
            "earlier settings to go on"
        )


def check_same_shards(others: Mapping[RunPaths, dict[str, Any]], now: dict[str, Any]) -> None:
    """Raises UserError where other shards of this run (their settings by their files) have other settings."""
    for paths, meta in others.items():
        if differences := run_differences(whole_run(meta), whole_run(now)):
            raise UserError(
                f"{paths.results} is a shard of another configuration: {'; '.join(differences)}. Give all shards the same "
                "settings, or another --output_path"
            )


def run_differences(earlier: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """In words, what differs between the settings of two starts and changes results."""
    before, after = ({**LATER_ARGUMENTS, "shard": None} | meta["arguments"] for meta in (earlier, now))
    differences = [
        f"--{name} was {was!r} and is {after.get(name)!r}"
        for name, was in before.items()
        if name not in FREE_ARGUMENTS and after.get(name) != was
    ]
    by_servers = any(meta["arguments"].get("engine") == "sglang-server" for meta in (earlier, now))
    numerics = f"engine and dtypes differ ({earlier.get('numerics')} -> {now.get('numerics')})"
    compared = {
        "the benchmark's problems differ": lambda meta: meta.get("problems_sha256"),
        "the generator's weights differ": lambda meta: meta.get("generator", {}).get("fingerprint"),
        "the value model's weights differ": lambda meta: meta.get("value_model", {}).get("fingerprint"),
        numerics: lambda meta: _numerics(meta, by_servers),
    }
    return differences + [words for words, pick in compared.items() if pick(earlier) != pick(now)]


def _numerics(meta: dict[str, Any], by_servers: bool) -> dict[str, Any]:
    """Engines and dtypes. Where servers wrote or are to write, the generator's is theirs: old meta files say that of the
    client's device. Before there were value engines all values were local."""
    numerics = {"value_engine": "local"} | (meta.get("numerics") or {})
    return {name: value for name, value in numerics.items() if name != "generator_dtype" or not by_servers}


def reproducible(value_dtype: str, value_engine: str) -> dict[str, Any]:
    """For X.meta.json: how exactly values can be had again, and which free flags they depend on. value_engine: local or
    sglang."""
    if value_dtype == "fp32":
        return {"values": "to 1e-5", "depends_on": []}
    return {"values": "to rounding", "depends_on": list(ROUNDING[value_engine])}


def warn_of_rounding(earlier: dict[str, Any], now: dict[str, Any]) -> None:
    """Say which flags have changed that fp32 values do not depend on and bf16 ones do."""
    before, after = dict(earlier["arguments"]), now["arguments"]
    if isinstance(one := before.get("value_device"), str):  # of a run from before there could be several
        before["value_device"] = [one]
    changed = [f"--{name} was {before[name]!r} and is {after[name]!r}" for name in now.get("reproducible", {}).get("depends_on", ())
               if name in before and before[name] != after[name]]  # fmt: skip
    if changed:
        logger.warning(
            "going on with other settings (%s): in bf16 the last bits of values depend on them, so searches may keep other "
            "candidates than in one go; values of --value_dtype fp32 do not", "; ".join(changed),
        )  # fmt: skip
