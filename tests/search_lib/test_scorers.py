"""The scorer in its thread: the order of calls, what a call cost, and that the event loop is never blocked."""

import asyncio
import threading
from types import SimpleNamespace

import pytest
import torch

from search_lib.scorers import ScorerThread


class Recording:
    """A ValueScorer that notes its calls; `score` waits for `gate`."""

    def __init__(self):
        self.calls, self.gate, self.usage = [], threading.Event(), SimpleNamespace(tokens_scored=7, tokens_reread=1)

    def tree_usage(self, tree_id):
        return self.usage

    def start(self, tree_id, prompt_ids, history):
        self.calls.append(("start", tree_id, list(prompt_ids), history))

    def score(self, tree_id, items, finished):
        assert self.gate.wait(10)
        self.calls.append(("score", tree_id, items, finished))
        self.usage.tokens_scored += 5
        self.usage.tokens_reread += 2
        return [0.5]

    def keep(self, tree_id, nodes):
        self.calls.append(("keep", tree_id, nodes))

    def release(self, tree_id):
        self.calls.append(("release", tree_id))


def test_the_thread_stands_on_the_models_gpu(monkeypatch):
    """Some kernels launch where the thread stands, which is the first GPU unless it is told."""
    stood = []
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: stood.append((device, threading.current_thread().name))
    )
    for device in ("cuda:1", "cpu"):
        recording = Recording()
        scorer = ScorerThread(recording, device)

        async def main(scorer=scorer):
            scorer.start("a", (1, 2), [])

        asyncio.run(main())
        scorer.close()
        assert recording.calls == [("start", "a", [1, 2], [])]
    assert stood == [("cuda:1", "score_0")]


def test_calls_take_effect_in_order_and_the_event_loop_goes_on():
    recording = Recording()
    scorer = ScorerThread(recording)

    async def main():
        scorer.start("a", (1, 2), iter([(0, [3])]))
        scored = asyncio.create_task(scorer.score("a", [(0, [4])], [False]))
        scorer.keep("b", {2})
        await asyncio.sleep(0)
        assert not scored.done()
        recording.gate.set()  # from the loop, which the scorer in its thread does not block
        scored = await scored
        scorer.release("a")
        await scorer.score("b", [(0, [5])], [False])  # calls are in order: the release has been done by then
        return scored

    scored = asyncio.run(main())
    scorer.close()
    assert (scored.values, scored.tokens_scored, scored.tokens_reread) == ([0.5], 5, 2)
    assert recording.calls[0] == ("start", "a", [1, 2], [(0, [3])])
    assert recording.calls[-2] == ("release", "a")
    assert {call[0] for call in recording.calls} == {"start", "score", "keep", "release"}


def test_errors_of_a_score_come_through_and_those_of_the_others_are_logged(caplog):
    class Broken(Recording):
        def keep(self, tree_id, nodes):
            raise KeyError("no such tree")

        def score(self, *args):
            raise ValueError("too long")

    scorer = ScorerThread(Broken())

    async def main():
        scorer.keep("a", [1])
        with pytest.raises(ValueError, match="too long"):
            await scorer.score("a", [], [])

    asyncio.run(main())
    scorer.close()
    assert "no such tree" in caplog.text


def test_a_device_without_memory_says_what_to_change():
    class Full(Recording):
        def score(self, *args):
            raise MemoryError("out of memory on cuda:0 for a single trace of 9 tokens")

    scorer = ScorerThread(Full())

    async def main():
        with pytest.raises(MemoryError) as caught:
            await scorer.score("a", [], [])
        return str(caught.value)

    line = asyncio.run(main())
    scorer.close()
    assert line.startswith("out of memory on cuda:0 for a single trace of 9 tokens; leave the value model more: ")
    for flag in ("--value_dtype bf16", "--piref_gpu_util", "--mem-fraction-static", "--value_device", "--max_length"):
        assert flag in line
