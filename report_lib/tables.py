"""Tables of a report: one plain form for terminal, Markdown and page; CSV and JSON with the numbers."""

import csv
import io
import json
import math
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from eval_lib.summary import METRICS, format_table
from report_lib.analysis import Analysis
from report_lib.compare import BASES
from report_lib.cost import FORMULA
from report_lib.value import bias_words

Table = dict[str, Any]  # title, columns [str], rows [[str]], notes [str], text [columns that hold words]
ROWS_SHOWN = 6
MIN_CLUSTERS = 5  # an interval over fewer problems is not worth showing
TERMINAL_METRICS = (("pass1", "pass1"), ("maj", "maj"), ("wmaj", "wmaj"), ("wmaj", "maj"), ("maj", "wmaj"))


def number(value: float | None, form: str = ".3f") -> str:
    return "–" if value is None or math.isnan(value) else format(value, form)


def percent(value: float | None, half: float | None = None, digits: int = 1) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.{digits}f}" + ("" if half is None else f" ±{100 * half:.{digits}f}")


def short(value: float | None) -> str:
    """1,230,000 -> 1.23M; FLOPs up to E."""
    if value is None:
        return "–"
    for unit, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}" if abs(value) < 1000 * size else f"{value / size:,.0f}{unit}"
    return f"{value:.3g}"


def shown_rows(rows: Sequence[dict]) -> list[dict]:
    """All rows if they are few, else the powers of two and the last."""
    if len(rows) <= ROWS_SHOWN:
        return list(rows)
    return [row for row in rows if row["pooled"] & (row["pooled"] - 1) == 0 or row is rows[-1]]


def row_notes(rows: Sequence[dict]) -> list[str]:
    """What to mind of the rows, rows with the same remark together."""
    by_note: dict[str, list[str]] = {}
    for row in rows:
        if row["note"]:
            by_note.setdefault(row["note"], []).append(str(row["pooled"]))
    return [f"At {', '.join(pooled)} pooled: {note}." for note, pooled in by_note.items()]


# ---------------------------------------------------------------------------------------------------------------------
# The tables


def accuracy_table(analysis: Analysis) -> Table:
    rows = []
    for row in shown_rows(analysis.rows):
        cells = [number(row["N"], "d"), str(row["pooled"]), str(row["problems"])]
        for metric in METRICS:
            noise = row[f"{metric}_ci_repeat"]
            cells.append(percent(row[f"{metric}_m"], row[f"{metric}_ci"]))
            cells.append("–" if noise is None else f"±{percent(noise)}")
        rows.append([*cells, percent(row["truncated"]), percent(row["empty"])])
    columns = ["N", "pooled", "problems"]
    for label in METRICS.values():
        columns += [label, "repeat noise"]
    return {
        "title": f"Accuracy, %: {analysis.run.name}",
        "columns": [*columns, "truncated", "empty"],
        "rows": rows,
        "notes": [
            "± is the half-width of the 95 % interval. First, clustered by problem: it holds for other problems of "
            "the same kind. "
            "Beside it, repeat noise only (the released code's): it leaves out the variance between problems, and is "
            "too narrow for "
            "any claim beyond these very problems. It needs two disjoint groups of repetitions.",
            *row_notes(shown_rows(analysis.rows)),
        ],
    }


def cost_table(analyses: Sequence[Analysis]) -> Table:
    rows = []
    for analysis in analyses:
        for row in shown_rows(analysis.rows):
            costs = [short(row[key]) for key in ("tokens_generated", "tokens_scored", "flops_decode", "flops_prefill")]
            costs += [short(row["flops_score"]), short(row["flops"]), number(row["seconds"], ",.1f")]
            rows.append([analysis.run.name, number(row["N"], "d"), str(row["pooled"]), *costs])
    notes = [FORMULA, "Seconds are a search's own wall-clock, summed over the pooled ones; searches run side by side."]
    for analysis in analyses:
        if analysis.tokens_per_second:
            sessions = (analysis.run.meta or {})["sessions"]
            hardware = ", ".join(sorted({str(s["hardware"]) for s in sessions if s.get("hardware")}))
            notes.append(
                f"{analysis.run.name}: wall-clock {analysis.seconds:,.0f} s in {len(sessions)} session(s)"
                f"{' on ' + hardware if hardware else ''}, {analysis.tokens_per_second:,.0f} tokens generated per second."
            )
    columns = ["run", "N", "pooled", "tokens generated", "tokens scored", "decode", "prefill", "value model", "total"]
    return {
        "title": "Cost of one problem (mean); FLOPs of the generator (decode, prefill) and of the value model",
        "columns": [*columns, "seconds"],
        "rows": rows,
        "notes": notes,
        "text": [0],
    }


def value_table(analysis: Analysis) -> Table:
    rows = []
    for group in analysis.values["groups"]:
        within = "–" if group["auc_within"] is None else number(group["auc_within"])
        if group["auc_within_ci"] is not None and group["auc_within_problems"] >= MIN_CLUSTERS:
            within += f" ±{group['auc_within_ci']:.3f}"
        rows.append(
            [
                group["label"],
                f"{group['count']:,}",
                percent(group["share_right"]) + "%",
                number(group["mean_value"]),
                number(group["auc"]),
                f"{within} ({group['auc_within_problems']})",
                number(group["brier"]),
                number(group["brier_base_rate"]),
                number(group["ece"]),
            ]
        )
    words = bias_words(analysis.values["biased"])
    notes = [
        "One observation per finished candidate and block end. AUC (pooled): chance that a right one has the higher "
        "value. "
        "AUC within: mean of the AUC inside each problem that has right and wrong ones (how many), with a 95 % "
        "interval "
        "clustered by problem; pooled AUC also rewards telling easy problems from hard ones. Brier of the base rate: "
        "of "
        "always saying the share that is right. ECE: 10 bins."
    ]
    if analysis.values["biased"] is not False:
        notes.append(
            "What was kept was chosen by the values judged here, so they look too high (winner's curse), and "
            "rejected traces are seen "
            "only where they had finished: nothing certain follows about the value model. For that, run beam1 or bon."
        )
    if analysis.rescued is not None:
        notes.append(
            f"In {analysis.rescued} of {len(analysis.run.lines)} searches a rejected, finished candidate was right "
            "and no final beam was."
        )
    return {
        "title": f"Value model: {analysis.run.name} ({words})",
        "columns": ["where", "n", "right", "mean value", "AUC", "AUC within", "Brier", "of base rate", "ECE"],
        "rows": rows,
        "notes": notes,
        "text": [0],
    }


def comparison_table(comparison: dict[str, Any], brief: bool = False) -> Table:
    """Rows by basis, budget and metric; pass@1, which no budget changes, once. `brief`: extreme budgets, votes only."""
    rows = []
    ends: dict[str, list[float]] = {}
    for row in comparison["rows"]:
        ends.setdefault(row["basis"], [row["budget"], row["budget"]])[1] = row["budget"]
    first = comparison["rows"][0]["budget"] if comparison["rows"] else None
    for row in comparison["rows"]:
        if row["metric_one"] == "pass1" and (row["basis"] != comparison["rows"][0]["basis"] or row["budget"] != first):
            continue
        metrics = (row["metric_one"], row["metric_other"])
        if brief and (row["budget"] not in ends[row["basis"]] or metrics not in TERMINAL_METRICS):
            continue
        same = row["metric_one"] == row["metric_other"]
        label = METRICS[row["metric_one"]]
        budget = number(row["budget"], ".0f") if row["basis"] == "N" else short(row["budget"])
        rows.append(
            [
                BASES[row["basis"]] if row["metric_one"] != "pass1" else "any",
                budget if row["metric_one"] != "pass1" else "any",
                label if same else f"{label} / {METRICS[row['metric_other']]}",
                percent(row["one"]),
                percent(row["other"]),
                f"{100 * row['difference']:+.1f}" + ("" if row["ci"] is None else f" ±{100 * row['ci']:.1f}"),
                "<0.001" if row["p_value"] is not None and row["p_value"] < 0.001 else number(row["p_value"]),
            ]
        )
    return {
        "title": f"{comparison['one']} against {comparison['other']}: accuracy in % at equal N, tokens, FLOPs",
        "columns": ["at equal", "budget", "metric", "first", "second", "difference", "p"],
        "rows": rows,
        "notes": [comparison["note"] + ".", *[f"{missing}." for missing in comparison["missing"]]],
        "text": [0, 2],
    }


def all_tables(analyses: Sequence[Analysis], comparisons: Sequence[dict]) -> list[Table]:
    tables = [accuracy_table(analysis) for analysis in analyses]
    tables += [comparison_table(comparison) for comparison in comparisons]
    return [*tables, cost_table(analyses), *[value_table(analysis) for analysis in analyses]]


# ---------------------------------------------------------------------------------------------------------------------
# Forms


def printable(text: str) -> str:
    """Without control characters (a file name may hold an escape sequence)."""
    return "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in text)


def as_text(table: Table, width: int = 80) -> str:
    """Columns padded; wider than `width` only where the columns are."""
    words = table.get("text", [])
    grid = [table["columns"], *table["rows"]]
    widths = [max(len(row[i]) for row in grid) for i in range(len(table["columns"]))]
    lines = [
        "  ".join(
            c.ljust(w) if i in words else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in grid
    ]
    notes = [textwrap.fill(note, width) for note in table.get("notes", [])]
    return printable("\n".join([table["title"], *lines, *notes]))


def as_markdown(table: Table) -> str:
    def cell(text: str) -> str:
        return printable(text).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")

    words = table.get("text", [])
    head = [
        "| " + " | ".join(map(cell, table["columns"])) + " |",
        "|" + "|".join(":--" if i in words else "--:" for i in range(len(table["columns"]))) + "|",
    ]
    body = ["| " + " | ".join(map(cell, row)) + " |" for row in table["rows"]]
    notes = [f"\n{cell(note)}" for note in table.get("notes", [])]
    return "\n".join([f"## {cell(table['title'])}", "", *head, *body, *notes]) + "\n"


def as_csv(analyses: Sequence[Analysis]) -> str:
    """One row per run and pooled number of repetitions, every number unrounded; empty where it cannot be told."""
    stream = io.StringIO()
    keys = ["run", *analyses[0].rows[0]]
    writer = csv.DictWriter(stream, keys, lineterminator="\n")
    writer.writeheader()
    for analysis in analyses:
        writer.writerows({"run": analysis.run.name, **row} for row in analysis.rows)
    return stream.getvalue()


def as_json(analyses: Sequence[Analysis], comparisons: Sequence[dict]) -> str:
    runs = [
        {
            "run": analysis.run.name,
            "path": str(analysis.run.path),
            "partial": analysis.run.partial,
            "searches": len(analysis.run.lines),
            "planned": analysis.run.planned,
            "notes": analysis.notes,
            "table": analysis.rows,
            "value_model": analysis.values,
            "searches_rescuable_by_a_rejected_candidate": analysis.rescued,
            "wall_clock_seconds": analysis.seconds,
            "tokens_per_second": analysis.tokens_per_second,
            "problems": analysis.problems,
        }
        for analysis in analyses
    ]
    value = {"format": 1, "flops": FORMULA, "runs": runs, "comparisons": list(comparisons)}
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


def terminal_text(analyses: Sequence[Analysis], comparisons: Sequence[dict]) -> str:
    """What is printed."""
    parts = []
    for analysis in analyses:
        parts += [
            printable(f"== {analysis.run.name}"),
            *[printable(note) for note in analysis.notes],
            format_table(analysis.rows),
        ]
    tables = [comparison_table(comparison, brief=True) for comparison in comparisons]
    if any(analysis.flops for analysis in analyses):
        tables += [narrow(cost_table(analyses), "tokens generated", "tokens scored", "seconds")]
    tables += [narrow(value_table(analysis), "of base rate", "mean value") for analysis in analyses]
    told: set[str] = set()
    for table in tables:  # what explains several tables is said once
        parts.append(as_text(table | {"notes": [note for note in table["notes"] if note not in told]}))
        told.update(table["notes"])
    return "\n\n".join(parts)


def narrow(table: Table, *without: str) -> Table:
    """The table without some columns (what `format_table` has said already)."""
    keep = [i for i, name in enumerate(table["columns"]) if name not in without]
    return table | {
        "columns": [table["columns"][i] for i in keep],
        "rows": [[row[i] for i in keep] for row in table["rows"]],
    }


def write_tables(folder: Path, analyses: Sequence[Analysis], comparisons: Sequence[dict]) -> None:
    """table.md, table.csv, table.json."""
    tables: Iterable[Table] = all_tables(analyses, comparisons)
    notes = "".join(f"- {printable(note)}\n" for analysis in analyses for note in analysis.notes)
    text = "# Search report\n\n" + (notes + "\n" if notes else "") + "\n".join(map(as_markdown, tables))
    (folder / "table.md").write_text(text, encoding="utf-8", errors="backslashreplace")
    (folder / "table.csv").write_text(as_csv(analyses), encoding="utf-8", errors="backslashreplace")
    (folder / "table.json").write_text(as_json(analyses, comparisons), encoding="utf-8")
