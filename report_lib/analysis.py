"""One pass over a run, problem by problem: what tables, plots and page say is gathered here, in bounded memory."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval_lib.grading import Grader
from eval_lib.stopped import StopRecord, stopped_scores, summarize_run
from eval_lib.summary import pooled_scores
from report_lib.clones import clone_rows, families_by_round
from report_lib.cost import COST_KEYS, forward_costs, mean_costs, search_flops
from report_lib.data import RunRecord
from report_lib.problem import ProblemView, SearchView, only_pruned_right, problem_row, problem_view
from report_lib.replay import WhatIf
from report_lib.value import observe_search, value_report
from search_lib.run_reader import Journal


def analyse(run: RunRecord, grader: Grader, show: Callable[[ProblemView], None] = lambda view: None) -> "Analysis":
    """Read the run's journal once. `show` is called with every problem, and must not keep what it is given."""
    journal = Journal(*run.journal_paths)
    analysis = Analysis(run, journal)
    for data_idx in sorted(run.by_problem.keys() | journal.searches.keys()):
        view = problem_view(run, journal, data_idx, grader)
        if view.lines:  # else nothing of it is finished: not even its text is known
            analysis.add(view)
            show(view)
    analysis.finish()
    return analysis


class Analysis:
    """What a report says of one run: sums and columns over its problems, and when it is finished, what follows.

    scores: data_idx -> metric -> [m - 1] (a problem's mean score at m pooled). costs: `tokens` and `flops` of one
    repetition by data_idx (mean), None where they are not known.
    """

    def __init__(self, run: RunRecord, journal: Journal):
        self.run, self.has_journal = run, bool(journal.searches)
        self.notes = [*run.notes, *journal.notes]
        if not self.has_journal:
            lost = "no trees, no rejected candidates, no values inside a trace, no clones"
            self.notes.append(f"{run.name}: no journal ({run.journal_paths[0].name}): {lost}")
        self.problems: list[dict[str, Any]] = []
        self.classes: dict[int, dict[int, list[int]]] = {}  # data_idx -> repeat_idx -> class of each beam
        self.flops_by_problem: dict[int, list[dict[str, float]]] = {}  # COST_KEYS of each repetition, where known
        self.what_if: WhatIf | None = None  # where it was asked for
        self.tokens_generated = 0  # of all searches, unfinished ones too; without a journal not known
        self._sees_rejected = self.has_journal and run.prunes is not False
        self._forward_costs = forward_costs(run.meta) if self.has_journal else None
        self._observations: list[NDArray] = []
        self._families: dict[int, list[list[tuple[int, int]]]] = {}
        self._beams = 0  # of one search
        self._without_flops = self._without_journal = 0
        self._seconds = np.zeros((0, 2))  # [rounds, (generating, scoring)], summed over searches

    def add(self, view: ProblemView) -> None:
        seen = self._sees_rejected and all(search.in_journal for search in view.searches)
        pruned_right = sum(map(only_pruned_right, view.searches)) if seen else None
        families = [families_by_round(s.tree) for s in view.searches if s.line and s.in_journal]
        self._families[view.data_idx] = families = list(filter(None, families))
        clones = float(np.mean([search[-1][0] for search in families])) if families else None
        self.problems.append(problem_row(view, pruned_right) | {"clones": clones})
        self.classes[view.data_idx] = {s.repeat_idx: s.classes for s in view.searches if s.line}
        final_only = bool(self.run.prunes) and not self.run.biased
        # Where a problem stopped depends on what its repetitions held: what every problem has shows no more than is there.
        shown = self.run.stopping.smallest if self.run.stopping else math.inf
        for search in view.searches:
            self.tokens_generated += sum(map(len, search.tree.tokens))
            self._without_journal += not search.in_journal
            if search.line:
                self._beams = len(search.tree.beams)
                if search.repeat_idx < shown:
                    self._observations.append(observe_search(view.data_idx, search, final_only))
                self._add_costs(view.data_idx, search, search.line)

    def _add_costs(self, data_idx: int, search: SearchView, line: dict[str, Any]) -> None:
        known = self._forward_costs if search.in_journal else None
        flops = search_flops(search.tree, line, known) if known else None
        if flops:
            self.flops_by_problem.setdefault(data_idx, []).append(flops)
        self._without_flops += flops is None
        if "seconds_generate" in line:
            rounds = np.array([(record.seconds_generate, record.seconds_score) for record in search.tree.rounds])
            self._seconds.resize((max(len(rounds), len(self._seconds)), 2), refcheck=False)
            self._seconds[: len(rounds)] += rounds

    def finish(self) -> None:
        """Sum up."""
        run, searches = self.run, max(1, len(self.run.lines))
        if self.has_journal and self._without_journal:
            lost = f"{self._without_journal} finished searches are not in the journal"
            self.notes.append(f"{run.name}: {lost}: only their final beams are shown")
        # searches in which only a rejected candidate was right; None where some are not seen
        rescued = [row["rescued"] for row in self.problems]
        self.pruned_right = sum(rescued) if self._sees_rejected and None not in rescued else None
        self.flops = mean_costs(self.flops_by_problem) if self.flops_by_problem and not self._without_flops else None
        if run.stopping:
            self._finish_stopped(run.stopping)
        elif run.meta and not self.flops:
            needs = "they need both models' shapes in the settings, the journal, and its token counts"
            self.notes.append(f"{run.name}: no FLOPs ({needs})")
        counted = run.lines, run.num_blocks, self.classes, run.stopping, run.num_problems
        self.rows, self.outcome = summarize_run(*counted)
        for row in self.rows:
            for key in (*COST_KEYS, "flops"):
                row[key] = self.flops[key] * row["pooled"] if self.flops else None
        self.values = {"biased": run.biased} | value_report(np.concatenate(self._observations))
        self.clones = clone_rows({i: found for i, found in self._families.items() if found}, self._beams)
        # seconds a search spent in each round, and waiting: neither generating nor being scored; mean over searches
        self.rounds = [{"generate": float(g), "score": float(s)} for g, s in self._seconds / searches]
        self.waiting = max(0.0, sum(line["dt"] for line in run.lines) - self._seconds.sum()) / searches
        self.scores = (
            stopped_scores(run.lines, self.classes, run.stopping)
            if run.stopping
            else {
                i: {metric: [float(np.mean(window)) for window in by_pooled] for metric, by_pooled in scores.items()}
                for i, scores in pooled_scores(run.lines, self.classes).items()
            }
        )
        self.costs: dict[str, dict[int, float] | None] = {"tokens": None, "flops": None}
        if all("tokens_generated" in line for line in run.lines):
            spent = {i: [line["tokens_generated"] for line in lines] for i, lines in run.by_problem.items()}
            self.costs["tokens"] = {i: float(np.mean(tokens)) for i, tokens in spent.items()}
        if self.flops:
            spent = {i: [sum(costs.values()) for costs in searches] for i, searches in self.flops_by_problem.items()}
            self.costs["flops"] = {i: float(np.mean(flops)) for i, flops in spent.items()}

    def _finish_stopped(self, record: StopRecord) -> None:
        self.flops = None  # of a problem that stopped, the mean of its repetitions times their number says too little
        self.tokens_generated += record.uncounted.get("generated", 0)  # they are not shown
        self.notes += [
            f"{self.run.name}: problems stop early ({record.words}): no FLOPs; its values are judged by the first "
            f"{record.smallest} repetitions, before any problem stopped; shares in the list of problems are of those that count"
        ]
        if self.run.meta and "regraded_from" in self.run.meta:
            self.notes.append(
                f"{self.run.name}: graded again after it was stopped; what was decided, and sure or certified, was the vote of "
                f"the answers in {self.run.meta['regraded_from']}"
            )

    @property
    def seconds(self) -> float | None:
        """Wall-clock of the run: its sessions together. None where one did not end in order, and of several shards, whose
        processes may have run side by side."""
        sessions = (self.run.meta or {}).get("sessions") or []
        if len(self.run.parts) > 1 or not sessions or any(session.get("ended") is None for session in sessions):
            return None
        return float(sum(session.get("seconds") or 0.0 for session in sessions))

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens generated per second of wall-clock."""
        return self.tokens_generated / self.seconds if self.seconds and self.has_journal else None
