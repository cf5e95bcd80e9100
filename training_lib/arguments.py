"""Flags of train_classifier.py, and what can be checked of them without reading a file."""

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common_lib import tracking
from common_lib.cli import ArgumentParser, Rule, check_rules

PACKINGS = ("none", "pack", "tree")
AUTO = "auto"
FSDP = (AUTO, "on", "off")
# A resumed run must agree in these, or it would be another run; the others change at most rounding, or nothing.
IDENTITY = (
    "model_path", "init_from", "data_path", "data_num_response", "small_group_size", "label_key", "skip_bad_rows",
    "held_out", "seed", "total_batch_size", "max_length", "num_steps", "disable_lr_schedule", "max_lr", "beta1",
    "beta2", "weight_decay", "grad_norm_clip", "p_dropout", "num_labels", "train_bt_model", "param_dtype", "debug",
)  # fmt: skip
ROUNDING = (
    "micro_batch_size", "packing", "row_tokens", "compile", "gradient_checkpointing", "activation_budget",
    "autocast", "fsdp", "device", "world_size",
)  # fmt: skip
# Flags that leave a choice to the run, and the value that does. What was chosen is in the checkpoint's arguments.
AUTOMATIC: dict[str, Any] = {
    "packing": AUTO, "row_tokens": None, "gradient_checkpointing": None, "activation_budget": AUTO, "fsdp": AUTO,
}  # fmt: skip
# What a run did whose checkpoint is older than the flag; takes the run's arguments.
OLD_BEHAVIOUR: dict[str, Callable[[dict[str, Any]], Any]] = {
    "row_tokens": lambda run: run["micro_batch_size"] * run["max_length"],
    "activation_budget": lambda run: 1.0,
}


def parse_args(argv: Sequence[str] | None, description: str = "") -> argparse.Namespace:
    """Checked arguments, with `world_size` (ranks), `held_out` (what is evaluated on) and defaults filled in.

    Raises UserError.
    """
    args = build_parser(description).parse_args(argv)
    args.world_size = int(os.environ.get("WORLD_SIZE", "1"))
    positive = ("num_steps", "total_batch_size", "micro_batch_size", "data_num_response", "small_group_size",
                "save_every", "max_keep_ckpts", "eval_size", "max_lr", "grad_norm_clip")  # fmt: skip
    fractions = ("p_dropout", "beta1", "beta2")
    rules = [
        *((name, getattr(args, name) > 0, "must be above 0") for name in positive),
        *((name, 0 <= getattr(args, name) < 1, "must be at least 0 and below 1") for name in fractions),
        ("seed", args.seed >= 0, "must be 0 or more"),
        ("max_length", args.max_length >= 2, "must be at least 2: a roll-in and a roll-out token"),
        ("row_tokens", args.row_tokens is None or args.row_tokens >= longest_unit(args), f"is too few: a row must hold a "
         f"whole {'pair' if args.train_bt_model else 'trace'}; give {longest_unit(args)} or more, or a smaller --max_length"),
        ("weight_decay", args.weight_decay >= 0, "must be 0 or more"),
        ("num_workers", args.num_workers is None or args.num_workers >= 0, "must be 0 or more"),
        ("profile", args.profile >= 0, "must be 0 or more"),
        ("num_labels", args.num_labels == 1 or not args.train_bt_model, "must be 1 with --train_bt_model"),
        ("activation_budget", args.activation_budget == AUTO or 0 < args.activation_budget <= 1, "must be auto, or above 0 "
         "and at most 1"),
        ("activation_budget", args.activation_budget == AUTO or args.compile, "needs --compile: without it whole layers "
         "are computed again (--gradient_checkpointing)"),
        ("activation_budget", args.activation_budget == AUTO or not args.gradient_checkpointing, "and "
         "--gradient_checkpointing exclude each other: whole layers are computed again, or parts of them"),
        ("eval_every", args.eval_every > 0 or not args.eval_only, "must be above 0 with --eval_only"),
    ]  # fmt: skip
    check_rules(args, rules)
    check_rules(args, division_rules(args))
    if args.debug:
        args.num_steps, args.tracker, args.push_to_hub = min(args.num_steps, 10), "none", False
    if args.tracker is None:
        args.tracker = "neptune" if args.track or args.neptune_project is not None else "none"
    args.run_name = args.run_name or default_run_name(args)
    if args.activation_budget != AUTO:
        args.gradient_checkpointing = False  # also where the checkpoint to go on from had it
    args.held_out = args.validation_data_path or args.eval_size if args.eval_every > 0 else 0
    return args


def division_rules(args: argparse.Namespace) -> list[Rule]:
    """A row divides evenly into groups, and without packing a step into ranks and micro batches. A packing that is left to
    the run is none on a CPU; elsewhere this is to be checked again when it is known."""
    total, micro, ranks, pairs = args.total_batch_size, args.micro_batch_size, args.world_size, args.train_bt_model
    padded = args.packing == "none" or (args.packing == AUTO and args.device == "cpu")
    unit = micro * ranks
    fits = [str(size) for size in (total // unit * unit, -(-total // unit) * unit) if size]
    least = ranks * (2 if pairs else 1)
    response, group = args.data_num_response, args.small_group_size
    divisors = [size for size in range(1, response + 1) if response % size == 0]
    nearest = min(divisors, key=lambda size: (abs(size - group), size))
    return [
        ("total_batch_size", not padded or total % unit == 0, f"is not a multiple of {ranks} ranks x --micro_batch_size "
         f"{micro} = {unit}, as it must be with --packing none; the nearest that work: {', '.join(fits)}"),
        ("micro_batch_size", not (padded and pairs) or micro % 2 == 0, "must be even with --train_bt_model: it holds pairs"),
        ("total_batch_size", total % 2 == 0 or not pairs, "must be even with --train_bt_model: it holds pairs"),
        ("total_batch_size", total >= least, f"leaves one of {ranks} ranks without work; give {least} or more"),
        ("small_group_size", response % group == 0, f"does not divide --data_num_response {response}; the nearest that "
         f"does: {nearest}"),
    ]  # fmt: skip


def budget(text: str) -> float | str:
    try:
        return text if text == AUTO else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be auto, or a number above 0 and at most 1") from None


def longest_unit(args: argparse.Namespace) -> int:
    """Tokens of the longest thing that must share a row: a trace, or a Bradley-Terry pair."""
    return args.max_length * (2 if args.train_bt_model else 1)


def go_on_with(args: argparse.Namespace, trained: dict[str, Any]) -> dict[str, Any]:
    """What the flags leave to the run becomes what its checkpoint was trained with. Returns the checkpoint's arguments,
    with what an older one lacks filled in: then it did what `OLD_BEHAVIOUR` says."""
    was = trained.get("fsdp", False)
    trained = trained | {"fsdp": {True: "on", False: "off"}.get(was, was)}  # a switch until there was auto
    for name, automatic in AUTOMATIC.items():
        if getattr(args, name) == automatic:
            before = trained[name] if name in trained else OLD_BEHAVIOUR[name](vars(args))
            setattr(args, name, before)
    return {name: before(trained) for name, before in OLD_BEHAVIOUR.items()} | trained


def default_run_name(args: argparse.Namespace) -> str:
    """The same for the same command, so that it resumes."""
    parts = [args.dataset_name, args.init_from or args.model_path, args.data_path, f"seed{args.seed}"]
    names = [Path(part).name for part in parts if part]
    return "-".join(names + (["debug"] if args.debug else []))


# fmt: off
def build_parser(description: str) -> argparse.ArgumentParser:
    parser = ArgumentParser(description=description)
    switch: Any = argparse.BooleanOptionalAction

    flag = parser.add_argument_group("data").add_argument
    flag("--data_path", default="VGS-AI/OpenR1-VM", help="hub name, folder or file of parquet, or save_to_disk folder ")
    flag("--validation_data_path", help="evaluate on its first eval_size rows (default: hold problems of data_path out)")
    flag("--data_num_response", type=int, default=8, help="the first that many roll-outs of each row")
    flag("--small_group_size", type=int, default=2, help="that many neighbouring roll-outs of a row stay together in the "
         "shuffle")
    flag("--label_key", default="labels", help="the labels' column")
    flag("--skip_bad_rows", action=switch, default=False, help="leave faulty rows out and say how many, instead of "
         "stopping; reads every token id once")
    flag("--max_length", type=int, default=16384, help="tokens of a trace, prompt included; a longer one is cut and "
         "keeps its label")
    flag("--packing", choices=(AUTO, *PACKINGS), default=AUTO, help="none: right padding; pack: traces one behind the "
         "other in a row; tree: shared prefixes computed once, too; auto: none on a CPU, else tree where that saves 5 %% "
         "of the tokens, else pack; a run that goes on keeps what it had")
    flag("--row_tokens", type=int, help="tokens of a packed row (default: 32768 with a GPU, else micro_batch_size x "
         "max_length; a run that goes on keeps what it had)")
    flag("--num_workers", type=int, help="processes that read data, 0: none (default: 2 with a GPU, else 0)")

    flag = parser.add_argument_group("model").add_argument
    flag("--model_path", default="deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", help="backbone, folder or hub name of a "
         "Qwen2")
    flag("--init_from", help="a value model to go on from, with its head, instead of --model_path")
    flag("--num_labels", type=int, choices=(1, 3), default=3, help="3: incorrect, correct, length-limited; 1: correct "
         "or not")
    flag("--train_bt_model", action=switch, default=False, help="Bradley-Terry loss on pairs of one problem, at the "
         "last tokens; needs --num_labels 1")
    flag("--p_dropout", type=float, default=0.05, help="in attention and head")
    flag("--param_dtype", choices=("fp32", "bf16"), default="fp32", help="bf16 parameters save memory, but small "
         "updates are lost in them")
    flag("--autocast", action=switch, help="compute in bf16 (default: with a GPU); with --fsdp on FSDP does the casting")
    flag("--use_dora", action=switch, default=False, help="accepted without effect, as in the released code")

    flag = parser.add_argument_group("optimization").add_argument
    flag("--num_steps", type=int, default=4000, help="optimizer steps of the whole run")
    flag("--total_batch_size", type=int, default=128, help="roll-outs a step, over all ranks")
    flag("--micro_batch_size", type=int, default=4, help="roll-outs a forward pass and rank, where they are not packed")
    flag("--max_lr", type=float, default=1e-4, help="after warm-up; the cosine ends at 10 %% of it")
    flag("--disable_lr_schedule", action=switch, default=False, help="max_lr throughout, no warm-up and no cosine")
    flag("--beta1", type=float, default=0.9, help="of AdamW")
    flag("--beta2", type=float, default=0.95, help="of AdamW")
    flag("--weight_decay", type=float, default=0.1, help="on tensors of two or more dimensions")
    flag("--grad_norm_clip", type=float, default=5.0, help="joint norm of all gradients")
    flag("--seed", type=int, default=1337, help="of batch order, hold-out, fresh head and dropout")

    flag = parser.add_argument_group("machine").add_argument
    flag("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU where there is one")
    flag("--compile", action=switch, default=False, help="torch.compile every layer")
    flag("--gradient_checkpointing", action=switch, help="keep one activation a layer, and compute the rest again "
         "(default: on without --compile; with it see --activation_budget)")
    flag("--activation_budget", type=budget, default=AUTO, help="with --compile: the part of its activations that a layer "
         "keeps, above 0 and at most 1; what is cheapest is computed again (default: auto, as much as memory has room for; "
         "a run that goes on keeps what it had)")
    flag("--fsdp", nargs="?", const="on", choices=FSDP, default=AUTO, help="on: shard parameters, gradients and optimizer "
         "over the ranks, and cast whole layers to bf16 (FSDP2); off: every rank has them all (DDP, autocast); auto: on with "
         "a GPU; a run that goes on keeps what it had (default: auto)")
    flag("--no-fsdp", dest="fsdp", action="store_const", const="off", help="--fsdp off")
    flag("--profile", type=int, default=0, metavar="N", help="trace N steps, from the third on, into the run's folder and tell "
         "where their time went")
    flag("--certify", action=switch, help="before the first step, check attention of the rows that will be read: masks, leaks, "
         "and the distance of loss and gradients from a float32 reference (default: with a GPU)")

    flag = parser.add_argument_group("evaluation, checkpoints, log").add_argument
    flag("--eval_every", type=int, default=200, help="steps; 0 or less: no evaluation, nothing held out")
    flag("--eval_size", type=int, default=128, help="problems held out")
    flag("--eval_only", action=switch, default=False, help="evaluate the run's newest checkpoint, or --init_from, and stop")
    flag("--save_dir", default="runs", help="a run lies in SAVE_DIR/RUN_NAME")
    flag("--run_name", help="(default: made of dataset_name, model, data and seed)")
    flag("--dataset_name", help="a prefix of the default run name")
    flag("--save_every", type=int, default=200, help="steps")
    flag("--max_keep_ckpts", type=int, default=20, help="older checkpoints are removed; of those kept the "
         "newest two can be gone on from")
    flag("--push_to_hub", action=switch, default=False, help="push checkpoints to the private hub repository RUN_NAME, "
         "a revision for each step")
    flag("--track", action=switch, default=False, help="log to --tracker, neptune if that is not given")
    flag("--tracker", choices=tracking.TRACKERS, help="(default: neptune with --track or "
         "--neptune_project, else none; wandb and trackio take their project from --neptune_project too)")
    flag("--neptune_project", nargs="?", const="", help="log to neptune; without a value NEPTUNE_PROJECT says where")
    flag("--logger_tags", nargs="*", default=[], help="tags of the tracker's run")
    flag("--debug", action=switch, default=False, help="a trial: at most 10 steps on the first 256 rows, with autograd's "
         "anomaly detection, nothing tracked or pushed")
    return parser
# fmt: on
