"""Settings of the SGLang engine, with a parser in the place of sglang's own."""

import argparse

import pytest

from common_lib.cli import UserError
from engine_lib.base import EngineConfig
from engine_lib.sglang_wire import ServerInfo, engine_settings, longest_request, parse_sglang_args, read_info


def odd(text: str) -> object:
    raise RuntimeError(f"no odd {text}")


def command_line(*more: str) -> argparse.ArgumentParser:
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
    for name in more:
        parser.add_argument(name, type=int)
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


GRAPHS = "cuda_graph_max_bs_decode"


def graphs(
    requests, *given, device="cuda:1", flags=("--cuda-graph-max-bs-decode", "--dp-size", "--attn-dp-size")
) -> dict:
    config = EngineConfig("folder", 9, device=device, requests_at_once=requests, sglang_args=given)
    made = engine_settings(config, lambda: command_line(*flags))
    return {name: value for name, value in made.items() if "graph" in name}


def test_decode_graphs_reach_as_far_as_requests_are_asked_at_once():
    """By itself sglang stops at 256 on an H100 and at 32 on an A100 of 40 GB, whatever is asked."""
    assert graphs(256) == {GRAPHS: 256}
    assert graphs(32 * 16) == {GRAPHS: 512}
    assert graphs(8) == {GRAPHS: 8}
    assert graphs(14336) == {GRAPHS: 1024}
    assert graphs(0) == {}, "not known: sglang's own choice"
    assert graphs(512, device="cpu") == {}


@pytest.mark.parametrize("setting", ["dp_size", "attn_dp_size"])
def test_each_data_parallel_rank_has_graphs_for_its_share_as_far_as_it_may_be_exceeded(setting):
    assert graphs(512, f"{setting}=2") == {GRAPHS: 320}
    assert graphs(512, f"{setting}=1") == {GRAPHS: 512}
    assert graphs(10000, f"{setting}=4") == {GRAPHS: 1024}


def test_graphs_of_the_users_own():
    assert graphs(512, "cuda_graph_max_bs_decode=64") == {GRAPHS: 64}


def test_graphs_of_another_sglang(caplog):
    assert graphs(512, flags=("--cuda-graph-max-bs",)) == {"cuda_graph_max_bs": 512}
    assert not caplog.text
    assert graphs(512, flags=()) == {}
    assert "this sglang has no cuda_graph_max_bs_decode" in caplog.text


def test_what_a_server_says_of_itself():
    """Keys of 0.5.23, and an older server that lacks some."""
    model = {"model_path": "m", "architectures": ["Qwen2ForCausalLM"]}
    server = {
        "max_req_input_len": 2042,
        "max_total_num_tokens": 8192,
        "version": "0.5.23",
        "dtype": "bfloat16",
        "dp_size": 4,
        "enable_custom_logit_processor": True,
        "speculative_algorithm": "EAGLE",
    }
    assert read_info(model, server) == ServerInfo(
        "m", ("Qwen2ForCausalLM",), 2046, 8192, False, "0.5.23", "bfloat16", 4, True, "EAGLE"
    )
    assert read_info(model, server | {"dp_size": 1, "attn_dp_size": 8}).ranks == 8
    assert read_info(model, {"max_req_input_len": 2042}) == ServerInfo(
        "m", ("Qwen2ForCausalLM",), 2046, None, False, None, None, 1, False, None
    )


def test_the_longest_request_of_what_the_scheduler_tells():
    assert longest_request(2042) == 2046  # of 2048 positions
