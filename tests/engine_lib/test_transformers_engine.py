"""The embedded engine: samples from the right distribution, every row from its own noise, whatever it is batched with."""

import asyncio
import random
import threading

import pytest
import tiny
import torch
import transformers

from engine_lib.base import EngineConfig, EngineError, Request, check_requests
from engine_lib.transformers_engine import TransformersEngine, default_batch_tokens


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    return tiny.save_generator(tmp_path_factory.mktemp("generator"))


def with_engine(generator, main, kind=TransformersEngine, **settings):
    async def run():
        engine = kind(EngineConfig(str(generator), 264), **settings)
        try:
            return await main(engine)
        finally:
            await engine.close()

    return asyncio.run(run())


def texts(replies):
    """What is said, without what it cost: whether a prompt was shared depends on the batch."""
    return [(reply.token_ids, reply.finish_reason, reply.prompt_tokens) for reply in replies]


def some_requests(count: int) -> list[Request]:
    rng = random.Random(3)
    return [
        Request(
            [rng.randrange(256) for _ in range(rng.randint(1, 12))], rng.randint(1, 15), rng.choice([0, 0.6, 1.0]),
            rng.choice([0.5, 0.95, 1.0]), tuple(rng.sample(range(256), rng.choice([0, 20]))), seed=i,
        )
        for i in range(count)
    ]  # fmt: skip


def test_a_reply_does_not_depend_on_its_neighbours(generator):
    requests = some_requests(24)

    async def main(engine):
        together = await engine.generate(requests)
        apart = [(await engine.generate([request]))[0] for request in requests]
        pieces = await asyncio.gather(*(engine.generate(requests[i : i + 5]) for i in range(0, 24, 5)))
        return together, apart, [reply for piece in pieces for reply in piece]

    together, apart, pieces = with_engine(generator, main)
    assert texts(together) == texts(apart) == texts(pieces)
    assert {reply.finish_reason for reply in together} == {"stop", "length"}


def test_replies_keep_the_rules_of_the_interface(generator):
    requests = some_requests(24)
    for request, reply in zip(requests, with_engine(generator, lambda e: e.generate(requests)), strict=True):
        assert reply.prompt_tokens == len(request.prompt_ids)
        assert 1 <= len(reply.token_ids) <= request.max_new_tokens
        assert not set(reply.token_ids[:-1]) & set(request.stop_ids)
        ends_with_stop = reply.token_ids[-1] in request.stop_ids
        assert reply.finish_reason == ("stop" if ends_with_stop else "length")
        assert ends_with_stop or len(reply.token_ids) == request.max_new_tokens


def test_continuations_of_one_prompt_read_it_once_and_stay_what_they_were(generator):
    requests = [
        Request(prompt, 9, 0.8, 0.9, (7, 8), seed)
        for seed, prompt in enumerate([[5, 6, 7, 8, 9, 10]] * 4 + [[1, 2, 3]] * 3 + [[4]])
    ]
    read = []

    async def main(engine):
        apart = [(await engine.generate([request]))[0] for request in requests]
        hook = engine.model.model.embed_tokens.register_forward_pre_hook(lambda m, args: read.append(args[0].shape))
        together = await engine.generate(requests)
        hook.remove()
        return together, apart

    together, apart = with_engine(generator, main)
    assert texts(together) == texts(apart)
    assert [reply.cached_tokens for reply in together] == [0, 5, 5, 5, 0, 2, 2, 0]
    assert read[0] == (3, 5)  # three different prompts, all but their last token
    assert all(shape == (8, 1) for shape in read[1:])


def test_greedy_equals_a_plain_loop(generator):
    model, prompt = tiny.tiny_generator(), [3, 1, 4, 1, 5]
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(12):
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
    request = Request(prompt, 12, temperature=0)
    (reply,) = with_engine(generator, lambda e: e.generate([request]))
    assert reply.token_ids == ids[5:]


def test_a_batch_that_does_not_fit_is_split(generator):
    requests = some_requests(24)
    whole = texts(with_engine(generator, lambda e: e.generate(requests)))
    assert texts(with_engine(generator, lambda e: e.generate(requests), max_batch_tokens=60)) == whole
    assert texts(with_engine(generator, lambda e: e.generate(requests), max_batch_rows=1)) == whole


def test_a_batch_is_as_large_as_its_device_has_room_for(generator, monkeypatch):
    """On a CPU it is short, so that an interruption does not wait; on a GPU it takes 30 % of what is free."""
    assert TransformersEngine(EngineConfig(str(generator), 264)).describe()["max_batch_tokens"] == 1 << 15
    assert TransformersEngine(EngineConfig(str(generator), 264), max_batch_tokens=99).max_batch_tokens == 99
    asked, free = [], 77 * 10**9
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: asked.append(device) or (free, 85 * 10**9))
    released = transformers.Qwen2Config(
        hidden_size=1536, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2
    )
    assert default_batch_tokens(released, torch.bfloat16, "cuda:1") == int(0.3 * free) // (28 * 2 * 2 * 128 * 2)
    assert asked == ["cuda:1"]
    free = 10**8  # a card that is full of something else: what does not fit is halved then
    assert default_batch_tokens(released, torch.bfloat16, "cuda") == 1 << 15


class SmallCard(TransformersEngine):
    """Has room for three rows."""

    def _run_batch(self, requests):
        if len(requests) > 3:
            raise torch.OutOfMemoryError("no room")
        return super()._run_batch(requests)


class Broken(TransformersEngine):
    def _run_batch(self, requests):
        raise RuntimeError("boom")


def test_out_of_memory_halves_the_batch_and_says_so(generator, caplog):
    requests = some_requests(8)
    whole = texts(with_engine(generator, lambda e: e.generate(requests)))
    assert texts(with_engine(generator, lambda e: e.generate(requests), SmallCard)) == whole
    assert "going on with 4" in caplog.text


def test_another_error_ends_its_requests_with_one_line(generator):
    with pytest.raises(EngineError, match="boom"):
        with_engine(generator, lambda e: e.generate(some_requests(2)), Broken)


def test_a_batch_ends_with_its_last_wanted_row(generator):
    """A cancelled request's row ends where it is; the others write what they had written alone."""

    async def main(engine):
        (alone,) = await engine.generate([Request([2], 40)])
        passes, begun = [], threading.Event()

        def count(*_):
            passes.append(1)
            if len(passes) > 3:
                begun.set()

        hook = engine.model.register_forward_pre_hook(count)
        short = asyncio.create_task(engine.generate([Request([2], 40)]))
        long = asyncio.create_task(engine.generate([Request([1], 2000)]))
        assert await asyncio.to_thread(begun.wait, 30)
        long.cancel()
        (reply,) = await short
        hook.remove()
        assert reply.token_ids == alone.token_ids and reply.finish_reason == "length"
        assert len(passes) < 1000
        assert (await engine.generate([Request([2], 40)]))[0].token_ids == alone.token_ids
        with pytest.raises(asyncio.CancelledError):
            await long

    with_engine(generator, main)


def test_cancelled_and_closed(generator):
    async def main(engine):
        long = asyncio.create_task(engine.generate([Request([1], 2000)]))
        waiting = asyncio.create_task(engine.generate([Request([2], 2000)] * 3))
        begun = threading.Event()
        engine.model.register_forward_pre_hook(lambda *_: begun.set())
        assert await asyncio.to_thread(begun.wait, 30)
        waiting.cancel()
        await engine.close()
        await engine.close()
        (reply,) = await long
        assert reply.finish_reason == "abort"
        with pytest.raises(EngineError, match="closed"):
            await engine.generate([Request([1], 1)])
        with pytest.raises(asyncio.CancelledError):
            await waiting

    with_engine(generator, main)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([], 1), "empty prompt"),
        (Request([1], 0), "0 new tokens"),
        (Request([264], 1), "token id 264 is outside the generator's vocabulary of 264"),
        (Request([-1], 1), "token id -1"),
        (Request([1] * 10, 7), "10 prompt tokens and 7 new ones is longer than the generator's context of 16"),
    ],
)
def test_what_would_crash_an_engine_is_refused(request_, message):
    with pytest.raises(ValueError, match=message):
        check_requests([request_], context_length=16, vocab_size=264)
