"""One step and its surroundings: noise by rank, figures of the log, faults that name the sample, signals, the hub."""

import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from rollouts import losses, write_rows
from tiny import save_generator, save_value_model, tiny_value_model
from torch.optim.optimizer import register_optimizer_step_post_hook
from train_spy import SpyHub, command, numbered_rows, spied_run

import train_classifier
from classifier_lib import Qwen2ForClassifier
from common_lib.cli import UserError
from training_lib import loop, rollout_data
from training_lib.arguments import parse_args
from training_lib.attention import SDPA
from training_lib.batch_order import balanced_shares
from training_lib.checkpoints import lock_run, restore
from training_lib.packing import Trace, padded_batch
from training_lib.ranks import World
from training_lib.step import TrainStep, load_model, peak_flops, step_flops

CPU = torch.device("cpu")
POISON = 260  # a token id that one roll-out has


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    save_generator(folder / "backbone")
    rows = numbered_rows(0, 20)
    rows[5]["roll_outs_ids"][2][-1] = POISON
    write_rows(folder / "data", rows)
    save_value_model(folder / "poisoned")
    model = Qwen2ForClassifier.from_pretrained(folder / "poisoned")
    with torch.no_grad():
        model.get_input_embeddings().weight[POISON] = float("nan")
    model.save_pretrained(folder / "poisoned")
    return folder


def run(inputs, tmp_path, **changes):
    settings = {
        "model_path": inputs / "backbone", "data_path": inputs / "data", "data_num_response": 4, "max_length": 40,
        "total_batch_size": 8, "micro_batch_size": 4, "num_steps": 4, "eval_every": -1, "max_lr": 1e-3, "run_name": "run",
        "save_dir": tmp_path, "device": "cpu",
    }  # fmt: skip
    seen = spied_run(command(settings | changes), inputs / "cache")
    seen.run_dir = tmp_path / "run"
    return seen


# ---------------------------------------------------------------------------------------------------------------------
# The model


def loaded(inputs, rank: int, *flags: str):
    """(weights of the head, the noise that dropout draws next) of a rank."""
    plan = SimpleNamespace(has_head=False, model_dir=inputs / "backbone", attention=SDPA)
    model = load_model(parse_args(flags), plan, World(rank, 3, CPU))
    assert model.training
    return model.score[0].weight.detach().clone(), torch.rand(8)


def test_a_fresh_head_is_alike_on_all_ranks_and_dropout_is_not(inputs):
    heads, noise = zip(*(loaded(inputs, rank) for rank in range(3)), strict=True)
    assert torch.equal(heads[0], heads[1]) and torch.equal(heads[0], heads[2])
    assert len({tuple(draws.tolist()) for draws in noise}) == 3
    other = loaded(inputs, 0, "--seed", "2")
    assert not torch.equal(other[0], heads[0]) and other[1].tolist() not in [draws.tolist() for draws in noise]
    again = loaded(inputs, 1)
    assert torch.equal(again[0], heads[0]) and torch.equal(again[1], noise[1])


@pytest.mark.parametrize(("fsdp", "place"), [("on", "cpu"), ("off", "meta")])
def test_a_model_that_fsdp_will_shard_is_not_taken_to_the_card_whole(inputs, fsdp, place):
    plan = SimpleNamespace(has_head=False, model_dir=inputs / "backbone", attention=SDPA)
    model = load_model(parse_args(["--fsdp", fsdp]), plan, World(0, 1, torch.device("meta")))
    assert {parameter.device.type for parameter in model.parameters()} == {place}


def test_evaluation_has_no_dropout_and_leaves_the_model_in_training(inputs, tmp_path):
    seen = run(inputs, tmp_path, eval_every=2, eval_size=5, p_dropout=0.5)
    assert [forward.training for forward in seen.forwards].count(False) == 2 * 5
    assert {x for forward in seen.evaluated for x in forward.attention_dropout} == {0.0}
    assert {x for forward in seen.trained for x in forward.attention_dropout} == {0.5}
    assert seen.steps[2].gradient_norm > 0 and len(seen.steps) == 4


# ---------------------------------------------------------------------------------------------------------------------
# What is logged


def test_rates_count_all_tokens_real_ones_and_those_of_the_loss(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr("training_lib.loop.peak_flops", lambda device: 1e9)
    seen = run(inputs, tmp_path)
    rows = numbered_rows(0, 20)
    for step, record in enumerate(seen.records):
        forwards = seen.trained[2 * step : 2 * step + 2]
        names = [name for forward in forwards for name in forward.traces]
        ins = [len(rows[row]["roll_in_ids"][column]) for row, column in names]
        outs = [len(rows[row]["roll_outs_ids"][column]) for row, column in names]
        lengths = np.add(ins, outs)
        found = [record[f"{name}tokens_per_s"] * record["seconds"] for name in ("", "real_", "loss_")]
        assert found == pytest.approx([sum(f.input_ids.numel() for f in forwards), lengths.sum(), sum(outs)])
        pairs = (lengths * (lengths + 1) // 2).sum()
        flops = step_flops(forwards[0].model, float(lengths.sum()), float(pairs))
        assert record["mfu"] * record["seconds"] * 1e9 == pytest.approx(flops)
        assert record["attention"] == "sdpa" and record["lr"] == seen.steps[step].groups[0]["lr"]


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12),
     ("NVIDIA L40S", 362e12), ("NVIDIA L40", 181e12), ("NVIDIA L4", 121e12), ("NVIDIA GH200 480GB", 989e12), ("GeForce", None)],
)  # fmt: skip
def test_the_peak_is_that_of_the_card(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == peak
    assert peak_flops(CPU) is None


def test_a_checkpoint_says_what_it_is_of(inputs, tmp_path):
    seen = run(inputs, tmp_path, save_every=2, track=True, tracker="trackio")
    for step in (2, 4):
        folder = seen.run_dir / f"step-{step:08d}"
        trainer = json.loads((folder / "trainer.json").read_text())
        assert (trainer["step"], trainer["record"]["step"], trainer["world_size"]) == (step, step, 1)
        assert (trainer["attention"], trainer["tracker"]) == ("sdpa", seen.trackers[0].run_id)
        assert (trainer["arguments"]["max_lr"], trainer["arguments"]["world_size"]) == (1e-3, 1)
        assert trainer["data"] == {"rows": 20, "rollouts": 80, "rollout_tokens": ROLLOUT_TOKENS}
        saved = Qwen2ForClassifier.from_pretrained(folder).state_dict()
        assert all(torch.equal(saved[name], value) for name, value in seen.steps[step - 1].after.items())
        assert (folder / "tokenizer.json").read_bytes() == (inputs / "backbone/tokenizer.json").read_bytes()
    assert (seen.run_dir / "latest").resolve() == folder


ROLLOUT_TOKENS = sum(len(ids) for row in numbered_rows(0, 20) for ids in row["roll_outs_ids"])


# ---------------------------------------------------------------------------------------------------------------------
# What goes wrong


def test_a_loss_that_is_not_finite_names_the_sample_and_changes_nothing(inputs, tmp_path):
    seen = run(inputs, tmp_path, init_from=inputs / "poisoned", num_steps=10)
    step = len(seen.steps) + 1
    assert f"step {step}, rank 0: the loss is nan; sample row 5, roll-out 2; nothing was updated" in seen.error
    assert [(5, 2) in forward.traces for forward in seen.trained[-4:]].count(True) == 2  # and once more, to find it
    assert seen.checkpoints == [] and len(losses(seen.run_dir)) == step - 1


def test_the_sample_is_found_in_any_micro_batch():
    model = tiny_value_model().train()
    with torch.no_grad():
        model.get_input_embeddings().weight[POISON] = float("inf")
    step = TrainStep(model, World(0, 1, CPU), SDPA, False, 4)
    clean, bad = (Trace(np.array(tokens), 1, 0, (tokens[0], 7)) for tokens in ([4, 5, 6], [9, 8, POISON]))
    batches = [padded_batch([clean, clean], 8), padded_batch([clean, bad], 8)]
    assert step.find_nonfinite_sample(batches) == "row 9, roll-out 7"
    assert step.find_nonfinite_sample(batches[:1]) == "unknown (computed again, its logits are finite)"


def test_a_fault_in_the_data_that_is_read_late_is_named(inputs, tmp_path, monkeypatch):
    rows = numbered_rows(0, 20)
    rows[7]["roll_outs_ids"][1].append(999)
    write_rows(tmp_path / "data", rows)
    monkeypatch.setattr(rollout_data.load_rollouts, "__kwdefaults__", rollout_data.load_rollouts.__kwdefaults__
                        | {"ids_checked_at_start": 0})  # fmt: skip
    seen = run(inputs, tmp_path, data_path=tmp_path / "data", num_steps=10)
    assert "row 7, column roll_outs_ids[1]: token id 999 is outside the model's vocabulary of 264" in seen.error
    assert len(seen.steps) < 10 and seen.checkpoints == []


def test_pairs_that_do_not_exist_are_told_before_training(inputs, tmp_path):
    rows = numbered_rows(0, 20)
    write_rows(tmp_path / "held", [row | {"labels": [1] * 4} for row in rows[:3]])
    pairs = {"num_labels": 1, "train_bt_model": True, "eval_every": 2}
    seen = run(inputs, tmp_path, **pairs, validation_data_path=tmp_path / "held")
    assert "the validation data have no pair of a correct and an incorrect roll-out" in seen.error
    write_rows(tmp_path / "wrong", [row | {"labels": [0] * 4} for row in rows])
    seen = run(inputs, tmp_path, **pairs | {"eval_every": -1}, data_path=tmp_path / "wrong")
    assert (
        "has fewer pairs of a correct and an incorrect roll-out (0) than a step of --total_batch_size 8" in seen.error
    )


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_saves_the_step_and_the_same_command_goes_on(inputs, tmp_path, capsys, number, status):
    whole = run(inputs, tmp_path / "whole", p_dropout=0.3)
    count = []

    def stop_after_two(optimizer, args, kwargs):
        count.append(1)
        if len(count) == 2:
            os.kill(os.getpid(), number)

    handle = register_optimizer_step_post_hook(stop_after_two)
    try:
        seen = run(inputs, tmp_path, p_dropout=0.3)
    finally:
        handle.remove()
    assert seen.status == status and len(seen.steps) == 2 and seen.checkpoints == [2]
    name = signal.Signals(number).name
    assert f"stopped by {name} after step 2, which is saved; the same command goes on" in capsys.readouterr().err
    lock_run(seen.run_dir, patience_s=0.0).release()  # it is free
    rest = run(inputs, tmp_path, p_dropout=0.3)
    assert rest.status == 0 and len(rest.steps) == 2
    assert losses(rest.run_dir) == losses(whole.run_dir)


def test_the_lock_is_free_after_a_mistake(inputs, tmp_path):
    assert run(inputs, tmp_path, label_key="nothing").error
    lock_run(tmp_path / "run", patience_s=0.0).release()


def test_a_checkpoint_that_is_being_pushed_is_not_removed(inputs, tmp_path, monkeypatch):
    """The hub is slower than training, and only one checkpoint is kept."""
    upload = SpyHub.upload_folder

    def slow(hub, repo_id, folder_path, revision, ignore_patterns, commit_message):
        time.sleep(0.1)
        assert sorted(ignore_patterns) == ["optimizer.pt", "rng.pt"]
        upload(hub, repo_id, folder_path, revision, ignore_patterns, commit_message)

    monkeypatch.setattr(SpyHub, "upload_folder", slow)
    seen = run(inputs, tmp_path, save_every=1, max_keep_ckpts=1, push_to_hub=True)
    pushed = [(name, revision) for kind, _, name, *revision in seen.hub if kind == "upload"]
    wanted = [(f"step-{n:08d}", [revision]) for n in range(1, 5) for revision in (f"step-{n}", "main")]
    assert pushed == wanted and "was not pushed" not in seen.log
    assert (seen.run_dir / "latest").resolve().name == "step-00000004"


# ---------------------------------------------------------------------------------------------------------------------
# Ranks


def test_rank0_first_and_errors_of_one_are_raised_by_all():
    order = []

    class TwoRanks(World):
        def gather(self, item):
            order.append("gather")
            return [item, "other rank's trouble"] if self.device.type == "meta" else [item]

    for rank in (0, 1):
        assert TwoRanks(rank, 2, CPU).rank0_first(lambda rank=rank: order.append(f"do {rank}") or rank) == rank
    assert order == ["do 0", "gather", "gather", "gather", "do 1", "gather"]
    with pytest.raises(UserError, match="other rank's trouble"):
        TwoRanks(0, 2, torch.device("meta")).raise_together(None)


def test_shares_are_balanced_and_whole():
    assert balanced_shares(np.array([5, 5, 5, 1, 1, 1]), 3) == [[0, 3], [1, 4], [2, 5]]


def test_a_rank_that_is_not_the_first_leaves_the_error_to_rank_0(inputs, tmp_path, monkeypatch):
    """It waits, so that torchrun does not end rank 0 before it spoke, and returns 2."""
    waited = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(train_classifier.time, "sleep", waited.append)
    assert run(inputs, tmp_path, total_batch_size=7).status == 2
    assert waited and waited[0] >= 5
    assert not Path(tmp_path / "run").exists()


def test_a_gradient_that_is_not_finite_stops_before_the_weights_change(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, most: torch.tensor(float("inf")))
    seen = run(inputs, tmp_path)
    assert "step 1: the gradient's norm is inf (loss 1." in seen.error and "nothing was updated" in seen.error
    assert not seen.steps and seen.checkpoints == []


def test_a_steps_seconds_leave_out_evaluations_and_checkpoints(inputs, tmp_path, monkeypatch):
    """By a clock that runs in forward passes (1 s), evaluations (1000 s) and checkpoints (10000 s) alone."""
    now = [0.0]

    def taking(seconds, do):
        def slow(*args, **kwargs):
            now[0] += seconds
            return do(*args, **kwargs)

        return slow

    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(loop, "evaluate", taking(1000, lambda *_: {"loss": 1.0}))
    monkeypatch.setattr(loop, "save_checkpoint", taking(10000, loop.save_checkpoint))
    monkeypatch.setattr(TrainStep, "logits", taking(1, TrainStep.logits))
    seen = run(inputs, tmp_path, eval_every=1, eval_size=5, save_every=1)
    assert seen.values("seconds") == [2.0] * 4


def test_with_sharding_every_rank_runs_as_many_passes():
    class ThreeRanks(World):
        def gather(self, item):
            return [1, item, 4]

    batch = padded_batch([Trace(np.arange(1, 5), 1, 0, (0, 0))], 8)
    step = TrainStep(tiny_value_model(), ThreeRanks(1, 3, CPU), SDPA, False, 4, packed=True, sharded=True)
    padded = step.pad_to_same_count([batch, batch])
    assert len(padded) == 4 and padded[2] is padded[3] is batch  # the last one exchanges the gradients
    assert all(len(empty.labels) == 0 and empty.end is not None for empty in padded[:2])
    assert step.pad_to_same_count([batch] * 4) == [batch] * 4


def test_each_rank_draws_on_from_its_own_noise(inputs, tmp_path):
    """Of a checkpoint of as many ranks; with another number the noise is another anyway."""

    class SomeRanks(World):
        sent: ClassVar[list] = []  # by rank 0, in order

        def gather(self, item):
            return [item]

        def from_rank0(self, item):
            self.sent.append(item if self.rank == 0 else self.sent.pop(0))
            return self.sent[-1]

        broadcast = from_rank0

    seen = run(inputs, tmp_path)
    checkpoint = seen.run_dir / "latest"
    states = [torch.manual_seed(seed).get_state() for seed in (5, 6)]
    torch.save([{"cpu": state} for state in states], checkpoint / "rng.pt")
    model = Qwen2ForClassifier.from_pretrained(checkpoint)
    for rank, size, expected in ((0, 2, states[0]), (1, 2, states[1]), (1, 3, torch.manual_seed(7).get_state())):
        torch.manual_seed(7)
        optimizer = torch.optim.AdamW(model.parameters())
        restore(checkpoint, model, optimizer, SomeRanks(rank, size, CPU))
        assert torch.equal(torch.get_rng_state(), expected)
        assert all(float(state["step"]) == 4 for state in optimizer.state.values())


def test_after_a_mistake_a_sharded_run_can_start_again(inputs, tmp_path):
    """Its process group of one rank is gone, whatever ended the run."""
    assert "lacks column nothing" in run(inputs, tmp_path, fsdp=True, label_key="nothing").error
    assert not torch.distributed.is_initialized()
    assert run(inputs, tmp_path, fsdp=True, num_steps=1).status == 0
    assert not torch.distributed.is_initialized()
