"""What is done where a generator fails on a request: the same for a search and for the collection of roll-outs."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from engine_lib.base import Reply


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
    replies: dict[int, Reply] = {}
    missing, failures = list(range(len(limits))), 0
    while missing:
        if failures:
            await sleep(policy.pause(failures))
        replies |= zip(missing, await ask(missing), strict=True)
        missing = [i for i in missing if not is_whole(replies[i], limits[i])]
        failures += 1
        if missing and failures == policy.attempts:
            how = {
                f"asked for {limits[i]} tokens; got {replies[i].finish_reason} after {len(replies[i].token_ids)} tokens"
                for i in missing
            }
            raise RequestsFailed(f"the generator failed {failures} times ({'; '.join(sorted(how)[:3])})")
    return [replies[i] for i in range(len(limits))]


def is_whole(reply: Reply, limit: int) -> bool:
    """A text ends with a stop token or has all the `limit` tokens asked for; so unfinished beams are equally long."""
    if reply.finish_reason == "stop":
        return 0 < len(reply.token_ids) <= limit
    return reply.finish_reason == "length" and len(reply.token_ids) == limit
