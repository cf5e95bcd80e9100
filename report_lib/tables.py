"""The tables of a report, and its files table.md, table.csv, table.json."""

import json
import textwrap
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from common_lib.files import write_text
from eval_lib.stopped import tables_of
from eval_lib.summary import METRICS, budget_table
from eval_lib.tables import Table, as_csv, as_markdown, as_text, number, percent, printable, short, thin
from report_lib.analysis import Analysis
from report_lib.answer import Answer, first_screen
from report_lib.compare import BASES
from report_lib.cost import FORMULA
from report_lib.value import MARK, MIN_CLUSTERS, bias_words, mark_note, no_evidence
from report_lib.what_if import what_if_tables

BY_VALUE = {METRICS["wmaj"], METRICS["bon"]}
BRIEF_METRICS = {("maj", "maj"), ("wmaj", "wmaj"), ("wmaj", "maj"), ("maj", "wmaj")}
FLOPS_COLUMNS = {
    "decode": (short, "flops_decode"),
    "prefill": (short, "flops_prefill"),
    "value model": (short, "flops_score"),
    "total": (short, "flops"),
}
WHAT_IF = "what_if.csv"
VALUE_NOTE = (
    "One observation per finished candidate and block end. AUC (pooled): chance that a right one has the higher value. "
    "AUC within: mean of the AUC inside each problem that has right and wrong ones (how many), with a 95 % interval "
    "clustered by problem; pooled AUC also rewards telling easy problems from hard ones. Brier of the base rate: of "
    "always saying the share that is right. ECE: 10 bins."
)
COMPARISON_NOTE = (
    "Tokens are those generated, FLOPs those of both models. Two metrics: the first run's, the second's. pass@1 does "
    "not depend on the budget and stands here once. p-values are not corrected for the number of rows."
)
BRIEF_NOTE = (
    "Left out here: pass@k, best-of-N, and budgets in between. --all_rows shows them; table.md of --out has them."
)
CLONE_NOTE = (
    "Clones: of the beams that a search holds after the round, those of the largest family, that is with the same block "
    "of the first round. First blocks left: number of families. Collapsed: searches in which all beams descend from one. "
    "A search that is over keeps its beams. Mean over problems of the mean over repetitions. Left out: runs of one round "
    "or of one beam, which cannot have any, and those without a journal."
)
BIAS_NOTE = (
    "What was kept was chosen by the values judged here, so they look too high (winner's curse), and rejected traces are "
    "seen only where they had finished: nothing certain follows about the value model. For that, run beam1 or bon."
)


def all_tables(
    analyses: Sequence[Analysis], comparisons: Sequence[dict], brief: bool = False, all_rows: bool = False
) -> list[Table]:
    """Accuracy of each run, comparisons, costs, clones and values of each run. What explains several is said once.

    brief: extreme budgets and votes alone of comparisons. all_rows: a row for every number of repetitions.
    """
    by_run = [tables_of(analysis.rows, analysis.outcome, analysis.run.name, all_rows) for analysis in analyses]
    marked = {analysis.run.name for analysis in analyses if no_evidence(analysis.values)}
    tables = [mark_votes(accuracy, a) for a, (accuracy, _, _) in zip(analyses, by_run, strict=True)]
    tables += [comparison_table(comparison, brief, marked) for comparison in comparisons]
    tables += [table for analysis in analyses for table in what_if_tables(analysis, all_rows)]
    for analysis, (_, second, cost) in zip(analyses, by_run, strict=True):
        tables += [
            replace(second, folded=analysis.outcome is None),
            replace(cost, notes=[*cost.notes, *wall_clock(analysis)]),
        ]
        if analysis.flops:
            title = f"FLOPs of one problem, generator (decode, prefill) and value model: {analysis.run.name}"
            rows = analysis.rows if all_rows else thin(analysis.rows)
            tables.append(budget_table(title, rows, FLOPS_COLUMNS, [FORMULA]))
    tables += [clone_table(analysis) for analysis in analyses if len(analysis.clones) > 1]
    tables += map(value_table, analyses)
    told: set[str] = set()
    for table in tables:
        table.notes = [note for note in table.notes if note not in told]
        told.update(table.notes)
    return tables


def mark_votes(accuracy: Table, analysis: Analysis) -> Table:
    """Its table with a mark at the votes by values, where there is no evidence for these."""
    if not no_evidence(analysis.values):
        return accuracy
    columns = [name + MARK * (name in BY_VALUE) for name in accuracy.columns]
    return replace(accuracy, columns=columns, notes=[mark_note(analysis.run.name), *accuracy.notes])


def wall_clock(analysis: Analysis) -> list[str]:
    """A note, where it is known."""
    if not analysis.tokens_per_second:
        return []
    sessions = (analysis.run.meta or {})["sessions"]
    hardware = ", ".join(sorted({str(s["hardware"]) for s in sessions if s.get("hardware")}))
    where = f"{len(sessions)} session(s){' on ' + hardware if hardware else ''}"
    rate = f"{analysis.tokens_per_second:,.0f} tokens generated per second"
    return [f"{analysis.run.name}: wall-clock {analysis.seconds:,.0f} s in {where}, {rate}."]


def clone_table(analysis: Analysis) -> Table:
    columns = ["round", "beams", "clones", "first blocks left", "collapsed"]
    cells = [
        [str(row["round"]), str(row["beams"]), *(number(row[key], ".2f") for key in ("clones", "families")),
         percent(row["collapsed"]) + "%"]
        for row in analysis.clones
    ]  # fmt: skip
    return Table(f"Clones, by round: {analysis.run.name}", columns, cells, [CLONE_NOTE])


def value_table(analysis: Analysis) -> Table:
    notes = [VALUE_NOTE]
    if analysis.values["biased"] is not False:
        notes.append(BIAS_NOTE)
    if analysis.pruned_right is not None:
        notes.append(
            f"{analysis.run.name}: in {analysis.pruned_right} of {len(analysis.run.lines)} searches a rejected, finished "
            "candidate was right and no final beam was."
        )
    return Table(
        f"Value model: {analysis.run.name} ({bias_words(analysis.values['biased'])})",
        ["where", "n", "right", "value", "AUC", "AUC within", "Brier", "(base rate)", "ECE"],
        [value_cells(group) for group in analysis.values["groups"]],
        notes,
        words=["where"],
    )


def value_cells(group: dict[str, Any]) -> list[str]:
    within = number(group["auc_within"])
    if group["auc_within_ci"] is not None and group["auc_within_problems"] >= MIN_CLUSTERS:
        within += f" ±{group['auc_within_ci']:.3f}"
    return [
        group["label"],
        f"{group['count']:,}",
        percent(group["share_right"]) + "%",
        number(group["mean_value"]),
        number(group["auc"]),
        f"{within} ({group['auc_within_problems']})",
        number(group["brier"]),
        f"({number(group['brier_base_rate'])})",
        number(group["ece"]),
    ]


def comparison_table(comparison: dict[str, Any], brief: bool, marked: Collection[str] = ()) -> Table:
    """Rows by basis, budget and metric; pass@1, which no budget changes, once. `brief`: extreme budgets, votes only.

    marked: runs whose votes by values have a mark.
    """
    marks = [MARK * (comparison[run] in marked) for run in ("one", "other")]
    of_pass1 = [row for row in comparison["rows"] if row["metric_one"] == "pass1"]
    rows = [row for row in comparison["rows"] if row["metric_one"] != "pass1"]
    if brief:
        budgets = {basis: [row["budget"] for row in rows if row["basis"] == basis] for basis in BASES}
        rows = [row for row in rows if row["budget"] in (budgets[row["basis"]][0], budgets[row["basis"]][-1])]
        rows = [row for row in rows if (row["metric_one"], row["metric_other"]) in BRIEF_METRICS]
    return Table(
        f"{comparison['one']} against {comparison['other']}: accuracy in % at equal N, tokens, FLOPs",
        ["at equal", "budget", "metric", "first", "second", "difference", "p"],
        [comparison_cells(row, marks) for row in [*of_pass1[:1], *rows]],
        [f"{comparison['note']}.", *[f"{missing}." for missing in comparison["missing"]], COMPARISON_NOTE]
        + [BRIEF_NOTE] * brief,
        words=["at equal", "metric"],
    )


def comparison_cells(row: dict[str, Any], marks: Sequence[str] = ("", "")) -> list[str]:
    """marks: at votes by values of the first and of the second run."""
    names = [METRICS[row[f"metric_{run}"]] for run in ("one", "other")]
    one, other = (name + mark * (name in BY_VALUE) for name, mark in zip(names, marks, strict=True))
    budget = number(row["budget"], ".0f") if row["basis"] == "N" else short(row["budget"])
    return [
        *(["any", "any"] if row["metric_one"] == "pass1" else [BASES[row["basis"]], budget]),
        one if one == other else f"{one} / {other}",
        percent(row["one"]),
        percent(row["other"]),
        "+" * (row["difference"] >= 0) + percent(row["difference"], row["ci"]),
        "<0.001" if row["p_value"] is not None and row["p_value"] < 0.001 else number(row["p_value"]),
    ]


def answer_text(answer: Answer, width: int = 80) -> str:
    """An answer in a terminal."""
    said = [textwrap.fill(part, width, initial_indent="  ", subsequent_indent="    ") for part in answer.sentences]
    rest = [textwrap.fill(part, width, initial_indent="  ", subsequent_indent="  ") for part in answer.mind]
    chosen = [textwrap.fill(f"({answer.chosen})", width, initial_indent="  ", subsequent_indent="  ")]
    return printable("\n".join([answer.title, *said, *rest, *chosen * bool(answer.chosen)]))


def answer_markdown(answer: Answer) -> str:
    cells = [printable(part).replace("<", "&lt;") for part in (*answer.sentences, *answer.mind)]
    chosen = [f"\n{printable(answer.chosen)}"] * bool(answer.chosen)
    return "\n".join([f"## {printable(answer.title)}\n", *(f"- {part}" for part in cells), *chosen, ""])


def terminal_text(analyses: Sequence[Analysis], comparisons: Sequence[dict], all_rows: bool = False) -> str:
    """What is printed: the answers, what to mind, the tables."""
    answers = list(map(answer_text, first_screen(analyses, comparisons)))
    notes = [printable(note) for analysis in analyses for note in analysis.notes]
    tables = all_tables(analyses, comparisons, not all_rows, all_rows)
    return "\n\n".join([*answers, *["\n".join(notes)] * bool(notes), *map(as_text, tables)])


def to_json(analysis: Analysis) -> dict[str, Any]:
    """A run in table.json; keys are older than the names here."""
    return {
        "run": analysis.run.name,
        "path": str(analysis.run.path),
        "partial": analysis.run.partial,
        "searches": len(analysis.run.lines),
        "planned": analysis.run.planned,
        "notes": analysis.notes,
        "table": analysis.rows,
        "stopped": analysis.outcome,
        "value_model": analysis.values,
        "searches_rescuable_by_a_rejected_candidate": analysis.pruned_right,
        "clones": analysis.clones,
        "wall_clock_seconds": analysis.seconds,
        "tokens_per_second": analysis.tokens_per_second,
        "problems": analysis.problems,
    } | ({"what_if": analysis.what_if.rows} if analysis.what_if else {})


def write_tables(folder: Path, analyses: Sequence[Analysis], comparisons: list[dict]) -> None:
    """table.md, table.csv (one row per run and pooled number of repetitions), table.json; what_if.csv of a what-if (one
    row per policy), and none that an earlier report left."""
    notes = "".join(f"- {printable(note)}\n" for analysis in analyses for note in analysis.notes)
    tables = "\n".join(map(as_markdown, all_tables(analyses, comparisons)))
    answers = first_screen(analyses, comparisons)
    data = {"format": 1, "answers": list(map(vars, answers)), "flops": FORMULA, "runs": list(map(to_json, analyses))}
    written = {
        "table.md": "\n".join(["# Search report\n", *map(answer_markdown, answers), *[notes] * bool(notes), tables]),
        "table.csv": as_csv([{"run": analysis.run.name, **row} for analysis in analyses for row in analysis.rows]),
        "table.json": json.dumps(data | {"comparisons": comparisons}, indent=1, allow_nan=False) + "\n",
    }
    (folder / WHAT_IF).unlink(missing_ok=True)
    if found := [row for analysis in analyses if analysis.what_if for row in analysis.what_if.rows]:
        written[WHAT_IF] = as_csv([{k: v for k, v in row.items() if not isinstance(v, dict)} for row in found])
    for name, text in written.items():
        write_text(folder / name, text)
