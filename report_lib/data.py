"""A run as a report sees it: its output file and settings, read and checked."""

import json
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from common_lib.cli import UserError
from report_lib.lines import OWN_KEYS, RELEASED_KEYS, check_line, is_count, iterate_lines, loads_without_ids


@dataclass
class Run:
    """One run file. `lines` are ordered by problem, then repetition; each has the file's keys but for `generated_ids`.

    Instead of the ids a line has `lengths` [beams] (tokens) and `offset`, `size`: where in the file it lies (bytes).
    `num_blocks` is None where nothing tells it; `planned` is the number of searches the run was to have.
    """

    path: Path
    name: str
    lines: list[dict]
    meta: dict | None
    num_blocks: int | None
    planned: int
    notes: list[str] = field(default_factory=list)

    @property
    def tree_path(self) -> Path:
        """The journal; the settings of a regraded run name that of its samples."""
        named = (self.meta or {}).get("journal")
        return self.path.with_name(Path(named).name) if isinstance(named, str) else sibling(self.path, "tree.jsonl")

    @property
    def partial(self) -> bool:
        return len(self.lines) < self.planned

    @property
    def search_type(self) -> str | None:
        return self.meta["arguments"].get("search_type") if self.meta else None

    @property
    def has_selection(self) -> bool | None:
        """Whether candidates were pruned, so that values seen are biased; None where it is not known."""
        return self.meta["search"]["branch"] > 1 if self.meta else None

    @cached_property
    def by_problem(self) -> dict[int, list[dict]]:
        """data_idx -> its lines in the order of repetitions."""
        groups: dict[int, list[dict]] = {}
        for line in self.lines:
            groups.setdefault(line["data_idx"], []).append(line)
        return groups


def sibling(path: Path, ending: str) -> Path:
    """`X.tree.jsonl`, `X.meta.json` of `X.jsonl`."""
    return path.with_name(f"{path.name.removesuffix('.jsonl')}.{ending}")


# ---------------------------------------------------------------------------------------------------------------------
# A file


def read_lines(path: Path, notes: list[str]) -> list[dict]:
    """All lines, checked. A torn last line is left out with a note; anything else that is wrong is a UserError."""
    lines: list[dict] = []
    unknown: set[str] = set()
    for number, offset, raw in iterate_lines(path):
        try:
            line = loads_without_ids(raw, "generated_ids")
        except (ValueError, RecursionError) as error:
            if not raw.endswith(b"\n"):
                notes.append(f"{path.name}: its last line is torn (a run in progress, or killed) and was left out")
                break
            raise UserError(
                f"{path}: line {number} is not a line of a run ({error}); give a whole output file"
            ) from None
        try:
            check_line(line)
        except ValueError as error:
            raise UserError(f"{path}: line {number} {error}") from None
        unknown |= line.keys() - set(RELEASED_KEYS) - set(OWN_KEYS)
        slim = {key: line[key] for key in RELEASED_KEYS + OWN_KEYS if key in line and key != "generated_ids"}
        slim["gt_answer"] = str(slim["gt_answer"])
        slim["reward"] = [bool(reward) for reward in slim["reward"]]
        lines.append(slim | {"lengths": line["generated_ids"], "offset": offset, "size": len(raw), "line": number})
    if unknown:
        notes.append(f"{path.name}: keys that are not known here were ignored: {', '.join(sorted(unknown)[:8])}")
    return lines


def check_one_run(path: Path, lines: list[dict], num_problems: int | None) -> None:
    """Raises UserError where lines cannot be of one run: repeated searches, other problems, another problem count."""
    seen: dict[tuple[int, int], int] = {}
    first: dict[int, dict] = {}
    for line in lines:
        key = line["data_idx"], line["repeat_idx"]
        if key in seen:
            raise UserError(
                f"{path}: line {line['line']} repeats problem {key[0]}, repetition {key[1]} of line {seen[key]}; "
                "two runs in one file? Report each from its own file"
            )
        seen[key] = line["line"]
        other = first.setdefault(line["data_idx"], line)
        if (other["problem"], other["gt_answer"]) != (line["problem"], line["gt_answer"]):
            raise UserError(
                f"{path}: lines {other['line']} and {line['line']} have different problems under data_idx "
                f"{line['data_idx']}; runs on different benchmarks in one file? Report each from its own file"
            )
        rest = line["global_idx"] - line["data_idx"]
        if num_problems is None and line["repeat_idx"]:
            num_problems = rest // line["repeat_idx"]
        if num_problems is not None and rest != line["repeat_idx"] * num_problems:
            raise UserError(
                f"{path}: line {line['line']} has global_idx {line['global_idx']}, which in a run of {num_problems} "
                "problems "
                f"is not repetition {line['repeat_idx']} of problem {line['data_idx']}; lines of several runs in one "
                "file?"
            )


def read_meta(path: Path) -> dict | None:
    """`X.meta.json`, or None where there is none. Raises UserError where it is not one."""
    if not path.exists():
        return None
    try:
        meta = json.loads(path.read_bytes())
        if meta["format"] != 1:
            raise UserError(f"{path}: format {meta['format']!r:.40} is not known; this report.py reads format 1")
        whole = all(isinstance(meta[key], dict) for key in ("arguments", "search"))
        whole = whole and all(is_count(meta["search"][key]) for key in ("width", "branch", "num_blocks"))
        if not (whole and is_count(meta["num_problems"])):
            raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(
            f"{path}: not a run's settings (format, arguments, search, num_problems); restore or delete it"
        ) from None
    return meta


def read_run(path: Path, name: str, num_blocks: int | None = None) -> Run:
    """Read and check one run. Raises UserError, one line, for whatever cannot be reported."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the --output_path of a run")
    if path.name.endswith((".tree.jsonl", ".meta.json")):
        raise UserError(f"{path}: that is a run's journal or settings; give the run's own file, which lies beside it")
    meta = read_meta(sibling(path, "meta.json"))
    notes: list[str] = []
    lines = read_lines(path, notes)
    if not lines:
        running = sibling(path, "tree.jsonl").exists()
        raise UserError(
            f"{path}: no finished search in it{' yet: the run is in progress' if running else ''}; nothing to report"
        )
    check_one_run(path, lines, meta["num_problems"] if meta else None)
    lines.sort(key=lambda line: (line["data_idx"], line["repeat_idx"]))
    if meta:
        known = meta["search"]["num_blocks"]
        if num_blocks not in (None, known):
            notes.append(f"{name}: --num_blocks {num_blocks} ignored, the run's settings say {known}")
        num_blocks = known
        repetitions = meta["arguments"].get("num_repetitions", 1)
        planned = meta["num_problems"] * repetitions
    else:
        repetitions = 1 + max(line["repeat_idx"] for line in lines)
        planned = len({line["data_idx"] for line in lines}) * repetitions
        notes.append(
            f"{name}: no settings beside it ({sibling(path, 'meta.json').name}): no FLOPs, no wall-clock of the run"
        )
        if num_blocks is None:
            notes.append(f"{name}: budget N is not known; rows count pooled repetitions. Give --num_blocks to have N")
    run = Run(path, name, lines, meta, num_blocks, planned, notes)
    if run.partial:
        counts = Counter(line["data_idx"] for line in lines)
        notes.append(
            f"{name}: PARTIAL, {len(lines)} of {planned} searches finished; {len(counts)} problems, "
            f"{min(counts.values())} to {max(counts.values())} repetitions of each"
        )
    return run


def run_names(paths: list[Path]) -> list[str]:
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
