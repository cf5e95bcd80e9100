"""inference_eval.py where memory is short, and what its values do not depend on."""

import itertools
import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import search_spy
import torch

import classifier_lib
import inference_eval
from common_lib import devices
from common_lib.cli import UserError
from search_lib import value_models
from search_lib.run_files import ROUNDING


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    search_spy.write_inputs(folder)
    return folder


@pytest.fixture
def start(folder, tmp_path):
    numbers = itertools.count()

    def start(*more, output: Path | None = None, **settings):
        output = output or tmp_path / f"{next(numbers)}.jsonl"
        return search_spy.run([*search_spy.base_flags(folder, output), *map(str, more)], **settings)

    return start


# ---------------------------------------------------------------------------------------------------------------------
# Out of memory


class Full:
    """The value model's first layer runs out of memory in passes of more than `rows` rows, from pass `first` on."""

    def __init__(self, rows: int, first: int = 0):
        self.rows, self.first, self.passes = rows, first, 0

    def __call__(self, module, arguments):
        self.passes += 1
        if self.passes > self.first and arguments[0].shape[0] > self.rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 has a total of ...")

    def put_into(self, monkeypatch):
        load = value_models.load_value_model

        def load_and_hook(plan, device):
            model = load(plan, device)
            model.model.layers[0].register_forward_pre_hook(self)
            return model

        monkeypatch.setattr(value_models, "load_value_model", load_and_hook)


def test_a_pass_that_is_too_large_changes_no_line(start, monkeypatch, caplog):
    plain = start()
    Full(rows=1).put_into(monkeypatch)
    seen = start()
    assert seen.status == 0
    assert seen.scorers[0].back_offs > 0
    assert caplog.text.count("scoring: out of memory") == 1
    assert_same_lines(seen, plain)


def test_a_device_that_takes_no_pass_at_all_ends_with_one_line_and_goes_on_later(start, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out.jsonl"
    with monkeypatch.context() as patch:
        Full(rows=0, first=20).put_into(patch)
        assert start(output=output).status == 1
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: round ")
    assert "it cannot be scored: out of memory on cpu for a single trace of " in line
    assert "--piref_gpu_util" in line and "--value_device" in line
    finished = len(output.read_text().splitlines()) if output.exists() else 0
    assert line.endswith(f"({finished} of 8 searches are finished; the same command goes on)")
    seen = start(output=output)
    assert seen.status == 0
    assert_same_lines(seen, start())


def test_a_value_model_that_does_not_fit_is_one_line(monkeypatch):
    def to(device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = SimpleNamespace(to=to)
    monkeypatch.setattr(classifier_lib.Qwen2ForClassifier, "from_pretrained", lambda *_, **__: model)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9, 2 * 10**9))
    plan = SimpleNamespace(value_model=SimpleNamespace(path=""), value_dtype="bf16", value_attention={"cuda:1": "sdpa"})
    with pytest.raises(
        UserError, match="the value model does not fit on cuda:1, where 1 GB are free; lower --piref_gpu"
    ):
        value_models.load_value_model(plan, "cuda:1")


def test_a_gpu_that_is_full_is_told_before_searching(start, monkeypatch):
    whole = devices.memory_of
    monkeypatch.setattr(
        devices, "memory_of", lambda device: (10**8, 2 * 10**9) if device[:4] == "cuda" else whole(device)
    )
    with pytest.raises(UserError, match="0.1 GB are free on cuda:1, of which its caches may take 0, but one trace"):
        start("--value_device", "cuda:1")


# ---------------------------------------------------------------------------------------------------------------------
# What is said at the start


def test_who_gets_what_is_one_line(start, caplog):
    caplog.set_level(logging.INFO)
    seen = start("--value_device", "cuda:1", "--max_problems", 1)
    assert seen.scorers[0].budget.limit == 900_000_000  # of 2 GB 1 is free, and 5 % are left alone
    (line,) = [line for line in caplog.text.splitlines() if line.startswith("memory of ")]
    assert line.startswith("memory of cuda:1, 2 GB: generator on cpu; value weights 5.04e-05, value cache 0.")
    assert line.endswith("left 0.1")
    caplog.clear()
    start("--max_problems", 1)
    assert "memory of cpu, " in caplog.text
    assert "generator weights " in caplog.text


def test_auto_is_of_what_is_free_with_engine_and_value_model_loaded(start, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    free = iter([1_900_000_000, 1_500_000_000, 1_400_000_000])
    monkeypatch.setattr(devices, "memory_of", lambda device: (next(free), 2 * 10**9))
    flags = ["--value_device", "cuda:1", "--device", "cuda:1", "--engine", "sglang", "--max_problems", 1]
    assert start(*flags).scorers[0].budget.limit == 1_300_000_000
    assert "memory of cuda:1, 2 GB: generator weights 6.51e-05, graphs 0.4; value weights 5.04e-05, " in caplog.text


def test_beside_the_transformers_engine_half_is_left(start):
    seen = start("--device", "cuda:1", "--max_problems", 1)
    assert seen.scorers[0].budget.limit == 450_000_000
    assert start("--device", "cuda:1", "--engine", "sglang", "--max_problems", 1).scorers[0].budget.limit == 900_000_000


def test_a_small_cache_is_said_with_what_to_change(start, caplog):
    start("--max_problems", 1)
    assert "want at once" not in caplog.text
    start("--value_cache_gb", 0.0001)
    assert "so tokens will be read again (" in caplog.text


def test_two_models_on_one_device_share_what_is_free_and_two_devices_have_a_line_each(start, caplog):
    caplog.set_level(logging.INFO)
    seen = start("--value_device", "cuda:1", "cuda:0", "cuda:1", "--max_problems", 1)
    assert [scorer.budget.limit for scorer in seen.scorers] == [450_000_000, 450_000_000, 900_000_000]
    assert seen.meta["value_engine"] == {"name": "local", "devices": ["cuda:1", "cuda:1", "cuda:0"]}
    lines = [line for line in caplog.text.splitlines() if line.startswith("memory of ")]
    assert [line.split("; value cache")[0].split(", value cache")[0] for line in lines] == [
        "memory of cuda:1, 2 GB: generator on cpu; value weights 0.000101",
        "memory of cuda:0, 2 GB: generator on cpu; value weights 5.04e-05",
    ]
    assert "on cuda:1 (2 of them), up to " in caplog.text
    one, two = (start("--value_device", *["cpu"] * n, "--value_cache_gb", 0.06, "--max_problems", 1) for n in (1, 2))
    tokens = {scorer.max_batch_tokens for scorer in one.scorers + two.scorers}
    assert len(tokens) == 1 and 2048 < tokens.pop() < 32768  # half the cache would take half of it
    given = start("--value_device", "cuda:1", "cuda:1", "--value_cache_gb", 0.02, "--max_problems", 1)
    assert [scorer.budget.limit for scorer in given.scorers] == [10_000_000] * 2


def test_a_cache_that_several_models_share_must_hold_a_trace_of_each(start):
    """One model of this trace takes 7e-5 GB."""
    start("--value_cache_gb", 0.0001, "--max_problems", 1)
    with pytest.raises(
        UserError, match=r"--value_cache_gb 0.0001 cannot hold one trace of \d+ tokens .* at least 0.000"
    ):
        start("--value_cache_gb", 0.0001, "--value_device", "cpu", "cpu")


POOL = {"pool": 300}


def test_a_served_value_model_says_who_gets_what_and_where_its_pool_is_too_small(start, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    free = iter([1_900_000_000, 1_500_000_000, 600_000_000])  # before the engines, between them, after both
    monkeypatch.setattr(devices, "memory_of", lambda device: (next(free), 2 * 10**9))
    gpu = ["--value_device", "cuda:1", "--device", "cuda:1", "--engine", "sglang", "--max_problems", 1]
    start(*gpu, "--value_engine", "sglang", value_engine=POOL)
    assert (
        "memory of cuda:1, 2 GB: generator weights 6.51e-05, graphs 0.4; value weights 5.04e-05, value graphs 0.9; other 0.1, left 0.6"
    ) in caplog.text
    assert "bf16 on cuda:1, by SGLang, which holds 300 tokens" in caplog.text
    (line,) = [line for line in caplog.text.splitlines() if "computed again" in line]
    assert re.fullmatch(r".*cache holds 300 tokens, and 2 searches want \d{3} at once, so tokens will be computed again; "
                        r"give --batch_size 1, or give it a GPU with more memory .*", line)  # fmt: skip


def test_a_pool_is_too_small_from_the_threshold_on(start, caplog):
    """Two searches of 2 x 2 candidates, blocks of 12, 48 tokens: a token less than both hold as they end is told."""
    prompts = start("--max_length", 12, "--max_problems", 1).requests  # of searches of one round
    longest = max(len(request.prompt_ids) for request in prompts)
    wanted = 2 * (longest + 2 * 36 + 4 * 12)
    flags = ["--max_problems", 1, "--value_engine", "sglang"]
    start(*flags, value_engine={"pool": wanted})
    assert "computed again" not in caplog.text
    start(*flags, value_engine={"pool": wanted - 1})
    assert f"cache holds {wanted - 1} tokens, and 2 searches want {wanted} at once" in caplog.text


def test_servers_of_values_take_nothing_here(start, caplog):
    caplog.set_level(logging.INFO)
    servers = ["--value_engine", "sglang-server", "--value_url", "http://one:1", "--max_problems", 1]
    start(*servers)
    assert re.search(
        "^memory of cpu, .*generator weights .*; value model on its servers; other", caplog.text, re.MULTILINE
    )
    assert "computed again" not in caplog.text
    caplog.clear()
    start(*servers, "--engine", "sglang-server")
    assert "memory of" not in caplog.text
    assert "by SGLang, which holds" in caplog.text


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--value_cache_gb", "3", "--value_engine", "sglang"], ["--value_cache_gb 3.0"]),
        (["--value_batch_tokens", "9", "--value_engine", "sglang"], ["--value_batch_tokens 9"]),
        (["--value_device", "cpu", "--value_engine", "sglang"], []),
        (["--value_device", "cuda:1", "--value_engine", "sglang-server", "--value_url", "http://one:1"],
         ["--value_device cuda:1"]),
    ],
)  # fmt: skip
def test_flags_without_effect_on_a_served_value_model_are_named(flags, said, start, caplog):
    start(*flags, "--max_problems", 1)
    found = [line for line in caplog.messages if "has no effect with --value_engine" in line]
    assert len(found) == len(said) and all(words in line for words, line in zip(said, found, strict=True))


def test_a_value_engine_that_holds_too_little_is_told_and_both_engines_are_closed(start, folder, tmp_path):
    seen = search_spy.Seen()
    with pytest.raises(
        UserError, match=r"make \d+ tokens, and --value_engine sglang takes 50; give a smaller --max_length, or"
    ):
        start("--value_engine", "sglang", seen=seen, value_engine={"context_length": 50})
    assert seen.value_engines[0][1].closed == 1


def test_segments_grow_before_the_engine_starts_where_the_value_model_is_on_a_gpu(start, monkeypatch):
    order = []
    monkeypatch.setattr(devices, "use_expandable_segments", lambda: order.append("segments"))
    load = inference_eval.load_engine
    loaders = inference_eval.Loaders(engine=lambda args, plan: order.append("engine") or load(args, plan))
    main = inference_eval.main
    monkeypatch.setattr(inference_eval, "main", lambda argv: main(argv, loaders))
    start("--value_device", "cuda:1", "--max_problems", 1)
    start("--max_problems", 1)
    assert order == ["segments", "engine", "engine"]


# ---------------------------------------------------------------------------------------------------------------------
# What results depend on


def assert_same_lines(seen, plain):
    """The same beams, answers and votes; values to 1e-5."""
    for row, expected in zip(seen.rows, plain.rows, strict=True):
        for key in ("global_idx", "generated_ids", "processed_answer", "reward", "finish_reasons"):
            assert row[key] == expected[key]
        assert row["generated_scores"] == pytest.approx(expected["generated_scores"], abs=1e-5)


SETTINGS = {
    "batch_size": ["1", "3"], "value_cache_gb": ["0.0001", "0.001"], "value_batch_tokens": ["1", "20", "50"],
    "attention_impl": ["eager", "sdpa"], "value_device": ["cpu cpu"],
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(folder, tmp_path_factory):
    return search_spy.run(search_spy.base_flags(folder, tmp_path_factory.mktemp("plain") / "out.jsonl"))


@pytest.mark.parametrize(("flag", "value"), [(flag, value) for flag, values in SETTINGS.items() for value in values])
def test_fp32_results_depend_on_none_of_the_free_flags(flag, value, start, plain):
    assert set(SETTINGS) == set(ROUNDING["local"])
    assert plain.meta["numerics"]["value_dtype"] == "fp32"
    assert plain.meta["reproducible"] == {"values": "to 1e-5", "depends_on": []}
    assert_same_lines(start(f"--{flag}", *value.split()), plain)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("flag", SETTINGS)
def test_a_start_that_goes_on_with_other_settings_is_warned_in_bf16(flag, dtype, start, tmp_path, caplog):
    flags, output = ["--value_dtype", dtype], tmp_path / "out.jsonl"
    assert start(*flags, output=output, fail_after=30).status == 1
    value = SETTINGS[flag][0]
    assert start(*flags, f"--{flag}", *value.split(), output=output, fail_after=5).status == 1
    said = [record.getMessage() for record in caplog.records if "in bf16 the last bits" in record.getMessage()]
    if dtype == "fp32":
        assert not said
    else:
        (line,) = said
        assert f"--{flag} was " in line and "--value_dtype fp32" in line
        meta = json.loads((tmp_path / "out.meta.json").read_text())
        assert meta["reproducible"] == {"values": "to rounding", "depends_on": list(ROUNDING["local"])}
    caplog.clear()
    assert start(*flags, f"--{flag}", *value.split(), output=output).status == 0
    assert "in bf16 the last bits" not in caplog.text


def test_of_served_values_other_flags_are_named(start, tmp_path, caplog):
    flags, output = ["--value_dtype", "bf16", "--value_engine", "sglang"], tmp_path / "out.jsonl"
    assert start(*flags, output=output, fail_after=30).status == 1
    meta = json.loads((tmp_path / "out.meta.json").read_text())
    assert meta["reproducible"]["depends_on"] == ["batch_size", "value_sglang_args"]
    start(*flags, "--value_cache_gb", "0.001", output=output, fail_after=5)
    assert "in bf16 the last bits" not in caplog.text
    start(
        *flags,
        "--value_cache_gb",
        "0.001",
        "--value_sglang_args",
        "chunked_prefill_size=64",
        output=output,
        fail_after=5,
    )
    assert "--value_sglang_args was [] and is ['chunked_prefill_size=64']" in caplog.text


def test_a_run_of_one_device_from_before_there_were_several_is_not_warned_of(start, tmp_path, caplog):
    flags, output = ["--value_dtype", "bf16"], tmp_path / "out.jsonl"
    assert start(*flags, output=output, fail_after=30).status == 1
    meta = json.loads((tmp_path / "out.meta.json").read_text())
    meta["arguments"]["value_device"] = "auto"
    (tmp_path / "out.meta.json").write_text(json.dumps(meta))
    assert start(*flags, output=output, fail_after=5).status == 1
    assert "in bf16 the last bits" not in caplog.text
    start(*flags, "--value_device", "cpu", "cpu", output=output)
    assert "--value_device was ['auto'] and is ['cpu', 'cpu']" in caplog.text
