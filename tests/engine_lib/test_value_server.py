"""`python -m engine_lib.value_server`: its flags, what it refuses before SGLang is imported, and the command line it makes.
With a fake in the place of SGLang's server; it starts in test_sglang_value_local.py."""

import os
import subprocess
import sys

import pytest
import tiny
from conftest import ROOT
from test_sglang_wire import command_line

from common_lib.cli import ArgumentParser, UserError
from engine_lib import value_server, value_settings
from engine_lib.value_base import ValueConfig
from engine_lib.value_settings import PACKAGE, REFUSED, check_served_backbone, value_engine_settings


@pytest.mark.parametrize(
    ("flags", "status", "said"),
    [
        (["--help"], 0, "python -m sglang.launch_server --help"),
        (
            ["--classifier_ckpt_path", "m", "--port", "1", "--dp-size", "2"],
            2,
            "error: --dp-size: it makes every prefix",
        ),
    ],
)
def test_help_and_mistakes_are_answered_without_torch_and_sglang(flags, status, said):
    program = (
        f"import atexit, runpy, sys; sys.argv = ['value_server', *{flags!r}]\n"
        "atexit.register(lambda: print('slow:', sorted({'torch', 'transformers', 'sglang'} & set(sys.modules))))\n"
        "runpy.run_module('engine_lib.value_server', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (status, "slow: []")
    assert said in (done.stderr if status else done.stdout)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "the following arguments are required: --classifier_ckpt_path, --port"),
        (["--classifier_ckpt_path", "m", "--port", "many"], "argument --port: invalid int value: 'many'"),
        (["--classifier_ckpt_path", "m", "--port", "0"], "--port 0 is no port: 1 to 65535 are"),
        (
            ["--classifier_ckpt_path", "./no", "--port", "1"],
            "--classifier_ckpt_path ./no is no folder; give a model folder",
        ),
    ],
)
def test_each_mistake_is_one_line(flags, said):
    with pytest.raises(UserError, match=f"^{said}"):
        value_server.main(flags)


@pytest.fixture(scope="module")
def value_model(tmp_path_factory):
    return tiny.save_value_model(tmp_path_factory.mktemp("value"), tokenizer=False)


@pytest.fixture
def served(monkeypatch):
    """(flags, environment) that SGLang's server would get."""
    calls = []
    for name in ("SGLANG_EXTERNAL_MODEL_PACKAGE", "PYTHONPATH"):
        monkeypatch.setenv(name, "of before")
    names = ("SGLANG_EXTERNAL_MODEL_PACKAGE", "PYTHONPATH")
    monkeypatch.setattr(
        value_server, "serve", lambda flags, given: calls.append((flags, {name: os.environ[name] for name in names}))
    )
    return calls


def run(model, *given):
    value_server.main(["--classifier_ckpt_path", str(model), "--port", "31000", *given])


def test_what_must_be_set_is_set_and_what_is_given_comes_last(value_model, served):
    run(value_model, "--device", "cpu", "--chunked-prefill-size", "512", "--dtype=bfloat16")
    ((flags, environment),) = served
    assert environment == {
        "SGLANG_EXTERNAL_MODEL_PACKAGE": PACKAGE, "PYTHONPATH": os.pathsep.join([str(ROOT), "of before"])
    }  # fmt: skip
    assert flags[:4] == ["--port", "31000", "--model-path", str(value_model)]
    assert flags[-5:] == ["--device", "cpu", "--chunked-prefill-size", "512", "--dtype=bfloat16"]
    line = " ".join(flags)
    for part in (
        "--skip-tokenizer-init ", "--is-embedding ", "--page-size 1 ", "--cuda-graph-backend-prefill disabled ",
        "--dtype float32 ", "--attention-backend torch_native ", "--disable-overlap-schedule ",
    ):  # fmt: skip
        assert part in line


def test_on_a_gpu(value_model, served, monkeypatch):
    monkeypatch.setattr(value_server, "device_of", lambda given: "cuda")
    run(value_model)
    line = " ".join(served[0][0])
    assert "--device cuda --base-gpu-id 0 --dtype bfloat16 --is-embedding" in line
    assert "attention" not in line


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_would_break_it_is_refused_by_name(value_model, served, name):
    with pytest.raises(UserError, match=f"^--{name.replace('_', '-')}: .*"):
        run(value_model, f"--{name.replace('_', '-')}=1")
    assert not served


def test_every_name_of_a_flag_is_known_with_sglangs_parser():
    parser = ArgumentParser(add_help=False)
    parser.add_argument("--dp-size", "--data-parallel-size", type=int)
    parser.add_argument("--tp-size", type=int)
    value_server.check_given(["--tp-size", "2"], parser)
    with pytest.raises(
        UserError, match="^--dp-size: it makes every prefix be read once per rank; start a server for each"
    ):
        value_server.check_given(["--data-parallel-size", "2"], parser)


def test_what_is_no_value_model_is_refused(generator_folder, tmp_path, served):
    with pytest.raises(UserError, match="has no value head"):
        run(generator_folder)
    tiny.save_value_model(tmp_path, tokenizer=False)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace("Qwen2ForClassifier", "LlamaForClassifier"))
    with pytest.raises(
        UserError, match="is a LlamaForClassifier with a qwen2 backbone; SGLang serves Qwen2ForClassifier"
    ):
        run(tmp_path)
    (tmp_path / "config.json").write_text(config.replace('"qwen2"', '"llama"'))
    with pytest.raises(UserError, match="is a Qwen2ForClassifier with a llama backbone"):
        check_served_backbone(tmp_path)
    assert not served


# In process: --value_sglang_args


def settings(*given: str, **changes) -> dict:
    config = ValueConfig("folder", 264, 3, sglang_args=given, **changes)
    return value_engine_settings(config, lambda: command_line("--dp-size", "--mem-fraction-static", "--base-gpu-id"))


def test_given_settings_come_last_and_are_read_as_the_command_line_reads_them():
    assert settings()["mem_fraction_static"] == value_settings.SHARE_OF_RAM
    assert settings(device="cuda:1")["mem_fraction_static"] == value_settings.SHARE_OF_GPU
    made = settings("tp-size=2", "schedule_policy=lpm", device="cuda:1", dtype="bf16")
    assert (made["tp_size"], made["schedule_policy"]) == (2, "lpm")
    assert (made["base_gpu_id"], made["dtype"], made["is_embedding"]) == (1, "bfloat16", True)
    assert settings("mem_fraction_static=1")["mem_fraction_static"] == 1


def test_settings_that_are_ours_are_refused_by_the_flags_name():
    with pytest.raises(UserError, match="^--value_sglang_args dp_size: it makes every prefix be read once per rank"):
        settings("dp_size=2")
    with pytest.raises(UserError, match="^--value_sglang_args base_gpu_id: give --value_device$"):
        settings("base_gpu_id=2")
    with pytest.raises(UserError, match="^--value_sglang_args disable_radix_cache: without its cache"):
        settings("disable_radix_cache=true")
    with pytest.raises(UserError, match="^--value_sglang_args 'tp_sizee' is no setting of SGLang's server"):
        settings("tp_sizee=2")
    with pytest.raises(UserError, match="^--value_sglang_args tp_size='two' cannot be read"):
        settings("tp_size=two")
