"""The searches of a run, side by side: each goes on where its journal ends, and is written as it goes."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from common_lib.concurrency import run_bounded
from engine_lib.base import Engine, Reply, Request
from search_lib.results import ResultRows
from search_lib.run_files import RunFiles
from search_lib.run_stopping import RunStops
from search_lib.scorers import Scorer
from search_lib.search import Generate, search
from search_lib.search_progress import SearchProgress
from search_lib.tree import Round, SearchConfig, SearchTask, Tree


@dataclass(frozen=True)
class SearchRunner:
    """Runs what counts and is not finished in `files`, whatever generator and scorer it is given."""

    generate: Generate
    scorer: Scorer
    config: SearchConfig
    files: RunFiles
    rows: ResultRows
    stops: RunStops
    progress: SearchProgress
    _under_way: dict[SearchTask, asyncio.Task[None]] = field(default_factory=dict)

    async def run(self, prompts: Mapping[int, Sequence[int]], num_repetitions: int, batch_size: int) -> None:
        """Search every prompt (by data_idx) `num_repetitions` times, or until its vote is decided, at most `batch_size` at
        once, first repetitions first. Raises what ends the run: SearchError, EngineError, OutputError."""
        tasks = [
            SearchTask(data_idx, repeat_idx, tuple(prompt))
            for repeat_idx in range(num_repetitions)
            for data_idx, prompt in prompts.items()
            if (data_idx, repeat_idx) not in self.files.finished
        ]
        try:
            await run_bounded(tasks, self._run_one, batch_size)
        finally:
            self.stops.close()
            self.progress.close()

    async def _run_one(self, task: SearchTask) -> None:
        """A task of its own, so that it can be aborted and its place goes to the next one."""
        if not self.stops.counts(task.data_idx, task.repeat_idx):
            return
        work = self._under_way[task] = asyncio.create_task(self._search(task))
        try:
            await work
        except asyncio.CancelledError:
            this = asyncio.current_task()
            if self.stops.counts(task.data_idx, task.repeat_idx) or (this is not None and this.cancelling()):
                raise  # the whole run ends
        finally:
            del self._under_way[task]
            self.progress.end(task)
        if await self.stops.look(task.data_idx):
            for other, work in self._under_way.items():
                if not self.stops.counts(other.data_idx, other.repeat_idx):
                    work.cancel()

    async def _search(self, task: SearchTask) -> None:
        earlier = self.files.rounds.get((task.data_idx, task.repeat_idx), [])
        result = await search(task, self.generate, self.scorer, self.config, earlier, self._write_round)
        self.files.add_result(await self.rows.result(result))

    def _write_round(self, task: SearchTask, tree: Tree, record: Round) -> None:
        self.files.add_round(task, record, self.rows.block_texts(tree, record))
        self.progress.add_round(task, record)


def generate_with(engine: Engine, temperature: float, top_p: float, stop_ids: tuple[int, ...]) -> Generate:
    """What a search asks of a generator, put to an engine."""

    async def generate(prompt_ids: list[int], n: int, limit: int, seeds: list[int], tree_id: str) -> list[Reply]:
        return await engine.generate(
            [Request(prompt_ids, limit, temperature, top_p, stop_ids, seed, tree_id) for seed in seeds[:n]]
        )

    return generate
