"""Grading of mathematical answers, and classes of equal answers. Pure Python, no torch.

Equality is math-verify's (https://github.com/huggingface/Math-Verify), asked of worker processes (eval_lib/grading_worker.py).
"""

import asyncio
import json
import logging
import math
import os
import select
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from eval_lib.normalise import answer_parts, as_integer, compared, normalize_answer

logger = logging.getLogger(__name__)

# ----------------------------------------------------------------------------------------------------------- the grader

WORKER = Path(__file__).with_name("grading_worker.py")
PAIR_SECONDS = 30  # the most that one comparison may take before its worker is replaced
START_SECONDS = 120  # the most that a worker may take to start: importing SymPy from a slow network disk
MAX_ANSWER_CHARS = 20_000  # a longer answer equals only itself
MAX_COMPARISONS = 5_000


class GradingError(RuntimeError):
    """No worker can be started (math-verify is missing or broken), or the grader was closed too early."""


class _Worker:
    """One worker process, and the bounded dialogue with it."""

    def __init__(self, program: Path) -> None:
        command = [sys.executable, str(program)]
        # SymPy's order of terms depends on string hashes: a fixed seed makes verdicts repeatable.
        environment = os.environ | {"PYTHONHASHSEED": "0"}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment, bufsize=0)
        if self._read(START_SECONDS) != "ready":
            self.process.kill()
            said = self.process.communicate()[1].decode(errors="replace").split("\n")
            raise GradingError(f"the grading worker did not start: {' '.join(said[-2:]).strip() or 'it said nothing'}")

    def _read(self, seconds: float) -> Any:
        """The next reply; None where the worker died or the time is over."""
        assert self.process.stdout is not None
        deadline, data = time.monotonic() + seconds, b""
        while not data.endswith(b"\n"):
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            chunk = os.read(self.process.stdout.fileno(), 1 << 16) if ready else b""
            if not chunk:
                return None
            data += chunk
        return json.loads(data)

    def ask(self, do: str, answers: tuple[str, ...], seconds: float) -> dict[str, Any] | None:
        assert self.process.stdin is not None
        request = json.dumps({"do": do, "answers": answers, "seconds": seconds}).encode() + b"\n"
        try:
            self.process.stdin.write(request)
        except OSError:  # it died since its last reply
            return None
        return self._read(seconds + 1)

    def end(self) -> None:
        """Kill the process and free its pipes. Only for the thread that holds the worker."""
        with self.process:  # on leaving, Popen closes its pipes and waits
            self.process.kill()


def _far_apart(one: list[float], other: list[float]) -> bool:
    """Do both answers have numbers, and do these differ by more than math-verify's rounding (6 decimals) forgives?"""
    close = partial(math.isclose, rel_tol=1e-4, abs_tol=1e-4)
    return bool(one and other) and (len(one) != len(other) or not all(map(close, one, other)))


def _known(verdict: "bool | Future[Any]") -> Any:
    """What a future holds, waited for; GradingError where the grader was closed before."""
    try:
        return verdict.result() if isinstance(verdict, Future) else verdict
    except CancelledError:
        raise GradingError("the grader was closed before it had graded everything") from None


class Grader:
    """Grades answers with math-verify in `num_workers` processes. A context manager; one for a run; thread-safe.

    Verdicts are cached. Integers and equal strings are decided at once; a worker starts when it is first needed. A pair
    that takes longer than `pair_seconds`, or whose worker dies, is False with a warning, and the worker is replaced.
    max_comparisons: pairs given to math-verify for the classes of one problem. program: what a worker runs.
    """

    def __init__(
        self,
        num_workers: int | None = None,
        pair_seconds: float = PAIR_SECONDS,
        max_comparisons: int = MAX_COMPARISONS,
        program: Path = WORKER,
    ) -> None:
        self.num_workers = num_workers or min(8, os.cpu_count() or 1)
        self.pair_seconds, self.max_comparisons, self.program = pair_seconds, max_comparisons, program
        self._threads = ThreadPoolExecutor(self.num_workers, thread_name_prefix="grading")
        self._own = threading.local()  # `worker`: the one of a thread, where it is started
        self._workers: set[_Worker] = set()
        self._cache: dict[tuple[str, ...], Future[Any]] = {}
        self._closed = False

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers that are running."""
        return [worker.process.pid for worker in self._workers]

    def close(self) -> None:
        """End the workers. Pairs that still wait are not graded: their callers get an error. Idempotent."""
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in list(self._workers):
            worker.process.kill()  # the thread that reads from it sees the end and lets go
        self._threads.shutdown(wait=True)
        for worker in self._workers:
            worker.end()
        self._workers.clear()

    def grade(self, pairs: Iterable[tuple[str, str]]) -> list[bool]:
        """Is the answer right, for each (gold, answer)? An empty answer is wrong. Raises GradingError."""
        verdicts = [self._verdict(*pair) for pair in pairs]
        return [bool(_known(verdict)) for verdict in verdicts]

    async def agrade(self, pairs: Iterable[tuple[str, str]]) -> list[bool]:
        """`grade` for the event loop, which goes on meanwhile. It may be cancelled."""
        verdicts = [self._verdict(*pair) for pair in pairs]
        # The cache shares its futures: a caller that is cancelled must not cancel them for the others.
        futures = [asyncio.shield(asyncio.wrap_future(v)) for v in verdicts if isinstance(v, Future)]
        await asyncio.gather(*futures, return_exceptions=True)
        return [bool(_known(verdict)) for verdict in verdicts]

    def answer_classes(self, answers: Sequence[str]) -> list[int]:
        """The class of each answer, numbered from 0 by first appearance; -1 for an empty one.

        Classes are the connected components of "math-verify says equal, with either as gold". That relation is not
        transitive; components do not depend on the order of the answers. Answers whose numbers differ are not compared;
        of the rest at most max_comparisons pairs are, frequent answers first (a warning says so where that cuts).
        """
        forms = [normalize_answer(answer) for answer in answers]
        keys = [as_integer(form) or form for form in forms]
        counts = Counter(key for key in keys if key)
        distinct = sorted(counts, key=lambda key: (-counts[key], key))
        name = {key: key for key in distinct}  # of its class, so far
        failures: Counter[str] = Counter()

        def open_pairs() -> Iterator[tuple[str, str]]:
            for one, other in self._comparable(distinct):
                # An answer that hung twice would hang against all others too.
                if name[one] != name[other] and max(failures[one], failures[other]) < 2:
                    yield one, other

        pairs = open_pairs()
        while batch := list(islice(pairs, 8 * self.num_workers)):
            asked = [
                (one, other, self._verdict(*pair)) for one, other in batch for pair in ((one, other), (other, one))
            ]
            for one, other, verdict in asked:
                equal = _known(verdict)
                failures.update((one, other) if equal is None else ())
                if equal:
                    name |= {key: name[other] for key in distinct if name[key] == name[one]}
        numbers: dict[str, int] = {}
        return [numbers.setdefault(name[key], len(numbers)) if key else -1 for key in keys]

    def _comparable(self, distinct: Sequence[str]) -> Iterator[tuple[str, str]]:
        """Pairs of distinct normalised answers that math-verify might call equal, in order, at most max_comparisons."""
        integers = {key for key in distinct if as_integer(key)}
        asked = {key: self._submit("numbers", answer_parts(key)[0]) for key in distinct if key not in integers}
        numbers = {key: [float(key)] for key in integers} | {key: _known(future) for key, future in asked.items()}
        in_time = [key for key in distinct if numbers[key] is not None]
        count = 0
        for i, key in enumerate(in_time):
            for earlier in in_time[:i]:
                # Integers differ from each other for certain.
                if (key in integers and earlier in integers) or _far_apart(numbers[key], numbers[earlier]):
                    continue
                if compared(key, earlier) is None:
                    continue
                if count == self.max_comparisons:
                    cut = "%d distinct answers to one problem: only %d pairs were compared, frequent answers first"
                    logger.warning(cut, len(distinct), count)
                    return
                count += 1
                yield earlier, key

    def _verdict(self, gold: str, answer: str) -> "bool | Future[bool | None]":
        """Equal or not; a future where a worker must say. The future's result is None where that failed."""
        pair = compared(normalize_answer(gold), normalize_answer(answer))
        if pair is None or not all(pair):
            return False
        gold, answer = pair
        if gold == answer:
            return True
        integers = as_integer(gold), as_integer(answer)
        if None not in integers:
            return integers[0] == integers[1]
        return self._submit("equal", gold, answer)

    def _submit(self, do: str, *answers: str) -> "Future[Any]":
        key = (do, *answers)
        if key not in self._cache:
            self._cache[key] = self._threads.submit(self._ask, do, *answers)
        return self._cache[key]

    def _ask(self, do: str, *answers: str) -> Any:
        """Runs in a thread of the grader: the result of its worker, started if need be; None where that failed."""
        if max(map(len, answers)) > MAX_ANSWER_CHARS:
            return None
        if getattr(self._own, "worker", None) is None:
            self._own.worker = _Worker(self.program)
            self._workers.add(self._own.worker)
        worker = self._own.worker
        reply = None if self._closed else worker.ask(do, answers, self.pair_seconds)
        if self._closed:
            raise GradingError("the grader was closed before it had graded everything")
        if reply is None:
            self._own.worker = None
            self._workers.discard(worker)
            worker.end()
            reply = {"failure": f"took more than {self.pair_seconds:g} s or ended its worker"}
        if "failure" in reply:
            shown = " with ".join(repr(answer if len(answer) <= 80 else answer[:80] + "...") for answer in answers)
            logger.warning("comparing %s %s; counted as not equal", shown, reply["failure"])
        return reply.get("result")
