"""Coroutines side by side: order, how many at once, and that one error ends all."""

import asyncio

import pytest

from common_lib.concurrency import cancel_all, gather_all, run_bounded


def test_results_come_in_order():
    async def after(turns, value):
        for _ in range(turns):
            await asyncio.sleep(0)
        return value

    assert asyncio.run(gather_all(after(3 - i, i) for i in range(4))) == [0, 1, 2, 3]
    assert asyncio.run(gather_all([])) == []


def test_one_error_cancels_the_others_and_waits_for_them():
    cleaned = []

    async def waits(name):
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            cleaned.append(name)

    async def fails():
        await asyncio.sleep(0)
        raise ValueError("no")

    async def main():
        with pytest.raises(ValueError, match="no"):
            await gather_all([waits("a"), fails(), waits("b")])
        assert sorted(cleaned) == ["a", "b"]

    asyncio.run(main())


def test_a_cancelled_gather_cancels_all_and_waits_for_them():
    cleaned = []

    async def waits():
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            cleaned.append(True)

    async def main():
        task = asyncio.create_task(gather_all([waits(), waits(), waits()]))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await cancel_all([task])
        assert cleaned == [True] * 3
        await task

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(main())


@pytest.mark.parametrize("limit", [1, 3, 20])
def test_at_most_so_many_at_once_and_the_earlier_ones_first(limit):
    begun, running, most = [], 0, 0

    async def work(item):
        nonlocal running, most
        begun.append(item)
        running += 1
        most = max(most, running)
        for _ in range(1 + item % 3):
            await asyncio.sleep(0)
        running -= 1

    asyncio.run(run_bounded(range(10), work, limit))
    assert begun == list(range(10))
    assert most == min(limit, 10)


def test_the_first_error_ends_all_and_nothing_more_begins():
    begun, ended = [], []

    async def work(item):
        begun.append(item)
        try:
            await asyncio.sleep(0)
            if item == 1:
                raise ValueError("no")
            await asyncio.Event().wait()
        finally:
            ended.append(item)

    async def main():
        with pytest.raises(ValueError, match="no"):
            await run_bounded(range(10), work, 3)
        assert begun == [0, 1, 2]
        assert sorted(ended) == [0, 1, 2]

    asyncio.run(main())


def test_nothing_to_do():
    async def work(item):
        raise AssertionError

    asyncio.run(run_bounded([], work, 4))
