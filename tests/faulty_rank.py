"""train_classifier.py as torchrun starts it, with faults by the environment.

UNREADABLE: ranks but the first cannot read optimizer and random state. HANGS_RANK hangs in the data of step HANGS_STEP, 0
the first; from step to step a rank waits for STEP_SECONDS, and a save takes SAVE_SECONDS.
"""

import datetime
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import train_classifier
from common_lib.cli import run_script
from training_lib import batch_order, checkpoints, ranks
from training_lib.launch import leave_ranks

RANK = int(os.environ["RANK"])
load, getitem, write = torch.load, batch_order.RankBatches.__getitem__, checkpoints._write


def load_on_rank_0(path, **kwargs):
    if RANK and isinstance(path, Path):  # objects between ranks are loaded from memory
        raise OSError(f"rank {RANK} reads {path}")
    return load(path, **kwargs)


def hang(batches, step):
    if step == int(os.environ["HANGS_STEP"]) and str(RANK) == os.environ["HANGS_RANK"]:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun need not wait half a minute to kill it
        time.sleep(600)
    return getitem(batches, step)


def write_slowly(*args):
    time.sleep(float(os.environ["SAVE_SECONDS"]))
    write(*args)


if __name__ == "__main__":
    if "UNREADABLE" in os.environ:
        torch.load = load_on_rank_0
    if "HANGS_RANK" in os.environ:
        batch_order.RankBatches.__getitem__ = hang
        checkpoints._write = write_slowly
        ranks.STEPPING = datetime.timedelta(seconds=float(os.environ["STEP_SECONDS"]))
    try:
        run_script(train_classifier.main)
    except SystemExit as end:
        leave_ranks(end.code)
        raise
