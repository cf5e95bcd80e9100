"""SIGINT and SIGTERM end a run in order; Ctrl-C again, at once."""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

AGAIN_S = 2.0  # shells and launchers often send a signal twice: only a later Ctrl-C means "at once"


class Stopped(Exception):
    """A signal ended the run; what was finished is in its files. `status` is the exit status that shells expect."""

    def __init__(self, number: int):
        self.number = signal.Signals(number)
        super().__init__(f"stopped by {self.number.name}")

    @property
    def status(self) -> int:
        return 128 + self.number


async def run_until_signal(work: Coroutine[Any, Any, None], stop: "StopSignal | None" = None) -> None:
    """Run `work` to its end, or cancel it at SIGINT or SIGTERM and raise `Stopped` once it has cleaned up.

    stop: one that is entered already, so that no signal is lost between what came before and `work`.
    """
    loop, task = asyncio.get_running_loop(), asyncio.ensure_future(work)
    with contextlib.ExitStack() as stack:
        stop = stop or stack.enter_context(StopSignal())
        # Also of a signal from before: `work` has begun by then, and cleans up
        stack.enter_context(stop.calling(lambda: loop.call_soon_threadsafe(task.cancel)))
        try:
            await task
        except asyncio.CancelledError:
            if stop.received is None:  # it was cancelled by whoever called
                raise
            raise Stopped(stop.received) from None


class StopSignal:
    """Notes SIGINT and SIGTERM while it is entered: `received` is the first one. Main thread only.

    `on_stop` is called with the first, from its handler. A Ctrl-C more than `again_s` seconds later ends the process at
    once; a second SIGTERM never does, as torchrun passes on the one that its whole process group has had already.
    """

    def __init__(self, on_stop: Callable[[], object] = lambda: None, again_s: float = AGAIN_S):
        self.received: int | None = None
        self._on_stop, self._again_s, self._since = on_stop, again_s, 0.0

    def __enter__(self) -> "StopSignal":
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if kind is KeyboardInterrupt and self.received is not None:
            raise Stopped(self.received) from None

    @contextlib.contextmanager
    def calling(self, on_stop: Callable[[], object]) -> Iterator[None]:
        """Meanwhile the first signal calls this instead; at once, where it has come already."""
        before, self._on_stop = self._on_stop, on_stop
        try:
            if self.received is not None:
                on_stop()
            yield
        finally:
            self._on_stop = before

    @contextlib.contextmanager
    def raising(self) -> Iterator[None]:
        """Around what takes long and does not await, such as the start of an engine: the first signal interrupts it
        wherever it is, and `Stopped` is raised, whatever was made of that inside."""
        try:
            # A KeyboardInterrupt goes through where errors are caught, and through an event loop
            with self.calling(lambda: signal.default_int_handler(signal.SIGINT, None)):
                yield
        finally:
            if self.received is not None:
                raise Stopped(self.received) from None

    def _note(self, number: int, frame: object) -> None:
        if self.received is None:
            self.received, self._since = number, time.monotonic()
            self._on_stop()
        elif number == signal.SIGINT and time.monotonic() - self._since > self._again_s:
            os.write(2, b"interrupted\n")  # the handler may have come in the middle of a print
            os._exit(128 + number)
