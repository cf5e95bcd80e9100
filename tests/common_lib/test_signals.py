"""Stop signals: the first ends the work in order, a Ctrl-C after a while at once, and nobody else's handler is lost."""

import asyncio
import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

from common_lib.signals import Stopped, StopSignal, run_until_signal

NUMBERS = [signal.SIGINT, signal.SIGTERM]


@pytest.mark.parametrize("number", NUMBERS)
def test_the_first_signal_cancels_and_is_named_once_all_is_cleaned_up(number):
    cleaned, before = [], [signal.getsignal(n) for n in NUMBERS]

    async def work():
        try:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)  # launchers often send it twice
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0)
            os.kill(os.getpid(), signal.SIGTERM)  # does not disturb the cleaning up
            await asyncio.sleep(0)
            cleaned.append(True)

    with pytest.raises(Stopped, match=f"stopped by {number.name}") as stop:
        asyncio.run(run_until_signal(work()))
    assert stop.value.status == 128 + number
    assert cleaned == [True]
    assert [signal.getsignal(n) for n in NUMBERS] == before


def test_work_that_ends_or_fails_by_itself():
    ended = []

    async def ends():
        ended.append(True)

    async def fails():
        raise ValueError("no")

    asyncio.run(run_until_signal(ends()))
    assert ended == [True]
    with pytest.raises(ValueError, match="no"):
        asyncio.run(run_until_signal(fails()))


def test_a_cancel_from_outside_is_no_signal():
    cancelled = []

    async def work():
        try:
            await asyncio.sleep(60)
        finally:
            cancelled.append(True)

    async def main():
        task = asyncio.create_task(run_until_signal(work()))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        await task

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(main())
    assert cancelled == [True]


def test_a_stop_signal_notes_the_first_and_calls_back_once():
    told = []
    with StopSignal(lambda: told.append(True)) as stop:
        assert stop.received is None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
    assert stop.received == signal.SIGTERM
    assert told == [True]


def test_a_signal_that_came_before_the_work_cancels_it_once_it_has_begun():
    cleaned = []

    async def work():
        try:
            await asyncio.sleep(60)
        finally:
            cleaned.append(True)

    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped, match="stopped by SIGTERM"):
            asyncio.run(run_until_signal(work(), stop))
        os.kill(os.getpid(), signal.SIGTERM)  # of a loop that is closed by now
    assert cleaned == [True]


SCRIPT = """
import os, signal, sys
from common_lib.signals import StopSignal

with StopSignal(again_s=float(sys.argv[1])):
    for name in sys.argv[2:]:
        os.kill(os.getpid(), getattr(signal, name))
print("came to its end")
"""


@pytest.mark.parametrize(
    ("again_s", "names", "status"),
    [
        (0, ["SIGINT", "SIGINT"], 130),
        (0, ["SIGTERM", "SIGINT"], 130),
        (0, ["SIGTERM", "SIGTERM", "SIGTERM"], 0),  # torchrun passes it on to ranks that had it already
        (0, ["SIGINT", "SIGTERM"], 0),
        (60, ["SIGINT", "SIGINT", "SIGINT"], 0),  # too soon: one Ctrl-C that came twice
    ],
)
def test_only_a_later_ctrl_c_ends_the_process_at_once(again_s, names, status):
    cmd = [sys.executable, "-c", SCRIPT, str(again_s), *names]
    done = subprocess.run(cmd, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == status
    assert done.stdout == ("" if status else "came to its end\n")
    assert done.stderr == ("interrupted\n" if status else "")
