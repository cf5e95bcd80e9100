"""inference_eval.py told to stop before its first search: what was started is closed, and it ends as a stopped run does."""

import contextlib
import os
import signal
import time
from pathlib import Path
from unittest import mock

import pytest
import search_spy

import inference_eval
from common_lib.models import load_tokenizer
from engine_lib import choose
from engine_lib.base import EngineError

NUMBERS = [signal.SIGINT, signal.SIGTERM]
SERVERS = ["--value_engine", "sglang-server", "--value_url", "http://one:1"]
# From the value servers' meeting to the end, and what is open by then
MOMENTS = {
    "servers": [], "generator": ["servers"], "generator that catches all": ["servers"],
    "a destructor in the generator's start": ["servers", "generator", "scorer"], "between": ["servers", "generator"],
    "value model": ["servers", "generator"], "description": ["servers", "generator", "scorer"],
    "before the first search": ["servers", "generator", "scorer"], "first check": ["servers", "generator", "scorer"],
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    search_spy.write_inputs(folder)
    return folder


@pytest.fixture
def nobody():
    """Who would have had the signals."""

    def end(number, frame):
        raise AssertionError(f"{number} ends this process")

    before = {number: signal.signal(number, end) for number in NUMBERS}
    yield end
    for number, handler in before.items():
        signal.signal(number, handler)


class Starts:
    """Loaders whose parts are told to stop at one moment, and how often each that was started has been closed."""

    def __init__(self, number: int, moment: str):
        self.number, self.moment, self.closed = number, moment, {}

    def at(self, moment: str) -> None:
        if moment == self.moment:
            os.kill(os.getpid(), self.number)
            time.sleep(0.001)  # anything at all, upon which Python looks for signals

    def part(self, name: str) -> "Part":
        self.closed[name] = 0
        return Part(self, name)

    def servers(self, config) -> "Part":
        self.at("servers")
        return self.part("servers")

    def generator(self, args, plan) -> "Part":
        with contextlib.suppress(Exception):  # as where it is tried again
            self.at("generator")
        try:
            self.at("generator that catches all")
        except BaseException as error:
            raise EngineError("it did not start") from error
        Destroyed(self)
        return self.part("generator")

    def scorer(self, args, plan, memory, servers) -> "Part":
        self.at("value model")
        return self.part("scorer")


class Destroyed:
    """Told to stop where exceptions are lost."""

    def __init__(self, starts: Starts):
        self.starts = starts

    def __del__(self):
        self.starts.at("a destructor in the generator's start")


class Part:
    """An engine or a scorer, as far as a start goes."""

    context_length, vocab_size = 1 << 20, 264

    def __init__(self, starts: Starts, name: str):
        self.starts, self.name = starts, name

    def describe(self):
        self.starts.at({"generator": "between", "scorer": "description"}.get(self.name, ""))
        return {"name": self.name}

    async def check(self):
        self.starts.at("first check")

    async def close(self):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)  # launchers often send it twice
        self.starts.closed[self.name] += 1


@pytest.mark.parametrize(
    ("moment", "number"),
    [("generator", signal.SIGINT), ("first check", signal.SIGINT), *((moment, signal.SIGTERM) for moment in MOMENTS)],
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_while_models_start_closes_those_that_have(moment, number, folder, tmp_path, nobody, capsys):
    starts = Starts(number, moment)
    loaders = inference_eval.Loaders(starts.generator, starts.scorer, load_tokenizer)
    say = inference_eval.say_what_is_searched
    flags = [*search_spy.base_flags(folder, tmp_path / "out.jsonl"), *SERVERS]
    with (
        mock.patch.dict(choose.VALUE_ENGINES, {"sglang-server": starts.servers}),
        mock.patch.object(
            inference_eval, "say_what_is_searched", lambda *a: starts.at("before the first search") or say(*a)
        ),
    ):
        assert inference_eval.main(flags, loaders) == 128 + number
    assert list(starts.closed) == MOMENTS[moment]
    # The servers are the scorer's where there is one; this one leaves them alone
    late = moment in ("before the first search", "first check")
    assert starts.closed == {name: int(name != "servers" or not late) for name in MOMENTS[moment]}
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert line == f"stopped by {number.name}: 0 of 8 searches are finished; the same command goes on"
    assert [signal.getsignal(n) for n in NUMBERS] == [nobody] * 2
