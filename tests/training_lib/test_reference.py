"""The whole loop against plain PyTorch, written here: parameters after each step, on one rank and on three."""

import json
import math
from pathlib import Path

import pytest
import torch
from rollouts import run_script, write_rows
from safetensors.torch import load_file
from tiny import save_generator, tiny_value_model
from torch.nn.functional import binary_cross_entropy_with_logits, log_softmax, logsigmoid
from train_spy import command, names, numbered_rows, spied_run, trace_name

ROWS = numbered_rows(0, 20, per_row=6)
STEPS, CLIP, LONGEST = 8, 0.02, 20  # 8 steps of 24 roll-outs are more than an epoch of 15 x 6; the clip is active
SETTINGS = {
    "data_num_response": 6, "max_length": LONGEST, "total_batch_size": 24, "micro_batch_size": 4, "num_steps": STEPS,
    "max_lr": 1e-3, "beta1": 0.8, "beta2": 0.9, "weight_decay": 0.2, "grad_norm_clip": CLIP, "p_dropout": 0.0, "eval_every": 4,
    "eval_size": 5, "save_every": 1, "device": "cpu", "run_name": "run",
}  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    save_generator(folder / "backbone")
    write_rows(folder / "data", ROWS)
    return folder


def run_spied(inputs, tmp_path, **changes):
    paths = {"model_path": inputs / "backbone", "data_path": inputs / "data", "save_dir": tmp_path}
    seen = spied_run(command(SETTINGS | paths | changes), inputs / "cache")
    seen.run_dir = tmp_path / "run"
    assert seen.status == 0, seen.error
    return seen


def rate(step: int) -> float:
    """Of steps 0 .. 7: linear over the first four (half of them), then a cosine to a tenth at the last."""
    return 1e-3 * ((step + 1) / 4 if step < 4 else 0.1 + 0.9 * (1 + math.cos(math.pi * (step - 4) / 3)) / 2)


def rollout(row: int, column: int) -> tuple[torch.Tensor, int, int]:
    """(tokens cut at the longest, first roll-out token, label)."""
    roll_in, roll_out = ROWS[row]["roll_in_ids"][column], ROWS[row]["roll_outs_ids"][column]
    return torch.tensor((roll_in + roll_out)[:LONGEST]), len(roll_in), ROWS[row]["labels"][column]


def reference_loss(model, batch: list[tuple[int, int]], pairs: bool) -> torch.Tensor:
    """Mean over roll-outs of the mean over their tokens, or over pairs at the last tokens; each trace read by itself."""
    losses, last = [], []
    for name in batch:
        tokens, start, label = rollout(*name)
        logits = model(tokens[None]).logits[0, start:]
        last.append(logits[-1, 0])
        if logits.shape[-1] == 1:
            wanted = torch.full_like(logits[:, 0], float(label == 1))
            losses.append(binary_cross_entropy_with_logits(logits[:, 0], wanted))
        else:
            losses.append(-log_softmax(logits, dim=-1)[:, label].mean())
    if pairs:
        losses = [-logsigmoid(correct - incorrect) for correct, incorrect in zip(last[::2], last[1::2], strict=True)]
    return torch.stack(losses).mean()


def reference(start: dict, batches: list[list[tuple[int, int]]], num_labels=3, pairs=False, scheduled=True):
    """(parameters, loss, norm of the gradient) of each step, in float64."""
    model = tiny_value_model(num_labels=num_labels).double()
    model.load_state_dict({name: value.double() for name, value in start.items()})
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in model.named_parameters()}
    for step, batch in enumerate(batches):
        model.zero_grad()
        loss = reference_loss(model, batch, pairs)
        loss.backward()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
        lr = rate(step) if scheduled else 1e-3
        with torch.no_grad():
            for name, p in model.named_parameters():
                gradient = p.grad * min(1, CLIP / norm)
                first, second = moments[name]
                first.mul_(0.8).add_(0.2 * gradient)
                second.mul_(0.9).add_(0.1 * gradient**2)
                p.mul_(1 - lr * 0.2 if p.dim() > 1 else 1)
                p.sub_(lr * first / (1 - 0.8 ** (step + 1)) / ((second / (1 - 0.9 ** (step + 1))).sqrt() + 1e-6))
        yield {name: p.detach().clone() for name, p in model.named_parameters()}, float(loss.detach()), norm


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], step: int) -> None:
    """To 1e-6, relative to a tensor's size, or to 1e-4 of what a step can move: biases begin at 0."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        error = (found[name].double() - value).norm()
        assert error <= 1e-6 * value.norm() + 1e-4 * 1e-3 * value.numel() ** 0.5, (step, name, error, value.norm())


def batches_of(seen) -> list[list[tuple[int, int]]]:
    """The roll-outs of each step."""
    read = names(seen.trained)
    return [read[i : i + 24] for i in range(0, len(read), 24)]


VARIANTS = {
    "three classes": ({}, {}),
    "one class, constant rate, pushed through once": (
        {"num_labels": 1, "disable_lr_schedule": True, "micro_batch_size": 24, "gradient_checkpointing": False},
        {"num_labels": 1, "scheduled": False},
    ),
    "pairs": ({"num_labels": 1, "train_bt_model": True}, {"num_labels": 1, "pairs": True}),
    "sharded": ({"fsdp": True}, {}),
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_step_is_that_of_plain_pytorch(inputs, tmp_path, variant):
    changes, kind = VARIANTS[variant]
    seen = run_spied(inputs, tmp_path, **changes)
    batches = batches_of(seen)
    assert [len(batch) for batch in batches] == [24] * STEPS
    wanted = list(reference(seen.steps[0].before, batches, **kind))
    for step, (parameters, loss, norm) in enumerate(wanted):
        assert_same(seen.steps[step].after, parameters, step)
        assert seen.values("loss")[step] == pytest.approx(loss, rel=1e-5)
        assert seen.values("grad_norm")[step] == pytest.approx(norm, rel=1e-4) and norm > 2 * CLIP
    logged = [1e-3] * STEPS if kind.get("scheduled") is False else [rate(step) for step in range(STEPS)]
    assert seen.values("lr") == pytest.approx(logged)


def test_packed_rows_train_as_padded_ones(inputs, tmp_path):
    """The same roll-outs, so the same steps, whatever the layout: checkpoints of both are compared."""
    padded = run_spied(inputs, tmp_path / "none")
    for packing in ("pack", "tree"):
        packed = run_spied(inputs, tmp_path / packing, packing=packing)
        assert all(forward.position_ids is not None for forward in packed.forwards)
        assert len(packed.trained) < len(padded.trained)
        for step in range(STEPS):
            assert_same(packed.steps[step].after, {k: v.double() for k, v in padded.steps[step].after.items()}, step)


def test_three_ranks_are_plain_pytorch_too_and_evaluate_as_one(inputs, tmp_path):
    one = run_spied(inputs, tmp_path / "one")
    paths = {"model_path": inputs / "backbone", "data_path": inputs / "data", "save_dir": tmp_path / "three"}
    done = run_script(command(SETTINGS | paths), ranks=3, env={"HF_DATASETS_CACHE": str(inputs / "cache")})
    assert done.returncode == 0, done.stderr
    run_dir: Path = tmp_path / "three/run"
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    trained = [record for record in records if "loss" in record]
    assert [record["step"] for record in trained] == list(range(1, STEPS + 1))
    wanted = reference(one.steps[0].before, batches_of(one))
    for step, (parameters, loss, norm) in enumerate(wanted):
        assert_same(load_file(run_dir / f"step-{step + 1:08d}/model.safetensors"), parameters, step)
        assert (trained[step]["loss"], trained[step]["grad_norm"]) == pytest.approx((loss, norm), rel=1e-4)
    assert len(torch.load(run_dir / "latest/rng.pt", weights_only=True)) == 3
    evaluations = [[r for r in found if "eval/loss" in r] for found in (records, one.records)]
    assert [record["step"] for record in evaluations[0]] == [4, 8]
    for three_ranks, one_rank in zip(*evaluations, strict=True):
        assert three_ranks == pytest.approx(one_rank, rel=1e-4, abs=1e-6)


def test_the_loss_is_computed_in_float32_under_autocast(inputs, tmp_path):
    """From bf16 logits, in float32: bf16 would be off by 1e-3."""
    seen = run_spied(inputs, tmp_path, autocast=True, micro_batch_size=24, num_steps=2, eval_every=-1)
    for forward, loss in zip(seen.trained, seen.values("loss"), strict=True):
        assert forward.logits.dtype == torch.bfloat16
        losses = []
        for row, logits in zip(forward.input_ids.tolist(), forward.logits.double(), strict=True):
            tokens, start, label = rollout(*trace_name(row))
            losses.append(-log_softmax(logits, dim=-1)[start : len(tokens), label].mean())
        assert loss == pytest.approx(float(torch.stack(losses).mean()), rel=1e-6)
