"""What every served value model has in common: traces in, values out, the interface, and the checks before anything is asked."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from engine_lib.base import EngineError


@dataclass(frozen=True, slots=True)
class Valued:
    """The value at the last token of a trace, and the tokens that were computed for it: those whose keys and values were
    cached cost nothing."""

    value: float
    tokens_computed: int


class NoValue(EngineError):
    """What an engine answers is no value: another model's numbers, or NaN."""


@dataclass(frozen=True)
class ValueConfig:
    """How a value model is served. Each engine takes of it what it knows."""

    model_path: str
    vocab_size: int
    num_labels: int
    device: str = "cpu"
    dtype: str = "fp32"  # "bf16" or "fp32"
    request_timeout_s: float = 3600.0
    groups_at_once: int = 0  # searches; 0: not known
    requests_at_once: int = 0  # of all of them; 0: not known
    sglang_args: tuple[str, ...] = ()  # KEY=VALUE
    urls: tuple[str, ...] = ()


class ValueEngine(Protocol):
    """What a search needs of a served value model. `values` may be called many times at once, and may be cancelled.

    Requests that arrive together do not share what none of them has been computed of: whoever wants a prefix read once
    sends it alone first, and waits.
    """

    name: str
    context_length: int  # most tokens of a trace that are taken
    pool_tokens: int  # whose keys and values its caches hold, those of all servers together

    async def values(
        self, traces: Sequence[Sequence[int]], group: str, prefixes: Sequence[Sequence[int]] = ()
    ) -> list[Valued]:
        """One batch; traces of one `group` (one search tree) go where that group's caches are.

        prefixes: what the traces go on from, each once, shorter ones first: the group's caches should hold them. An engine
        whose caches for the group were lost, or that moved it, reads each alone first; what that computes counts with the
        first trace. Raises ValueError for a trace that cannot be scored (empty, an id outside the vocabulary, longer than
        `context_length`), before anything is sent; EngineError where the engine is dead or out of reach.
        """

    async def close(self) -> None:
        """Abort what still runs. Can be called twice."""

    def describe(self) -> dict[str, object]:
        """Versions, device and settings, JSON-able, for the run's meta file."""


def check_traces(traces: Sequence[Sequence[int]], context_length: int, vocab_size: int) -> None:
    """Raise ValueError for what would kill or hang an engine: no tokens, ids outside the vocabulary, too many tokens."""
    for trace in traces:
        if not trace:
            raise ValueError("a trace is empty and has no last token to score")
        if len(trace) > context_length:
            raise ValueError(f"a trace of {len(trace)} tokens is longer than the {context_length} that are served")
        for token in (min(trace), max(trace)):
            if not 0 <= token < vocab_size:
                raise ValueError(f"token id {token} is outside the value model's vocabulary of {vocab_size}")
