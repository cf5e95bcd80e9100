"""Settings of the SGLang engine, with a parser in the place of sglang's own."""

import argparse

import pytest

from common_lib.cli import UserError
from engine_lib.base import EngineConfig
from engine_lib.sglang_wire import engine_settings, longest_request, parse_sglang_args


def odd(text: str) -> object:
    raise RuntimeError(f"no odd {text}")


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--tp-size", "--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--schedule-policy", choices=["fcfs", "lpm"])
    parser.add_argument("--disable-radix-cache", action="store_true")
    parser.add_argument("--enable-deterministic-inference", action="store_true")
    parser.add_argument("--enable-custom-logit-processor", action="store_true")
    parser.add_argument("--speculative-algorithm")
    parser.add_argument("--cuda-graph-bs", type=int, nargs="+")
    parser.add_argument("--config-value", nargs="?")
    parser.add_argument("--odd", type=odd)
    return parser


def settings(*given: str, **changes) -> dict:
    config = EngineConfig(model_path="folder", vocab_size=9, sglang_args=given, **changes)
    return engine_settings(config, command_line)


def test_settings_for_a_cpu_and_for_a_gpu():
    on_cpu = settings(seed=2**31 + 5)
    assert (on_cpu["device"], on_cpu["dtype"], on_cpu["random_seed"]) == ("cpu", "float32", 5)
    assert on_cpu["attention_backend"] == "torch_native"
    on_gpu = settings(device="cuda:3", gpu_share=0.7, deterministic=True)
    assert (on_gpu["device"], on_gpu["base_gpu_id"], on_gpu["dtype"]) == ("cuda", 3, "bfloat16")
    assert (on_gpu["mem_fraction_static"], on_gpu["enable_deterministic_inference"]) == (0.7, True)
    assert "attention_backend" not in on_gpu, "a GPU takes sglang's own choice"
    assert all(config["skip_tokenizer_init"] for config in (on_cpu, on_gpu))


def test_given_settings_may_change_any_of_ours():
    assert settings("tp-size=2")["tp_size"] == 2
    assert settings("--disable-radix-cache=true")["disable_radix_cache"] is True
    assert settings("disable_radix_cache=0", "schedule_policy=lpm")["schedule_policy"] == "lpm"


def test_values_are_read_as_the_command_line_reads_them():
    given = ["tp-size=2", "disable_radix_cache=False", "cuda_graph_bs=1,2,4", "config_value=a,b"]
    assert parse_sglang_args(given, command_line()) == {
        "tp_size": 2, "disable_radix_cache": False, "cuda_graph_bs": [1, 2, 4], "config_value": "a,b",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("tp_size", "--sglang_args 'tp_size' has no '='; give KEY=VALUE"),
        ("tp_sizee=2", "'tp_sizee' is no setting of SGLang's server; the nearest is 'tp_size'"),
        ("tp_size=two", r"tp_size='two' cannot be read: .*invalid int value: 'two'"),
        ("cuda_graph_bs=1,x", r"cuda_graph_bs='1,x' cannot be read: .*invalid int value: 'x'"),
        ("schedule_policy=best", r"schedule_policy='best' cannot be read: .*invalid choice: 'best' .*fcfs"),
        ("disable_radix_cache=perhaps", "disable_radix_cache='perhaps' cannot be read: true or false is expected"),
        ("odd=3", "odd='3' cannot be read: no odd 3"),
        ("enable_deterministic_inference=true", "give --deterministic, which also passes the seeds"),
    ],
)
def test_a_setting_that_cannot_be_is_one_line(item, message):
    with pytest.raises(UserError, match=message):
        settings(item)


def test_deterministic_needs_a_gpu():
    with pytest.raises(UserError, match="--deterministic needs a GPU"):
        settings(deterministic=True)


def test_the_longest_request_of_what_the_scheduler_tells():
    assert longest_request(2042) == 2046  # of 2048 positions
