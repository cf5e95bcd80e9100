"""What is done where an engine fails on a request: the same for a search, for the collection of roll-outs, and for values."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from engine_lib.base import Reply

T = TypeVar("T")


@dataclass(frozen=True)
class RetryPolicy:
    """`attempts` of one request, the first included; the pause before the second is `pause_s` seconds, and doubles."""

    attempts: int = 4
    pause_s: float = 0.1

    def pause(self, failures: int) -> float:
        """Seconds to wait after so many failed attempts, at least one."""
        return self.pause_s * 2 ** (failures - 1)


class RequestsFailed(RuntimeError):
    """A request failed at every attempt; the message says how, in one line."""


async def ask_until_whole(
    ask: Callable[[list[int]], Awaitable[Sequence[Reply]]],
    limits: Sequence[int],
    policy: RetryPolicy,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> list[Reply]:
    """Replies to requests 0 .. len(limits) - 1, of which `ask(numbers)` sends some; those that are not whole (aborted,
    or short) are sent again. limits: most new tokens of each. Raises RequestsFailed."""

    def fault(i: int, reply: Reply) -> str:
        if is_whole(reply, limits[i]):
            return ""
        return f"asked for {limits[i]} tokens; got {reply.finish_reason} after {len(reply.token_ids)} tokens"

    return await ask_again(ask, len(limits), fault, "the generator", policy, sleep)


async def ask_again(
    ask: Callable[[list[int]], Awaitable[Sequence[T]]],
    count: int,
    fault: Callable[[int, T], str],
    who: str,
    policy: RetryPolicy,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> list[T]:
    """Replies to requests 0 .. count - 1, of which `ask(numbers)` sends some, again where `fault(number, reply)` says
    what is wrong with a reply. Raises RequestsFailed, which says that `who` failed."""
    replies: dict[int, T] = {}
    missing, failures = list(range(count)), 0
    while missing:
        if failures:
            await sleep(policy.pause(failures))
        replies |= zip(missing, await ask(missing), strict=True)
        how = {i: said for i in missing if (said := fault(i, replies[i]))}
        missing = list(how)
        failures += 1
        if missing and failures == policy.attempts:
            raise RequestsFailed(f"{who} failed {failures} times ({'; '.join(sorted(set(how.values()))[:3])})")
    return [replies[i] for i in range(count)]


def is_whole(reply: Reply, limit: int) -> bool:
    """A text ends with a stop token or has all the `limit` tokens asked for; so unfinished beams are equally long."""
    if reply.finish_reason == "stop":
        return 0 < len(reply.token_ids) <= limit
    return reply.finish_reason == "length" and len(reply.token_ids) == limit
