"""Is the value model any good on this run: discrimination and calibration of the values that the search recorded.

Each finished candidate gives one observation at the end of each of its blocks: (value there, was its answer right). A
node that several finished candidates share counts once for each of them.

That is an unbiased picture of the generator only where nothing was pruned by value: `beam1` and `bon`, or
`--selection random` (of which only the final beams count: among rejected candidates just the short ones are
finished). On other runs what is seen was selected by the very values that are judged, and every table and plot says
"under search, biased".
"""

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval_lib.calibration import auc, auc_within, brier_score, expected_calibration_error, reliability_bins
from report_lib.problem import SearchView

OBSERVATION = np.dtype(  # problem: data_idx; block: from 1; position: response tokens; last: is it the trace's end?
    [("problem", "i8"), ("block", "i4"), ("position", "i8"), ("value", "f8"), ("right", "?"), ("last", "?")]
)
MAX_GROUPS = 8  # rows of a table by round or length
MIN_OBSERVATIONS = 20  # fewer are not worth a row
MARK = "†"  # of votes by values for which there is no evidence
NO_EVIDENCE = "no evidence that its values tell right from wrong on these problems"
MIN_CLUSTERS = 5  # an interval over fewer problems is not worth showing


def observe_search(data_idx: int, search: SearchView, final_only: bool) -> NDArray:
    """The observations of a search, of type OBSERVATION. final_only: leave rejected candidates out."""
    tree = search.tree
    rows = [
        (data_idx, tree.round[node] + 1, tree.end(node), tree.value[node], search.grades[leaf][1], node == leaf)
        for leaf in (tree.beams if final_only else tree.finished)
        for node in tree.path(leaf)
    ]
    return np.array(rows, OBSERVATION)


def value_report(seen: NDArray) -> dict[str, Any]:
    """What tables and plots say of observations: `groups` with measures and reliability bins, `trace`."""
    groups = [
        {"kind": kind, "label": label, "bins": reliability_bins(part["right"], part["value"])} | quality(part)
        for kind, label, part in groups_of(seen)
    ]
    return {"groups": groups, "trace": value_along_trace(seen)}


def quality(part: NDArray) -> dict[str, Any]:
    """Measures of one set of observations; None where a measure does not exist (one kind of answer only)."""
    right, value = part["right"], part["value"].copy()  # contiguous: a sum's last bit depends on that
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


def edges(values: NDArray, groups: int) -> list[tuple[int, int]]:
    """(low, high] ranges of about the same number of distinct steps that cover whole numbers from 1 to the largest."""
    top = int(values.max(initial=1))
    bounds = sorted({round(top * i / groups) for i in range(groups + 1)})
    return list(pairwise(bounds))


def groups_of(seen: NDArray) -> list[tuple[str, str, NDArray]]:
    """(kind, label, observations): at the end, at all block ends, by round, by length; thin groups are left out."""
    ends, block = seen[seen["last"]], seen["block"]
    found = [("end", "end of the trace", ends)]
    top = int(block.max(initial=1))
    if top > 1:
        found.append(("all", "every block's end", seen))
        for low, high in edges(block, min(top, MAX_GROUPS)):
            label = f"end of round {high}" if high == low + 1 else f"ends of rounds {low + 1}-{high}"
            found.append(("block", label, seen[(block > low) & (block <= high)]))
    for low, high in edges(seen["position"], 4):
        part = ends[(ends["position"] > low) & (ends["position"] <= high)]
        found.append(("length", f"{low + 1:,}-{high:,} tokens", part))
    return [group for group in found if len(group[2]) >= (1 if group[0] == "end" else MIN_OBSERVATIONS)]


def value_along_trace(seen: NDArray) -> list[dict[str, Any]]:
    """Per round and outcome: mean position (tokens), quartiles and mean of the value. For the plot."""
    rows = []
    for block in np.unique(seen["block"]):
        for right in (True, False):
            part = seen[(seen["block"] == block) & (seen["right"] == right)]
            if len(part) < 5:
                continue
            position, value = part["position"].copy(), part["value"].copy()
            low, high = np.quantile(value, [0.25, 0.75])
            rows.append(
                {
                    "block": int(block),
                    "right": right,
                    "count": len(part),
                    "position": float(position.mean()),
                    "mean": float(value.mean()),
                    "low": float(low),
                    "high": float(high),
                }
            )
    return rows


def bias_words(biased: bool | None) -> str:
    """What a title says of a run's values."""
    if biased is None:
        return "settings unknown, perhaps biased by search"
    return "under search, biased" if biased else "no selection by value: unbiased"


def values_verdict(values: dict[str, Any]) -> str:
    """Do the values tell right answers from wrong ones of the same problem? For `value_report` with `biased`.

    `accepted` only where the clustered interval of the AUC within problems, at the end of the trace, lies above 0.5; else
    `no evidence`; `few` problems to judge by; `biased` where the values were selected by themselves, or may have been.
    """
    end = values["groups"][0]
    if values["biased"] is not False:
        return "biased"
    if end["auc_within_problems"] < MIN_CLUSTERS:
        return "few"
    return "accepted" if end["auc_within"] - end["auc_within_ci"] > 0.5 else "no evidence"


def no_evidence(values: dict[str, Any]) -> bool:
    """Are votes that weigh by these values marked? Where nothing certain can be said they are not."""
    return values_verdict(values) == "no evidence"


def mark_note(run: str) -> str:
    return f"{MARK} {run}: {NO_EVIDENCE}: do not rely on votes that weigh or choose by them."


def value_sentence(run: str, values: dict[str, Any]) -> str | None:
    """`values_verdict` in words; None where nothing certain can be said."""
    end, verdict = values["groups"][0], values_verdict(values)
    problems, auc_of_pairs, half = (end[f"auc_within{name}"] for name in ("_problems", "", "_ci"))
    if verdict == "biased":
        return None
    if verdict == "few":
        return (
            f"{run}: too little to judge its values by: {problems} problem{'s' * (problems != 1)} with right and with "
            f"wrong answers, {MIN_CLUSTERS} are needed."
        )
    low, high = max(0.0, auc_of_pairs - half), min(1.0, auc_of_pairs + half)
    figures = (
        f"AUC within problems {auc_of_pairs:.3f}, 95 % interval {low:.3f} to {high:.3f} over {problems} problems; "
        "0.5 is chance"
    )
    if verdict == "accepted":
        return f"{run}: its values tell right answers from wrong ones of the same problem ({figures})."
    return f"{run}: {NO_EVIDENCE} ({figures})."
