"""The one form of a table, and how it is shown: in a terminal, as Markdown, as CSV. A report's page draws the same form."""

import csv
import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass
class Table:
    """Cells are text as it is shown; the columns named in `words` are set left, all others hold numbers.

    folded: a page hides the table until it is asked for.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    words: Sequence[str] = ()
    folded: bool = False


def thin(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows to show, one a pooled number of repetitions: powers of two and the last."""
    return [row for row in rows if row["pooled"] & (row["pooled"] - 1) == 0 or row is rows[-1]]


def number(value: float | None, form: str = ".3f") -> str:
    return "–" if value is None or math.isnan(value) else format(value, form)


def percent(value: float | None, half: float | None = None) -> str:
    """0.458, 0.152 -> `45.8 ±15.2`."""
    return number(value and 100 * value, ".1f") + ("" if half is None else f" {half_width(half):>5}")


def half_width(half: float | None) -> str:
    return "–" if half is None else f"±{100 * half:.1f}"


def short(value: float | None) -> str:
    """1,230,000 -> 1.23M; FLOPs up to E."""
    if value is None:
        return "–"
    for unit, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}" if abs(value) < 1000 * size else f"{value / size:,.0f}{unit}"
    return f"{value:.3g}"


def printable(text: str) -> str:
    """Without control characters (a file name may hold an escape sequence)."""
    return "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in text)


def as_text(table: Table, width: int = 80) -> str:
    """Columns padded; wider than `width` only where the columns are."""
    grid = [table.columns, *table.rows]
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    sides = ["<" if name in table.words else ">" for name in table.columns]
    form = "  ".join(f"{{:{side}{width}}}" for side, width in zip(sides, widths, strict=True))
    notes = [textwrap.fill(note, width, subsequent_indent="  ") for note in table.notes]
    return printable("\n".join([table.title, *(form.format(*row).rstrip() for row in grid), *notes]))


def as_markdown(table: Table) -> str:
    def cell(text: str) -> str:
        return printable(text).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")

    rules = [":--" if name in table.words else "--:" for name in table.columns]
    grid = [list(map(cell, table.columns)), rules, *(list(map(cell, row)) for row in table.rows)]
    notes = [f"\n{cell(note)}" for note in table.notes]
    return "\n".join([f"## {cell(table.title)}", "", *(f"| {' | '.join(row)} |" for row in grid), *notes]) + "\n"


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Every number unrounded; empty where it cannot be told, or where only other rows have such a number."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()
