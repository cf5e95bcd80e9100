"""One pass over a run, problem by problem: what tables, plots and page say is gathered here, in bounded memory."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval_lib.grading import Grader
from eval_lib.summary import pooled_scores, summarize
from report_lib.compare import ComparisonInput
from report_lib.cost import COST_KEYS, forward_costs, mean_costs, search_flops
from report_lib.data import RunRecord
from report_lib.problem import ProblemView, SearchView, only_pruned_right, problem_row, problem_view
from report_lib.value import observe_search, value_report
from search_lib.run_reader import Journal


@dataclass
class Analysis:
    """What a report says of one run."""

    run: RunRecord
    rows: list[dict[str, Any]]
    comparison_input: ComparisonInput
    flops: dict[str, float] | None  # of one repetition, mean over problems
    values: dict[str, Any]
    rounds: list[dict[str, float]]  # seconds a search spent in each round, mean over searches
    waiting: float  # seconds a search waited, neither generating nor being scored; mean
    problems: list[dict[str, Any]]
    pruned_right: int | None  # searches in which only a rejected candidate was right
    tokens_generated: int | None  # of all searches, unfinished ones too
    notes: list[str]

    @property
    def seconds(self) -> float | None:
        """Wall-clock of the run: its sessions together. None where one did not end in order."""
        sessions = (self.run.meta or {}).get("sessions") or []
        if not sessions or any(session.get("ended") is None for session in sessions):
            return None
        return float(sum(session.get("seconds") or 0.0 for session in sessions))

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens generated per second of wall-clock."""
        return self.tokens_generated / self.seconds if self.seconds and self.tokens_generated else None


def analyse(run: RunRecord, grader: Grader, show: Callable[[ProblemView], None] = lambda view: None) -> Analysis:
    """Read the run's journal once. `show` is called with every problem, and must not keep what it is given."""
    journal = Journal(run.journal_path)
    gather = Gatherer(run, journal)
    for data_idx in sorted(run.by_problem.keys() | journal.searches.keys()):
        view = problem_view(run, journal, data_idx, grader)
        if view.lines:  # else nothing of it is finished: not even its text is known
            gather.add(view)
            show(view)
    return gather.result()


class Gatherer:
    """Sums and columns over the problems of a run."""

    def __init__(self, run: RunRecord, journal: Journal):
        self.run, self.journal = run, journal
        self.sees_pruned = bool(journal.searches) and run.prunes is not False
        self.costs = forward_costs(run.meta) if journal.searches else None
        self.classes: dict[int, dict[int, list[int]]] = {}
        self.observations: list[NDArray] = []
        self.flops: dict[int, list[dict[str, float]]] = {}
        self.problems: list[dict[str, Any]] = []
        self.pruned_right = self.tokens = self.without_flops = self.without_journal = 0
        self.seconds = np.zeros((0, 2))  # [rounds, (generating, scoring)], summed over searches

    def add(self, view: ProblemView) -> None:
        pruned_right = sum(map(only_pruned_right, view.searches)) if self.sees_pruned else None
        self.pruned_right += pruned_right or 0
        self.problems.append(problem_row(view, pruned_right))
        self.classes[view.data_idx] = {s.repeat_idx: s.classes for s in view.searches if s.line}
        final_only = bool(self.run.prunes) and not self.run.biased
        for search in view.searches:
            self.tokens += sum(map(len, search.tree.tokens))
            self.without_journal += not search.in_journal
            if search.line:
                self.observations.append(observe_search(view.data_idx, search, final_only))
                self.add_costs(view.data_idx, search, search.line)

    def add_costs(self, data_idx: int, search: SearchView, line: dict[str, Any]) -> None:
        flops = search_flops(search.tree, line, self.costs) if self.costs and search.in_journal else None
        if flops:
            self.flops.setdefault(data_idx, []).append(flops)
        self.without_flops += flops is None
        if "seconds_generate" in line:
            rounds = np.array([(record.seconds_generate, record.seconds_score) for record in search.tree.rounds])
            self.seconds.resize((max(len(rounds), len(self.seconds)), 2), refcheck=False)
            self.seconds[: len(rounds)] += rounds

    def result(self) -> Analysis:
        run, flops, by_problem = self.run, None, None
        if self.flops and not self.without_flops:
            flops = mean_costs(self.flops)
            by_problem = {
                i: float(np.mean([sum(search[key] for key in COST_KEYS) for search in searches]))
                for i, searches in self.flops.items()
            }
        rows = summarize(run.lines, run.num_blocks, self.classes, run.meta["num_problems"] if run.meta else None)
        for row in rows:
            for key in (*COST_KEYS, "flops"):
                row[key] = flops[key] * row["pooled"] if flops else None
        searches = max(1, len(run.lines))
        return Analysis(
            run=run,
            rows=rows,
            comparison_input=ComparisonInput(run, self.mean_scores(), self.mean_tokens(), by_problem),
            flops=flops,
            values={"biased": run.biased} | value_report(np.concatenate(self.observations)),
            rounds=[{"generate": float(g), "score": float(s)} for g, s in self.seconds / searches],
            waiting=max(0.0, sum(line["dt"] for line in run.lines) - self.seconds.sum()) / searches,
            problems=self.problems,
            pruned_right=self.pruned_right if self.sees_pruned else None,
            tokens_generated=self.tokens if self.journal.searches else None,
            notes=[*run.notes, *self.notes(flops is not None)],
        )

    def mean_scores(self) -> dict[int, dict[str, list[float]]]:
        windows = pooled_scores(self.run.lines, self.classes)
        return {
            i: {metric: [float(np.mean(window)) for window in by_pooled] for metric, by_pooled in scores.items()}
            for i, scores in windows.items()
        }

    def mean_tokens(self) -> dict[int, float] | None:
        """Tokens generated in one repetition, by problem."""
        if not all("tokens_generated" in line for line in self.run.lines):
            return None
        by_problem = self.run.by_problem.items()
        return {i: float(np.mean([line["tokens_generated"] for line in lines])) for i, lines in by_problem}

    def notes(self, has_flops: bool) -> list[str]:
        """What the run's files do not tell."""
        name, notes = self.run.name, []
        if not self.journal.searches:
            journal = self.journal.path.name
            notes = [f"{name}: no journal ({journal}): no trees, no rejected candidates, no values inside a trace"]
        elif self.journal.torn:
            notes = [f"{name}: the journal's last line is torn and was left out"]
        if self.journal.searches and self.without_journal:
            without = f"{self.without_journal} finished searches are not in the journal"
            notes.append(f"{name}: {without}: only their final beams are shown")
        if self.run.meta and not has_flops:
            needs = "they need both models' shapes in the settings, the journal, and its token counts"
            notes.append(f"{name}: no FLOPs ({needs})")
        return notes
