"""The released command's step, as train_classifier.py runs it: a saved model loaded, DDP or FSDP, clipping, AdamW.

16 roll-outs of up to 16,384 tokens: what a rank of the released command's four has to do in a step.
"""

import functools
import gc
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch

from common_lib.models import inspect_model
from gpu_parts.layouts import SyntheticTable, synthetic_table
from gpu_parts.models import NOT_ON_CPU, SHAPES, free_memory, peak_gb, timed, value_model
from gpu_parts.needs import need
from gpu_parts.report import Report
from training_lib.arguments import parse_args
from training_lib.attention import choose_attention
from training_lib.batch_order import RankBatches
from training_lib.fitting import memory_line, settle_memory
from training_lib.packing import MicroBatch
from training_lib.precision import settle_precision
from training_lib.ranks import clear_gradients, clip_gradients, distribute, join_ranks
from training_lib.step import TrainStep, load_model, make_optimizer, peak_flops, step_flops

TABLE = "the released command's step: 16 roll-outs on one rank"
FLAGS = ["--total_batch_size", "16", "--micro_batch_size", "8", "--small_group_size", "2", "--data_num_response", "56"]
CASES = {  # most important first: the time may end
    "none as released": ["--packing", "none", "--no-fsdp", "--gradient_checkpointing"],
    "tree (auto)": ["--packing", "tree"],
    "pack": ["--packing", "pack"],
}
SCALE = {"tiny": 1 / 128, "small": 1 / 32, "full": 1.0}  # of the lengths


def flags_of(case: str, report: Report, table: SyntheticTable) -> list[str]:
    """On a CPU it is not compiled, and FSDP, which auto takes on a GPU, is asked for."""
    flags = [*FLAGS, *CASES[case], "--max_length", str(table.max_length), "--device", report.device]
    if report.device == "cpu":
        return flags + ["--fsdp"] * ("--no-fsdp" not in flags) + ["--row_tokens", str(2 * table.max_length)]
    return [*flags, "--compile"]


def released_steps(report: Report) -> None:
    """Time, MFU and memory of each case that there is time for, and the gain over none as released."""
    table = synthetic_table(4, SHAPES[report.size]["vocab_size"], SCALE[report.size])
    report.say(
        "goals on one H100 at 1.5B: 40 % MFU for pack, twice the loss tokens/s of none as released for tree (auto)"
    )
    rates: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        value_model(report.size, report.device, torch.bfloat16).save_pretrained(name)
        free_memory(report.device)
        for case in CASES:
            if report.has_time(need("training", case, report.size), case):
                with report.going_on(case):
                    rates[case] = one_step(report, case, table, Path(name))
                gc.collect()
                torch._dynamo.reset()
    for case in rates.keys() - {"none as released"}:
        if before := rates.get("none as released"):
            report.figure(TABLE, "loss tokens/s over none as released", rates[case] / before, case=case)


def one_step(report: Report, case: str, table: SyntheticTable, folder: Path) -> float:
    """Loss tokens a second of the second of two steps, after all has been compiled in the first."""
    args = parse_args(flags_of(case, report, table))
    with join_ranks(args.device) as world:
        free_memory(report.device)
        precision = settle_precision(args, world.device.type)
        attention = choose_attention(args.packing, world.device.type, precision.half_attention, args.p_dropout > 0)
        batches = RankBatches(
            table, args.seed, args.total_batch_size, args.micro_batch_size, args.packing, args.small_group_size,
            multiple=attention.row_multiple, row_tokens=args.row_tokens or 32_768, prepare=attention.prepare,
        )  # fmt: skip
        args.row_tokens = batches.row_tokens
        memory = settle_memory(args, inspect_model(folder, "the model"), precision, attention, table, world)
        report.say(f"{case}: {precision}, {attention.name}; {memory_line(memory, str(world.device))}")
        plan = SimpleNamespace(has_head=True, model_dir=folder, attention=attention)
        model = load_model(args, plan, world)
        step = TrainStep(
            distribute(model, world, precision), world, attention, precision.autocast, args.total_batch_size,
            packed=args.packing != "none", sharded=precision.fsdp,
        )  # fmt: skip
        optimizer = make_optimizer(step.model, args.max_lr, (args.beta1, args.beta2), args.weight_decay)

        def whole_step(micro_batches: list[MicroBatch]) -> None:
            step.backward(micro_batches)
            clip_gradients(step.model, args.grad_norm_clip)
            optimizer.step()
            clear_gradients(step.model, optimizer)

        whole_step(batches[0])
        free_memory(report.device)
        measured = batches[1]
        seconds, _ = timed(report.device, functools.partial(whole_step, measured))
        rate = speed_figures(report, TABLE, case, step, measured, seconds)
        share = (peak_gb(report.device) or 0.0) / (memory.total / 1e9) or None
        report.figure(TABLE, "peak memory / estimated", share, case=case, at_most=1.15, why=NOT_ON_CPU)
        return rate


def speed_figures(
    report: Report, table: str, case: str, step: TrainStep, batches: list[MicroBatch], seconds: float
) -> float:
    """Rates as the trainer logs them. Returns loss tokens a second."""
    counts = [(b.input_ids.size, b.num_tokens, len(b.token_index), b.num_pairs) for b in batches]
    computed, real, owned, pairs = map(sum, zip(*counts, strict=True))
    peak = peak_flops(step.world.device)
    mfu = 100 * step_flops(step.model, real, pairs) / seconds / peak if peak else None
    figure = functools.partial(report.figure, table, case=case)
    figure("step", seconds, "s")
    figure("tokens computed", computed)
    figure("real tokens/s", real / seconds)
    figure("loss tokens/s", owned / seconds)
    figure("MFU", mfu, "%", why="no peak is known")
    figure("peak memory", peak_gb(report.device), "GB", why=NOT_ON_CPU)
    return owned / seconds
