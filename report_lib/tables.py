"""The tables of a report, and its files table.md, table.csv, table.json."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from common_lib.files import write_text
from eval_lib.summary import METRICS, budget_table, run_tables
from eval_lib.tables import Table, as_csv, as_markdown, as_text, number, percent, printable, short
from report_lib.analysis import Analysis
from report_lib.compare import BASES
from report_lib.cost import FORMULA
from report_lib.value import bias_words

MIN_CLUSTERS = 5  # an interval over fewer problems is not worth showing
BRIEF_METRICS = {("maj", "maj"), ("wmaj", "wmaj"), ("wmaj", "maj"), ("maj", "wmaj")}
FLOPS_COLUMNS = {
    "decode": (short, "flops_decode"),
    "prefill": (short, "flops_prefill"),
    "value model": (short, "flops_score"),
    "total": (short, "flops"),
}
VALUE_NOTE = (
    "One observation per finished candidate and block end. AUC (pooled): chance that a right one has the higher value. "
    "AUC within: mean of the AUC inside each problem that has right and wrong ones (how many), with a 95 % interval "
    "clustered by problem; pooled AUC also rewards telling easy problems from hard ones. Brier of the base rate: of "
    "always saying the share that is right. ECE: 10 bins."
)
BIAS_NOTE = (
    "What was kept was chosen by the values judged here, so they look too high (winner's curse), and rejected traces are "
    "seen only where they had finished: nothing certain follows about the value model. For that, run beam1 or bon."
)


def all_tables(analyses: Sequence[Analysis], comparisons: Sequence[dict], brief: bool = False) -> list[Table]:
    """Accuracy of each run, comparisons, costs and values of each run. What explains several tables is said once."""
    by_run = [run_tables(analysis.rows, analysis.run.name) for analysis in analyses]
    tables = [accuracy for accuracy, _, _ in by_run]
    tables += [comparison_table(comparison, brief) for comparison in comparisons]
    for analysis, (_, noise, cost) in zip(analyses, by_run, strict=True):
        tables += [noise, replace(cost, notes=[*cost.notes, *wall_clock(analysis)])]
        if analysis.flops:
            title = f"FLOPs of one problem, generator (decode, prefill) and value model: {analysis.run.name}"
            tables.append(budget_table(title, analysis.rows, FLOPS_COLUMNS, [FORMULA]))
    tables += map(value_table, analyses)
    told: set[str] = set()
    for table in tables:
        table.notes = [note for note in table.notes if note not in told]
        told.update(table.notes)
    return tables


def wall_clock(analysis: Analysis) -> list[str]:
    """A note, where it is known."""
    if not analysis.tokens_per_second:
        return []
    sessions = (analysis.run.meta or {})["sessions"]
    hardware = ", ".join(sorted({str(s["hardware"]) for s in sessions if s.get("hardware")}))
    where = f"{len(sessions)} session(s){' on ' + hardware if hardware else ''}"
    rate = f"{analysis.tokens_per_second:,.0f} tokens generated per second"
    return [f"{analysis.run.name}: wall-clock {analysis.seconds:,.0f} s in {where}, {rate}."]


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


def comparison_table(comparison: dict[str, Any], brief: bool) -> Table:
    """Rows by basis, budget and metric; pass@1, which no budget changes, once. `brief`: extreme budgets, votes only."""
    of_pass1 = [row for row in comparison["rows"] if row["metric_one"] == "pass1"]
    rows = [row for row in comparison["rows"] if row["metric_one"] != "pass1"]
    if brief:
        budgets = {basis: [row["budget"] for row in rows if row["basis"] == basis] for basis in BASES}
        rows = [row for row in rows if row["budget"] in (budgets[row["basis"]][0], budgets[row["basis"]][-1])]
        rows = [row for row in rows if (row["metric_one"], row["metric_other"]) in BRIEF_METRICS]
    return Table(
        f"{comparison['one']} against {comparison['other']}: accuracy in % at equal N, tokens, FLOPs",
        ["at equal", "budget", "metric", "first", "second", "difference", "p"],
        list(map(comparison_cells, [*of_pass1[:1], *rows])),
        [comparison["note"] + ".", *[f"{missing}." for missing in comparison["missing"]]],
        words=["at equal", "metric"],
    )


def comparison_cells(row: dict[str, Any]) -> list[str]:
    label = METRICS[row["metric_one"]]
    budget = number(row["budget"], ".0f") if row["basis"] == "N" else short(row["budget"])
    return [
        *(["any", "any"] if row["metric_one"] == "pass1" else [BASES[row["basis"]], budget]),
        label if row["metric_one"] == row["metric_other"] else f"{label} / {METRICS[row['metric_other']]}",
        percent(row["one"]),
        percent(row["other"]),
        "+" * (row["difference"] >= 0) + percent(row["difference"], row["ci"]),
        "<0.001" if row["p_value"] is not None and row["p_value"] < 0.001 else number(row["p_value"]),
    ]


def terminal_text(analyses: Sequence[Analysis], comparisons: Sequence[dict]) -> str:
    """What is printed."""
    notes = [printable(note) for analysis in analyses for note in analysis.notes]
    return "\n\n".join(["\n".join(notes)] * bool(notes) + list(map(as_text, all_tables(analyses, comparisons, True))))


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
        "value_model": analysis.values,
        "searches_rescuable_by_a_rejected_candidate": analysis.pruned_right,
        "wall_clock_seconds": analysis.seconds,
        "tokens_per_second": analysis.tokens_per_second,
        "problems": analysis.problems,
    }


def write_tables(folder: Path, analyses: Sequence[Analysis], comparisons: list[dict]) -> None:
    """table.md, table.csv (one row per run and pooled number of repetitions), table.json."""
    notes = "".join(f"- {printable(note)}\n" for analysis in analyses for note in analysis.notes)
    tables = "\n".join(map(as_markdown, all_tables(analyses, comparisons)))
    data = {"format": 1, "flops": FORMULA, "runs": list(map(to_json, analyses)), "comparisons": comparisons}
    written = {
        "table.md": "# Search report\n\n" + (notes + "\n" if notes else "") + tables,
        "table.csv": as_csv([{"run": analysis.run.name, **row} for analysis in analyses for row in analysis.rows]),
        "table.json": json.dumps(data, indent=1, allow_nan=False) + "\n",
    }
    for name, text in written.items():
        write_text(folder / name, text)
