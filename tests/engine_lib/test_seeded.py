"""--seeded without SGLang: what is sent to its scheduler, what that draws, and that nothing makes it raise."""

import ast
import json
import logging
import pickle
import subprocess
import sys
import weakref
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from fake_sglang import FakeServer, generated
from test_sglang_wire import settings

from common_lib.cli import UserError
from engine_lib import sampling
from engine_lib.base import EngineConfig, EngineError, Request
from engine_lib.sampling import SeededSampler, row_uniforms, sample_rows
from engine_lib.seeded import logit_processor
from engine_lib.sglang_remote import SGLangServerEngine
from engine_lib.sglang_wire import sampling_params

REQUEST = Request([1, 2], 7, temperature=0.6, top_p=0.95, stop_ids=(4, 5), seed=11)


class Record(SimpleNamespace):
    """SGLang's record of a request, as far as the sampler reads it."""


def record(prompt: int, committed: int) -> Record:
    return Record(
        origin_input_ids=[1] * prompt, output_ids=[], kv=SimpleNamespace(kv_committed_len=committed), to_finish=None
    )


def row(request, seed=3, temperature=0.8, top_p=0.9) -> dict:
    return {"seed": seed, "temperature": temperature, "top_p": top_p, "__req__": request}


@pytest.fixture
def abort(monkeypatch):
    """SGLang's reason of a request that was ended, in a fake package."""
    module = ModuleType("sglang.srt.managers.schedule_batch")
    module.FINISH_ABORT = lambda message, status, kind: (message, status, kind)
    for name in ("sglang", "sglang.srt", "sglang.srt.managers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)


# What is sent


def test_what_a_request_says():
    plain = sampling_params(REQUEST, False)
    assert sampling_params(REQUEST, False, True) == plain | {
        "temperature": 0.0, "top_p": 1.0, "custom_params": {"seed": 11, "temperature": 0.6, "top_p": 0.95},
    }  # fmt: skip
    assert "custom_params" not in plain


def test_the_sampler_is_made_where_nothing_of_this_project_can_be_imported(tmp_path):
    """By its text, in another process and folder: it draws the tokens that are drawn here."""
    rng = np.random.default_rng(0)
    logits, seeds = rng.normal(size=(40, 50)).astype(np.float32) * 3, rng.integers(2**31, size=40)
    program = """
import importlib.util, json, pickle, sys, types
assert importlib.util.find_spec("engine_lib") is None
given = json.load(sys.stdin)
import torch
sampler = pickle.loads(bytes.fromhex(json.loads(given["processor"])["callable"]))()
def record(step):
    kv = types.SimpleNamespace(kv_committed_len=9 + step)
    return types.SimpleNamespace(kv=kv, origin_input_ids=[0] * 9)
rows = [{"seed": s, "temperature": 0.8, "top_p": 0.9, "__req__": record(i)} for i, s in enumerate(given["seeds"])]
left = sampler(torch.tensor(given["logits"]), rows)
assert left.isfinite().sum(dim=1).tolist() == [1] * len(rows)
print(left.argmax(dim=1).tolist())
"""
    given = json.dumps({"processor": logit_processor(), "logits": logits.tolist(), "seeds": seeds.tolist()})
    done = subprocess.run(
        [sys.executable, "-I", "-c", program], cwd=tmp_path, input=given, capture_output=True, text=True, check=True
    )
    eighty, ninety = (torch.full((40,), x, dtype=torch.float64) for x in (0.8, 0.9))
    uniforms = torch.as_tensor(row_uniforms(seeds, np.arange(40)))
    assert json.loads(done.stdout) == sample_rows(torch.tensor(logits), eighty, ninety, uniforms).tolist()


def test_the_text_that_is_sent_stands_alone():
    tree = ast.parse(Path(sampling.__file__).read_text())
    found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    found |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert found == {"logging", "numpy", "torch", "sglang.srt.managers.schedule_batch"}
    assert len(logit_processor()) < 12_000  # it goes with every request
    assert logit_processor() == logit_processor()  # SGLang batches by it


# What is drawn


def test_a_token_is_drawn_by_its_requests_seed_and_place_alone():
    rng = np.random.default_rng(1)
    logits = torch.tensor(rng.normal(size=(30, 20)), dtype=torch.float32)
    rows = [
        row(record(5 + i % 3, 5 + i % 3 + i), seed=7 + i, temperature=(0, 0.5, 2)[i % 3], top_p=(0.5, 1)[i % 2])
        for i in range(30)
    ]
    whole = SeededSampler()(logits, rows)
    order = rng.permutation(30)
    shuffled = SeededSampler()(logits[order], [rows[i] for i in order])
    assert torch.equal(shuffled, whole[order])
    for i, one in enumerate(rows):
        numbers = [torch.tensor([x], dtype=torch.float64) for x in (one["temperature"], one["top_p"])]
        uniform = torch.as_tensor(row_uniforms(np.array([7 + i]), i))
        assert whole[i].argmax().item() == sample_rows(logits[i : i + 1], *numbers, uniform).item()


@pytest.mark.parametrize(("committed", "step"), [(5, 0), (6, 1), (50, 45), (3, 0), (0, 0)])
def test_a_place_is_read_from_the_length_of_the_cache(committed, step):
    """Not from `output_ids`, which lag a step under the overlap schedule. Shorter than the prompt: a chunk of it."""
    assert SeededSampler().written(record(5, committed)) == step


def test_logits_of_a_gpu_may_be_bf16():
    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(0)).bfloat16()
    left = SeededSampler()(logits, [row(record(2, 3), seed) for seed in range(4)])
    assert left.dtype == torch.bfloat16 and left.shape == logits.shape
    plain = SeededSampler()(logits.float(), [row(record(2, 3), seed) for seed in range(4)])
    assert torch.equal(left.argmax(1), plain.argmax(1))


# It never raises: the requests that met an error are ended with it


def dead() -> object:
    return weakref.proxy(record(2, 3))  # whose request is gone


@pytest.mark.parametrize(
    "bad",
    [
        {"seed": -1}, {"seed": "x"}, {"seed": None}, {"temperature": None}, {"top_p": "high"},
        {"__req__": SimpleNamespace(origin_input_ids=[1], to_finish=None)},
    ],
)  # fmt: skip
def test_what_cannot_be_drawn_ends_its_requests(bad, abort, caplog):
    rows = [row(record(2, 3)), row(record(2, 3)) | bad]
    logits = torch.zeros(2, 9)
    assert SeededSampler()(logits, rows).shape == logits.shape
    for each in rows:
        message, status, _ = each["__req__"].to_finish
        assert message.startswith("--seeded: a token could not be drawn (") and status == 500
    assert "a token could not be drawn" in caplog.text


def test_a_request_that_cannot_be_ended_does_not_keep_others(abort):
    rows = [row(dead()), None, row(record(2, 3))]
    SeededSampler()(torch.zeros(3, 9), rows)
    assert rows[2]["__req__"].to_finish is not None


def test_out_of_memory_ends_its_requests(abort, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(sampling, "sample_rows", fail)
    one = row(record(2, 3))
    SeededSampler()(torch.zeros(1, 9), [one])
    assert "OutOfMemoryError: CUDA out of memory" in one["__req__"].to_finish[0]


@pytest.mark.parametrize(
    "rows",
    [[{}], [None], None, [row(dead())], [{"seed": 1, "temperature": 1.0, "top_p": 1.0}], [row(record(1, 1))] * 3],
)
@pytest.mark.parametrize("logits", [torch.zeros(1, 9), torch.full((1, 9), float("nan")), torch.zeros(9)])
def test_nothing_makes_it_raise(rows, logits, abort, caplog):
    caplog.set_level(logging.CRITICAL)
    assert SeededSampler()(logits, rows).shape == logits.shape


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_end_their_requests(value, abort):
    logits = torch.zeros(2, 9)
    logits[1, 3] = value
    one = row(record(2, 3))
    SeededSampler()(logits, [one, row(record(2, 3))])
    assert "the model's logits are no numbers" in one["__req__"].to_finish[0]


def test_a_token_that_is_impossible_is_not_drawn():
    logits = torch.zeros(2, 9)
    logits[:, 1:] = float("-inf")
    left = SeededSampler()(logits, [row(record(2, 3)), row(record(2, 3))])
    assert left.isfinite().nonzero().tolist() == [[0, 0], [1, 0]]


# Where it cannot be


def test_the_engine_in_this_process_is_started_for_it():
    assert settings(seeded=True)["enable_custom_logit_processor"] is True
    assert settings()["enable_custom_logit_processor"] is False
    assert settings("enable_custom_logit_processor=true")["enable_custom_logit_processor"] is True


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (
            "enable_custom_logit_processor=false",
            "without custom logit processors; leave enable_custom_logit_processor out",
        ),
        ("speculative_algorithm=EAGLE", "with speculative decoding, which draws several tokens a step"),
    ],
)
def test_settings_that_do_not_go_with_it(item, message):
    with pytest.raises(UserError, match=f"^--seeded: --sglang_args start SGLang {message}"):
        settings(item, seeded=True)


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ({}, "runs without custom logit processors; start it with --enable-custom-logit-processor"),
        ({"enable_custom_logit_processor": True, "speculative_algorithm": "EAGLE"}, "runs with speculative decoding"),
    ],
)
def test_a_server_that_cannot_is_refused(info, message, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    good, bad = FakeServer(enable_custom_logit_processor=True), FakeServer(**info)
    try:
        with pytest.raises(UserError, match=f"^--seeded: {bad.url} {message}"):
            SGLangServerEngine(EngineConfig(str(tmp_path), 264, seeded=True, sglang_urls=(good.url, bad.url)))
        engine = SGLangServerEngine(EngineConfig(str(tmp_path), 264, seeded=True, sglang_urls=(good.url,)))
        assert engine.describe()["seeded"] is True
        SGLangServerEngine(EngineConfig(str(tmp_path), 264, sglang_urls=(bad.url,)))
    finally:
        good.kill()
        bad.kill()


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (lambda body: (200, generated(body | {"input_ids": [5]})), UserError, "does not draw by seeds, as a router"),
        (
            lambda body: (500, {"error": {"message": "too bad"}}),
            EngineError,
            r"no SGLang server answers \(.*500: too bad",
        ),
    ],
)
def test_what_does_not_draw_is_found_at_the_start(answer, error, message, tmp_path):
    """A router that takes the sampler out of the request, and a server that fails on it."""
    (tmp_path / "config.json").write_text("{}")

    def script(body):
        assert body["input_ids"] == [0] and body["sampling_params"]["custom_params"]["temperature"] == 100
        body.pop("custom_logit_processor")
        return answer(body)

    server = FakeServer(script, enable_custom_logit_processor=True)
    try:
        with pytest.raises(error, match=message):
            SGLangServerEngine(EngineConfig(str(tmp_path), 264, seeded=True, sglang_urls=(server.url,)))
    finally:
        server.kill()


def test_what_is_sent_is_a_pickle_of_builtins():
    import pickletools

    data = bytes.fromhex(json.loads(logit_processor())["callable"])
    names = [arg for code, arg, _ in pickletools.genops(data) if "UNICODE" in code.name]
    assert names[:2] == ["builtins", "eval"]
    assert pickle.loads(data).__name__ == "SeededSampler"
