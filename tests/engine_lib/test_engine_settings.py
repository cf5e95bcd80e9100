"""Every field of EngineConfig and of a request, at the engine that takes it: the transformers engine against a plain loop."""

import asyncio
import dataclasses
import json

import pytest
import tiny
import torch
import transformers
from fake_sglang import FakeServer
from plain_sampling import draw, uniform
from test_sglang_wire import command_line

from common_lib.cli import UserError
from engine_lib import transformers_engine
from engine_lib.base import EngineConfig, EngineError, Reply, Request
from engine_lib.choose import make_engine
from engine_lib.sglang_remote import SGLangServerEngine
from engine_lib.sglang_wire import engine_settings, same_model, sampling_params, to_reply
from engine_lib.transformers_engine import TransformersEngine

PROMPT = [7, 3, 100, 3, 41]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Its generation config has sampling defaults of its own, which must not leak in."""
    folder = tiny.save_generator(tmp_path_factory.mktemp("generator"))
    own = {"temperature": 0.1, "top_k": 2, "do_sample": True, "repetition_penalty": 3.0, "eos_token_id": 5}
    (folder / "generation_config.json").write_text(json.dumps(own))
    return folder


@pytest.fixture(scope="module")
def model():
    return tiny.tiny_generator()


def ask(folder, requests, **settings):
    async def run():
        engine = TransformersEngine(EngineConfig(str(folder), 264), **settings)
        try:
            return await engine.generate(requests)
        finally:
            await engine.close()

    return asyncio.run(run())


def plain(model, request: Request) -> Reply:
    """One forward pass of the whole text for each token, drawn in numpy."""
    ids, reason = list(request.prompt_ids), "length"
    for step in range(request.max_new_tokens):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1].numpy()
        ids.append(draw(logits, request.temperature, request.top_p, uniform(request.seed, step)))
        if ids[-1] in request.stop_ids:
            reason = "stop"
            break
    return Reply(ids[len(request.prompt_ids) :], reason, len(request.prompt_ids))


def texts(replies):
    return [(reply.token_ids, reply.finish_reason, reply.prompt_tokens) for reply in replies]


REQUESTS = {
    "greedy": {"temperature": 0.0},
    "cold": {"temperature": 0.3},
    "hot": {"temperature": 1.5},
    "narrow": {"top_p": 0.4},
    "wide": {"top_p": 1.0},
    "another seed": {"seed": 12},
    "a large seed": {"seed": 2**31 - 1},
    "longer": {"max_new_tokens": 19},
    "one token": {"max_new_tokens": 1},
    "another prompt": {"prompt_ids": [9, 9, 250]},
}


@pytest.mark.parametrize("name", REQUESTS)
def test_every_field_of_a_request_acts_as_in_a_plain_loop(name, folder, model):
    base = Request(PROMPT, 14, temperature=0.8, top_p=0.9, seed=11)
    request = dataclasses.replace(base, **REQUESTS[name])
    (reply,) = ask(folder, [request])
    assert texts([reply]) == texts([plain(model, request)])
    assert reply.token_ids != plain(model, base).token_ids, "the value makes no difference"


def test_each_row_of_a_batch_keeps_its_own_settings(folder, model):
    """All at once, with further stop tokens: the second, the first and none of them end a text."""
    base = Request(PROMPT, 14, temperature=0.8, top_p=0.9, seed=11)
    requests = [dataclasses.replace(base, **changes) for changes in REQUESTS.values()]
    tokens = plain(model, base).token_ids
    first = [tokens.index(token) for token in (tokens[3], tokens[9])]
    requests += [
        dataclasses.replace(base, stop_ids=stops)
        for stops in ((tokens[3],), (263, tokens[9]), (tokens[9], tokens[3], 262), (261, 263))
    ]
    expected = [plain(model, request) for request in requests]
    assert [len(reply.token_ids) for reply in expected[-4:]] == [first[0] + 1, first[1] + 1, min(first) + 1, 14]
    assert texts(ask(folder, requests)) == texts(expected)
    assert texts(ask(folder, requests[::-1], max_batch_rows=3)) == texts(expected[::-1])


def test_a_stop_token_of_another_row_stops_nothing(folder, model):
    one = Request(PROMPT, 9, temperature=0)
    tokens = plain(model, one).token_ids
    stopped = dataclasses.replace(one, stop_ids=(tokens[4],))
    assert [reply.finish_reason for reply in ask(folder, [one, stopped])] == ["length", "stop"]


def test_no_more_rows_and_tokens_in_a_batch_than_are_allowed(folder):
    batches = []

    class Noting(TransformersEngine):
        def _run_batch(self, requests):
            batches.append([len(r.prompt_ids) + r.max_new_tokens for r in requests])
            return super()._run_batch(requests)

    async def run(**settings):
        batches.clear()
        engine = Noting(EngineConfig(str(folder), 264), **settings)
        await engine.generate([Request([1] * n, 4) for n in (2, 2, 2, 8, 2, 2, 40, 2)])
        await engine.close()
        return batches[:]

    assert asyncio.run(run(max_batch_rows=3)) == [[6, 6, 6], [12, 6, 6], [44, 6]]
    assert asyncio.run(run(max_batch_tokens=36)) == [[6, 6, 6], [12, 6, 6], [44], [6]]  # rows x the longest


# ---------------------------------------------------------------------------------------------------------------------
# EngineConfig, field by field

BASE = EngineConfig(model_path="folder", vocab_size=9)


def sglang_settings(**changes):
    return engine_settings(dataclasses.replace(BASE, **changes), command_line)


LOCAL = {  # field -> value, the setting of sgl.Engine that it becomes
    "model_path": ("other", {"model_path": "other"}),
    "device": ("cuda:2", {"device": "cuda", "base_gpu_id": 2, "dtype": "bfloat16"}),
    "gpu_share": (0.77, {"mem_fraction_static": 0.77}),
    "seed": (42, {"random_seed": 42}),
    "deterministic": (True, {"enable_deterministic_inference": True}),
    "seeded": (True, {"enable_custom_logit_processor": True}),
    "sglang_args": (("tp_size=2",), {"tp_size": 2}),
}
ELSEWHERE = {  # what sgl.Engine is not made with -> the test that sees it act
    "vocab_size": "test_requests_are_checked_against_the_vocabulary_and_the_context",
    "attention": "test_the_transformers_engine_loads_what_it_is_told",
    "gpu_share_given": "test_a_share_of_the_gpu_that_nobody_takes_is_said",
    "samples": "test_sglang_ignores_seeds_unless_it_is_told_to_keep_to_them",
    "request_timeout_s": "test_the_time_limit_of_a_request",
    "groups_at_once": "test_few_searches_for_many_servers_are_said",
    "requests_at_once": "test_decode_graphs_reach_as_far_as_requests_are_asked_at_once",
    "sglang_urls": "test_servers_are_asked_with_their_key_and_each_url_once",
    "model_flag": "test_a_server_of_something_else_is_refused_before_the_generator_is_loaded",
    "url_flag": "test_no_server_at_all_names_the_flag",
}


def test_every_field_is_tested():
    assert {field.name for field in dataclasses.fields(EngineConfig)} == LOCAL.keys() | ELSEWHERE.keys()


@pytest.mark.parametrize("field", LOCAL)
def test_what_the_sglang_engine_is_made_with(field):
    value, expected = LOCAL[field]
    more = {"device": "cuda"} if field == "deterministic" else {}
    before, after = sglang_settings(**more), sglang_settings(**more | {field: value})
    assert expected.items() <= after.items()
    assert not expected.items() & before.items() or field == "sglang_args"
    assert all(after[name] == before[name] for name in before if name not in expected and field != "device")


def test_a_setting_of_ours_gives_way_to_the_users():
    assert sglang_settings(sglang_args=("tp-size=1", "schedule-policy=lpm"))["schedule_policy"] == "lpm"
    assert sglang_settings(gpu_share=0.5)["skip_tokenizer_init"] is True
    assert sglang_settings(device="cuda")["base_gpu_id"] == 0


@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.float32), ("cuda:1", torch.bfloat16)])
def test_the_transformers_engine_loads_what_it_is_told(device, dtype, folder, monkeypatch):
    loaded = []

    class Model(torch.nn.Module):
        config = transformers.Qwen2Config(max_position_embeddings=77)

        def get_input_embeddings(self):
            return torch.nn.Embedding(9, 2)

        def to(self, where):
            loaded.append(where)
            return self

    def load(path, **settings):
        loaded.append((path, settings))
        return Model()

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    asked = []
    monkeypatch.setattr(
        transformers_engine, "resolve_attn_implementation", lambda *given: asked.append(given) or "eager"
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9, 2 * 10**9))
    config = EngineConfig(model_path="there", vocab_size=9, device=device, attention="sdpa")
    engine = make_engine("transformers", config)
    assert loaded == [("there", {"dtype": dtype, "attn_implementation": "eager"}), device]
    assert asked == [("sdpa", dtype, device, "generator")]
    assert (engine.context_length, engine.vocab_size) == (77, 9)
    assert engine.describe()["device"] == device and engine.describe()["dtype"] == str(dtype).removeprefix("torch.")


def test_requests_are_checked_against_the_vocabulary_and_the_context(folder):
    for request, message in ((Request([264], 1), "vocabulary of 264"), (Request([1] * 2000, 49), "context of 2048")):
        with pytest.raises(ValueError, match=message):
            ask(folder, [request])


# ---------------------------------------------------------------------------------------------------------------------
# What is said to SGLang, and how its answers are read


@pytest.mark.parametrize(
    ("field", "value", "name", "expected"),
    [
        ("max_new_tokens", 33, "max_new_tokens", 33),
        ("temperature", 0.25, "temperature", 0.25),
        ("top_p", 0.35, "top_p", 0.35),
        ("stop_ids", (8, 9, 10), "stop_token_ids", [8, 9, 10]),
        ("seed", 99, "sampling_seed", 99),
    ],
)
def test_a_field_of_a_request_is_sent(field, value, name, expected):
    base = Request([1, 2], 7, temperature=0.6, top_p=0.95, stop_ids=(4, 5), seed=11)
    before, after = (sampling_params(r, True) for r in (base, dataclasses.replace(base, **{field: value})))
    assert after[name] == expected != before[name]
    assert {key for key in after if after[key] != before[key]} == {name}
    assert "sampling_seed" not in sampling_params(base, False)


def output(tokens, kind, **meta):
    return {"output_ids": tokens, "meta_info": {"finish_reason": {"type": kind}, "prompt_tokens": 12, **meta}}


def test_answers_are_read_field_by_field():
    request = Request([1, 2], 7, stop_ids=(4, 5))
    assert to_reply(request, output([9, 5], "stop", cached_tokens=3)) == Reply([9, 5], "stop", 12, 3)
    assert to_reply(request, output([9, 4], "stop", cached_tokens=None)) == Reply([9, 4], "stop", 12, 0)
    assert to_reply(request, output([9, 9], "length")) == Reply([9, 9], "length", 12, 0)
    for kind in ("abort", "something new"):
        assert to_reply(request, output([9], kind)).finish_reason == "abort"
    for tokens in ([], [4, 9]):  # it must be the last one
        with pytest.raises(EngineError, match="is not among the stop tokens"):
            to_reply(request, output(tokens, "stop"))


def test_names_of_one_model(tmp_path):
    hub = tmp_path / "models--owner--name/snapshots/abc"
    hub.mkdir(parents=True)
    assert same_model(str(hub), hub) and same_model("owner/name", hub)
    assert not same_model("owner/other", hub) and not same_model(str(tmp_path), hub)


def test_servers_are_asked_with_their_key_and_each_url_once(folder, monkeypatch):
    monkeypatch.setenv("SGLANG_API_KEY", "the-key")
    seen = []

    class Noting(FakeServer):
        def answer(self, method, path, body, headers):
            seen.append((path, headers.get("Authorization")))
            return super().answer(method, path, body, headers)

    one, two = Noting(), FakeServer(max_req_input_len=500)
    try:
        urls = (one.url, one.url, two.url)
        engine = SGLangServerEngine(EngineConfig(str(folder), 264, sglang_urls=urls, request_timeout_s=9.0))
        assert [server.url for server in engine.servers] == [one.url, two.url]
        assert seen == [(page, "Bearer the-key") for page in ("/health", "/server_info", "/model_info", "/server_info")]
        assert engine.context_length == 504  # the smaller one's
        told = engine.describe()
        assert told["urls"] == [one.url, two.url] and told["servers"][two.url]["longest"] == 504
        assert json.loads(json.dumps(told))["context_length"] == 504
    finally:
        one.kill()
        two.kill()


def test_a_servers_model_is_compared_with_the_configs_architecture(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    server = FakeServer()
    try:
        with pytest.raises(
            UserError, match=r"serves the-model, a Qwen2ForCausalLM; --piref_model .* is a LlamaForCausalLM"
        ):
            SGLangServerEngine(EngineConfig(str(tmp_path), 264, sglang_urls=(server.url,)))
    finally:
        server.kill()
