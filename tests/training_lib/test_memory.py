"""The memory line: counts against tracked fake tensors and the compiler's own cut, what it refuses, what it chooses."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import training_memory
from gpu_parts import baselines
from rollouts import write_rows
from tiny import save_generator
from train_spy import command, numbered_rows, spied_run
from training_memory import CLOSE, LAYOUTS, NARROW, PRECISIONS, SHAPES, measure_layer, measure_step, model_info

from classifier_lib import Qwen2ForClassifier
from common_lib.cli import UserError
from common_lib.models import inspect_model
from training_lib import fitting
from training_lib.arguments import parse_args
from training_lib.attention import FLEX, SDPA
from training_lib.memory import (
    BUDGETS,
    StepShape,
    activation_bytes,
    check_memory,
    choose_activation_budget,
    compiled_layer,
    eager_layer,
    estimate_memory,
    layer_parameters,
    root_parameters,
    usable,
)  # fmt: skip
from training_lib.ranks import World

H100 = 85_000_000_000  # what the driver says of 80 GB
BF16, AUTOCAST, FP32 = PRECISIONS["FSDP, bf16"], PRECISIONS["DDP, autocast"], PRECISIONS["DDP, fp32"]


# ---------------------------------------------------------------------------------------------------------------------
# Against what is measured


@pytest.mark.parametrize(
    ("model", "layout", "precision", "checkpointing"),
    [("0.5B", "none", BF16, True), ("0.5B", "pack", AUTOCAST, False), ("1.5B", "tree", BF16, True), ("1.5B", "none", AUTOCAST, True),
     ("7B", "pack", BF16, False), ("7B", "tree", FP32, False)],
)  # fmt: skip
def test_the_line_is_what_fake_tensors_of_the_step_take(model, layout, precision, checkpointing):
    """Of models of three layers, and so that the passes count and not only the states; scripts/training_memory.py has all
    layers and all ways."""
    shapes = SHAPES[model] | {"num_hidden_layers": 3, "vocab_size": 4096}
    shape = StepShape(16_384, precision, 4 if precision.fsdp else 1, checkpointing, packed=layout != "none")
    measured, estimated = measure_step(shapes, shape, LAYOUTS[layout]), estimate_memory(model_info(shapes), shape)
    assert estimated.total == pytest.approx(measured, rel=0.05) and CLOSE == 0.15
    assert estimated.parts["activations"] > 0.5 * estimated.total
    states = sum(estimated.parts[name] for name in ("parameters", "gradients", "AdamW"))
    assert estimated.total - states == pytest.approx(measured - states, rel=CLOSE)


@pytest.fixture(scope="module")
def kept_by_budget():
    """Bytes a token that a compiled layer keeps, as the compiler cuts it."""
    shapes = {
        budget: StepShape(1024, BF16, compiled=True, checkpointing=False, budget=budget)
        for budget in (1.0, 0.8, 0.4, 0.1)
    }
    return {budget: measure_layer(NARROW, shape) for budget, shape in shapes.items()}


def test_what_a_compiled_layer_keeps_is_the_compilers_own_cut(kept_by_budget):
    for budget, measured in kept_by_budget.items():
        shape = StepShape(1024, BF16, compiled=True, checkpointing=False, budget=budget)
        assert compiled_layer(model_info(NARROW), shape) == pytest.approx(measured, rel=CLOSE), budget


def test_saved_bytes_are_those_of_the_baseline(kept_by_budget):
    info = model_info(SHAPES["1.5B"])
    figures = {f"a layer of 1/8 of the 1.5B, compiled, budget {b}": kept for b, kept in kept_by_budget.items()}
    figures |= {
        f"a layer of the 1.5B, eager, {name}": float(eager_layer(info, StepShape(1, precision)))
        for name, precision in PRECISIONS.items()
    }
    assert baselines.differences("saved_bytes", figures) == []


def test_bytes_a_token_and_layer_of_the_released_model():
    """As measured for the 1.5B; in KiB."""
    info = model_info(SHAPES["1.5B"])

    def kept(precision, budget):
        return compiled_layer(info, StepShape(1, precision, compiled=True, budget=budget)) / 1024

    assert [round(kept(BF16, budget)) for budget in (1.0, 0.8)] == [72, 48]
    assert kept(BF16, 0.4) == pytest.approx(31.0, rel=0.05)  # attention's output kept
    assert round(kept(AUTOCAST, 1.0)) == 75
    assert round(eager_layer(info, StepShape(1, AUTOCAST)) / 1024) == 116  # and 1 of the weights that autocast casts


def test_parameters_are_counted_from_shapes(tmp_path):
    info = inspect_model(save_generator(tmp_path), "--model_path")
    model = Qwen2ForClassifier.from_backbone(tmp_path)
    counted = info.num_hidden_layers * layer_parameters(info) + root_parameters(info, 3)
    assert counted == sum(parameter.numel() for parameter in model.parameters())


def test_states_are_shared_out_by_fsdp_alone():
    info = model_info(SHAPES["1.5B"])
    whole, sharded = (estimate_memory(info, StepShape(4096, p, 4)).parts for p in (AUTOCAST, BF16))
    assert 16 * 1.54e9 < sum(whole[name] for name in ("parameters", "gradients", "AdamW")) < 16 * 1.56e9
    assert all(whole[name] == pytest.approx(4 * sharded[name]) for name in ("parameters", "gradients", "AdamW"))
    half = estimate_memory(info, StepShape(4096, replace(AUTOCAST, bf16_parameters=True))).parts
    assert whole["AdamW"] == 2 * half["AdamW"]


def test_a_dense_mask_counts():
    info = model_info(NARROW)
    with_mask, without = (activation_bytes(info, StepShape(4096, FP32, dense_mask=dense)) for dense in (True, False))
    assert with_mask - without == 5 * 4096**2


# ---------------------------------------------------------------------------------------------------------------------
# What fits


def refusal(model: str, shape: StepShape) -> str:
    with pytest.raises(UserError) as told:
        check_memory(model_info(SHAPES[model]), shape, H100, "cuda:0")
    return str(told.value)


def test_the_default_model_on_one_card_is_refused_with_what_makes_it_fit():
    """7B at 32,768 tokens: 113 GB of states."""
    shape = StepShape(32_768, BF16, 1, shortest=16_384)
    told = refusal("7B", shape)
    assert (
        "on its one rank, and cuda:0 has 85, of which 79.9 can be used: parameters 28.3, gradients 28.3, AdamW 56.7"
        in told
    )
    assert "what fits: --fsdp on with 2 ranks (76.3 GB)" in told and "\n" not in told
    check_memory(model_info(SHAPES["7B"]), replace(shape, ranks=2), H100, "cuda:0")
    under_ddp = refusal("7B", replace(shape, precision=AUTOCAST, ranks=4))
    assert "on each of 4 ranks" in under_ddp and "what fits: --fsdp on (" in under_ddp


@pytest.mark.parametrize(
    ("model", "shape", "flags"),
    [("1.5B", StepShape(524_288, BF16, 4, shortest=16_384), "--row_tokens 262144"),
     ("1.5B", StepShape(524_288, BF16, 4, packed=False, shortest=16_384), "--micro_batch_size 16"),
     ("1.5B", StepShape(65_536, BF16, 4, checkpointing=False), "--gradient_checkpointing"),
     ("1.5B", StepShape(65_536, BF16, 4, False, True, 1.0), "--activation_budget 0.1"),
     ("7B", StepShape(262_144, BF16, 1, shortest=16_384), "--row_tokens 131072 and --fsdp on with 16 ranks")],
)  # fmt: skip
def test_the_flags_that_are_named_make_it_fit(model, shape, flags):
    told = refusal(model, shape)
    assert f"{flags} (" in told
    size = float(told.split(f"{flags} (")[1].split(" GB")[0])
    assert size <= usable(H100) / 1e9


def test_what_nothing_fits_says_so():
    shapes = SHAPES["7B"] | {"num_hidden_layers": 20_000}
    with pytest.raises(UserError, match="give a smaller model"):
        check_memory(model_info(shapes), StepShape(8, BF16, 1, shortest=8), 10**9, "cuda:0")


def test_the_budget_is_as_large_as_memory_has_room_for():
    info, shape = model_info(SHAPES["1.5B"]), StepShape(32_768, BF16, 4, False, True)
    chosen = [choose_activation_budget(info, shape, gb * 10**9) for gb in (141, 85, 60, 48, 40, 24, 8)]
    assert chosen[0] == 1.0 and chosen[-1] is None and set(chosen[1:-1]) <= set(BUDGETS)
    assert chosen[:-1] == sorted(chosen[:-1], reverse=True) and chosen[1] == 0.8
    for gb, budget in zip((141, 85, 60, 48, 40, 24), chosen, strict=False):
        assert estimate_memory(info, replace(shape, budget=budget)).total <= usable(gb * 10**9)
    assert choose_activation_budget(info, shape, 60 * 10**9, (1.0,)) is None


# ---------------------------------------------------------------------------------------------------------------------
# Of a run


class Lengths:
    """A table of traces of up to 3000 tokens."""

    def __len__(self):
        return 5

    def lengths(self, rollouts):
        return np.array([3000, 10, 2, 700, 41])[rollouts]


def shape_of(flags: str, attention=FLEX, precision=BF16, ranks=1) -> StepShape:
    args = parse_args(flags.split())
    return fitting.step_shape(args, precision, attention, Lengths(), ranks)


def test_the_shape_of_a_step_is_that_of_its_largest_row():
    packed = shape_of("--packing pack --row_tokens 32768 --total_batch_size 64")
    assert (packed.tokens, packed.packed, packed.dense_mask, packed.shortest) == (32_768, True, False, 16_384)
    few = shape_of("--packing tree --row_tokens 32768 --total_batch_size 4")
    assert few.tokens == 12_032, "four traces of 3000, padded to 128: a row is not longer than the data fill it"
    padded = shape_of("--packing none --micro_batch_size 4", SDPA)  # 3000 tokens are padded to a multiple of 1024
    assert (padded.tokens, padded.packed, padded.dense_mask, padded.shortest) == (4 * 3072, False, False, 3072)
    assert shape_of("--packing pack --row_tokens 32768", SDPA).dense_mask
    ranks = shape_of("--packing none --num_labels 1 --total_batch_size 32", SDPA, AUTOCAST, ranks=8)
    assert (ranks.ranks, ranks.num_labels, ranks.precision) == (8, 1, AUTOCAST)


def settle(monkeypatch, flags, card, device="cuda", attention=FLEX, model="7B"):
    """(arguments, memory) with a card of that size."""
    monkeypatch.setattr(fitting, "memory_of", lambda device: (card, card))
    args = parse_args(["--packing", "pack", "--row_tokens", "32768", "--total_batch_size", "64", *flags.split()])
    world = World(0, 1, torch.device(device, *([0] if device == "cuda" else [])))
    return args, fitting.settle_memory(args, model_info(SHAPES[model]), BF16, attention, Full(), world)


class Full(Lengths):
    """A table of traces as long as they may be."""

    def lengths(self, rollouts):
        return np.full(len(rollouts), 16_384)


def test_a_gpu_without_room_is_refused_and_a_cpu_is_warned_of(monkeypatch, caplog):
    with pytest.raises(UserError, match=r"and cuda:0 .* what fits: --fsdp on with 2 ranks"):
        settle(monkeypatch, "", H100)
    _, memory = settle(monkeypatch, "", H100, "cpu")
    assert memory.total > H100 and "and the RAM has 85" in caplog.text
    line = fitting.memory_line(memory, "cpu")
    assert (
        line.startswith("memory of a rank on cpu, 85 GB: parameters 28.3, gradients 28.3, AdamW 56.7, ")
        and "left -" in line
    )


def test_the_smallest_card_of_the_ranks_counts(monkeypatch):
    class TwoRanks(World):
        def gather(self, item):
            return [item, 20 * 10**9]

    monkeypatch.setattr(fitting, "memory_of", lambda device: (H100, H100))
    args = parse_args(["--packing", "pack", "--row_tokens", "32768", "--total_batch_size", "64"])
    with pytest.raises(UserError, match=r"has 20, of which 18\.8"):
        fitting.settle_memory(
            args, model_info(SHAPES["1.5B"]), BF16, FLEX, Full(), TwoRanks(0, 2, torch.device("cuda", 0))
        )


def test_a_run_tells_its_memory_before_weights_load(tmp_path, monkeypatch):
    save_generator(tmp_path / "backbone")
    write_rows(tmp_path / "data", numbered_rows(0, 20))
    from training_lib import step as step_module

    def load_model(*_):
        raise UserError("so far")

    monkeypatch.setattr(step_module, "load_model", load_model)
    flags = {
        "model_path": tmp_path / "backbone", "data_path": tmp_path / "data", "data_num_response": 4, "max_length": 40,
        "total_batch_size": 8, "micro_batch_size": 4, "num_steps": 3, "eval_every": -1, "save_dir": tmp_path, "device": "cpu",
    }  # fmt: skip
    seen = spied_run(command(flags), tmp_path / "cache")
    assert seen.error == "so far" and "memory of a rank on cpu, " in seen.log and ", checkpointing; left " in seen.log


def test_the_scripts_table_says_what_is_off(capsys):
    assert training_memory.tell("x", 10.0, 11.0, "GB") and not training_memory.tell("x", 10.0, 12.0, "GB")
    assert "+10.0%" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "card", "kept"),
    [("--compile", 85, (False, 0.6)), ("--compile", 50, (False, 0.1)), ("--compile", 38, (True, "auto")),
     ("--compile --activation_budget 0.3", 200, (False, 0.3)), ("--compile --no-gradient_checkpointing", 38, None),
     ("--compile", 200, (False, 1.0)), ("", 85, (True, "auto")), ("--no-gradient_checkpointing", 200, (False, "auto"))],
)  # fmt: skip
def test_what_is_kept_is_chosen_where_it_is_left_to_the_run(monkeypatch, flags, card, kept):
    """Of the 1.5B on one GPU; (whole layers computed again, activation budget), None where it is refused."""
    if kept is None:
        with pytest.raises(UserError, match="what fits"):
            settle(monkeypatch, flags, card * 10**9, model="1.5B")
        return
    args, memory = settle(monkeypatch, flags, card * 10**9, model="1.5B")
    assert (args.gradient_checkpointing, args.activation_budget) == kept
    assert memory.total <= usable(card * 10**9) and memory.shape.checkpointing == kept[0]
