"""What is done where a generator fails on a request: the same for a search and for the collection of roll-outs."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from engine_lib.base import Reply


@dataclass(frozen=True)
class RetryPolicy:
    """`attempts` of one request, the first included; the pause before the next one starts at `pause_s` and doubles."""

    attempts: int = 4
    pause_s: float = 0.1


class RequestsFailed(RuntimeError):
    """A request failed at every attempt; the message says how, in one line."""


def is_whole(reply: Reply, limit: int) -> bool:
    """A text ends with a stop token or has all the `limit` tokens asked for; so unfinished beams are equally long."""
    if reply.finish_reason == "stop":
        return 0 < len(reply.token_ids) <= limit
    return reply.finish_reason == "length" and len(reply.token_ids) == limit


async def ask_until_whole(
    ask: Callable[[list[int]], Awaitable[Sequence[Reply]]], limits: Sequence[int], policy: RetryPolicy
) -> list[Reply]:
    """Replies to requests 0 .. len(limits) - 1, of which `ask(numbers)` sends some; those that are not whole (aborted,
    or short) are sent again. limits: most new tokens of each. Raises RequestsFailed."""
    replies: dict[int, Reply] = {}
    failed: list[str] = []
    for attempt in range(policy.attempts):
        missing = [i for i in range(len(limits)) if i not in replies]
        got = await ask(missing)
        replies |= {i: reply for i, reply in zip(missing, got, strict=True) if is_whole(reply, limits[i])}
        if len(replies) == len(limits):
            return [replies[i] for i in range(len(limits))]
        failed = [
            f"asked for {limits[i]} tokens; got {reply.finish_reason} after {len(reply.token_ids)} tokens"
            for i, reply in zip(missing, got, strict=True)
            if i not in replies
        ]
        if attempt + 1 < policy.attempts:
            await asyncio.sleep(policy.pause_s * 2**attempt)
    raise RequestsFailed(f"the generator failed {policy.attempts} times ({'; '.join(sorted(set(failed)))})")
