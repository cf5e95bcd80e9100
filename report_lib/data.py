"""A run as a report sees it: its finished searches and settings, read and checked."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from common_lib.cli import UserError
from common_lib.shards import WHOLE, Shard
from eval_lib.stopped import StopRecord
from search_lib.counted import join_stopped, planned_searches, stop_settings, stopped_of
from search_lib.run_files import run_differences
from search_lib.run_reader import RunPaths, read_meta, read_results
from search_lib.run_shards import find_shards, whole_run


class NothingYet(UserError):
    """A run has begun, and no search of it is finished."""


@dataclass
class RunRecord:
    """One run. `lines` (of `read_results`) are ordered by problem, then repetition.

    `num_blocks` and `num_problems` are None where nothing tells them; `planned` is the number of searches the run was to
    have, of a problem that --stop has decided those that count. parts: its files; several where `path` is a run in shards.
    """

    path: Path
    name: str
    lines: list[dict[str, Any]]
    meta: dict[str, Any] | None
    num_blocks: int | None
    num_problems: int | None
    planned: int
    parts: list[RunPaths]
    notes: list[str] = field(default_factory=list)

    @property
    def journal_paths(self) -> list[Path]:
        """The settings of a regraded run name the journal of its samples."""
        named = [(read_meta(part.meta) or {}).get("journal") for part in self.parts]
        return [
            part.results.with_name(Path(name).name) if isinstance(name, str) else part.tree
            for part, name in zip(self.parts, named, strict=True)
        ]

    @property
    def partial(self) -> bool:
        return len(self.lines) < self.planned

    @property
    def unfinished(self) -> str | None:
        """What to mind where searches are missing, as of a run in progress or without some of its shards."""
        words = f"not a result yet: {self.name} has {len(self.lines)} of {self.planned} searches"
        return words if self.partial else None

    @cached_property
    def stopping(self) -> StopRecord | None:
        """Of a run whose problems were stopped early, else None."""
        return StopRecord.of(self.meta)

    @property
    def search_type(self) -> str | None:
        return self.meta["arguments"].get("search_type") if self.meta else None

    @property
    def prunes(self) -> bool | None:
        """Are there rejected candidates? None where the settings are not known."""
        return self.meta["search"]["branch"] > 1 if self.meta else None

    @property
    def biased(self) -> bool | None:
        """Did pruning by value decide which values are seen? None where the settings are not known."""
        by_value = self.meta is None or self.meta["arguments"].get("selection", "value") == "value"
        return self.prunes and by_value

    @cached_property
    def by_problem(self) -> dict[int, list[dict[str, Any]]]:
        """data_idx -> its lines in the order of repetitions."""
        groups: dict[int, list[dict[str, Any]]] = {}
        for line in self.lines:
            groups.setdefault(line["data_idx"], []).append(line)
        return groups


def read_run(path: Path, name: str, num_blocks: int | None = None) -> RunRecord:
    """Read and check one run, where it is in shards all that are there. Raises UserError, one line, for whatever cannot be
    reported."""
    shards = find_shards(path)
    if not path.is_file() and not shards:
        raise UserError(f"{path}: no such file; give the --output_path of a run")
    if path.name.endswith((".tree.jsonl", ".meta.json", ".uncounted.jsonl")):
        raise UserError(
            f"{path}: that is a run's journal, settings or uncounted lines; give the run's own file, which lies beside it"
        )
    parts = list(shards.values()) or [RunPaths.of(path)]
    metas = [read_meta(part.meta) for part in parts]
    meta = join_settings(shards, metas) if shards else metas[0]
    notes = shard_notes(name, shards, meta)
    lines: list[dict[str, Any]] = []
    for part in parts:
        found, more = read_results(part.results, meta["num_problems"] if meta else None, stopped_of(meta))
        lines, notes = lines + found, notes + more
    if not lines:
        if any(part.tree.exists() for part in parts):
            raise NothingYet(f"{path}: no finished search in it yet: the run is in progress; nothing to report")
        raise UserError(f"{path}: no finished search in it; nothing to report")
    check_shards(shards, lines)
    lines.sort(key=lambda line: (line["data_idx"], line["repeat_idx"]))
    counts = Counter(line["data_idx"] for line in lines)
    num_problems = None
    if meta:
        known = meta["search"]["num_blocks"]
        if num_blocks not in (None, known):
            notes.append(f"{name}: --num_blocks {num_blocks} ignored, the run's settings say {known}")
        num_blocks = known
        num_problems = shard_of(meta).count_of(meta["num_problems"])
        planned = planned_searches(num_problems, meta["arguments"].get("num_repetitions", 1), stopped_of(meta))
    else:
        planned = len(counts) * (1 + max(line["repeat_idx"] for line in lines))
        notes.append(f"{name}: no settings beside it ({parts[0].meta.name}): no FLOPs, no wall-clock of the run")
        if num_blocks is None:
            notes.append(f"{name}: budget N is not known; rows count pooled repetitions. Give --num_blocks to have N")
    run = RunRecord(path, name, lines, meta, num_blocks, num_problems, planned, parts, notes)
    if run.partial:
        notes.append(
            f"{name}: PARTIAL, {len(lines)} of {planned} searches finished; {len(counts)} problems, "
            f"{min(counts.values())} to {max(counts.values())} repetitions of each"
        )
    return run


# ---------------------------------------------------------------------------------------------------------------------
# Shards


def join_settings(shards: Mapping[Shard, RunPaths], metas: Sequence[dict[str, Any] | None]) -> dict[str, Any]:
    """Those of the whole run, with the sessions of all shards. Raises UserError where shards are of several runs."""
    whole: dict[str, Any] = {}
    for paths, meta in zip(shards.values(), metas, strict=True):
        if meta is None:
            raise UserError(f"{paths.results}: a shard without its settings ({paths.meta.name}); restore or delete it")
        if not whole:
            whole, first = whole_run(meta), paths
        elif differences := run_differences(whole, whole_run(meta)):
            raise UserError(f"{paths.results} is no shard of the run of {first.results.name}: {'; '.join(differences)}")
        elif (stop := stop_settings(meta)) != stop_settings(whole):
            one, other = (
                " ".join(f"--{name} {what}" for name, what in found.items()) for found in (stop, stop_settings(whole))
            )
            raise UserError(
                f"{paths.results} stops by {one}, {first.results.name} by {other}; start the search of one again with the flags "
                "of the other"
            )
    repetitions = max(meta["arguments"].get("num_repetitions", 1) for meta in metas if meta)
    sessions = [session for meta in metas if meta for session in meta.get("sessions", [])]
    joined = {"sessions": sessions, "arguments": whole["arguments"] | {"num_repetitions": repetitions}}
    return whole | joined | join_stopped([meta for meta in metas if meta])


def shard_of(meta: Mapping[str, Any]) -> Shard:
    """Of a run's settings; the whole where they name none."""
    text = meta["arguments"].get("shard")
    return Shard.parse(text, "shard") if isinstance(text, str) else WHOLE


def shard_notes(name: str, shards: Mapping[Shard, RunPaths], meta: Mapping[str, Any] | None) -> list[str]:
    if not shards:
        own = shard_of(meta) if meta else WHOLE
        return [f"{name}: shard {own} of a run alone; give the name without it for all of them"] if own != WHOLE else []
    count = next(iter(shards)).count
    notes = [f"{name}: {len(shards)} of {count} shards, side by side or not: no wall-clock of the run"]
    if missing := [shard for index in range(count) if (shard := Shard(index, count)) not in shards]:
        notes.append(f"{name}: MISSING shards {', '.join(map(str, missing))}: their problems are left out")
    return notes


def check_shards(shards: Mapping[Shard, RunPaths], lines: Sequence[dict[str, Any]]) -> None:
    """Raises UserError where a shard has a problem of another's."""
    shard_of_path = {paths.results: shard for shard, paths in shards.items()}
    for line in lines if shards else ():
        shard = shard_of_path[line["path"]]
        if not shard.holds(line["data_idx"]):
            raise UserError(
                f"{line['path']}: line {line['line']} has problem {line['data_idx']}, which is not of shard {shard}; was the "
                "file renamed?"
            )


def run_names(paths: Sequence[Path]) -> list[str]:
    """Short names that differ: the file's stem, with as many parent folders as it takes. Same file twice: UserError."""
    resolved = [path.resolve() for path in paths]
    for path in resolved:
        if resolved.count(path) > 1:
            raise UserError(f"{path}: given twice; a run cannot be compared with itself")
    for depth in range(1, 1 + max(len(path.parts) for path in resolved)):
        names = ["/".join(path.parts[-depth:]).removesuffix(".jsonl") for path in resolved]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in resolved]
