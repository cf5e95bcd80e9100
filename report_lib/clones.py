"""Clones: how many of the beams that a search holds descend from one first block.

After every round, each held beam (an open one, or a finished one that was kept) has one ancestor among the candidates
of the first round. The beams with the same ancestor are a family, and a search's clones are the size of its largest
family: 1 where every beam has a first block of its own, the number of beams where all share one and the search has
collapsed. A search that is over keeps its beams, so that every round counts the same searches.

From the journal; not known without one. A search of a single beam cannot have any.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from search_lib.tree import ROOT, Tree


def families_by_round(tree: Tree) -> list[tuple[int, int]]:
    """By round: beams of the largest family, and number of families. Empty for a search of one beam."""
    if len(tree.beams) < 2:
        return []
    first = [ROOT]  # by node, its ancestor in the first round
    for node in range(1, len(tree.parent)):
        first.append(first[tree.parent[node]] or node)
    finished: Counter[int] = Counter()  # beams that ended in earlier rounds, by their first block
    found = []
    for number in range(len(tree.rounds)):
        kept = [node for node, keep in enumerate(tree.kept) if keep and tree.round[node] == number]
        families = finished + Counter(first[node] for node in kept)
        found.append((max(families.values()), len(families)))
        finished.update(first[node] for node in kept if tree.finish[node])
    return found


def clone_rows(by_problem: Mapping[int, Sequence[Sequence[tuple[int, int]]]], beams: int) -> list[dict[str, Any]]:
    """One row a round, each a mean over problems of the mean over their finished searches.

    by_problem: data_idx -> `families_by_round` of each search. A row has round (from 1), beams (of a search), clones
    (beams of the largest family), families (first blocks that are still there) and collapsed (share of searches in
    which all beams descend from one). Empty where nothing is known.
    """
    rounds = max((len(search) for searches in by_problem.values() for search in searches), default=0)
    rows = []
    for number in range(rounds):
        means = []
        for searches in by_problem.values():
            now = [search[min(number, len(search) - 1)] for search in searches]
            means.append(np.mean([(clones, families, clones == beams) for clones, families in now], axis=0))
        clones, families, collapsed = map(float, np.mean(means, axis=0))
        row = {"round": number + 1, "beams": beams, "clones": clones, "families": families, "collapsed": collapsed}
        rows.append(row)
    return rows
