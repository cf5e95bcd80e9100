"""What is shown of a run while it searches."""

import math
import time
from collections.abc import Mapping
from typing import Any

from common_lib.progress import Progress, format_count, format_seconds
from search_lib.tree import Round, SearchConfig, SearchTask


class SearchProgress(Progress):
    """Searches done, time left, rates of this start, and how often the finished beams were right so far."""

    def __init__(
        self, finished: Mapping[Any, Mapping[str, Any]], total: int, config: SearchConfig, clock=time.perf_counter
    ):
        """finished: the result lines so far, in a mapping that grows (`RunFiles.finished`). total: searches of the run."""
        super().__init__(self.status)
        self._finished, self._total, self._clock = finished, total, clock
        self._most_rounds = math.ceil(config.max_length / config.block_size)
        self._begin, self._done_before = clock(), len(finished)
        self._rounds: dict[SearchTask, int] = {}  # of the searches under way, in this start
        self._generated = self._scored = 0

    def add_round(self, task: SearchTask, record: Round) -> None:
        self._generated += sum(map(len, record.tokens))
        self._scored += record.tokens_scored
        self._rounds[task] = self._rounds.get(task, 0) + 1
        self.update()

    def add_result(self, task: SearchTask) -> None:
        self._rounds.pop(task, None)
        self.update()

    def status(self) -> str:
        seconds, done = max(self._clock() - self._begin, 1e-6), len(self._finished)
        gained = done - self._done_before + sum(self._rounds.values()) / self._most_rounds
        left = format_seconds(seconds / gained * max(0.0, self._total - self._done_before - gained)) if gained else "?"
        rewards = [reward for row in self._finished.values() for reward in row["reward"]]
        accuracy = f"{sum(rewards) / len(rewards):.3f}" if rewards else "-"
        return (
            f"{done}/{self._total} searches, ETA {left} | {format_count(self._generated / seconds)} tok/s generated, "
            f"{format_count(self._scored / seconds)} scored | pass@1 {accuracy}"
        )
