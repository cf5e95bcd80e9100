"""The value model on real SGLang servers, one, two, and sglang-router before them: values, cost, loss, and what is refused.

Skipped where sglang is not installed: scripts/install_sglang_cpu.sh.
"""

import importlib.util

import pytest

if importlib.util.find_spec("sglang") is None:
    pytest.skip("sglang is not installed; bash scripts/install_sglang_cpu.sh FOLDER does it", allow_module_level=True)

import asyncio
import random
from dataclasses import replace

import tiny
import torch
from sglang_host import wait_until

from common_lib.cli import UserError
from common_lib.models import inspect_model
from engine_lib.base import EngineError
from engine_lib.retry import RetryPolicy
from engine_lib.server_pool import Patience
from engine_lib.sglang_value_remote import SGLangValueServers
from engine_lib.value_base import ValueConfig
from engine_lib.value_check import check_values
from engine_lib.value_client import ValueClient

# The test's checkpoint has no number in its embedding. It comes first: a masked NaN is one on a CPU, so that the keys and
# values before it are none either, and stay in the cache.
NAN_TOKEN = 263
CHUNK = 64  # prompts of more tokens are computed in chunks


@pytest.fixture(scope="module")
def model():
    model = tiny.tiny_value_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[NAN_TOKEN] = float("nan")
    return model


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("value_model")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def servers(host, folder):
    """Two, up."""
    two = [host.value_server(folder, chunked_prefill_size=CHUNK) for _ in range(2)]
    host.router(two)  # it starts beside them
    for server in two:
        wait_until(server.is_up, 120, server)
    return two


@pytest.fixture(scope="module")
def router(host, servers):
    router = host.children[2]
    wait_until(lambda: router.serves(2), 120, router)
    return router


@pytest.fixture(scope="module")
def plain(model):
    """Values of traces by a plain forward pass each."""

    def values(traces):
        with torch.inference_mode():
            return [model(torch.tensor([ids])).success_probs[0, -1].item() for ids in traces]

    return values


def config_of(folder, *urls, **settings) -> ValueConfig:
    info = inspect_model(folder, "--classifier_ckpt_path")
    return ValueConfig(
        info.path, info.vocab_size, info.num_labels, **({"urls": urls, "request_timeout_s": 60.0} | settings)
    )


def with_engine(config, main, patience=None):
    async def run():
        engine = SGLangValueServers(config, patience or Patience(retry=RetryPolicy(3, 0.05)))
        try:
            async with asyncio.timeout(120):
                return await main(engine)
        finally:
            await engine.close()

    return asyncio.run(run())


def tokens(rng, count) -> list[int]:
    return [rng.randrange(NAN_TOKEN) for _ in range(count)]


@pytest.mark.parametrize("kind", ["one", "two", "router"])
def test_values_are_a_forward_passs_and_cost_what_is_new(folder, servers, plain, request, kind):
    """Searches at once, of two rounds each, their prompts sent first. Prompts are longer than a chunk."""
    urls = {
        "one": lambda: [servers[0].url], "two": lambda: [s.url for s in servers],
        "router": lambda: [request.getfixturevalue("router").url],
    }[kind]()  # fmt: skip
    rng = random.Random(kind)

    async def search(engine, group):
        prompt = tokens(rng, 150)
        (first,) = await engine.values([prompt], group)
        beams, traces, valued, new = [prompt], [prompt], [first], [150]
        for _ in range(2):
            candidates = [beam + tokens(rng, length) for beam in beams for length in (20, 20, 7)]
            valued += await engine.values(candidates, group)
            traces, new, beams = traces + candidates, [*new, *[20, 20, 7] * len(beams)], candidates[:2]
        assert [one.value for one in valued] == pytest.approx(plain(traces), abs=1e-5)
        assert [one.tokens_computed for one in valued] == new

    async def main(engine):
        await check_values(engine, engine.config)
        await asyncio.gather(*(search(engine, f"{kind} {i}") for i in range(4)))

    with_engine(config_of(folder, *urls), main)


def test_one_of_two_is_killed_in_mid_use_and_used_again(host, folder, servers, router, plain):
    """All values come, and are right, through a router too; its groups move and stay, new ones go to who is back."""
    rng = random.Random(5)
    traces = [tokens(rng, 60) for _ in range(12)]
    expected = plain(traces)

    async def round_and_round(engine, i, done, group=""):
        while not done.is_set():
            (one,) = await engine.values([traces[i]], group or f"{i}")
            assert one.value == pytest.approx(expected[i], abs=1e-5)
            await asyncio.sleep(0.02)

    async def main(engine):
        done, routed = asyncio.Event(), SGLangValueServers(config_of(folder, router.url))
        running = [asyncio.create_task(round_and_round(routed if i > 7 else engine, i, done)) for i in range(12)]
        await asyncio.sleep(0.5)
        await asyncio.to_thread(servers[0].kill)
        while engine.servers[0].up:
            await asyncio.sleep(0.05)
        servers[0] = await asyncio.to_thread(host.value_server, folder, servers[0].port, chunked_prefill_size=CHUNK)
        while not engine.servers[0].up:
            await asyncio.sleep(0.05)
        new = asyncio.create_task(round_and_round(engine, 0, done, group="new"))
        while not engine.servers[0].load:
            await asyncio.sleep(0.001)
        done.set()
        await new
        await asyncio.gather(*running)
        assert routed.servers[0].up
        await routed.close()

    with_engine(config_of(folder, *(server.url for server in servers)), main)


def test_bad_requests_are_one_line_and_the_server_goes_on(folder, servers, plain):
    trace = tokens(random.Random(1), 30)

    async def main(engine):
        assert engine.pool_tokens == 16384
        for bad in ([], [264], [-1], [3] * (engine.context_length + 1)):
            with pytest.raises(ValueError):
                await engine.values([trace, bad], "g")
        with pytest.raises(EngineError, match=r"failed 3 times .*NaN") as error:
            await engine.values([trace, [NAN_TOKEN, 6]], "g")
        assert "\n" not in str(error.value)
        (longest,) = await engine.values([[3] * engine.context_length], "g")
        assert longest.value == pytest.approx(plain([[3] * engine.context_length])[0], abs=1e-5)
        running = [asyncio.create_task(engine.values([tokens(random.Random(i), 2000)], "g")) for i in range(4)]
        await asyncio.sleep(0.02)
        for task in running:
            task.cancel()
        assert await asyncio.gather(*running, return_exceptions=True)
        (one,) = await engine.values([trace], "g")
        assert one.value == pytest.approx(plain([trace])[0], abs=1e-5)

    with_engine(config_of(folder, servers[1].url), main)


def test_nan_through_a_router_is_one_line(folder, router, plain):
    async def main(engine):
        with pytest.raises(EngineError, match="no numbers|NaN"):
            await engine.values([[NAN_TOKEN, 6]], "g")
        (one,) = await engine.values([[5, 6]], "g")
        assert one.value == pytest.approx(plain([[5, 6]])[0], abs=1e-5)

    with_engine(config_of(folder, router.url), main)


def test_values_at_positions_cached_or_not(servers, router, model):
    """Over several chunks; and again, where all of the trace but its last token is cached."""
    ids = tokens(random.Random(8), 3 * CHUNK + 17)
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).success_probs[0].tolist()
    client = ValueClient(servers[1].url)
    assert (client.vocab_size, client.num_labels) == (264, 3)
    assert client.values(ids[:100]) == pytest.approx([expected[99]], abs=1e-5)
    positions = [len(ids) - 1, 0, 63, 64, 99, 100, 101, 127, 150, 150]
    for _ in range(2):
        assert client.values(ids, positions) == pytest.approx([expected[p] for p in positions], abs=1e-5)
    with pytest.raises(UserError, match="is a router, which drops positions"):
        ValueClient(router.url).values(ids, [1])
    assert ValueClient(router.url).values(ids) == pytest.approx([expected[-1]], abs=1e-5)


# The start


def test_another_checkpoint_is_refused_by_its_values(folder, servers, tmp_path):
    other = tiny.save_value_model(tmp_path / "other", tokenizer=False, seed=9)
    with pytest.raises(UserError, match=f"and {other} gives .*another value model is served"):
        with_engine(config_of(other, servers[1].url), lambda engine: check_values(engine, engine.config))


def test_another_vocabulary_label_count_or_dtype_is_refused_by_name(folder, servers):
    config = config_of(folder, servers[1].url)
    for change, message in (
        ({"vocab_size": 300}, "with a vocabulary of 264; --classifier_ckpt_path .* has 300"),
        ({"num_labels": 1}, "with 3 labels; --classifier_ckpt_path .* has 1"),
        ({"dtype": "bf16"}, "computes in float32, and --value_dtype is bf16"),
    ):
        with pytest.raises(UserError, match=message):
            SGLangValueServers(replace(config, **change))


OTHER_MODEL = """
from sglang.srt.models.qwen2 import Qwen2ForCausalLM


class Qwen2ForClassifier(Qwen2ForCausalLM):
    pass


EntryClass = Qwen2ForClassifier
"""


def test_a_generators_checkpoint_and_packages_that_are_not_ours_are_refused(host, folder, generator_folder, tmp_path):
    """SGLang starts with the first and the second, and gives numbers; with a package that does not load it does not start."""

    def start(package, source):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
        (tmp_path / package / "model.py").write_text(source)
        environment = {"SGLANG_EXTERNAL_MODEL_PACKAGE": package, "PYTHONPATH": str(tmp_path)}
        return host.value_server(folder, environment=environment)

    generator = host.value_server(generator_folder)
    other, broken = start("other_value_model", OTHER_MODEL), start("broken_value_model", "import no_such_module\n")
    for server, message in (
        (generator, "a Qwen2ForCausalLM that embeds; --classifier_ckpt_path .* is a Qwen2ForClassifier"),
        (other, "has 32 numbers, and a value model of 3 labels writes 4: it serves another model, or the package"),
    ):
        wait_until(server.is_up, 120, server)
        with pytest.raises(UserError, match=f"^--value_url {server.url}:? .*{message}"):
            SGLangValueServers(config_of(folder, server.url))
        server.kill()
    wait_until(lambda: not broken.running, 60, broken)
    assert "'Qwen2ForClassifier' is not a registered model" in broken.output
