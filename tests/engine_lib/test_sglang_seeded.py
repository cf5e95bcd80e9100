"""--seeded through the real SGLang on a CPU: the same seeds give the same tokens, in any order and batching, everywhere.

What they are compared with is the transformers engine. Skipped where sglang is not installed: scripts/install_sglang_cpu.sh.
"""

import asyncio
import dataclasses
import importlib.util
import json
import os
import random
import subprocess
import sys

import pytest

if importlib.util.find_spec("sglang") is None:
    pytest.skip("sglang is not installed; bash scripts/install_sglang_cpu.sh FOLDER does it", allow_module_level=True)

import kill_test
import numpy as np
import tiny
import torch
from sglang_host import CPU_FLAGS, ENVIRONMENT, SGLANG_ARGS, Server, free_port, wait_until

from common_lib.cli import UserError
from engine_lib import seeded, sglang_local
from engine_lib.base import EngineConfig, EngineError, Request
from engine_lib.choose import make_engine
from engine_lib.retry import RetryPolicy
from engine_lib.sampling import row_uniforms, sample_rows
from engine_lib.sglang_remote import Patience, SGLangServerEngine
from engine_lib.transformers_engine import TransformersEngine

COUNT, NEW = 64, 64
STOPS = (5, 77, 200, 256)
EQUAL = 62  # of 64; the others must be explained by rounding
BATCHINGS = [(1, COUNT), (2, 16), (3, 5)]  # seed of the order, requests at once


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_generator(tmp_path_factory.mktemp("generator"))


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    """Of many lengths, temperatures and nuclei; four at a time have one prompt."""
    rng = random.Random(0)
    prompts = [[rng.randrange(256) for _ in range(rng.randint(1, 40))] for _ in range(COUNT // 4)]
    return [
        Request(
            prompts[i // 4], NEW, rng.choice([0.6, 0.8, 1.2]), rng.choice([0.9, 0.95, 1.0]), (), rng.randrange(2**31),
            group=f"{i // 4}",
        )
        for i in range(COUNT)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def expected(folder, requests) -> list[list[int]]:
    replies = asyncio.run(TransformersEngine(EngineConfig(str(folder), 264)).generate(requests))
    tokens = [reply.token_ids for reply in replies]
    assert len({tuple(ids) for ids in tokens}) == COUNT  # all distinct
    return tokens


def new_engine(folder, *sglang_args, pool=16384, **settings):
    sglang_args = (f"max_total_tokens={pool}", "max_running_requests=64", *sglang_args)
    config = EngineConfig(
        str(folder), 264, seed=1, seeded=True, request_timeout_s=120.0, sglang_args=sglang_args, **settings
    )
    return make_engine("sglang", config)


async def ask(engine, requests, order: int, at_once: int) -> list[list[int]]:
    """Their tokens: asked for one by one in that order, so many at once."""
    room, tokens = asyncio.Semaphore(at_once), {}
    numbers = list(range(len(requests)))
    random.Random(order).shuffle(numbers)

    async def one(number):
        async with room:
            (reply,) = await engine.generate([requests[number]])
        assert reply.prompt_tokens == len(requests[number].prompt_ids)
        tokens[number] = reply.token_ids

    await asyncio.gather(*map(one, numbers))
    return [tokens[number] for number in range(len(requests))]


def check(requests, tokens, expected) -> None:
    """At least EQUAL are equal, and where others part, the draw is so near a border that rounding decides."""
    other = [i for i in range(COUNT) if tokens[i] != expected[i]]
    assert COUNT - len(other) >= EQUAL, f"{len(other)} of {COUNT} differ"
    for i in other:
        step = next(at for at, (a, b) in enumerate(zip(tokens[i], expected[i], strict=False)) if a != b)
        ids = requests[i].prompt_ids + expected[i][:step]
        with torch.no_grad():
            logits = tiny.tiny_generator()(torch.tensor([ids])).logits[0, -1:]
        at = [torch.tensor([x], dtype=torch.float64) for x in (requests[i].temperature, requests[i].top_p)]
        uniform = row_uniforms(np.array([requests[i].seed]), step)
        near = {sample_rows(logits, *at, torch.as_tensor(uniform + nudge)).item() for nudge in (-1e-5, 0, 1e-5)}
        assert {tokens[i][step], expected[i][step]} <= near, f"request {i} parts at token {step}, far from a border"


@pytest.mark.parametrize("overlap", [True, False])
def test_any_order_and_batching_in_this_process(overlap, folder, fork, requests, expected):
    """With the overlap schedule too, as on GPUs: there a step is launched before the last token is known."""
    engine = new_engine(folder, f"disable_overlap_schedule={not overlap}")
    assert engine.describe()["seeded"] is True

    async def main():
        for order, at_once in BATCHINGS:
            check(requests, await ask(engine, requests, order, at_once), expected)
        await engine.close()

    asyncio.run(main())


@pytest.mark.parametrize("overlap", [True, False])
def test_retracted_requests_draw_again_what_they_had_drawn(overlap, folder, fork, requests, monkeypatch):
    """Where the cache is too small for all that run, SGLang throws some back and later reads again what they wrote.
    (Not those that nothing but their length ends: it makes room for them before.)"""
    requests = [dataclasses.replace(request, stop_ids=STOPS) for request in requests]
    replies = asyncio.run(TransformersEngine(EngineConfig(str(folder), 264)).generate(requests))
    retracted, to_reply = [], sglang_local.to_reply

    def note(request, output):
        retracted.append(output["meta_info"]["num_retractions"])
        return to_reply(request, output)

    monkeypatch.setattr(sglang_local, "to_reply", note)
    engine = new_engine(folder, f"disable_overlap_schedule={not overlap}", "schedule_conservativeness=0.01", pool=1000)

    async def main():
        check(requests, await ask(engine, requests, 4, COUNT), [reply.token_ids for reply in replies])
        await engine.close()

    asyncio.run(main())
    assert sum(count > 0 for count in retracted) >= 5, retracted


def test_a_prompt_that_is_read_in_chunks(folder, fork, requests):
    """Tokens that SGLang samples after a chunk in the middle of a prompt are none of the request's."""
    prompt = random.Random(5).choices(range(256), k=700)
    long = [Request(prompt[: 500 + 50 * i], 20, 0.9, 0.95, (), 77 + i) for i in range(4)]
    reference = asyncio.run(TransformersEngine(EngineConfig(str(folder), 264)).generate(long))
    engine = new_engine(folder, "chunked_prefill_size=64", "enable_mixed_chunk=true", "disable_overlap_schedule=false")

    async def main():
        busy = asyncio.create_task(engine.generate(requests[:8]))
        replies = await engine.generate(long)
        await busy
        await engine.close()
        return replies

    equal = [a.token_ids == b.token_ids for a, b in zip(asyncio.run(main()), reference, strict=True)]
    assert equal == [True] * 4


def test_a_draw_that_fails_ends_its_request_with_one_line_and_no_other(folder, fork, requests, expected, monkeypatch):
    engine = new_engine(folder)
    params = seeded.seeded_params

    def spoilt(request):
        made = params(request)
        return made | {"custom_params": made["custom_params"] | {"seed": -1}} if request.group == "bad" else made

    monkeypatch.setattr("engine_lib.sglang_wire.seeded_params", spoilt)

    async def main():
        bad = Request([1, 2], 9, 0.8, group="bad")
        with pytest.raises(EngineError, match=r"SGLang failed on a request: --seeded: a token could not be drawn \(Ov"):
            await engine.generate([bad])
        check(requests, await ask(engine, requests, 0, COUNT), expected)
        await engine.close()

    asyncio.run(main())


# Servers


def server_far_from_here(host, folder) -> Server:
    """Started in another folder, and as a user starts it: nothing of this project can be imported there."""
    port, log = free_port(), host.folder / "far.log"
    flags = [
        "--model-path",
        str(folder),
        "--port",
        str(port),
        "--log-level",
        "error",
        "--enable-custom-logit-processor",
    ]
    for name, value in CPU_FLAGS.items():
        if name != "disable_overlap_schedule":
            flags += [f"--{name.replace('_', '-')}", str(value)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | ENVIRONMENT
    found = "import importlib.util, sys; sys.exit(importlib.util.find_spec('engine_lib') is not None)"
    subprocess.run([sys.executable, "-c", found], cwd=host.folder, env=environment, check=True)
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "sglang.launch_server", *flags], cwd=host.folder, env=environment, stdout=output,
            stderr=output, process_group=0,
        )  # fmt: skip
    return host._add(Server(process.pid, log, port))


@pytest.fixture(scope="module")
def servers(host, folder):
    """Two of one model, one with the overlap schedule and one without; and one that takes no logit processors."""
    three = [
        server_far_from_here(host, folder),
        host.server(folder, enable_custom_logit_processor=True),
        host.server(folder),
    ]
    for server in three:
        wait_until(server.is_up, 400, server)  # one is imported anew
    return three


def of_servers(folder, *urls: str, **patience) -> SGLangServerEngine:
    config = EngineConfig(str(folder), 264, seeded=True, sglang_urls=urls, request_timeout_s=120.0)
    return SGLangServerEngine(config, Patience(**patience))


def test_any_order_and_batching_on_two_servers(folder, requests, expected, servers):
    async def main():
        engine = of_servers(folder, servers[0].url, servers[1].url)
        for order, at_once in BATCHINGS:
            check(requests, await ask(engine, requests, order, at_once), expected)
        assert all(server.up for server in engine.servers)
        await engine.close()

    asyncio.run(main())


def test_a_router_that_drops_the_sampler_is_refused(host, folder, servers):
    """Else every text would be greedy."""
    router = host.router(servers[:2])
    wait_until(lambda: router.serves(2), 120, router)
    with pytest.raises(UserError, match=f"^--seeded: {router.url} does not draw by seeds, as a router .* each server"):
        of_servers(folder, router.url)


def test_a_server_that_takes_no_logit_processors_is_refused(folder, servers):
    with pytest.raises(
        UserError, match=f"^--seeded: {servers[2].url} runs .*; start it with --enable-custom-logit-proc"
    ):
        of_servers(folder, servers[0].url, servers[2].url)


def test_a_draw_that_fails_on_a_server_is_one_line_and_the_server_lives(
    folder, requests, expected, servers, monkeypatch
):
    bad = {"temperature": 0.0, "top_p": 1.0, "custom_params": {"seed": "none"}}

    async def main():
        engine = of_servers(folder, servers[0].url, retry=RetryPolicy(attempts=2, pause_s=0.1))
        with monkeypatch.context() as patch:
            patch.setattr("engine_lib.sglang_wire.seeded_params", lambda request: bad)
            with pytest.raises(
                EngineError, match=r"failed 2 times on a request, .*500: --seeded: a token could not be"
            ):
                await engine.generate([requests[0]])
        check(requests, await ask(engine, requests, 9, COUNT), expected)
        await engine.close()

    asyncio.run(main())


# A whole run


def answers(output) -> dict:
    rows = map(json.loads, output.read_text().splitlines())
    return {(row["data_idx"], row["repeat_idx"]): (row["generated_ids"], row["processed_answer"]) for row in rows}


def test_two_runs_of_one_seed_at_other_batch_sizes(host, tmp_path):
    inputs = kill_test.make_inputs(tmp_path, problems=3)
    outputs = []
    for batch_size in ("1", "9"):
        outputs.append(tmp_path / f"{batch_size}.jsonl")
        flags = ["--temperature", "0.8", "--seeded", "--batch_size", batch_size, "--output_path", outputs[-1]]
        child = host.script("inference_eval.py", *inputs, *flags, *SGLANG_ARGS)
        assert child.wait(180) == 0, child.output
        assert "ignores seeds" not in child.output
    first, second = map(answers, outputs)
    assert len(first) == 9 and len({str(ids) for ids, _ in first.values()}) == 9
    assert first == second
    assert json.loads(outputs[0].with_name("1.meta.json").read_text())["engine"]["seeded"] is True
