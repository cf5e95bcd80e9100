"""One pass over a run, problem by problem: what tables, plots and page say is gathered here, in bounded memory."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from eval_lib.summary import pooled_scores, summarize
from eval_utils import Grader
from report_lib.compare import Measured
from report_lib.cost import COST_KEYS, forward_costs, mean_costs, search_flops
from report_lib.data import Run
from report_lib.problem import ProblemView, problem_row, problem_view
from report_lib.trees import SearchTree, TreeFile, open_trees
from report_lib.value import Observations, observe_line, observe_tree, only_final_beams, rescued_searches, value_report


@dataclass
class Analysis:
    """What a report says of one run."""

    run: Run
    rows: list[dict[str, Any]]
    scores: dict[int, dict[str, list[float]]]
    flops: dict[str, float] | None  # of one repetition, mean over problems
    flops_by_problem: dict[int, float] | None
    values: dict[str, Any]
    rounds: list[dict[str, float]]  # seconds a search spent in each round, mean over searches
    waiting: float  # seconds a search waited, neither generating nor being scored; mean
    problems: list[dict[str, Any]]
    rescued: int | None
    tokens_generated: int | None  # of all searches, unfinished ones too
    notes: list[str] = field(default_factory=list)

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

    @property
    def measured(self) -> Measured:
        lines = self.run.by_problem.items()
        tokens = None
        if all("tokens_generated" in line for line in self.run.lines):
            tokens = {i: float(np.mean([line["tokens_generated"] for line in problem])) for i, problem in lines}
        return Measured(self.run, self.scores, tokens, self.flops_by_problem)


def analyse(run: Run, grader: Grader, show: Callable[[ProblemView], None] = lambda view: None) -> Analysis:
    """Read the run's journal once. `show` is called with every problem, and must not keep what it is given."""
    notes: list[str] = []
    trees = open_trees(run.tree_path)
    if trees is None:
        notes.append(
            f"{run.name}: no journal ({run.tree_path.name}): no trees, no rejected candidates, no values inside a trace"
        )
    elif trees.torn:
        notes.append(f"{run.name}: the journal's last line is torn and was left out")
    gather = Gatherer(run, trees)
    classes: dict[int, dict[int, list[int]]] = {}
    for data_idx in sorted(run.by_problem.keys() | set(trees.problems if trees else [])):
        view = problem_view(run, trees, data_idx, grader)
        if not any(view.lines):  # nothing of it is finished: not even its text is known
            continue
        classes[data_idx] = {
            line["repeat_idx"]: numbers for line, numbers in zip(view.lines, view.classes, strict=True) if line
        }
        gather.add(view)
        show(view)
    windows = pooled_scores(run.lines, classes)
    planned = run.meta["num_problems"] if run.meta else None
    return gather.result(
        rows=summarize(run.lines, run.num_blocks, classes, planned),
        scores={
            i: {metric: [float(np.mean(w)) for w in by_pooled] for metric, by_pooled in problem.items()}
            for i, problem in windows.items()
        },
        notes=notes,
    )


# ---------------------------------------------------------------------------------------------------------------------
# All problems


class Gatherer:
    """Sums and columns over the problems of a run."""

    def __init__(self, run: Run, trees: TreeFile | None):
        self.run, self.has_trees = run, trees is not None
        self.prunes = trees is not None and (run.meta is None or run.meta["search"]["branch"] > 1)
        self.costs = forward_costs(run.meta) if trees else None
        self.observations = Observations()
        self.flops: dict[int, list[dict[str, float]]] = {}
        self.problems: list[dict[str, Any]] = []
        self.rescued = 0
        self.tokens = 0
        self.without_flops = self.without_journal = 0
        self.seconds = np.zeros((0, 2))  # [rounds, (generating, scoring)], summed over searches
        self.total_seconds = 0.0

    def add(self, view: ProblemView) -> None:
        right = [{node: verdict for node, (_, verdict) in grades.items()} for grades in view.grades]
        self.tokens += sum(sum(tree.length) for tree in view.trees)
        rescued = rescued_searches(view.trees, right) if self.prunes else None
        self.rescued += rescued or 0
        self.without_journal += view.journal.count(False)
        for line, tree, verdicts, journal in zip(view.lines, view.trees, right, view.journal, strict=True):
            if line is None:
                continue
            if journal:
                observe_tree(self.observations, tree, verdicts, only_final_beams(self.run))
            else:
                observe_line(self.observations, line)
            self.add_seconds(line, tree)
            flops = search_flops(tree, line, self.costs) if self.costs and journal else None
            if flops:
                self.flops.setdefault(view.data_idx, []).append(flops)
            self.without_flops += flops is None
        self.problems.append(problem_row(view, rescued))

    def result(self, rows: list[dict], scores: dict, notes: list[str]) -> Analysis:
        run = self.run
        if self.has_trees and self.without_journal:
            notes.append(
                f"{run.name}: {self.without_journal} finished searches are not in the journal: only their final "
                "beams are shown"
            )
        flops = by_problem = None
        if self.flops and not self.without_flops:
            flops = mean_costs(self.flops)
            by_problem = {
                i: float(np.mean([sum(search[key] for key in COST_KEYS) for search in searches]))
                for i, searches in self.flops.items()
            }
        elif run.meta:
            notes.append(
                f"{run.name}: no FLOPs (they need both models' shapes in the settings, the journal, and its token "
                "counts)"
            )
        for row in rows:
            for key in (*COST_KEYS, "flops"):
                row[key] = flops[key] * row["pooled"] if flops else None
        return Analysis(
            run=run,
            rows=rows,
            scores=scores,
            flops=flops,
            flops_by_problem=by_problem,
            values=value_report(run, self.observations),
            rounds=self.time_by_round(),
            waiting=max(0.0, self.total_seconds - self.seconds.sum()) / max(1, len(run.lines)),
            problems=self.problems,
            rescued=self.rescued if self.prunes else None,
            tokens_generated=self.tokens if self.has_trees else None,
            notes=[*run.notes, *notes],
        )

    def add_seconds(self, line: dict, tree: SearchTree) -> None:
        self.total_seconds += line["dt"]
        rounds = (
            tree.seconds or [(line["seconds_generate"], line["seconds_score"])] if "seconds_generate" in line else []
        )
        if len(rounds) > len(self.seconds):
            self.seconds = np.vstack([self.seconds, np.zeros((len(rounds) - len(self.seconds), 2))])
        self.seconds[: len(rounds)] += np.array(rounds).reshape(-1, 2)

    def time_by_round(self) -> list[dict[str, float]]:
        means = self.seconds / max(1, len(self.run.lines))
        return [{"generate": float(generate), "score": float(score)} for generate, score in means]
