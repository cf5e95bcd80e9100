"""Training that is stopped goes on as if it had not been."""

import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts"))

import kill_test


def test_stopped_three_times_the_losses_are_bit_identical(tmp_path, capsys):
    """SIGKILL at a random moment, SIGTERM, SIGKILL while a checkpoint is being written; two ranks under torchrun."""
    kill_test.train_trials(["kill", "term", "kill in save"], ranks=2, seed=os.getpid(), folder=tmp_path)
    assert "losses are bit-identical after 3 stops" in capsys.readouterr().out
