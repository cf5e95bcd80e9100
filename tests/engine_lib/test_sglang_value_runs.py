"""inference_eval.py with the value model on the real SGLang: its engine in the process, one and two servers, sglang-router.

The generator is the transformers engine, which draws by seeds, so that trees can be compared with those of local values.
Skipped where sglang is not installed: scripts/install_sglang_cpu.sh.
"""

import importlib.util
import json
import re
import time
from pathlib import Path

import pytest

if importlib.util.find_spec("sglang") is None:
    pytest.skip("sglang is not installed; bash scripts/install_sglang_cpu.sh FOLDER does it", allow_module_level=True)

import asyncio
import random

import kill_test
import tiny
from sglang_host import SGLANG_ARGS, wait_until
from simulated import simple_generate

import inference_eval
from classifier_lib import ValueScorer
from common_lib.models import inspect_model
from engine_lib.sglang_value_remote import SGLangValueServers
from engine_lib.value_base import ValueConfig
from search_lib.scorers import ScorerThread
from search_lib.search import search
from search_lib.served_scorer import ServedScorer
from search_lib.tree import SearchConfig, SearchTask

PROBLEMS, REPETITIONS = 4, 2
CLOSE = 1e-5  # values that are closer may be ranked otherwise
SAMPLED = ["--engine", "transformers", "--device", "cpu", "--temperature", "0.6"]
IN_PROCESS = ["--value_engine", "sglang", "--value_sglang_args", "max_running_requests=64"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Flags that name tiny models and a benchmark."""
    flags = kill_test.make_inputs(tmp_path_factory.mktemp("inputs"), problems=PROBLEMS)
    return [*flags, "--max_length", "40", "--num_repetitions", str(REPETITIONS)]


@pytest.fixture(scope="module")
def value_model(inputs):
    return Path(inputs[inputs.index("--classifier_ckpt_path") + 1])


@pytest.fixture(scope="module")
def servers(host, value_model):
    """Two, up."""
    two = [host.value_server(value_model) for _ in range(2)]
    for server in two:
        wait_until(server.is_up, 120, server)
    return two


@pytest.fixture(scope="module")
def router(host, servers):
    router = host.router(servers)
    wait_until(lambda: router.serves(2), 120, router)
    return router


@pytest.fixture(scope="module")
def local(inputs, tmp_path_factory):
    """What a run with local values writes, at temperature 0.6 (sampled) and at 0 (greedy)."""
    folder, outputs = tmp_path_factory.mktemp("local"), {}
    for name, temperature in (("sampled", "0.6"), ("greedy", "0")):
        outputs[name] = folder / f"{name}.jsonl"
        flags = [*inputs, *SAMPLED, "--temperature", temperature, "--output_path", str(outputs[name])]
        assert inference_eval.main(flags) == 0
    return outputs


def urls(*servers) -> list[str]:
    return ["--value_engine", "sglang-server", *(word for server in servers for word in ("--value_url", server.url))]


def run(host, inputs, output, *flags):
    return host.script("inference_eval.py", *inputs, "--output_path", output, *flags)


def finish(child) -> str:
    assert child.wait(120) == 0, child.output
    return child.output


def journal(output: Path) -> list[dict]:
    path = output.with_name(output.stem + ".tree.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def rounds_of(output: Path) -> dict[tuple[int, int], list[dict]]:
    searches = {}
    for row in journal(output):
        searches.setdefault((row["data_idx"], row["repeat_idx"]), []).append(row)
    return searches


def assert_same_trees(output: Path, reference: Path) -> None:
    """Round by round: the same candidates, values within CLOSE, and the same ones kept. From a round on whose last kept and
    first dropped values are closer than that, a search may go another way."""
    found, expected, compared = rounds_of(output), rounds_of(reference), 0
    assert found.keys() == expected.keys() and len(found) == REPETITIONS * PROBLEMS
    for key, rows in found.items():
        for row, other in zip(rows, expected[key], strict=False):
            for name in ("round", "parent", "tokens", "finish"):
                assert row[name] == other[name], (key, row["round"], name)
            assert row["value"] == pytest.approx(other["value"], abs=CLOSE)
            compared += 1
            if row["kept"] != other["kept"]:
                pairs = list(zip(other["value"], other["kept"], strict=True))
                kept, dropped = ([value for value, is_kept in pairs if is_kept is one] for one in (True, False))
                assert min(kept) - max(dropped) <= CLOSE
                break
        else:
            assert len(rows) == len(expected[key])
    assert compared > 0.9 * len(journal(reference))


def costs(output: Path) -> tuple[float, int, int]:
    """Tokens computed by the value model, as it counts them, for each token of prompts and responses; tokens read again, and
    in how many searches. Repetitions of a problem may share its prompt, and so cost less than they have."""
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    new = [row["prompt_tokens"] + row["tokens_generated"] for row in rows]
    assert all(row["tokens_scored"] - row["tokens_reread"] <= n for row, n in zip(rows, new, strict=True))
    again = [row["tokens_reread"] for row in rows]
    return sum(row["tokens_scored"] for row in rows) / sum(new), sum(again), sum(count > 0 for count in again)


# ---------------------------------------------------------------------------------------------------------------------
# The trees and values of the local scorer, and what they cost


@pytest.mark.parametrize("kind", ["one", "two", "router"])
def test_servers_give_the_trees_of_local_values(kind, inputs, local, servers, request, tmp_path):
    where = {
        "one": servers[:1],
        "two": servers,
        "router": [request.getfixturevalue("router")] if kind == "router" else [],
    }
    output = tmp_path / "out.jsonl"
    assert inference_eval.main([*inputs, *SAMPLED, "--output_path", str(output), *urls(*where[kind])]) == 0
    assert_same_trees(output, local["sampled"])
    a_token, reread, _ = costs(output)
    assert a_token <= 1.01 and reread == 0
    meta = json.loads((tmp_path / "out.meta.json").read_text())
    assert (meta["value_engine"]["name"], meta["numerics"]["value_engine"]) == ("sglang-server", "sglang")


def test_the_engine_in_the_process_gives_the_trees_of_local_values(host, inputs, local, tmp_path):
    output = tmp_path / "out.jsonl"
    said = finish(run(host, inputs, output, *SAMPLED, *IN_PROCESS, "max_total_tokens=16384"))
    assert_same_trees(output, local["sampled"])
    a_token, reread, _ = costs(output)
    assert a_token <= 1.01 and reread == 0
    assert "fp32 on cpu, by SGLang, which holds 16,384 tokens" in said
    assert re.search(
        r"^memory of cpu, .*: generator weights .*; value weights .*, value kv pool 0\.0", said, re.MULTILINE
    )
    assert "Traceback" not in said and "computed again" not in said


def test_a_pool_that_is_too_small_costs_what_is_reported_and_nothing_else(host, inputs, local, tmp_path):
    output = tmp_path / "out.jsonl"
    said = finish(run(host, inputs, output, *SAMPLED, *IN_PROCESS, "max_total_tokens=1000"))
    assert_same_trees(output, local["sampled"])
    a_token, reread, searches = costs(output)
    assert a_token > 1.1 and reread > 500 and searches > 4
    assert re.search(
        r"cache holds 1,000 tokens, and 8 searches want \d,\d{3} at once, .* give --batch_size \d, or", said
    )


def test_random_blocks_give_the_trees_of_local_values(value_model, servers):
    """Blocks that no generator has written, of many searches at once."""
    info = inspect_model(value_model, "--classifier_ckpt_path")
    config = ValueConfig(info.path, info.vocab_size, info.num_labels, urls=tuple(server.url for server in servers))
    tasks = [SearchTask(i, 0, tuple(random.Random(i).choices(range(2, 99), k=20 + 5 * i))) for i in range(12)]

    async def trees(scorer):
        generate, shape = simple_generate(shuffle=random.Random(1)), SearchConfig(3, 2, 12, 48)
        try:
            return await asyncio.gather(*(search(task, generate, scorer, shape) for task in tasks))
        finally:
            await scorer.close()

    async def served():
        return await trees(ServedScorer(SGLangValueServers(config), config))

    expected = asyncio.run(trees(ScorerThread(ValueScorer(tiny.tiny_value_model(), 1 << 26))))
    for result, other in zip(asyncio.run(served()), expected, strict=True):
        tree = result.tree
        assert (tree.tokens, tree.beams) == (
            other.tree.tokens,
            other.tree.beams,
        )  # no two of these values are too close
        assert tree.value[1:] == pytest.approx(other.tree.value[1:], abs=CLOSE)
        # Each token is computed once, and hardly any twice; single tokens may be shared by chance.
        new = len(tree.prompt_ids) + sum(map(len, tree.tokens))
        assert new - 20 < result.total("tokens_scored") <= 1.01 * new
        assert other.total("tokens_scored") == new


# ---------------------------------------------------------------------------------------------------------------------
# Lost servers and engines


def test_one_of_two_value_servers_killed_in_mid_run_and_restarted(host, inputs, value_model, local, servers, tmp_path):
    output = tmp_path / "out.jsonl"
    child = run(host, inputs, output, *SAMPLED, "--batch_size", "2", *urls(*servers))
    wait_until(lambda: len(journal(output)) >= 3, 90, child)  # while much is left
    servers[0].kill()
    servers[0] = host.value_server(value_model, port=servers[0].port)
    said = finish(child)
    assert f"lost {servers[0].url}" in said and "value servers left" in said
    assert_same_trees(output, local["sampled"])
    wait_until(servers[0].is_up, 60, servers[0])


def test_all_value_servers_gone_is_one_line_in_time_and_the_same_command_goes_on(
    host, inputs, value_model, local, servers, tmp_path
):
    output = tmp_path / "out.jsonl"
    flags = [*SAMPLED, "--batch_size", "1", "--request_timeout", "8", *urls(*servers)]
    child = run(host, inputs, output, *flags)
    wait_until(lambda: len(journal(output)) >= 3, 90, child)  # while much is left
    family = child.family()
    for process in family:  # or it ends before both are gone
        process.suspend()
    for server in servers:
        server.kill()
    for process in family:
        process.resume()
    begin = time.monotonic()
    assert child.wait(30) == 1
    assert time.monotonic() - begin < 12
    last = child.output.strip().splitlines()[-1]
    assert re.fullmatch(
        r"error: all SGLang servers have been out of reach for 8 s .*\(--value_url\) .*; the same command goes on\)",
        last,
    )
    assert "Traceback" not in child.output
    servers[0] = host.value_server(value_model, port=servers[0].port)
    wait_until(servers[0].is_up, 60, servers[0])
    said = finish(run(host, inputs, output, *flags))
    assert "does not answer" in said and "going on" in said
    assert_same_trees(output, local["sampled"])


def test_generator_and_value_engine_in_one_process_die_apart_and_the_right_one_is_named(host, inputs, local, tmp_path):
    """At temperature 0 the generator of SGLang writes what that of transformers does. The same command goes on each time."""
    output = tmp_path / "out.jsonl"
    flags = ["--temperature", "0", "--batch_size", "3", *SGLANG_ARGS, *IN_PROCESS, "max_total_tokens=16384"]
    for number, name in enumerate(("SGLang generator engine", "SGLang value engine")):
        before, child = len(journal(output)), run(host, inputs, output, *flags)
        wait_until(lambda before=before: len(journal(output)) >= before + 8, 90, child)
        family = child.family()
        schedulers = sorted((p for p in family if p.name().startswith("sglang::sched")), key=lambda p: p.create_time())
        assert len(schedulers) == 2  # the generator's is the first
        schedulers[number].kill()
        assert child.wait(30) == 1
        last = child.output.strip().splitlines()[-1]
        assert re.fullmatch(rf"error: the {name} died: .*; the same command goes on\)", last), child.output
        wait_until(lambda family=family: not any(process.is_running() for process in family), 10)
    said = finish(run(host, inputs, output, *flags))
    assert re.search(
        r"^memory of cpu, .*: generator weights .*, kv pool .*; value weights .*, value kv pool ", said, re.MULTILINE
    )
    kill_test.compare(output, local["greedy"], CLOSE)
