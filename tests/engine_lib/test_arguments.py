"""Flags of engines and of sampling: what they mean together, and each mistake in one line."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from common_lib.cli import ArgumentParser, UserError, check_rules
from engine_lib.arguments import (
    FREE_ARGUMENTS,
    add_engine_flags,
    add_sampling_flags,
    engine_config,
    engine_rules,
    resolve_engine,
)
from engine_lib.base import EngineConfig

ROOT = Path(__file__).resolve().parents[2]


def parser():
    made = ArgumentParser()
    add_sampling_flags(made.add_argument)
    add_engine_flags(made.add_argument, attention="sdpa", gpu_share=0.3)
    made.add_argument("--seed", type=int, default=1337)
    made.add_argument("--batch_size", type=int, default=32)
    return made


def parse(*flags: str):
    args = parser().parse_args(flags)
    check_rules(args, engine_rules(args))
    resolve_engine(args)
    return args


def test_defaults():
    args = parse()
    assert (args.engine, args.device, args.attention_impl, args.piref_gpu_util) == ("auto", "auto", "sdpa", 0.3)
    assert (args.temperature, args.top_p, args.prompt_format) == (0.6, 0.95, "r1")
    assert (args.sglang_url, args.sglang_args, args.deterministic, args.request_timeout) == ([], [], False, 3600.0)
    assert args.seeded is False
    assert set(vars(args)) >= FREE_ARGUMENTS


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--temperature -0.1", "--temperature -0.1 must be from 0 (greedy) to 100"),
        ("--temperature 101", "--temperature 101.0 must be"),
        ("--temperature nan", "--temperature nan must be"),
        ("--top_p 0", "--top_p 0.0 must be above 0 and at most 1"),
        ("--top_p 1.01", "--top_p 1.01 must be"),
        ("--seed -1", "--seed -1 must be 0 or more"),
        ("--piref_gpu_util 1", "--piref_gpu_util 1.0 is a share of the GPU's memory: above 0 and below 1"),
        ("--piref_gpu_util 0", "--piref_gpu_util 0.0 is a share"),
        ("--sglang_port 0", "--sglang_port 0 must be from 1 to 65535"),
        ("--sglang_port 65536", "--sglang_port 65536 must be"),
        ("--request_timeout 0", "--request_timeout 0.0 must be above 0"),
        ("--engine vllm", "invalid choice: 'vllm'"),
        ("--attention_impl flash", "invalid choice: 'flash'"),
        ("--prompt_format r2", "invalid choice: 'r2'"),
        ("--device gpu", "--device 'gpu' is unknown; give auto, cpu, cuda or cuda:N"),
        ("--device cuda:x", "--device 'cuda:x' is unknown"),
        (
            "--engine transformers --sglang_url http://a:1",
            "--sglang_url needs --engine sglang-server, not transformers",
        ),
        ("--engine sglang --sglang_url http://a:1", "--sglang_url needs --engine sglang-server, not sglang"),
        ("--use_sglang_server --engine sglang --sglang_url http://a:1", "not sglang"),
        ("--engine sglang-server --sglang_args tp_size=2", "give them to the servers where those are started"),
        ("--sglang_url http://a:1 --sglang_args tp_size=2", "give them to the servers where those are started"),
        ("--seeded --deterministic", "--seeded and --deterministic both make SGLang keep to the seeds"),
        ("--engine transformers --sglang_args tp_size=2", "--sglang_args need --engine sglang, not transformers"),
        *(
            (f"--sglang_url {url}", f"--sglang_url {url!r} is no URL of a server; give http://HOST:PORT")
            for url in ("localhost:30000", "http://", "ftp://a", "http://a:port", "http://a:0", "http://[::1")
        ),
    ],
)
def test_each_mistake_is_one_line(flags, message):
    with pytest.raises(UserError) as error:
        parse(*flags.split())
    assert message in str(error.value)


@pytest.mark.parametrize(
    "flags",
    [
        "--temperature 0", "--temperature 100", "--top_p 1", "--top_p 0.001", "--seed 0", "--piref_gpu_util 0.99",
        "--sglang_port 1", "--sglang_port 65535", "--request_timeout 0.5", "--device cuda:12", "--sglang_url https://a/v1",
    ],
)  # fmt: skip
def test_the_edges_are_allowed(flags):
    name, value = flags.removeprefix("--").split()
    got = getattr(parse(*flags.split()), name)
    assert (got[0] if isinstance(got, list) else str(got)) in (value, f"{value}.0")


def test_a_url_means_a_server_and_a_server_has_a_default_url():
    args = parse("--sglang_url", "http://a:1", "--sglang_url", "https://b")
    assert (args.engine, args.sglang_url) == ("sglang-server", ["http://a:1", "https://b"])
    args = parse("--use_sglang_server", "--sglang_port", "4000")
    assert (args.engine, args.sglang_url) == ("sglang-server", ["http://localhost:4000"])
    assert parse("--engine", "sglang-server").sglang_url == ["http://localhost:30000"]
    assert parse("--use_sglang_server", "--engine", "transformers").engine == "transformers"  # the last one counts
    args = parse("--engine", "sglang", "--sglang_args", "tp_size=2", "dp_size=4")
    assert (args.engine, args.sglang_url, args.sglang_args) == ("sglang", [], ["tp_size=2", "dp_size=4"])


def test_what_an_engine_is_given():
    args = parse(
        "--sglang_url", "http://a:1/", "--temperature", "0", "--deterministic", "--request_timeout", "5", "--seed", "7"
    )  # fmt: skip
    generator = SimpleNamespace(path="folder", vocab_size=9)
    assert engine_config(args, generator, "cuda:1", groups=100, requests_each=8) == EngineConfig(
        model_path="folder", vocab_size=9, device="cuda:1", attention="sdpa", seed=7, samples=False,
        deterministic=True, request_timeout_s=5.0, gpu_share=0.3, sglang_urls=("http://a:1",), groups_at_once=32,
        requests_at_once=256,
    )  # fmt: skip
    few = engine_config(args, generator, "cuda:1", groups=3, requests_each=8)
    assert (few.groups_at_once, few.requests_at_once) == (3, 24), "there is no more to do"


@pytest.mark.parametrize(
    ("flags", "seeded"), [([], False), (["--seeded"], True), (["--seeded", "--temperature=0"], False)]
)
def test_an_engine_is_asked_to_draw_by_seeds_where_something_is_drawn(flags, seeded):
    info = SimpleNamespace(path="folder", vocab_size=9)
    assert engine_config(parse(*flags), info, "cpu", groups=1, requests_each=1).seeded is seeded


def test_flags_are_read_without_a_model_library():
    code = (
        "import sys; from engine_lib import arguments, choose; from common_lib.devices import check_device_name\n"
        "check_device_name('cuda:3', '--device')\n"
        "print([name for name in ('torch', 'transformers', 'httpx', 'sglang') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_given_share_of_the_gpu_can_be_told_from_the_default():
    info = SimpleNamespace(path="folder", vocab_size=9)
    for flags, given in (("", False), ("--piref_gpu_util 0.3", True)):
        args = parse(*flags.split())
        config = engine_config(args, info, "cpu", groups=1, requests_each=1)
        assert (config.gpu_share, type(config.gpu_share), config.gpu_share_given) == (0.3, float, given)
        assert json.dumps(args.piref_gpu_util) == repr(args.piref_gpu_util) == "0.3"  # in meta and in messages
    with pytest.raises(UserError, match="--piref_gpu_util: invalid float value: 'half'"):
        parse("--piref_gpu_util", "half")
