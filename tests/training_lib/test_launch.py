"""A rank dies with torchrun, and leaves without the interpreter's teardown once all have been at the end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rollouts import ROOT

from training_lib.launch import leave_ranks

RANK = "import time; from training_lib.launch import follow_parent; follow_parent(); print('here', flush=True); time.sleep(60)"
LAUNCHER = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {RANK!r}]); print(p.pid, flush=True); p.wait()"


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="Linux kills the children of a dead parent")
@pytest.mark.parametrize("under_torchrun", [True, False])
def test_a_rank_dies_with_torchrun(under_torchrun):
    variables = {name: value for name, value in os.environ.items() if name != "TORCHELASTIC_RUN_ID"}
    variables |= {"TORCHELASTIC_RUN_ID": "x"} if under_torchrun else {}
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER], cwd=ROOT, env=variables, stdout=subprocess.PIPE, text=True
    )
    pid = int(launcher.stdout.readline())
    assert launcher.stdout.readline() == "here\n"
    try:
        launcher.kill()
        launcher.wait()
        deadline = time.monotonic() + (10 if under_torchrun else 0.3)
        while alive(pid) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert alive(pid) != under_torchrun
    finally:
        if alive(pid):
            os.kill(pid, signal.SIGKILL)
        launcher.stdout.close()


@pytest.mark.parametrize(
    ("size", "status", "expected"),
    [(2, 0, ["barrier", ("exit", 0)]), (3, 2, [("exit", 2)]), (1, 0, [])],
)
def test_several_ranks_leave_together_and_with_their_status(monkeypatch, size, status, expected):
    done: list = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: size)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: done.append("barrier"))
    monkeypatch.setattr("training_lib.launch.logging.shutdown", lambda: None)
    monkeypatch.setattr(os, "_exit", lambda code: done.append(("exit", code)))
    leave_ranks(status)
    assert done == expected
