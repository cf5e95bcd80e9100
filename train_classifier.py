"""Train the value model on roll-outs: a Qwen2 with a head that predicts, at every token, how the roll-out will end.

    # the released command, on a node of 4 GPUs
    torchrun --standalone --nproc_per_node=4 train_classifier.py --eval_every -1 --save_every 486 --num_steps 12170 \
        --max_lr 0.0001 --data_path VGS-AI/OpenR1-VM --data_num_response 56 \
        --model_path deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B --total_batch_size 64 --micro_batch_size 8 \
        --small_group_size 2 --run_name single_node_run --track --compile --push_to_hub
    # two CPU ranks, a model and data of your own (collect_rollouts.py makes the data)
    torchrun --standalone --nproc_per_node=2 train_classifier.py --model_path GENERATOR --data_path ROLLOUTS \
        --max_length 256 --total_batch_size 32 --micro_batch_size 16 --num_steps 500 --save_dir runs --run_name first

On a GPU roll-outs are packed into rows and shared prefixes computed once (--packing auto), on a kernel that may have no
attention dropout; --packing none pads, as the released code did. Everything lies in SAVE_DIR/RUN_NAME: metrics.jsonl and
the checkpoints, `latest` among them, which inference_eval.py takes as --classifier_ckpt_path. Stopped at any moment, the
same command goes on from the newest checkpoint.
"""

import argparse
import contextlib
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from common_lib.cli import UserError, enable_fast_transfers, run_script, set_up_logging
from common_lib.signals import StopSignal
from common_lib.tracking import Tracker, make_tracker
from training_lib.arguments import parse_args
from training_lib.hub_push import HubPusher
from training_lib.launch import RankError, follow_parent, leave_ranks

logger = logging.getLogger("train_classifier")


def train(args: argparse.Namespace) -> int:
    """Train to `num_steps`, or to a signal. Returns the exit status."""
    # These bring torch and transformers, seconds of import: only once the flags are known to be right.
    from training_lib.certificate import certify_run
    from training_lib.checkpoints import lock_run, restore
    from training_lib.evaluation import evaluate, format_evaluation
    from training_lib.fitting import memory_line
    from training_lib.loop import TrainingRun
    from training_lib.plan import make_plan
    from training_lib.ranks import distribute, join_ranks
    from training_lib.step import TrainStep, load_model, make_optimizer

    with join_ranks(args.device) as world, contextlib.ExitStack() as at_end:
        with world.together():
            if world.rank == 0 and not args.eval_only:  # before it is looked for what there is to go on from
                at_end.callback(lock_run(Path(args.save_dir) / args.run_name).release)
        plan = make_plan(args, world)
        logger.info(
            "=> %d roll-outs a step on %d rank%s, %s; %d steps an epoch; %s, attention %s, on %s", args.total_batch_size,
            world.size, "s" * (world.size > 1), plan.layout, plan.train.steps_per_epoch, plan.precision, plan.attention.name, world.device,
        )  # fmt: skip
        if plan.step >= args.num_steps and not args.eval_only:
            logger.info("%s: all %d steps are done; nothing is left to do", plan.run_dir, plan.step)
            return 0
        if plan.memory:
            logger.info("%s", memory_line(plan.memory, str(world.device)))
        with world.together():
            tracker, pusher = open_services(args, world.rank, plan.trainer.get("tracker"))

        certify_run(args, plan, world)
        model = load_model(args, plan, world)
        step = TrainStep(
            distribute(model, world, plan.precision), world, plan.attention, plan.precision.autocast, args.total_batch_size,
            pairs=args.train_bt_model, packed=args.packing != "none", sharded=plan.precision.fsdp,
        )  # fmt: skip
        if args.eval_only:
            logger.info("step %d %s", plan.step, format_evaluation(evaluate(step, plan.validation)))
            return 0
        optimizer = make_optimizer(step.model, args.max_lr, (args.beta1, args.beta2), args.weight_decay)
        if plan.checkpoint:
            restore(plan.checkpoint, model, optimizer, world)
            logger.info("going on from %s", plan.checkpoint)
        run = TrainingRun(args, world, plan, model, step, optimizer, tracker, pusher)
        with contextlib.closing(run), StopSignal() as stop:
            return run.train(stop)


def open_services(args: argparse.Namespace, rank: int, tracker_id: str | None) -> tuple[Tracker, HubPusher | None]:
    """Tracker and hub of a training, on rank 0. tracker_id: of the run that goes on. UserError where one is not set up."""
    if rank or args.eval_only:
        return Tracker(), None
    pusher = HubPusher(args.run_name) if args.push_to_hub else None
    tracker = make_tracker(args.tracker, args.neptune_project, args.run_name, args.logger_tags, tracker_id)
    if args.tracker != "none":
        logger.info("tracker: %s", tracker.where)
    return tracker, pusher


def main(argv: Sequence[str] | None = None) -> int:
    set_up_logging()
    enable_fast_transfers()
    rank = int(os.environ.get("RANK", "0"))
    if rank:
        logging.getLogger().setLevel(logging.WARNING)
        for name in ("classifier_lib", "training_lib"):  # what they have to say, rank 0 says
            logging.getLogger(name).setLevel(logging.ERROR)
    try:
        args = parse_args(argv, __doc__)
        if args.use_dora:
            logger.info("--use_dora has no effect, as in the released code")
        return train(args)
    except UserError as error:
        if rank:  # rank 0 tells it; the first to exit would make torchrun end the others before they spoke
            time.sleep(10)
            if isinstance(error, RankError):  # it may be rank 0 that hangs, or that knows nothing of it
                print(f"error: {error}", file=sys.stderr, flush=True)
            return 2
        raise


if __name__ == "__main__":
    follow_parent()
    try:
        run_script(main)
    except SystemExit as end:
        leave_ranks(end.code if isinstance(end.code, int) else 1)
        raise
