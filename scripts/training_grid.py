"""Every way to run a step computes the same: losses and gradients of layouts, ranks and row sizes against the plain path.

    python scripts/training_grid.py                                    # all of it, about two minutes on two cores
    python scripts/training_grid.py --ranks 2 --row_tokens 300 --packings tree

The plain path reads one roll-out after the other on one rank, unpacked and unsorted, with torch's own cross entropy. Each
case is a step of the trainer on gloo ranks: DDP or FSDP2, float32 on the CPU. Exit status 1 where one is off by more than
1e-5.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import torch
import torch.distributed as dist
import torch.multiprocessing
from gpu_parts.layouts import SyntheticTable, synthetic_table
from torch.nn import functional as F
from transformers import Qwen2Config

from classifier_lib import Qwen2ForClassifier
from common_lib.cli import quiet_transformers, run_script
from training_lib.arguments import PACKINGS
from training_lib.attention import SDPA
from training_lib.batch_order import RankBatches
from training_lib.precision import Precision
from training_lib.ranks import World, clip_gradients, distribute
from training_lib.step import TrainStep

CLOSE = 1e-5
SHAPES = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=512
)  # fmt: skip
ROLLOUTS, MICRO_BATCH, GROUP = 16, 2, 4
CPU = torch.device("cpu")


def new_model() -> Qwen2ForClassifier:
    torch.manual_seed(0)
    model = Qwen2ForClassifier._from_config(Qwen2Config(**SHAPES, num_labels=3), dtype=torch.float32)
    with torch.no_grad():  # at the usual scale a random model sees little of its input
        for weight in (parameter for parameter in model.parameters() if parameter.dim() == 2):
            weight.mul_(4)
    return model.train()


def plain_path(table: SyntheticTable, step: int) -> tuple[float, dict[str, torch.Tensor], float]:
    """(loss, gradients by name, their joint norm) of the step's roll-outs, one by one."""
    model, total = new_model(), 0.0
    order = RankBatches(table, 0, ROLLOUTS, MICRO_BATCH, "none", GROUP)
    for rollout in order.rank_units(step).ravel().tolist():
        trace = table.trace(rollout)
        logits = model(torch.tensor(trace.tokens[None].astype("int64")), use_cache=False).logits[0, trace.start :]
        loss = F.cross_entropy(logits, torch.full((len(logits),), trace.label)) / ROLLOUTS
        loss.backward()
        total += loss.item()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return total, gradients, float(torch.stack([gradient.norm() for gradient in gradients.values()]).norm())


def one_case(world: World, table: SyntheticTable, step: int, packing: str, rows: int, fsdp: bool):
    """The same of the trainer's step on these ranks, and how many passes the ranks ran."""
    model = new_model()
    precision = Precision(fsdp, half=False)
    train_step = TrainStep(
        distribute(model, world, precision), world, SDPA, False, ROLLOUTS, packed=packing != "none", sharded=fsdp
    )
    batches = RankBatches(
        table, 0, ROLLOUTS, MICRO_BATCH, packing, GROUP, False, world.rank, world.size, SDPA.row_multiple, rows
    )  # fmt: skip
    found = train_step.pad_to_same_count(batches[step])
    (loss,) = world.sum([sum(train_step.backward(found))])
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    whole = {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in gradients.items()}
    return loss, whole, clip_gradients(model, 1e9), sum(world.gather(len(found)))


def distances(found: tuple, expected: tuple) -> tuple[float, float, float]:
    """Of loss, gradients and the norm that is clipped by, relative; of gradients the largest of one tensor's, by the norm
    of all."""
    loss, gradients, norm = expected
    off = max(float((found[1][name] - gradient).norm()) for name, gradient in gradients.items())
    return abs(found[0] - loss) / loss, off / norm, abs(found[2] - norm) / norm


def on_rank(rank: int, size: int, args: argparse.Namespace, store: str) -> None:
    """All cases of that many ranks; writes the number that are off where a case is on any rank."""
    quiet_transformers()
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    world, table = World(rank, size, CPU), synthetic_table(2, SHAPES["vocab_size"], 1 / 128)
    expected = [plain_path(table, step) for step in range(args.steps)]
    bad = 0
    for packing, fsdp, rows in product(args.packings, (False, True), args.row_tokens):
        if packing == "none" and rows != args.row_tokens[0]:
            continue  # it has no rows
        off, passes = (0.0,) * 3, 0
        for step in range(args.steps):
            found = one_case(world, table, step, packing, rows, fsdp)
            off = tuple(map(max, off, distances(found, expected[step])))
            passes += found[3]
        worst = max(max(offs) for offs in world.gather(off))
        bad += worst > CLOSE
        if rank == 0:
            words = "" if packing == "none" else f", rows of {rows}"
            print(f"{packing:4} {'FSDP' if fsdp else 'DDP ':4} {size} ranks{words:15} {passes:3} passes  "
                  f"off by {worst:.1e}{'  TOO MUCH' if worst > CLOSE else ''}", flush=True)  # fmt: skip
    if rank == 0:
        Path(f"{store}.bad").write_text(str(bad))
    if dist.is_initialized():
        dist.destroy_process_group()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 4], help="numbers of ranks")
    parser.add_argument("--row_tokens", type=int, nargs="*", default=[136, 256, 1024, 4096], help="of packed rows")
    parser.add_argument("--packings", nargs="*", default=list(PACKINGS), choices=PACKINGS, help="layouts")
    parser.add_argument("--steps", type=int, default=2, help="of different roll-outs, each from the same weights")
    args = parser.parse_args(argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        for size in args.ranks:
            store = str(Path(folder) / str(size))
            if size == 1:
                on_rank(0, 1, args, store)
            else:
                torch.multiprocessing.spawn(on_rank, (size, args, store), nprocs=size)
            bad += int(Path(f"{store}.bad").read_text())
    print(f"{bad} cases are off by more than {CLOSE:g}" if bad else f"all cases within {CLOSE:g}")
    return 1 if bad else 0


if __name__ == "__main__":
    run_script(main)
