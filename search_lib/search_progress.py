"""What is shown of a run while it searches."""

import math
import time

from common_lib.progress import Progress, format_count, format_seconds
from search_lib.run_stopping import RunStops
from search_lib.tree import Round, SearchConfig, SearchTask


class SearchProgress(Progress):
    """Searches done, time left, rates of this start, and how often the finished beams were right so far."""

    def __init__(self, stops: RunStops, config: SearchConfig, clock=time.perf_counter):
        """stops: of the run, with the lines so far. Where problems are stopped pass@1 is that of first repetitions."""
        super().__init__(self.status)
        self._stops, self._clock = stops, clock
        self._most_rounds = math.ceil(config.max_length / config.block_size)
        self._begin, self._done_before = clock(), len(stops.files.finished)
        self._rounds: dict[SearchTask, int] = {}  # of the searches under way, in this start
        self._generated = self._scored = 0

    def add_round(self, task: SearchTask, record: Round) -> None:
        self._generated += sum(map(len, record.tokens))
        self._scored += record.tokens_scored
        self._rounds[task] = self._rounds.get(task, 0) + 1
        self.update()

    def end(self, task: SearchTask) -> None:
        """Of a search that is finished or aborted."""
        self._rounds.pop(task, None)
        self.update()

    def status(self) -> str:
        stops, lines = self._stops, self._stops.lines
        seconds, done, under_way = max(self._clock() - self._begin, 1e-6), len(lines), sum(self._rounds.values())
        gained = len(stops.files.finished) - self._done_before + under_way / self._most_rounds
        missing = max(0.0, stops.planned - done - under_way / self._most_rounds)
        left = format_seconds(seconds / gained * missing) if gained else "?"
        if stops.stopping.kind != "none":  # later ones are only of problems that are hard to decide
            lines = [line for line in lines if line["repeat_idx"] == 0]
        rewards = [reward for line in lines for reward in line["reward"]]
        accuracy = f"{sum(rewards) / len(rewards):.3f}" if rewards else "-"
        decided = ""
        if stops.stopping.kind != "none":
            decided, left = f" ({stops.decided}/{len(stops.problems)} problems decided)", f"at most {left}"
        return (
            f"{done}/{stops.planned} searches{decided}, ETA {left} | {format_count(self._generated / seconds)} tok/s "
            f"generated, {format_count(self._scored / seconds)} scored | pass@1 {accuracy}"
        )
