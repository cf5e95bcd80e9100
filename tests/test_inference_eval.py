"""The search script: from flags to table, its files, going on, and what it says to mistakes."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import kill_test
import pytest
import tiny
import torch
from conftest import ROOT, SHARED

import inference_eval
from common_lib.cli import UserError
from engine_lib.base import Reply
from inference_eval import Loaders
from search_lib.arguments import build_parser, parse_args
from search_lib.search import select
from search_lib.tree import SearchConfig


def no_model(*_):
    pytest.fail("a model was loaded")


NO_MODELS = Loaders(engine=no_model, scorer=no_model)

# The command of the paper's release, as it stands.
RELEASED_COMMAND = shlex.split("""
    --benchmark aime-24 --attention_impl flash_attention_2 --seed 1337
    --piref_model deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B --use_sglang_server --sglang_port 30000
    --classifier_ckpt_path VGS-AI/DeepSeek-VM-1.5B --output_path inference_outputs.jsonl --search_type beam2
    --piref_gpu_util 0.5 --batch_size 32 --max_length 16384 --block_size 4096 --num_blocks 8 --temperature 0.6
    --top_p 0.95 --num_repetitions 1
""")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Tiny models, and a benchmark that the tiny generator has no chance with."""
    return kill_test.make_inputs(tmp_path_factory.mktemp("inputs"), problems=3)


def flags(inputs, output, **changes):
    pairs = dict(zip(inputs[::2], inputs[1::2], strict=True)) | {
        "--engine": "transformers",
        "--output_path": str(output),
    }
    pairs |= {f"--{name}": value for name, value in changes.items()}
    return [
        str(word) for name, value in pairs.items() for word in (name, *(value if isinstance(value, list) else [value]))
    ]


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


# ------------------------------------------------------------------------------------------------------------ end to end


def test_a_run_from_start_to_table(inputs, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    assert inference_eval.main(flags(inputs, output)) == 0
    printed = capsys.readouterr().out
    for word in ("pass@1", "pass@k", "best-of-N", "majority", "weighted", "95 %", "tokens generated", "wall-clock"):
        assert word in printed
    rows = rows_of(output)
    assert [row["global_idx"] for row in rows] == list(range(9))
    assert [(row["repeat_idx"], row["data_idx"]) for row in rows] == [(r, d) for r in range(3) for d in range(3)]
    released_keys = ["repeat_idx", "data_idx", "global_idx", "problem", "gt_answer", "generated_ids", "generated_scores",
                     "processed_answer", "reward", "dt"]  # fmt: skip
    for row in rows:
        assert list(row)[:10] == released_keys
        assert len(row["generated_ids"]) == len(row["generated_scores"]) == len(row["reward"]) == 4
        assert row["tokens_scored"] == row["prompt_tokens"] + row["tokens_generated"]
        assert row["tokens_reread"] == 0
        assert all(isinstance(reward, bool) for reward in row["reward"])
    meta = json.loads(output.with_name("out.meta.json").read_text())
    assert meta["arguments"]["seed"] == 1337
    assert meta["generator"]["num_hidden_layers"] == 2
    assert meta["engine"]["name"] == "transformers"
    assert meta["sessions"][0]["seconds"] > 0


def test_the_journal_replayed_through_a_plain_forward_pass(inputs, tmp_path):
    """Every value in the journal is that of a full forward pass over its trace, and the choices follow from them."""
    output = tmp_path / "out.jsonl"
    inference_eval.main(flags(inputs, output, value_cache_gb=0.0001))  # a small cache: with eviction
    model = tiny.tiny_value_model()
    trees = {}
    for row in rows_of(tmp_path / "out.tree.jsonl"):
        key = row["data_idx"], row["repeat_idx"]
        nodes = trees.setdefault(key, [row["prompt_ids"] if row["round"] == 0 else None])
        for parent, tokens, value in zip(row["parent"], row["tokens"], row["value"], strict=True):
            nodes.append(nodes[parent] + tokens)
            with torch.no_grad():
                expected = model(torch.tensor([nodes[-1]])).success_probs[0, -1].item()
            assert value == pytest.approx(expected, abs=1e-5)
        assert row["kept"] == select(row["value"], sum(row["kept"]), SearchConfig(4, 2, 8, 64), None, 0)
    for row in rows_of(output):
        prompt, *nodes = trees[row["data_idx"], row["repeat_idx"]]
        assert all(prompt + ids in nodes for ids in row["generated_ids"])
    assert any(row["tokens_reread"] for row in rows_of(output))


@pytest.mark.parametrize("seed", [0, 1337])  # 0 .. 49 have been tried
def test_more_repetitions_later_and_nothing_done_again(inputs, tmp_path, seed):
    """In other company, so in other batches: the same tokens."""
    output = tmp_path / "out.jsonl"
    inference_eval.main(flags(inputs, output, seed=seed, num_repetitions=1))
    first = output.read_bytes()
    inference_eval.main(flags(inputs, output, seed=seed, num_repetitions=3, batch_size=2))
    assert output.read_bytes().startswith(first)
    whole = tmp_path / "whole.jsonl"
    inference_eval.main(flags(inputs, whole, seed=seed))
    kill_test.compare(output, whole, 1e-6)
    before = output.read_bytes()
    assert inference_eval.main(flags(inputs, output, seed=seed), NO_MODELS) == 0
    assert output.read_bytes() == before


def test_greedy_candidates_are_alike_and_sampled_ones_are_not(inputs, tmp_path):
    """What the real generator makes of --temperature; search types and selection: test_inference_rows.py."""
    for name, temperature, alike in (("greedy", 0, True), ("sampled", 1, False)):
        inference_eval.main(flags(inputs, tmp_path / f"{name}.jsonl", num_repetitions=1, temperature=temperature))
        rounds = rows_of(tmp_path / f"{name}.tree.jsonl")
        assert {len(set(map(tuple, row["tokens"]))) == 1 for row in rounds if row["round"] == 0} == {alike}


def test_right_answers_are_found_graded_and_tracked(inputs, tmp_path):
    """With a generator that always boxes 2: the problem 1 + 1 is solved by every beam, the others by none."""
    logged = {}

    class Tracker:
        id, where = "t", "nowhere"

        def log_configs(self, configs):
            logged["configs"] = configs

        def log_metrics(self, metrics, step):
            logged[step] = metrics

        def close(self):
            logged["closed"] = True

    class Boxing:
        name, context_length, vocab_size = "boxing", 2048, 264
        reply = (*tiny.tiny_tokenizer()("</think>so \\boxed{2}", add_special_tokens=False).input_ids, 256)

        async def generate(self, requests):
            return [self.block(request) for request in requests]

        def block(self, request):
            prompt = len(request.prompt_ids) - request.prompt_ids[::-1].index(198) - 1  # the newline after <think>
            done = len(request.prompt_ids) - prompt - 1
            tokens = list(self.reply)[done : done + request.max_new_tokens]
            return Reply(tokens, "stop" if tokens[-1] == 256 else "length", len(request.prompt_ids))

        async def close(self): ...
        def describe(self):
            return {"name": self.name}

    output = tmp_path / "out.jsonl"
    loaders = Loaders(engine=lambda args, plan: Boxing(), tracker=lambda *args, **settings: Tracker())
    assert inference_eval.main(flags(inputs, output, num_repetitions=3), loaders) == 0
    for row in rows_of(output):
        assert row["processed_answer"] == ["2"] * 4
        assert row["reward"] == [row["data_idx"] == 1] * 4
        assert set(row["finish_reasons"]) == {"stop"}
    assert set(logged) == {"configs", 8, 16, 24, "closed"}
    for step in (8, 16, 24):
        for name in ("bon_m", "bon_ci", "maj_m", "maj_ci", "wmaj_m", "wmaj_ci", "pass_m", "pass_ci"):
            assert f"problems/{name}" in logged[step]
        assert logged[step]["problems/maj_m"] == pytest.approx(1 / 3)
    assert logged[8]["problems/maj_ci_repeat"] == 0  # one repetition like the other; at 24 there is only one group


# --------------------------------------------------------------------------------------------------------------- flags


def test_the_released_command_is_accepted_and_its_values_are_the_defaults():
    released, default = parse_args(RELEASED_COMMAND), parse_args([])
    assert released.engine == "sglang-server"
    assert released.sglang_url == ["http://localhost:30000"]
    for name in ("benchmark", "attention_impl", "seed", "piref_model", "sglang_port", "classifier_ckpt_path", "output_path",
                 "search_type", "piref_gpu_util", "batch_size", "max_length", "block_size", "num_blocks", "temperature",
                 "top_p", "num_repetitions"):  # fmt: skip
        assert getattr(released, name) == getattr(default, name)
    assert parse_args([*RELEASED_COMMAND, "--neptune_project", "me/vgs"]).tracker == "neptune"
    assert default.tracker == "none"
    assert parse_args([*RELEASED_COMMAND, "--engine", "transformers"]).engine == "transformers"  # the last one counts


def test_every_flag_has_a_help_text():
    for action in build_parser()._actions:
        assert action.help and len(action.help) > 5, action.option_strings


BAD_FLAGS = [
    ({"benchmark": "aime-26"}, "--benchmark 'aime-26' is neither a known benchmark .aime-24"),
    ({"search_type": "beem2"}, "--search_type 'beem2' is unknown; give beamB"),
    ({"num_blocks": 9}, "--num_blocks 9 is not divisible by the 2"),
    ({"block_size": 65}, "--block_size 65 is more than --max_length 64"),
    ({"temperature": -1}, "--temperature -1.0 must be from 0"),
    ({"top_p": 0}, "--top_p 0.0 must be above 0 and at most 1"),
    ({"piref_gpu_util": 1.5}, "--piref_gpu_util 1.5 is a share"),
    ({"batch_size": 0}, "--batch_size 0 must be at least 1"),
    ({"num_repetitions": 0}, "--num_repetitions 0 must be at least 1"),
    ({"seed": "x"}, "argument --seed: invalid int value: 'x'"),
    ({"engine": "vllm"}, "argument --engine: invalid choice: 'vllm'"),
    ({"attention_impl": "flsh"}, "argument --attention_impl: invalid choice: 'flsh'"),
    ({"see": 3}, "unknown argument --see; did you mean --seed?"),
    ({"value_cache_gb": "lots"}, "--value_cache_gb 'lots' must be auto or a number"),
    ({"value_cache_gb": 1e-6}, "--value_cache_gb 1e-06 cannot hold one trace of .* give at least 7.78e-05"),
    ({"value_batch_tokens": "1e4"}, "--value_batch_tokens '1e4' must be auto or a whole number"),
    ({"value_batch_tokens": 0}, "--value_batch_tokens 0 must be above 0"),
    ({"output_path": "no/such/folder/out.jsonl"}, "the folder no/such/folder does not exist"),
    ({"piref_model": "./nowhere"}, "--piref_model ./nowhere is no folder"),
    ({"classifier_ckpt_path": "VGS-AI/not-downloaded"}, "--classifier_ckpt_path VGS-AI/not-downloaded is neither a local"),
    ({"value_device": "tpu"}, "--value_device 'tpu' is unknown; give auto, cpu, cuda"),
    ({"value_engine": "vllm"}, "argument --value_engine: invalid choice: 'vllm'"),
    ({"value_engine": "sglang-server"}, "--value_engine sglang-server needs --value_url http://HOST:PORT"),
    ({"value_url": "http://one:1"}, "--value_url needs --value_engine sglang-server, not local"),
    ({"value_url": "one:1", "value_engine": "sglang-server"}, "--value_url 'one:1' is no URL of a server"),
    ({"value_sglang_args": "tp_size=2"}, "--value_sglang_args need --value_engine sglang, not local"),
    ({"value_sglang_args": "tp_size=2", "value_engine": "sglang-server", "value_url": "http://one:1"},
     "--value_sglang_args are for --value_engine sglang; give them to the servers"),
    ({"value_device": ["cpu", "cpu"], "value_engine": "sglang"}, "--value_device cpu cpu: --value_engine sglang takes one device"),
    ({"device": "tpu"}, "--device 'tpu' is unknown; give auto, cpu, cuda"),
    ({"max_length": 2048, "block_size": 64}, r"--max_length 2048 make \d+ tokens, more than the 2048 positions of the generator"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), BAD_FLAGS)
def test_bad_input_is_one_line_before_a_model_loads(inputs, tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as error:
        inference_eval.main(flags(inputs, tmp_path / "out.jsonl", **changes), NO_MODELS)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())  # nothing was written


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there(inputs, tmp_path):
    with pytest.raises(UserError, match="--device cuda: this machine has 0 usable GPUs"):
        inference_eval.main(flags(inputs, tmp_path / "out.jsonl", device="cuda"), NO_MODELS)


def test_models_that_do_not_fit_each_other(inputs, tmp_path):
    def refused(message, **changes):
        with pytest.raises(UserError, match=message):
            inference_eval.main(flags(inputs, tmp_path / "out.jsonl", **changes), NO_MODELS)

    headless = tiny.save_generator(tmp_path / "headless")
    refused("has no value head", classifier_ckpt_path=headless)
    refused("has no language-model head", piref_model=tiny.save_value_model(tmp_path / "swapped"))
    other = tiny.save_value_model(tmp_path / "other")
    tokenizer = (other / "tokenizer.json").read_text(encoding="utf-8")
    (other / "tokenizer.json").write_text(tokenizer.replace('"<think>"', '"<thought>"'), encoding="utf-8")
    refused("different tokenizers .* '<think>' is 260 there and nothing here", classifier_ckpt_path=other)
    refused(
        "only 261 embeddings",
        classifier_ckpt_path=tiny.save_value_model(tmp_path / "small", tokenizer=False, vocab_size=261),
    )
    short = tiny.save_value_model(tmp_path / "short", max_position_embeddings=100)
    refused("100 positions of the value model .*generator 2048, value model 100", classifier_ckpt_path=short)
    broken = tiny.save_value_model(tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"\x10\x00")
    refused("not a whole safetensors file", classifier_ckpt_path=broken)


def test_a_bare_value_model_is_accepted_and_its_limits_are_said(inputs, tmp_path, caplog):
    bare = tiny.save_value_model(tmp_path / "bare", tokenizer=False)
    assert inference_eval.main(flags(inputs, tmp_path / "out.jsonl", num_repetitions=1, classifier_ckpt_path=bare)) == 0
    assert "has no tokenizer: only sizes could be checked" in caplog.text


NO_TORCH = """
import json, sys
import inference_eval
from common_lib.cli import UserError
from common_lib.devices import memory_of

for flags in json.loads(sys.argv[1]):
    try:
        inference_eval.main(flags)
        print("accepted:", flags)
    except (UserError, SystemExit):
        pass
assert memory_of("cpu")[0] > 0
print(*{"torch", "transformers", "sglang"} & set(sys.modules))
"""


def test_help_and_mistakes_are_answered_without_torch(inputs, tmp_path):
    needs_tokenizer = ({"value_cache_gb": 1e-6}, {"max_length": 2048, "block_size": 64})
    mistakes = [changes for changes, _ in BAD_FLAGS if changes not in needs_tokenizer]
    commands = [["--help"], *(flags(inputs, tmp_path / "out.jsonl", **changes) for changes in mistakes)]
    done = subprocess.run(
        [sys.executable, "-c", NO_TORCH, json.dumps(commands)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("usage:")
    assert "accepted" not in done.stdout
    assert done.stdout.splitlines()[-1] == ""


def test_mistakes_exit_with_status_2_and_one_line(inputs, tmp_path):
    cmd = [sys.executable, str(ROOT / "inference_eval.py"), *flags(inputs, tmp_path / "out.jsonl", benchmark="aime-26")]
    done = subprocess.run(cmd, env=kill_test.environment(), capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert [line for line in done.stderr.splitlines() if line][-1].startswith("error: --benchmark 'aime-26'")
    assert "Traceback" not in done.stderr


# --------------------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_flush_and_say_how_to_go_on(inputs, tmp_path, number):
    output = tmp_path / "out.jsonl"
    cmd = kill_test.command("simulated", inputs, output)
    process = subprocess.Popen(
        cmd, env=kill_test.environment() | {"SIM_SECONDS": "0.2"}, stderr=subprocess.PIPE, text=True
    )
    journal = tmp_path / "out.tree.jsonl"
    while process.poll() is None and not (journal.exists() and journal.stat().st_size):
        time.sleep(0.01)
    process.send_signal(number)
    process.send_signal(number)  # launchers often send it twice
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert f"stopped by {number.name}: 0 of 9 searches are finished; the same command goes on" in errors
    assert "Traceback" not in errors
    assert journal.read_bytes().endswith(b"\n")


def test_a_second_process_on_one_output_is_told_and_harms_nothing(inputs, tmp_path):
    output, reference = tmp_path / "out.jsonl", tmp_path / "reference.jsonl"
    kill_test.run_to_end(kill_test.command("simulated", inputs, reference))
    cmd = kill_test.command("simulated", inputs, output)
    first = subprocess.Popen(cmd, env=kill_test.environment() | {"SIM_SECONDS": "0.2"}, stderr=subprocess.DEVNULL)
    journal = tmp_path / "out.tree.jsonl"
    while first.poll() is None and not (journal.exists() and journal.stat().st_size):
        time.sleep(0.01)
    second = subprocess.run(cmd, env=kill_test.environment(), capture_output=True, text=True)
    assert first.wait() == 0
    assert second.returncode == 2
    assert "error: another process is writing to" in second.stderr
    kill_test.compare(output, reference, 0.0)


def test_a_full_disk_ends_a_run_in_one_line_and_the_same_command_goes_on(inputs, tmp_path, small_disk):
    output, reference = small_disk / "out.jsonl", tmp_path / "reference.jsonl"
    kill_test.run_to_end(kill_test.command("simulated", inputs, reference))
    (small_disk / "filler").write_bytes(b"x" * 230_000)  # room for the meta file and a few rounds
    cmd = kill_test.command("simulated", inputs, output)
    full = subprocess.run(cmd, env=kill_test.environment(), capture_output=True, text=True)
    assert full.returncode == 1
    line = full.stderr.strip().splitlines()[-1]
    assert "No space left on device" in line
    assert "the same command goes on" in line
    assert "Traceback" not in full.stderr
    (small_disk / "filler").unlink()
    kill_test.run_to_end(cmd)
    kill_test.compare(output, reference, 0.0)


@pytest.mark.parametrize(("engine", "times"), [("simulated", 2), ("transformers", 1)])
def test_killed_at_random_moments_nothing_is_lost_or_done_twice(engine, times, tmp_path):
    assert kill_test.kill_trials(times, engine, problems=3, seed=os.getpid(), folder=tmp_path) == 0


def test_an_engine_that_dies_ends_the_run_with_one_line(inputs, tmp_path, capsys):
    def failing(args, plan):
        engine = inference_eval.load_engine(args, plan)
        generate, calls = engine.model.generate, []

        def dies(*words, **settings):
            calls.append(settings)
            if len(calls) > 3:
                raise RuntimeError("device lost")
            return generate(*words, **settings)

        engine.model.generate = dies
        return engine

    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    inference_eval.main(flags(inputs, whole))
    assert inference_eval.main(flags(inputs, output), Loaders(engine=failing)) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: the transformers engine failed: device lost (0 of 9 searches are finished; the same")
    assert inference_eval.main(flags(inputs, output)) == 0
    kill_test.compare(output, whole, 1e-6)


class ClosingEngine:
    """Notes that it was closed."""

    name, context_length, vocab_size, closed = "closing", 2048, 264, 0

    def describe(self):
        return {"name": self.name}

    async def close(self):
        self.closed += 1


def test_the_engine_is_closed_also_where_the_value_model_does_not_load(inputs, tmp_path):
    def broken(*_):
        raise RuntimeError("out of memory")

    engine = ClosingEngine()
    with pytest.raises(RuntimeError, match="out of memory"):
        inference_eval.main(flags(inputs, tmp_path / "out.jsonl"), Loaders(lambda args, plan: engine, broken))
    assert engine.closed == 1


def test_an_engine_that_holds_too_little_is_told_and_closed(inputs, tmp_path):
    engine = ClosingEngine()
    engine.context_length = 100
    with pytest.raises(
        UserError, match=r"make \d+ tokens, and the closing engine takes 100; give a smaller --max_length"
    ):
        inference_eval.main(flags(inputs, tmp_path / "out.jsonl"), Loaders(lambda args, plan: engine, no_model))
    assert engine.closed == 1


def test_a_real_benchmark_is_read_and_searched(inputs, tmp_path):
    aime = SHARED / "data/matharena/aime_2024.jsonl"
    if not aime.exists():
        pytest.skip("needs third-party data that is not here: ../shared/data/matharena")
    output = tmp_path / "out.jsonl"
    changes = {"benchmark": aime, "max_problems": 3, "num_repetitions": 1}
    assert inference_eval.main(flags(inputs, output, **changes)) == 0
    assert [row["gt_answer"] for row in rows_of(output)] == ["204", "025", "809"]
