"""train_classifier.py: flags, equal gradients however a step is split, checkpoints, evaluation, and bad input."""

import functools
import itertools
import json
import math
import os
import resource
import shlex
import shutil
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
from rollouts import ROOT, losses, random_rows, run_script, write_rows
from tiny import save_generator, save_value_model, tiny_value_model

import train_classifier
from classifier_lib import Qwen2ForClassifier
from common_lib.cli import UserError
from training_lib import checkpoints as checkpoints_module
from training_lib import step as step_module
from training_lib.arguments import parse_args
from training_lib.checkpoints import checkpoints, lock_run
from training_lib.evaluation import _rollout_metrics
from training_lib.loop import open_metrics
from training_lib.step import learning_rate, step_flops


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))  # for scripts
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """A folder with a tiny backbone and 40 x 4 random roll-outs."""
    folder = tmp_path_factory.mktemp("inputs")
    save_generator(folder / "backbone")
    write_rows(folder / "data", random_rows(40))
    return folder


def flags(inputs, tmp_path, **changes):
    """Flags of a small run, as a list; a value of None leaves one out, True and False are switches."""
    settings = {
        "model_path": inputs / "backbone", "data_path": inputs / "data", "data_num_response": 4, "max_length": 40,
        "total_batch_size": 8, "micro_batch_size": 4, "num_steps": 6, "save_every": 3, "eval_every": -1, "max_lr": 1e-3,
        "save_dir": tmp_path / "runs", "run_name": "run", "device": "cpu",
    }  # fmt: skip
    parts = []
    for name, value in (settings | changes).items():
        if value is True or value is False:
            parts.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            parts += [f"--{name}", str(value)]
    return parts


# ---------------------------------------------------------------------------------------------------------------------
# Flags

RELEASED = shlex.split(
    "--eval_every -1 --save_every 486 --num_steps 12170 --max_lr 0.0001 --data_path VGS-AI/OpenR1-VM "
    "--data_num_response 56 --model_path deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B --total_batch_size 64 "
    "--micro_batch_size 8 --small_group_size 2 --run_name single_node_run --track --compile --push_to_hub"
)


def test_the_released_command_is_accepted(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    args = parse_args(RELEASED)
    assert (args.compile, args.push_to_hub, args.tracker, args.gradient_checkpointing) == (True, True, "neptune", None)
    assert (args.world_size, args.held_out, args.run_name) == (4, 0, "single_node_run")
    assert not parse_args([*RELEASED, "--no-push_to_hub", "--no-track"]).push_to_hub


def test_defaults_are_the_released_ones():
    released = {
        "track": False, "logger_tags": [], "data_path": "VGS-AI/OpenR1-VM", "validation_data_path": None,
        "data_num_response": 8, "model_path": "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", "compile": False,
        "seed": 1337, "micro_batch_size": 4, "total_batch_size": 128, "max_length": 16384,
        "disable_lr_schedule": False, "max_lr": 1e-4, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, "grad_norm_clip": 5.0,
        "p_dropout": 0.05, "num_steps": 4000, "eval_size": 128, "eval_every": 200, "save_every": 200, "max_keep_ckpts": 20,
        "push_to_hub": False, "small_group_size": 2, "num_labels": 3, "label_key": "labels", "train_bt_model": False,
        "debug": False, "dataset_name": None, "use_dora": False, "packing": "auto", "param_dtype": "fp32",
    }  # fmt: skip
    args = vars(parse_args([]))
    assert {name: args[name] for name in released} == released
    assert args["run_name"] == "DeepSeek-R1-Distill-Qwen-7B-OpenR1-VM-seed1337"
    assert parse_args(["--dataset_name", "mine"]).run_name.startswith("mine-")
    assert parse_args(["--logger_tags", "a", "b"]).logger_tags == ["a", "b"]


QUICK = """
import sys
import train_classifier
from common_lib.cli import run_script
try:
    run_script(train_classifier.main)
finally:
    print("slow:", [name for name in ("torch", "transformers", "datasets") if name in sys.modules])
"""


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--num_step", "3"], ["--p_dropout", "x"], ["--total_batch_size", "6", "--device", "cpu"]]
)
def test_help_and_mistakes_in_the_flags_are_answered_before_anything_slow_is_imported(arguments):
    done = subprocess.run([sys.executable, "-c", QUICK, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.endswith("slow: []\n")
    if arguments == ["--help"]:
        assert done.returncode == 0 and "torchrun --standalone --nproc_per_node=4" in done.stdout
    else:
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_schedule():
    rates = [learning_rate(step, 4000, 1.0) for step in range(4000)]
    assert rates[:2] == [1 / 200, 2 / 200] and rates[199] == rates[200] == 1.0
    assert rates[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(rates[199:]))
    assert learning_rate(99, 1000, 1.0) == 1.0 > learning_rate(98, 1000, 1.0)  # at least 100 steps
    assert learning_rate(9, 20, 1.0) == 1.0 > learning_rate(8, 20, 1.0)  # at most half
    assert learning_rate(0, 1, 1.0) == 1.0


def test_flops_of_a_small_model_by_hand():
    model = tiny_value_model()  # hidden 32, feed-forward 48, 4 heads and 2 of keys and values of 8 dimensions, 2 layers
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32 + (32 + 16 + 16)  # matrices, norms, biases
    weights = 2 * layer + 32 + 32 * 32 + 32 * 3  # last norm, head
    # 2 FLOPs a weight and token forward, twice that backward; QK and PV: 2 x 2 x head_dim a pair and head forward.
    tokens, pairs = 10, 55
    by_hand = 3 * (2 * weights * tokens + 2 * 2 * 2 * 32 * pairs)
    assert step_flops(model, tokens, pairs) == by_hand


# ---------------------------------------------------------------------------------------------------------------------
# The same gradient however a step is split


def first_gradient(run_dir):
    """The gradient of a run of one step without clipping: AdamW's first moment is (1 - beta1) times it."""
    state = torch.load(run_dir / "latest/optimizer.pt", weights_only=True)
    return {name: moments["exp_avg"] / (1 - 0.9) for name, moments in state.items()}


def test_gradients_do_not_depend_on_ranks_micro_batches_packing_or_sharding(inputs, tmp_path):
    one = {"num_steps": 1, "p_dropout": 0.0, "grad_norm_clip": 1e9, "total_batch_size": 16}
    variants = {
        "reference": (1, {"micro_batch_size": 1}),
        "micro": (1, {"micro_batch_size": 8, "gradient_checkpointing": False}),
        "tree": (1, {"micro_batch_size": 16, "packing": "tree"}),
        "two ranks": (2, {"micro_batch_size": 4}),
        "sharded": (2, {"micro_batch_size": 2, "packing": "tree", "fsdp": True}),
        "four ranks": (4, {"micro_batch_size": 2, "packing": "pack"}),
    }
    for name, (ranks, changes) in variants.items():
        arguments = flags(inputs, tmp_path, **one, **changes, run_name=name)
        if ranks == 1:
            assert train_classifier.main(arguments) == 0
        else:
            done = run_script(arguments, ranks)
            assert done.returncode == 0, done.stderr
    reference = first_gradient(tmp_path / "runs/reference")
    assert all(grad.norm() > 0 for grad in reference.values())
    for name in variants:
        assert losses(tmp_path / "runs" / name) == pytest.approx(losses(tmp_path / "runs/reference"), rel=1e-5)
        for key, grad in first_gradient(tmp_path / "runs" / name).items():
            assert (grad - reference[key]).norm() <= 1e-5 * reference[key].norm() + 1e-9, (name, key)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def test_resume_is_bit_identical_and_keeps_what_it_says(inputs, tmp_path):
    """With dropout, with data workers, over an epoch's end, and with an evaluation in between."""
    more = {"num_steps": 12, "eval_every": 4, "eval_size": 10, "total_batch_size": 16, "p_dropout": 0.2}
    assert train_classifier.main(flags(inputs, tmp_path, **more, run_name="whole")) == 0
    whole = losses(tmp_path / "runs/whole")
    run_dir = tmp_path / "runs/run"
    arguments = flags(inputs, tmp_path, **more, num_workers=1, max_keep_ckpts=2)
    assert train_classifier.main(arguments) == 0
    assert [path.name for path in checkpoints(run_dir)] == ["step-00000009", "step-00000012"]
    assert (run_dir / "latest").resolve().name == "step-00000012"
    for name in ("config.json", "model.safetensors", "optimizer.pt", "rng.pt", "trainer.json", "tokenizer.json"):
        assert (run_dir / "latest" / name).stat().st_mode & 0o444
    trainer = json.loads((run_dir / "latest/trainer.json").read_text())
    assert (trainer["step"], trainer["arguments"]["max_lr"], trainer["data"]["rollouts"]) == (12, 1e-3, 120)
    # As after a kill -9 in step 11: a later log, a torn line, a checkpoint half written, one half removed.
    (run_dir / "step-00000012/trainer.json").unlink()
    (run_dir / ".writing-step-00000012").mkdir()
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "loss"')
    assert train_classifier.main(arguments) == 0
    assert losses(run_dir) == whole
    assert not list(run_dir.glob(".writing*"))
    assert train_classifier.main(arguments) == 0  # nothing left to do
    assert losses(run_dir) == whole
    model = Qwen2ForClassifier.from_pretrained(run_dir / "latest")
    assert model.config.num_labels == 3 and model.dtype == torch.float32


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_good_one(inputs, tmp_path):
    small = flags(inputs, tmp_path, num_steps=3)
    assert train_classifier.main(small) == 0
    train_classifier.main(flags(inputs, tmp_path, run_name="full", save_every=3))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for path in (tmp_path / "runs/full").glob("step-00000006"):
        path.rename(tmp_path / "away")
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))  # as a full disk: every write beyond fails
    try:
        with pytest.raises(UserError, match=r"checkpoint of step 6 could not be written .* step-00000003 is whole"):
            train_classifier.main(flags(inputs, tmp_path, run_name="full", save_every=3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in checkpoints(tmp_path / "runs/full")] == ["step-00000003"]
    assert not list((tmp_path / "runs/full").glob(".writing*"))
    assert train_classifier.main(flags(inputs, tmp_path, run_name="full", save_every=3)) == 0


def test_a_run_goes_on_only_as_the_same_run(inputs, tmp_path, monkeypatch, caplog):
    assert train_classifier.main(flags(inputs, tmp_path, num_steps=4)) == 0
    with pytest.raises(UserError, match=r"another configuration: --num_steps was 4, is 8; --max_lr was 0.001, is 0.01"):
        train_classifier.main(flags(inputs, tmp_path, num_steps=8, max_lr=0.01))
    other = write_rows(tmp_path / "data2", random_rows(41))
    (tmp_path / "data").symlink_to(inputs / "data")
    moving = {"data_path": tmp_path / "data", "run_name": "moving"}
    train_classifier.main(flags(inputs, tmp_path, **moving))
    (tmp_path / "data").unlink()
    (tmp_path / "data").symlink_to(other)
    with pytest.raises(UserError, match=r"is not what .* was trained on"):
        train_classifier.main(flags(inputs, tmp_path, **moving))
    with caplog.at_level("INFO"):
        train_classifier.main(flags(inputs, tmp_path, num_steps=4, micro_batch_size=2))
    assert "equal to rounding (dropout apart): micro_batch_size" in caplog.text


def resume(inputs, tmp_path, caplog, attention, **more):
    """Go on from step 3 as if `attention` had been used before. Returns what was logged."""
    run_dir = tmp_path / "runs/run"
    if (run_dir / "step-00000006").exists():
        shutil.rmtree(run_dir / "step-00000006")
    path = run_dir / "step-00000003/trainer.json"
    trainer = json.loads(path.read_text()) | {"attention": attention}
    path.write_text(json.dumps({name: value for name, value in trainer.items() if value is not None}))
    caplog.clear()
    with caplog.at_level("INFO"):
        assert train_classifier.main(flags(inputs, tmp_path, **more)) == 0
    return caplog.text


@pytest.mark.parametrize("p_dropout", [0.1, 0.0])
def test_another_attention_is_told_and_refused_only_where_its_dropout_differs(inputs, tmp_path, caplog, p_dropout):
    more = {"p_dropout": p_dropout, "packing": "tree"}
    assert train_classifier.main(flags(inputs, tmp_path, **more)) == 0
    trainer = json.loads((tmp_path / "runs/run/latest/trainer.json").read_text())
    records = [json.loads(line) for line in (tmp_path / "runs/run/metrics.jsonl").read_text().splitlines()]
    assert {trainer["attention"], *(record["attention"] for record in records)} == {"sdpa"}

    assert "attention was" not in resume(inputs, tmp_path, caplog, "sdpa", **more)
    assert "attention was" not in resume(inputs, tmp_path, caplog, None, **more)  # a checkpoint of before it was noted
    told = resume(inputs, tmp_path, caplog, "flash_attention_2", **more)
    assert told.count("attention was varlen_flash_attention_2 at the checkpoint and is sdpa now") == 1
    if p_dropout:
        with pytest.raises(UserError, match=r"with attention packed_flex and would go on with sdpa, but only one of"):
            resume(inputs, tmp_path, caplog, "packed_flex", **more)
    else:
        told = resume(inputs, tmp_path, caplog, "packed_flex", **more)
        assert "attention was packed_flex at the checkpoint and is sdpa now" in told


def test_a_second_process_is_told(inputs, tmp_path, monkeypatch):
    run_dir = tmp_path / "runs/run"
    held = lock_run(run_dir)
    assert (run_dir / ".lock").read_text() == f"{os.getpid()}\n"
    (run_dir / ".writing-step-00000003").mkdir()
    monkeypatch.setattr(checkpoints_module, "lock_run", functools.partial(lock_run, patience_s=0.1))
    message = rf"process {os.getpid()} is training into .*run; wait for it, or give another --run_name"
    with pytest.raises(UserError, match=message):
        train_classifier.main(flags(inputs, tmp_path))
    assert (run_dir / ".writing-step-00000003").exists()  # it is the other's
    held.release()
    lock_run(run_dir).release()
    assert [path.name for path in run_dir.iterdir()] == [".lock"]


def test_metrics_go_on_after_the_step_that_was_saved(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "loss": 1e-05}\n{"step": 1, "eval/loss": 2.0}\n{"step": 2, "loss": 0.5}\n{"step": 3, "lo'
    )
    log = open_metrics(path, last_step=1)
    log.append({"step": 2, "loss": 0.25})
    log.close()
    assert path.read_text() == (
        '{"step": 1, "loss": 1e-05}\n{"step": 1, "eval/loss": 2.0}\n{"step": 2, "loss": 0.25}\n'
    )


def test_metrics_that_cannot_be_written_end_the_run_with_one_line(inputs, tmp_path):
    train_classifier.main(flags(inputs, tmp_path, run_name="other"))  # the data are in the cache
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(
            UserError, match=r"cannot write .*metrics.jsonl: .*; make room, and the same command goes on"
        ):
            train_classifier.main(flags(inputs, tmp_path, save_every=6))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert 0 < len(losses(tmp_path / "runs/run")) < 6
    assert train_classifier.main(flags(inputs, tmp_path, save_every=6)) == 0
    assert losses(tmp_path / "runs/run") == losses(tmp_path / "runs/other")


# ---------------------------------------------------------------------------------------------------------------------
# Losses and evaluation


@pytest.mark.parametrize("kind", ["three classes", "one class", "bradley-terry"])
def test_labels_that_are_given_away_are_learned_and_evaluated_alike_in_each_layout(tmp_path, inputs, caplog, kind):
    """The evaluation says so, and --eval_only says it again of the checkpoint, whatever the packing."""
    rows = random_rows(80, per_row=6)
    for row in rows:
        row["labels"] = [int(i % 3) for i in range(6)]
        row["roll_outs_ids"] = [[1 + label] * (5 + i) for i, label in enumerate(row["labels"])]
    write_rows(tmp_path / "data", rows)
    more = {
        "three classes": {},
        "one class": {"num_labels": 1},
        "bradley-terry": {"num_labels": 1, "train_bt_model": True},
    }
    arguments = flags(
        inputs, tmp_path, data_path=tmp_path / "data", data_num_response=6, num_steps=30, total_batch_size=24, max_lr=1e-2,
        micro_batch_size=12, eval_every=30, eval_size=20, packing="tree", **more[kind],
    )  # fmt: skip
    assert train_classifier.main(arguments) == 0
    lines = [json.loads(line) for line in (tmp_path / "runs/run/metrics.jsonl").read_text().splitlines()]
    found = {name.removeprefix("eval/"): value for name, value in lines[-1].items()}
    assert found["loss"] < 0.2 < lines[0]["loss"]
    assert found["accuracy"] > 0.95 and found["auc"] > 0.98
    if kind == "bradley-terry":
        assert found["within_auc"] == 1.0
    else:
        assert found["within_auc_at_75"] == 1.0 and found["brier"] < 0.05 and found["ece"] < 0.2
    for packing in ("none", "pack"):
        caplog.clear()
        with caplog.at_level("INFO"):
            assert train_classifier.main([*arguments, "--eval_only", "--packing", packing]) == 0
        [said] = [message for message in caplog.messages if message.startswith("step 30 evaluation: loss")]
        words = said.removeprefix("step 30 evaluation: ").split()
        shown = {name: float(value) for name, value in zip(words[::2], words[1::2], strict=True)}
        assert len(shown) >= 4 and shown == pytest.approx({name: found[name] for name in shown}, abs=2e-4)


def test_evaluation_figures_by_hand():
    value = np.array([0.1, 0.9, 0.8, 0.2, 0.4], dtype=np.float32)
    arrays = {
        "value": value,
        "hit": np.array([True, False, True, True, False]),
        "length": np.array([2, 0, 3]),  # the second roll-out was cut away whole
        "correct": np.array([False, True, True]),
        "problem": np.array([0, 0, 0]),
    }
    found = _rollout_metrics(**arrays)
    assert found["accuracy"] == 0.6
    assert found["auc"] == pytest.approx((1 + 1 + 1 + 0 + 0 + 0) / 6)
    assert found["brier"] == pytest.approx((0.1**2 + 0.9**2 + 0.2**2 + 0.8**2 + 0.6**2) / 5)
    assert (found["auc_at_0"], found["auc_at_100"], found["within_auc_at_0"]) == (1.0, 0.0, 1.0)
    assert found["brier_at_100"] == pytest.approx((0.9**2 + 0.6**2) / 2)
    assert found["accuracy_at_50"] == 1.0  # tokens 0 and 3: half of the way, ties to even


def test_evaluation_does_not_depend_on_the_layout(inputs, tmp_path, caplog):
    lines = []
    save_value_model(tmp_path / "value")
    for packing, micro_batch_size in (("none", 1), ("pack", 4), ("tree", 8)):
        arguments = flags(
            inputs, tmp_path, init_from=tmp_path / "value", packing=packing, micro_batch_size=micro_batch_size,
            eval_every=1, eval_size=15, eval_only=True,
        )  # fmt: skip
        caplog.clear()
        with caplog.at_level("INFO"):
            assert train_classifier.main(arguments) == 0
        lines.append(next(line for line in caplog.messages if "evaluation" in line))
    assert lines[0] == lines[1] == lines[2]
    assert not (tmp_path / "runs").exists()


def test_init_from_goes_on_with_the_head(inputs, tmp_path):
    save_value_model(tmp_path / "value")
    train_classifier.main(flags(inputs, tmp_path, init_from=tmp_path / "value", num_steps=1, max_lr=1e-12))
    before = Qwen2ForClassifier.from_pretrained(tmp_path / "value").score[2].weight
    after = Qwen2ForClassifier.from_pretrained(tmp_path / "runs/run/latest").score[2].weight
    assert (before - after).abs().max() < 1e-9


# ---------------------------------------------------------------------------------------------------------------------
# Bad input

BAD = {
    "total_batch_size": ({"total_batch_size": 10}, "is not a multiple of 1 ranks x --micro_batch_size 4 = 4, as it must be with "
                         "--packing none; the nearest that work: 8, 12"),
    "small_group_size": ({"small_group_size": 3}, "--small_group_size 3 does not divide --data_num_response 4; the nearest that does: 2"),
    "max_length": ({"max_length": 4096}, "--max_length 4096 is beyond the 2048 positions of"),
    "bt labels": ({"train_bt_model": True}, "--num_labels 3 must be 1 with --train_bt_model"),
    "bt micro batch": ({"train_bt_model": True, "num_labels": 1, "micro_batch_size": 1}, "--micro_batch_size 1 must be even"),
    "steps": ({"num_steps": 0}, "--num_steps 0 must be above 0"),
    "dropout": ({"p_dropout": 1.0}, "--p_dropout 1.0 must be at least 0 and below 1"),
    "eval_only": ({"eval_only": True}, "--eval_every -1 must be above 0 with --eval_only"),
    "nothing to evaluate": ({"eval_only": True, "eval_every": 1, "eval_size": 5}, "has no checkpoint; give --run_name of a trained run"),
    "hold-out": ({"eval_every": 1, "eval_size": 40}, "--eval_size 40 would hold out all of the 40 problems"),
    "model": ({"model_path": "/nowhere/model"}, "/nowhere/model"),
    "data": ({"data_path": "/nowhere/data"}, "/nowhere/data does not exist"),
    "columns": ({"label_key": "grades"}, "lacks column grades; it has message_id, problem"),
    "too little data": ({"total_batch_size": 400, "micro_batch_size": 4}, "has fewer roll-outs (160) than a step"),
    "init without head": ({"init_from": "backbone"}, "has no value head, --num_labels is 3"),
    "unwritable": ({"save_dir": "/proc/nowhere"}, "--save_dir: cannot write to"),
    "gpu": ({"device": "cuda"}, "--device cuda"),
    "push": ({"push_to_hub": True}, "--push_to_hub: cannot make the repository"),
    "tracker": ({"track": True}, "no neptune project"),
    "flag": ({"micro_batchsize": 4}, "did you mean --micro_batch_size?"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_line_before_a_model_loads(inputs, tmp_path, name, monkeypatch):
    for variable in ("NEPTUNE_PROJECT", "HF_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    if name == "gpu" and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    monkeypatch.setattr(step_module, "load_model", None)
    changes, message = BAD[name]
    if changes.get("init_from"):
        changes = {"init_from": inputs / changes["init_from"]}
    with pytest.raises(UserError) as error:
        train_classifier.main(flags(inputs, tmp_path, **changes))
    assert message in str(error.value)
    assert not list(tmp_path.glob("runs/run/step*"))


def test_a_loss_that_is_not_finite_stops_all_ranks_with_one_line(inputs, tmp_path):
    arguments = flags(
        inputs, tmp_path, max_lr=1e38, disable_lr_schedule=True, num_steps=50, save_every=1, max_keep_ckpts=9
    )
    done = run_script(arguments, ranks=2)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(said) == 1
    assert "the loss is nan; sample row " in said[0] or "the gradient's norm is" in said[0]
    assert "[rank" not in done.stderr  # no traceback of a rank; torchrun shows one of its own
    good = losses(tmp_path / "runs/run")
    assert all(map(math.isfinite, good))
    assert checkpoints(tmp_path / "runs/run")[-1].name == f"step-{len(good):08d}"
