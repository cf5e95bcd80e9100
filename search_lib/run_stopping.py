"""The stopping of a run: each problem's vote is looked at as its searches finish, and a decided problem is searched no more.

T of a problem is the first t at which the rule (eval_lib/stopping.py) holds on its repetitions 0 .. t - 1. It depends on their
lines alone, not on what finished when: a later start decides the same from what it finds. No torch.
"""

import asyncio
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from eval_lib.stopping import ClassesOf, Stopping, StopTest
from search_lib.counted import is_counted, planned_searches
from search_lib.run_files import RunFiles

THREADS = 4  # that look at votes; they mostly wait for the grader's workers


class RunStops:
    """Which searches of a run count, and how far it is. `stopped`: T by problem, of those that are decided."""

    def __init__(self, stopping: Stopping, files: RunFiles, problems: Collection[int], classes_of: ClassesOf):
        """problems: data_idx of those that this process searches. Decides what the lines in `files` decide, and notes it in
        the meta file."""
        self.stopping, self.files, self.problems = stopping, files, problems
        self.stopped: dict[int, int] = {}
        self._kinds: dict[int, str] = {}
        self._tests = {} if stopping.kind == "none" else {i: StopTest(stopping, classes_of) for i in problems}
        self._busy: set[int] = set()
        self._threads = ThreadPoolExecutor(THREADS, "stopping")
        for data_idx in list(self._tests):
            while line := self._next_line(data_idx):
                self._told(data_idx, self._look(data_idx, line))
        if stopping.kind != "none":
            self._note()

    # ------------------------------------------------------------------------------------------------- deciding

    async def look(self, data_idx: int) -> bool:
        """Look at the finished repetitions of a problem that follow one another. Returns whether they have decided it now.

        Classes of answers may take seconds: another thread asks for them. Who comes while a problem is looked at leaves
        his line to whoever is at it.
        """
        if data_idx in self._busy:
            return False
        self._busy.add(data_idx)
        try:
            while line := self._next_line(data_idx):
                look = asyncio.get_running_loop().run_in_executor(self._threads, self._look, data_idx, line)
                if self._told(data_idx, await look):
                    self._note()
                    return True
        finally:
            self._busy.remove(data_idx)
        return False

    def _next_line(self, data_idx: int) -> Mapping[str, Any] | None:
        """The repetition that the test of an undecided problem is to be told of, where it is finished."""
        test = self._tests.get(data_idx)
        return None if test is None else self.files.finished.get((data_idx, test.trees))

    def _look(self, data_idx: int, line: Mapping[str, Any]) -> str | None:
        return self._tests[data_idx].add(line["processed_answer"], line["generated_scores"])

    def _told(self, data_idx: int, kind: str | None) -> bool:
        if kind:
            self.stopped[data_idx], self._kinds[data_idx] = self._tests.pop(data_idx).trees, kind
        return bool(kind)

    def _note(self) -> None:
        """In the meta file, for readers while the run goes on."""
        self.files.meta["stopped"] = {str(i): self.stopped[i] for i in sorted(self.stopped)}
        self.files.meta["stopped_by"] = {str(i): self._kinds[i] for i in sorted(self._kinds)}
        self.files.meta["tokens_uncounted"] = self.files.tokens_of(lambda key: not self.counts(*key))
        self.files.write_meta()

    def close(self) -> None:
        """Look no more. What still waits for the grader ends with it."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    # ------------------------------------------------------------------------------------------------- how far it is

    def counts(self, data_idx: int, repeat_idx: int) -> bool:
        """Does this search count, as far as it is known?"""
        return is_counted(self.stopped, data_idx, repeat_idx)

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The finished lines that count."""
        return [line for key, line in self.files.finished.items() if self.counts(*key)]

    @property
    def planned(self) -> int:
        """Searches that count in the end; of an undecided problem all repetitions."""
        return planned_searches(len(self.problems), self.stopping.repetitions, self.stopped)

    @property
    def is_over(self) -> bool:
        return len(self.lines) == self.planned

    @property
    def decided(self) -> int:
        """Problems that are done: their vote is decided, or they have all repetitions."""
        rest = [i for i in self.problems if i not in self.stopped]
        every = range(self.stopping.repetitions)
        return len(self.stopped) + sum(all((i, r) in self.files.finished for r in every) for i in rest)

    def in_words(self) -> str:
        """5 of 8 searches are finished."""
        if self.stopping.kind == "none":
            return f"{len(self.lines)} of {self.planned} searches are finished"
        return f"{self.decided} of {len(self.problems)} problems are decided, {len(self.lines)} searches finished"
