"""A served value model for tests: values that depend on the trace alone, and SGLang's cache as far as it costs tokens."""

import asyncio

from simulated import sim_value

from engine_lib.base import EngineError
from engine_lib.value_base import ValueConfig, Valued, check_traces


class FakeValueEngine:
    """Notes what it is asked: `asked` has (traces, group) of each call, `finished` how many came back.

    A prefix is cached once a request that has it is done: requests that arrive together do not share it. A trace that is
    wholly cached costs one token. fail_after: calls until it dies.
    """

    name = "fake"

    def __init__(
        self, config: ValueConfig, context_length: int = 1 << 20, pool: int = 1 << 30, fail_after: int = 1 << 30
    ):
        self.config, self.context_length, self.pool_tokens, self.left = config, context_length, pool, fail_after
        self.cached: set[tuple[int, ...]] = {()}
        self.known: set[str] = set()  # groups whose prefixes it has
        self.asked, self.finished, self.cancelled, self.closed = [], 0, 0, 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def values(self, traces, group, prefixes=()):
        check_traces(traces, self.context_length, self.config.vocab_size)
        known, self.known = group in self.known, self.known | {group}
        reread = 0 if known else sum([(await self.values([prefix], group))[0].tokens_computed for prefix in prefixes])
        self.left -= 1
        if self.left < 0:
            raise EngineError("the fake value engine died")
        self.asked.append(([list(trace) for trace in traces], group))
        costs = [self.cost(tuple(trace)) for trace in traces]
        try:
            await self.gate.wait()
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        self.cached |= {tuple(trace[:end]) for trace in traces for end in range(1, len(trace) + 1)}
        self.finished += 1
        costs[0] += reread
        return [Valued(sim_value(trace), cost) for trace, cost in zip(traces, costs, strict=True)]

    def lose(self) -> None:
        """As a server that is lost and comes back."""
        self.cached, self.known = {()}, set()

    def cost(self, trace: tuple[int, ...]) -> int:
        held = next(end for end in range(len(trace), -1, -1) if trace[:end] in self.cached)
        return max(1, len(trace) - held)

    async def close(self):
        self.closed += 1

    def describe(self):
        return {"name": self.name}
