"""Is the value model any good on this run: discrimination and calibration of the values that the search recorded.

Each finished candidate gives one observation at the end of each of its blocks: (value there, was its answer right). A
node that several finished candidates share counts once for each of them.

That is an unbiased picture of the generator only where nothing was pruned by value: `beam1` and `bon`, or
`--selection random` (of which only the final beams count: among rejected candidates just the short ones are
finished). On other runs what is seen was selected by the very values that are judged, and every table and plot says
"under search, biased".
"""

from array import array
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval_lib.summary import auc, auc_within, brier_score, expected_calibration_error, reliability_bins
from report_lib.data import Run
from report_lib.trees import SearchTree

BIASED = "under search, biased"
MAX_GROUPS = 8  # rows of a table by round or length
MIN_OBSERVATIONS = 20  # fewer are not worth a row


class Observations:
    """Growing columns; `columns()` gives them as arrays of one length."""

    def __init__(self) -> None:
        kinds = {"problem": "q", "block": "i", "position": "q", "value": "d", "right": "b", "last": "b"}
        self._columns = {name: array(kind) for name, kind in kinds.items()}

    def add(self, **row: Any) -> None:
        for name, column in self._columns.items():
            column.append(row[name])

    def columns(self) -> dict[str, NDArray]:
        arrays = {name: np.array(column) for name, column in self._columns.items()}
        return arrays | {"right": arrays["right"].astype(bool), "last": arrays["last"].astype(bool)}

    def __len__(self) -> int:
        return len(self._columns["value"])


def is_biased(run: Run) -> bool | None:
    """Did pruning by value decide what is seen? None where the settings are not known."""
    if run.meta is None:
        return None
    by_value = run.meta["arguments"].get("selection", "value") == "value"
    return run.meta["search"]["branch"] > 1 and by_value


def only_final_beams(run: Run) -> bool:
    return run.meta is not None and run.meta["search"]["branch"] > 1 and not is_biased(run)


def observe_tree(observations: Observations, tree: SearchTree, right: Mapping[int, bool], final_only: bool) -> None:
    """Add a search. right: by finished node, is its answer right?"""
    for leaf in tree.beams if final_only else tree.finished:
        if not tree.finish[leaf]:
            continue
        for node in tree.path(leaf):
            observations.add(
                problem=tree.data_idx,
                block=tree.round[node] + 1,
                position=tree.start[node] + tree.length[node],
                value=tree.value[node],
                right=right[leaf],
                last=node == leaf,
            )


def observe_line(observations: Observations, line: Mapping[str, Any]) -> None:
    """Add a search of which only the output line is known: the final values of its beams."""
    for value, right, length in zip(line["generated_scores"], line["reward"], line["lengths"], strict=True):
        observations.add(problem=line["data_idx"], block=1, position=length, value=value, right=right, last=True)


def quality(part: Mapping[str, NDArray]) -> dict[str, Any]:
    """Measures of one set of observations; None where a measure does not exist (one kind of answer only)."""
    right, value = part["right"], part["value"]
    within = auc_within(right, value, part["problem"])
    base = float(right.mean())
    return {
        "count": len(right),
        "problems": len(np.unique(part["problem"])),
        "share_right": base,
        "mean_value": float(value.mean()),
        "auc": auc(right, value),
        "auc_within": within["auc"],
        "auc_within_ci": within["ci"],
        "auc_within_problems": within["problems"],
        "brier": brier_score(right, value),
        "brier_base_rate": base * (1 - base),
        "ece": expected_calibration_error(right, value),
    }


def select(columns: Mapping[str, NDArray], mask: NDArray) -> dict[str, NDArray]:
    return {name: column[mask] for name, column in columns.items()}


def edges(values: NDArray, groups: int) -> list[tuple[int, int]]:
    """(low, high] ranges of about the same number of distinct steps that cover whole numbers from 1 to the largest."""
    top = int(values.max(initial=1))
    bounds = sorted({round(top * i / groups) for i in range(groups + 1)})
    return list(pairwise(bounds))


def groups_of(columns: Mapping[str, NDArray]) -> list[tuple[str, str, dict[str, NDArray]]]:
    """(kind, label, observations): at the end, at all block ends, by round, by length; thin groups are left out."""
    found = [("end", "end of the trace", select(columns, columns["last"]))]
    top = int(columns["block"].max(initial=1))
    if top > 1:
        found.append(("all", "every block's end", dict(columns)))
        for low, high in edges(columns["block"], min(top, MAX_GROUPS)):
            label = f"end of round {high}" if high == low + 1 else f"ends of rounds {low + 1}-{high}"
            found.append(("block", label, select(columns, (columns["block"] > low) & (columns["block"] <= high))))
    for low, high in edges(columns["position"], 4):
        mask = columns["last"] & (columns["position"] > low) & (columns["position"] <= high)
        found.append(("length", f"{low + 1:,}-{high:,} tokens", select(columns, mask)))
    return [group for group in found if len(group[2]["value"]) >= (1 if group[0] == "end" else MIN_OBSERVATIONS)]


def value_report(run: Run, observations: Observations) -> dict[str, Any]:
    """What tables and plots say of the values: `biased`, `groups` with measures and reliability bins, `trace`."""
    columns = observations.columns()
    groups = [
        {"kind": kind, "label": label, "bins": reliability_bins(part["right"], part["value"])} | quality(part)
        for kind, label, part in groups_of(columns)
    ]
    return {"biased": is_biased(run), "groups": groups, "trace": value_along_trace(columns)}


def value_along_trace(columns: Mapping[str, NDArray]) -> list[dict[str, Any]]:
    """Per round and outcome: mean position (tokens), quartiles and mean of the value. For the plot."""
    rows = []
    for block in np.unique(columns["block"]):
        for right in (True, False):
            part = select(columns, (columns["block"] == block) & (columns["right"] == right))
            if len(part["value"]) < 5:
                continue
            low, high = np.quantile(part["value"], [0.25, 0.75])
            rows.append(
                {
                    "block": int(block),
                    "right": right,
                    "count": len(part["value"]),
                    "position": float(part["position"].mean()),
                    "mean": float(part["value"].mean()),
                    "low": float(low),
                    "high": float(high),
                }
            )
    return rows


def bias_words(biased: bool | None) -> str:
    """What a title says of a run's values."""
    if biased is None:
        return "settings unknown, perhaps biased by search"
    return BIASED if biased else "no selection by value: unbiased"


def rescued_searches(trees: Sequence[SearchTree], right: Sequence[Mapping[int, bool]]) -> int:
    """Searches in which a rejected, finished candidate was right and no final beam was."""
    count = 0
    for tree, grades in zip(trees, right, strict=True):
        kept = any(grades.get(node, False) for node in tree.beams)
        count += tree.is_over and not kept and any(grades[node] for node in tree.finished if not tree.kept[node])
    return count
