"""The table of a run whose problems were stopped when their vote was decided (`--stop`). No torch.

A problem has T repetitions, and T depends on what they held. So nothing is taken from windows: row m pools each problem's
first min(m, T) repetitions in their order, and that for the vote which stopping looked at. Everything else is given only
up to the smallest T, where nothing has stopped yet.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from eval_lib.intervals import clustered_interval, or_none, variance_warning
from eval_lib.summary import (
    COST_COLUMNS,
    COST_NOTE,
    INTERVAL_NOTE,
    METRICS,
    N_COLUMN,
    Classes,
    budget_table,
    left_out,
    mean_of_costs,
    read_searches,
    row_notes,
    rows_table,
    run_tables,
    score_problem,
    summarize,
)
from eval_lib.tables import Table, as_text, number, percent, thin

VOTE_METRICS = {"weighted": "wmaj", "majority": "maj"}
WORDS = {
    "certified": "certified",
    "sure": "sure",
    "full": "full: all repetitions",
    "open": "not yet",
}
FIRST_NOTE = (
    "Row m pools each problem's first min(m, T) repetitions, T being where it stopped; used and N used are means. All "
    "but the vote that stopping looks at is – above the smallest T: stopping would bias it."
)
DECIDED_NOTE = (
    '"Decided" is about the vote, not about being right: sure is one that the further repetitions of this run could not '
    "have changed, certified one whose answer is shown to be the heaviest in expectation. Only certified is a "
    "certification. Wrong: share of the vote that is wrong, mean over these problems."
)
SAVED_NOTE = (
    "Tokens saved are estimated: what all repetitions would have taken is each problem's own mean over its counted ones "
    "times their number. Spent tokens include the searches that do not count, finished or aborted."
)


@dataclass(frozen=True)
class StopRecord:
    """How a run was stopped, as its settings say it."""

    kind: str  # sure or certified
    vote: str  # weighted or majority
    alpha: float
    repetitions: int  # the most of a problem
    stopped: Mapping[int, int] = field(default_factory=dict)  # data_idx -> T, of decided problems
    kinds: Mapping[int, str] = field(default_factory=dict)  # data_idx -> certified or sure
    uncounted: Mapping[str, int] = field(
        default_factory=dict
    )  # tokens `generated`, `scored` of searches that do not count

    @classmethod
    def of(cls, meta: Mapping[str, Any] | None) -> "StopRecord | None":
        """From the settings of a run (docs/run_files.md); None where nothing was to stop."""
        asked = meta["arguments"] if meta else {}
        if meta is None or asked.get("stop", "none") == "none":
            return None
        stopped, kinds = ({int(i): what for i, what in meta.get(key, {}).items()} for key in ("stopped", "stopped_by"))
        flags = asked["stop"], asked["stop_vote"], asked["alpha"], asked["num_repetitions"]
        return cls(*flags, stopped, kinds, meta.get("tokens_uncounted", {}))

    @property
    def metric(self) -> str:
        return VOTE_METRICS[self.vote]

    @property
    def smallest(self) -> int:
        """Repetitions that no problem has stopped before."""
        return min([self.repetitions, *self.stopped.values()])

    @property
    def words(self) -> str:
        alpha = f", alpha {self.alpha:g}" if self.kind == "certified" else ""
        return f"--stop {self.kind}{alpha}, {self.vote} vote, at most {self.repetitions} repetitions"

    def first(self, lines: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """The lines that count without a gap before them: while a run goes on, later repetitions may be finished first."""
        by_search = {(line["data_idx"], line["repeat_idx"]): line for line in lines}
        found = []
        for i in dict.fromkeys(i for i, _ in sorted(by_search)):
            for r in range(self.stopped.get(i, self.repetitions)):
                if (i, r) not in by_search:
                    break
                found.append(by_search[i, r])
        return found

    def used(self, data_idx: int, there: int, m: int) -> int | None:
        """How many repetitions of a problem of which so many are there row m pools; None where it has not come so far."""
        return min(m, there) if there >= m or data_idx in self.stopped else None


def stopped_scores(
    lines: Iterable[Mapping[str, Any]], classes: Classes, record: StopRecord
) -> dict[int, dict[str, list[float]]]:
    """By problem and metric: entry m - 1 is the score of row m; a list ends where there is none."""
    scores: dict[int, dict[str, list[float]]] = {}
    for i, searches in read_searches(record.first(lines), classes).items():
        of_first = {metric: [float(s[0]) for s in found] for metric, found in score_problem(searches).items()}
        scores[i] = {metric: found[: record.smallest] for metric, found in of_first.items()}
        used = [record.used(i, len(searches), m) for m in range(1, record.repetitions + 1)]
        scores[i][record.metric] = [of_first[record.metric][n - 1] for n in used if n]
    return scores


def stopped_rows(
    lines: Iterable[Mapping[str, Any]],
    num_blocks: int | None,
    classes: Classes,
    record: StopRecord,
    num_problems: int | None = None,
) -> list[dict[str, Any]]:
    """`summarize` for such a run: the same keys, None where a figure would be biased, and of the problems of a row
    repetitions_m (mean of those used), N_used (num_blocks times that), saved_m (share of m that was not used)."""
    lines = list(lines)
    searches, scores = read_searches(record.first(lines), classes), stopped_scores(lines, classes, record)
    total = max(num_problems or 0, len({line["data_idx"] for line in lines}))
    rows = []
    for m in range(1, record.repetitions + 1):
        used = {i: n for i in searches if (n := record.used(i, len(searches[i]), m))}
        if not used:
            break
        mean_used = float(np.mean(list(used.values())))
        row: dict[str, Any] = {"N": num_blocks and num_blocks * m, "pooled": m, "problems": len(used)}
        row |= {"missing": total - len(used), "repetitions_m": mean_used, "saved_m": 1 - mean_used / m}
        row |= {"N_used": num_blocks and num_blocks * mean_used, "repeat_groups": None}
        notes = [f"{row['missing']} of {total} problems lack {m} repetitions"] if row["missing"] else []
        for metric in METRICS:
            known = metric == record.metric or m <= record.smallest
            values = [scores[i][metric][m - 1] for i in used] if known else []
            row |= dict.fromkeys((f"{metric}_m", f"{metric}_ci", f"{metric}_ci_repeat"))
            if known:
                mean, half = clustered_interval(values)
                row |= {f"{metric}_m": float(mean), f"{metric}_ci": or_none(half)}
                if warning := variance_warning(values):
                    notes.append(f"{METRICS[metric]}: {warning}")
        costs = mean_of_costs([searches[i][:n] for i, n in used.items()])
        shares = mean_of_costs([searches[i][: record.smallest] for i in used])
        row |= costs | {key: shares[key] for key in ("truncated", "empty")}
        rows.append(row | {"note": "; ".join(notes)})
    return rows


def stop_outcome(
    lines: Iterable[Mapping[str, Any]], classes: Classes, record: StopRecord, num_problems: int | None = None
) -> dict[str, Any]:
    """What stopping saved and how decided votes fared, JSON-able.

    kinds: for certified, sure, full (all repetitions were needed) and open (not there yet) problems, repetitions (mean),
    wrong (mean share of the vote that is wrong). counted, spent: tokens generated; saved_repetitions, saved_counted,
    saved_spent: shares, None until all problems are there and none is open: those decided first need the least.
    """
    searches = read_searches(record.first(lines), classes)
    groups: dict[str, list[int]] = {kind: [] for kind in WORDS}
    for i, runs in searches.items():
        undecided = "full" if len(runs) == record.repetitions else "open"
        groups[record.kinds.get(i, undecided)].append(i)
    scores = {i: float(score_problem(runs)[record.metric][-1][0]) for i, runs in searches.items()}
    kinds = {
        kind: {
            "problems": len(members),
            "repetitions": float(np.mean([len(searches[i]) for i in members])),
            "wrong": 1 - float(np.mean([scores[i] for i in members])),
        }
        for kind, members in groups.items()
        if members
    }
    tokens = {i: [search["tokens_generated"] for search in runs] for i, runs in searches.items()}
    known = not any(None in found for found in tokens.values()) and bool(tokens)
    counted = sum(map(sum, tokens.values())) if known else None
    whole = sum(record.repetitions * float(np.mean(found)) for found in tokens.values()) if known else None
    spent = None if counted is None else counted + record.uncounted.get("generated", 0)
    used, most = sum(map(len, searches.values())), record.repetitions * len(searches)
    is_over = bool(most) and not groups["open"] and len(searches) >= (num_problems or 0)
    figures = {"repetitions": (used, most), "counted": (counted, whole), "spent": (spent, whole)}
    saved = {
        f"saved_{name}": 1 - part / of if is_over and of and part is not None else None
        for name, (part, of) in figures.items()
    }
    totals = {"repetitions": used, "most": most, "counted": counted, "spent": spent}
    return {"stop": record.words, "kinds": kinds} | totals | saved


def stopped_tables(
    rows: Sequence[Mapping[str, Any]], outcome: Mapping[str, Any], run: str = "", all_rows: bool = False
) -> list[Table]:
    """`run_tables` for such a run: accuracy, what was decided, costs."""
    shown = rows if all_rows else thin(rows)
    of = f": {run}" if run else ""
    accuracy = N_COLUMN | {"N used": (partial(number, form=".1f"), "N_used"), "saved": (percent, "saved_m")}
    accuracy |= {words: (percent, f"{metric}_m", f"{metric}_ci") for metric, words in METRICS.items()}
    notes = [FIRST_NOTE, INTERVAL_NOTE, *row_notes(shown, run), *left_out(shown, rows, run)]
    table = rows_table(f"Accuracy, %{of} ({outcome['stop']})", shown, accuracy, notes)
    costs = {"used": (partial(number, form=".2f"), "repetitions_m")} | COST_COLUMNS
    return [table, decided_table(outcome, of), budget_table(f"Cost of one problem{of}", shown, costs, [COST_NOTE])]


def decided_table(outcome: Mapping[str, Any], of: str) -> Table:
    cells = [
        [WORDS[kind], str(group["problems"]), number(group["repetitions"], ".2f"), percent(group["wrong"])]
        for kind, group in outcome["kinds"].items()
    ]
    title, columns = f"Decided votes{of}", ["decided", "problems", "repetitions", "wrong, %"]
    return Table(title, columns, cells, [*saved_words(outcome), DECIDED_NOTE, SAVED_NOTE], words=["decided"])


def saved_words(outcome: Mapping[str, Any]) -> list[str]:
    """One sentence for repetitions, and one for tokens where they are known."""

    def share(key: str) -> str:
        return "" if outcome[key] is None else f" ({outcome[key]:.1%} saved)"

    said = [f"{outcome['repetitions']:,} of {outcome['most']:,} repetitions count{share('saved_repetitions')}."]
    if outcome["counted"] is not None:
        counted, spent = (f"{key} {outcome[key]:,}{share(f'saved_{key}')}" for key in ("counted", "spent"))
        said.append(f"Tokens generated: {counted}, {spent}.")
    return said


def summarize_run(
    lines: Sequence[Mapping[str, Any]],
    num_blocks: int | None,
    classes: Classes,
    record: StopRecord | None,
    num_problems: int | None,
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """The rows of a run, stopped or not, and of a stopped one its `stop_outcome`."""
    if record is None:
        return summarize(lines, num_blocks, classes, num_problems), None
    rows = stopped_rows(lines, num_blocks, classes, record, num_problems)
    return rows, stop_outcome(lines, classes, record, num_problems)


def tables_of(
    rows: Sequence[Mapping[str, Any]], outcome: Mapping[str, Any] | None, run: str = "", all_rows: bool = False
) -> list[Table]:
    """Accuracy first and costs last. Of `summarize_run`."""
    return stopped_tables(rows, outcome, run, all_rows) if outcome else run_tables(rows, run, all_rows)


def format_run(rows: Sequence[Mapping[str, Any]], outcome: Mapping[str, Any] | None = None) -> str:
    """`tables_of` as text of at most 80 columns."""
    return "\n\n".join(map(as_text, tables_of(rows, outcome)))
