"""A run as a report sees it: its finished searches and settings, read and checked."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from common_lib.cli import UserError
from search_lib.run_reader import RunPaths, read_meta, read_results


class NothingYet(UserError):
    """A run has begun, and no search of it is finished."""


@dataclass
class RunRecord:
    """One run. `lines` (of `read_results`) are ordered by problem, then repetition.

    `num_blocks` is None where nothing tells it; `planned` is the number of searches the run was to have.
    """

    path: Path
    name: str
    lines: list[dict[str, Any]]
    meta: dict[str, Any] | None
    num_blocks: int | None
    planned: int
    notes: list[str] = field(default_factory=list)

    @property
    def journal_path(self) -> Path:
        """The settings of a regraded run name the journal of its samples."""
        named = (self.meta or {}).get("journal")
        return self.path.with_name(Path(named).name) if isinstance(named, str) else RunPaths.of(self.path).tree

    @property
    def partial(self) -> bool:
        return len(self.lines) < self.planned

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
    """Read and check one run. Raises UserError, one line, for whatever cannot be reported."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the --output_path of a run")
    if path.name.endswith((".tree.jsonl", ".meta.json")):
        raise UserError(f"{path}: that is a run's journal or settings; give the run's own file, which lies beside it")
    paths = RunPaths.of(path)
    meta = read_meta(paths.meta)
    lines, notes = read_results(path, meta["num_problems"] if meta else None)
    if not lines:
        if paths.tree.exists():
            raise NothingYet(f"{path}: no finished search in it yet: the run is in progress; nothing to report")
        raise UserError(f"{path}: no finished search in it; nothing to report")
    lines.sort(key=lambda line: (line["data_idx"], line["repeat_idx"]))
    counts = Counter(line["data_idx"] for line in lines)
    if meta:
        known = meta["search"]["num_blocks"]
        if num_blocks not in (None, known):
            notes.append(f"{name}: --num_blocks {num_blocks} ignored, the run's settings say {known}")
        num_blocks = known
        planned = meta["num_problems"] * meta["arguments"].get("num_repetitions", 1)
    else:
        planned = len(counts) * (1 + max(line["repeat_idx"] for line in lines))
        notes.append(f"{name}: no settings beside it ({paths.meta.name}): no FLOPs, no wall-clock of the run")
        if num_blocks is None:
            notes.append(f"{name}: budget N is not known; rows count pooled repetitions. Give --num_blocks to have N")
    run = RunRecord(path, name, lines, meta, num_blocks, planned, notes)
    if run.partial:
        notes.append(
            f"{name}: PARTIAL, {len(lines)} of {planned} searches finished; {len(counts)} problems, "
            f"{min(counts.values())} to {max(counts.values())} repetitions of each"
        )
    return run


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
