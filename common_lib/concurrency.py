"""Coroutines side by side: all of them, or a queue of them with at most so many at once."""

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")
Item = TypeVar("Item")


async def gather_all(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All results in order; where one fails, the others are cancelled and waited for before its error goes on."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        await cancel_all(tasks)
        raise


async def cancel_all(tasks: Iterable[asyncio.Task]) -> None:
    """Cancel, and wait for the end."""
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def run_bounded(items: Sequence[Item], work: Callable[[Item], Coroutine[Any, Any, None]], limit: int) -> None:
    """`await work(item)` for each, at most `limit` at once, the earlier ones first. The first error ends all."""
    assert limit >= 1
    queue = iter(items)

    async def worker() -> None:
        for item in queue:
            await work(item)

    await gather_all([worker() for _ in range(min(limit, len(items)))])
