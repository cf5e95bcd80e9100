"""The files of a search run: written so that nothing is lost, and a run goes on where it stopped.

X.jsonl       one line per finished search; at the end in the order of global_idx
X.meta.json   arguments, versions, both models; what a second start is compared with
X.tree.jsonl  one line per finished round of each search: the journal, and what a report's page shows

Both .jsonl files only grow. A last line without its newline is torn: it is cut off, said, and done again. How the files
are read is in search_lib/run_reader.py.
"""

import contextlib
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from common_lib.cli import UserError
from common_lib.files import LineFile, OutputError, lock, read_rows, write_json, write_whole
from common_lib.shards import Shard
from engine_lib.arguments import FREE_ARGUMENTS as ENGINE_ARGUMENTS
from engine_lib.arguments import LATER_ARGUMENTS
from search_lib.run_reader import FORMAT as FORMAT
from search_lib.run_reader import Journal, Key, RunPaths, read_meta, read_results
from search_lib.run_shards import whole_run
from search_lib.tree import Round, SearchTask

logger = logging.getLogger(__name__)

# Flags that change where and how fast a run goes, not what comes out; every other one must stay as it was.
FREE_ARGUMENTS = ENGINE_ARGUMENTS | {
    "batch_size", "value_device", "value_cache_gb", "value_batch_tokens", "tracker", "neptune_project", "num_repetitions",
    "output_path", "benchmark", "piref_model", "classifier_ckpt_path", "value_dtype", "value_engine", "value_url",
    "value_sglang_args",
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
    paths = RunPaths.of(output_path, shard)
    folder = paths.results.parent
    if not folder.is_dir():
        raise UserError(f"--output_path {output_path}: the folder {folder} does not exist; make it first")
    if not os.access(folder, os.W_OK):
        raise UserError(f"--output_path {output_path}: the folder {folder} cannot be written to")
    for path in (paths.results, paths.meta, paths.tree):
        if path.exists() and (not path.is_file() or not os.access(path, os.W_OK)):
            raise UserError(f"--output_path {output_path}: {path} is not a file that can be written to")
    return paths


class RunFiles:
    """The open files of one run, and what an earlier start left: finished searches, and rounds of unfinished ones."""

    finished: dict[Key, dict[str, Any]]  # without generated_ids
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
            write_json(paths.meta, meta)
            self.results = LineFile(paths.results)
            stack.callback(lambda: self.results.close())
            self._read()
            self._opened = stack.pop_all()

    def _read(self) -> None:
        lines, _ = read_results(self.paths.results, self.meta["num_problems"])
        self.finished = {(line["data_idx"], line["repeat_idx"]): line for line in lines}
        journal = Journal(self.paths.tree)
        started = [(data_idx, repeat_idx) for data_idx, runs in journal.searches.items() for repeat_idx in runs]
        self.rounds = {key: journal.read(*key)[0].rounds for key in started if key not in self.finished}

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
        places = [(row["global_idx"], offset) for offset, row in read_rows(self.paths.results)]
        if places == sorted(places):
            return

        def copy(target: BinaryIO) -> None:
            with self.paths.results.open("rb") as source:
                for _, offset in sorted(places):
                    source.seek(offset)
                    target.write(source.readline())

        write_whole(self.paths.results, copy)
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
        self._opened.close()


def _earlier_meta(paths: RunPaths) -> dict[str, Any] | None:
    """The settings of an earlier start, None where nothing has come of it."""
    results = paths.results.exists() and paths.results.stat().st_size
    if not results and not (paths.tree.exists() and paths.tree.stat().st_size):
        return None
    meta = read_meta(paths.meta)
    if meta is None and results:
        raise UserError(f"{paths.results} exists, but not its {paths.meta.name}; give another --output_path")
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
