"""inference_eval.py through the real SGLang: the engine in its process, two HTTP servers, and sglang-router before them.

Servers are killed and started again in mid-run. Skipped where sglang is not installed: scripts/install_sglang_cpu.sh.
"""

import importlib.util
import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

if importlib.util.find_spec("sglang") is None:
    pytest.skip("sglang is not installed; bash scripts/install_sglang_cpu.sh FOLDER does it", allow_module_level=True)

import asyncio

import kill_test
import tiny
import torch
from sglang_host import SGLANG_ARGS, free_port, wait_until

from common_lib.cli import UserError
from common_lib.models import inspect_model, load_tokenizer
from engine_lib.base import EngineConfig, EngineError, Request
from engine_lib.served_vocabulary import check_vocabulary
from engine_lib.sglang_remote import SGLangServerEngine
from engine_lib.transformers_engine import TransformersEngine
from search_lib.search import select
from search_lib.tree import SearchConfig

PROBLEMS, REPETITIONS = 6, 3


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Flags that name tiny models and a benchmark."""
    return kill_test.make_inputs(tmp_path_factory.mktemp("inputs"), problems=PROBLEMS)


@pytest.fixture(scope="module")
def generator(inputs):
    return Path(inputs[inputs.index("--piref_model") + 1])


@pytest.fixture(scope="module")
def servers(host, generator):
    """Two, up. One has a tokenizer, as servers that are not started for this project have."""
    two = [host.server(generator), host.server(generator, skip_tokenizer_init=True)]
    for server in two:
        wait_until(server.is_up, 120, server)
    return two


@pytest.fixture(scope="module")
def router(host, servers):
    router = host.router(servers)
    wait_until(lambda: router.serves(2), 120, router)
    return router


@pytest.fixture(scope="module")
def greedy(inputs, tmp_path_factory):
    """What the transformers engine writes at temperature 0."""
    import inference_eval

    output = tmp_path_factory.mktemp("greedy") / "out.jsonl"
    assert (
        inference_eval.main([*inputs, "--engine", "transformers", "--temperature", "0", "--output_path", str(output)])
        == 0
    )
    return output


def run(host, inputs, output, *flags):
    return host.script("inference_eval.py", *inputs, "--output_path", output, *flags)


def finish(child) -> str:
    assert child.wait(120) == 0, child.output
    return child.output


def urls(*servers) -> list[str]:
    return [word for server in servers for word in ("--sglang_url", server.url)]


def new_engine(folder: Path, *servers: str, **settings) -> SGLangServerEngine:
    info = inspect_model(folder, "--piref_model")
    return SGLangServerEngine(EngineConfig(info.path, info.vocab_size, sglang_urls=servers, **settings))


def journal(output: Path) -> list[dict]:
    path = output.with_name(output.stem + ".tree.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def generator_tokens(output: Path) -> tuple[int, int]:
    """Prompt tokens that the generator was given, and how many of them came from its cache."""
    lengths, given = {}, 0
    for row in journal(output):
        nodes = lengths.setdefault((row["data_idx"], row["repeat_idx"]), [len(row.get("prompt_ids", []))])
        given += sum(nodes[parent] for parent in row["parent"])
        nodes += [nodes[parent] + len(tokens) for parent, tokens in zip(row["parent"], row["tokens"], strict=True)]
    return given, sum(row["tokens_cached"] for row in journal(output))


# What a collection asks servers of roll-in models


def test_vocabularies_are_told_apart(servers, generator, tmp_path):
    """Of a server that has a tokenizer and one that has not; by the number of ids, and by what they mean."""
    urls, tokenizer = [server.url for server in servers], load_tokenizer(generator, "--piref_model")
    asyncio.run(check_vocabulary(urls, tokenizer, 264, "M"))
    for size, word in ((263, "more"), (265, "fewer")):
        for url in urls:
            with pytest.raises(UserError, match=f"{url} has {word} token ids than the {size} of M"):
                asyncio.run(check_vocabulary([url], tokenizer, size, "M"))
    other = tiny.tiny_tokenizer()
    other.decode = lambda ids, **_: "".join(map(chr, ids))
    with pytest.raises(UserError, match=f"{urls[0]} has another tokenizer than M"):
        asyncio.run(check_vocabulary(urls, other, 264, "M"))


# Item 1 of the issue: the engine, two servers, and the router give what transformers gives


def test_greedy_runs_are_the_same_everywhere(host, inputs, greedy, servers, router, tmp_path):
    kinds = {"engine": SGLANG_ARGS, "servers": urls(*servers), "router": urls(router)}
    outputs = {kind: tmp_path / f"{kind}.jsonl" for kind in kinds}
    for kind, flags in kinds.items():
        said = finish(run(host, inputs, outputs[kind], "--temperature", "0", *flags))
        assert "pass@1" in said
        assert "Traceback" not in said
        (memory,) = [line for line in said.splitlines() if line.startswith("memory of cpu, ")]
        assert ("kv pool" in memory, "generator on its servers" in memory) == (kind == "engine", kind != "engine")
        kill_test.compare(outputs[kind], greedy, 1e-6)
        given, cached = generator_tokens(outputs[kind])
        assert cached > 0.6 * given, f"{kind}: {cached} of {given} prompt tokens came from the cache"
    meta = json.loads((tmp_path / "servers.meta.json").read_text())["engine"]
    assert [info["sglang"] for info in meta["servers"].values()] == ["0.5.23"] * 2
    assert [(info["dtype"], info["ranks"]) for info in meta["servers"].values()] == [("float32", 1)] * 2
    assert set(json.loads((tmp_path / "router.meta.json").read_text())["engine"]["servers"]) == {s.url for s in servers}


def test_a_sampled_run_replayed_through_a_plain_forward_pass(host, inputs, tmp_path):
    output = tmp_path / "out.jsonl"
    said = finish(run(host, inputs, output, "--temperature", "0.6", "--num_blocks", "4", *SGLANG_ARGS))
    assert "SGLang ignores seeds without --seeded: a second run will sample other tokens" in said
    model, trees = tiny.tiny_value_model(), {}
    for row in journal(output):
        nodes = trees.setdefault((row["data_idx"], row["repeat_idx"]), [row.get("prompt_ids")])
        nodes += [nodes[parent] + tokens for parent, tokens in zip(row["parent"], row["tokens"], strict=True)]
        with torch.no_grad():
            plain = [model(torch.tensor([ids])).success_probs[0, -1].item() for ids in nodes[-len(row["parent"]) :]]
        assert row["value"] == pytest.approx(plain, abs=1e-4)
        config = SearchConfig(2, 2, 8, 64)
        assert select(plain, sum(row["kept"]), config, None, row["round"]) == row["kept"]
    assert len(trees) == PROBLEMS * REPETITIONS
    for row in kill_test.read_run(output)[0]:
        row = json.loads(row)
        prompt, *nodes = trees[row["data_idx"], row["repeat_idx"]]
        assert all(prompt + ids in nodes for ids in row["generated_ids"])


# Faults of the engine in the process


def test_an_engine_killed_in_mid_run(host, inputs, greedy, tmp_path):
    """One line, an exit status, no process left; and the same command goes on to the same answers."""
    output = tmp_path / "out.jsonl"
    flags = ["--temperature", "0", "--batch_size", "3", *SGLANG_ARGS]
    child = run(host, inputs, output, *flags)
    wait_until(lambda: len(journal(output)) >= 10, 90, child)
    family = child.family()
    (scheduler,) = [process for process in family if process.name().startswith("sglang::sched")]
    scheduler.kill()
    assert child.wait(30) == 1
    last = child.output.strip().splitlines()[-1]
    assert re.fullmatch(r"error: the SGLang generator engine died: .*; the same command goes on\)", last), child.output
    wait_until(lambda: not any(process.is_running() for process in family), 10)
    done = len(journal(output))
    child = run(host, inputs, output, *flags)
    assert "going on" in finish(child)
    assert len(journal(output)) > done
    kill_test.compare(output, greedy, 1e-6)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_a_run_in_order(number, host, inputs, tmp_path):
    """SGLang would take SIGTERM for itself. A terminal sends SIGINT to its processes as well."""
    output = tmp_path / "out.jsonl"
    child = run(host, inputs, output, "--batch_size", "2", *SGLANG_ARGS)
    wait_until(lambda: len(journal(output)) >= 5, 90, child)
    family = child.family()
    if number == signal.SIGINT:
        os.killpg(child.pid, number)
    else:
        os.kill(child.pid, number)
    assert child.wait(30) == 128 + number
    assert "the same command goes on" in child.output.strip().splitlines()[-1]
    wait_until(lambda: not any(process.is_running() for process in family), 10)


def test_nothing_is_left_of_a_run_that_is_killed(host, inputs, tmp_path):
    child = run(host, inputs, tmp_path / "out.jsonl", *SGLANG_ARGS)
    wait_until(lambda: len(journal(tmp_path / "out.jsonl")) >= 3, 90, child)
    family = child.family()
    child.process.kill()
    wait_until(lambda: not any(process.is_running() for process in family), 30)


# Item 4 of the issue: servers that are lost


def test_one_of_two_servers_killed_in_mid_run_and_restarted(host, inputs, generator, greedy, servers, tmp_path):
    output = tmp_path / "out.jsonl"
    child = run(host, inputs, output, "--temperature", "0", "--batch_size", "2", *urls(*servers))
    wait_until(lambda: len(journal(output)) >= 8, 90, child)
    servers[0].kill()
    servers[0] = host.server(generator, port=servers[0].port)
    said = finish(child)
    assert f"lost {servers[0].url}" in said
    kill_test.compare(output, greedy, 1e-6)
    wait_until(servers[0].is_up, 60, servers[0])


def test_a_server_that_is_back_is_used_again(host, generator, servers):
    async def main():
        engine = new_engine(generator, *(server.url for server in servers))
        requests = [Request([i, 7], 12, temperature=0, group=f"{i}") for i in range(32)]
        expected = [
            reply.token_ids for reply in await TransformersEngine(EngineConfig(str(generator), 264)).generate(requests)
        ]
        home = servers[0]  # where the first group goes
        running = asyncio.create_task(
            engine.generate([Request([9, i], 1500, temperature=0, group="g") for i in range(6)])
        )
        await asyncio.to_thread(wait_until, lambda: running_requests(home) > 0, 20)
        await asyncio.to_thread(home.kill)
        assert [len(reply.token_ids) for reply in await running] == [1500] * 6
        assert [reply.token_ids for reply in await engine.generate(requests)] == expected
        servers[0] = await asyncio.to_thread(host.server, generator, home.port)
        while not engine.servers[0].up:
            await asyncio.sleep(0.1)
        running = asyncio.create_task(engine.generate(requests))
        await asyncio.sleep(0.01)
        assert engine.servers[0].load > 0, "it is to take its share of the groups that fled"
        assert [reply.token_ids for reply in await running] == expected
        await engine.close()

    asyncio.run(asyncio.wait_for(main(), 120))


def test_searches_stay_on_one_data_parallel_rank_of_a_server(host, generator):
    """Left to itself it goes from rank to rank, so that every second request of a search is read again."""
    server = host.server(generator, dp_size=2)
    wait_until(server.is_up, 120, server)

    async def main():
        engine = new_engine(generator, server.url)
        assert engine.describe()["servers"][server.url]["ranks"] == 2
        cached = []
        for _ in range(2):
            for group in range(3):
                request = Request([group + 1] * 60, 4, temperature=0, group=f"{group}/0")
                cached.append((await engine.generate([request]))[0].cached_tokens)
        ranks = [rank for _, rank in (entry.place for entry in engine._placement._groups.values())]
        await engine.close()
        return cached, ranks

    cached, ranks = asyncio.run(asyncio.wait_for(main(), 60))
    server.kill()
    assert cached == [0, 0, 0, 59, 59, 59]
    assert sorted(ranks) in ([0, 0, 1], [0, 1, 1])


def test_a_router_survives_one_of_its_servers(host, generator, servers, router):
    async def main():
        wait_until(lambda: sum(w["is_healthy"] for w in router.get("workers")["workers"]) == 2, 60, router)
        engine = new_engine(generator, router.url, request_timeout_s=100)
        running = asyncio.create_task(
            engine.generate([Request([3, i], 1000, temperature=0, group=f"{i}") for i in range(8)])
        )
        await asyncio.to_thread(wait_until, lambda: sum(map(running_requests, servers)) == 8, 20)
        await asyncio.to_thread(servers[0].kill)
        replies = await running
        await engine.close()
        return replies

    assert [len(reply.token_ids) for reply in asyncio.run(main())] == [1000] * 8
    servers[0] = host.server(generator, port=servers[0].port)
    wait_until(servers[0].is_up, 60, servers[0])


def test_all_servers_gone_is_one_line_in_time_and_the_same_command_goes_on(
    host, inputs, generator, greedy, servers, tmp_path
):
    output = tmp_path / "out.jsonl"
    flags = ["--temperature", "0", "--batch_size", "3", "--request_timeout", "8", *urls(*servers)]
    child = run(host, inputs, output, *flags)
    wait_until(lambda: len(journal(output)) >= 8, 90, child)
    for server in servers:
        server.kill()
    begin = time.monotonic()
    assert child.wait(30) == 1
    assert time.monotonic() - begin < 12
    last = child.output.strip().splitlines()[-1]
    assert re.fullmatch(
        r"error: all SGLang servers have been out of reach for 8 s .*; the same command goes on\)", last
    ), last
    assert "Traceback" not in child.output
    child = run(host, inputs, output, *flags)  # nobody is there at the start
    assert child.wait(60) == 1
    assert "error: no SGLang server answers" in child.output
    servers[0] = host.server(generator, port=servers[0].port)
    wait_until(servers[0].is_up, 60, servers[0])
    assert "does not answer" in finish(run(host, inputs, output, *flags))
    kill_test.compare(output, greedy, 1e-6)


def test_a_server_of_another_model_is_refused(generator, servers, tmp_path):
    config = json.loads((generator / "config.json").read_text()) | {"architectures": ["LlamaForCausalLM"]}
    for file in generator.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"Qwen2ForCausalLM; --piref_model .* is a LlamaForCausalLM"):
        new_engine(tmp_path, servers[0].url)
    with pytest.raises(UserError, match="--enable-deterministic-inference"):
        new_engine(generator, servers[0].url, deterministic=True)
    with pytest.raises(EngineError, match="no SGLang server answers"):
        new_engine(generator, f"http://127.0.0.1:{free_port()}")


def test_requests_that_nobody_waits_for_are_aborted(generator, servers):
    """On the server: after `close` it soon runs nothing."""

    async def main():
        engine = new_engine(generator, servers[0].url)
        running = asyncio.create_task(engine.generate([Request([3, i], 2040) for i in range(8)]))
        await asyncio.to_thread(wait_until, lambda: running_requests(servers[0]) == 8, 20)
        await engine.close()
        with pytest.raises(EngineError, match="closed"):
            await running

    asyncio.run(main())
    wait_until(lambda: running_requests(servers[0]) == 0, 5)


def running_requests(server) -> int:
    return sum(load["num_running_reqs"] + load["num_waiting_reqs"] for load in server.get("v1/loads")["loads"])
