"""Training that is stopped goes on as if it had not been; checkpoints reach the hub."""

import logging
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from common_lib.cli import UserError
from training_lib import hub_push
from training_lib.loop import StopSignal

sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts"))

import kill_test


def test_stopped_three_times_the_losses_are_bit_identical(tmp_path, capsys):
    """SIGKILL at a random moment, SIGTERM, SIGKILL while a checkpoint is being written; two ranks under torchrun."""
    kill_test.train_trials(["kill", "term", "kill in save"], ranks=2, seed=os.getpid(), folder=tmp_path)
    assert "losses are bit-identical after 3 stops" in capsys.readouterr().out


def test_a_signal_is_noted_once_and_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        assert stop.received is None
        for _ in range(3):  # torchrun passes on what its group was sent as well
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == signal.SIGTERM
        stop._since -= 10
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGTERM) == before


# ---------------------------------------------------------------------------------------------------------------------
# Hub


class FakeHub:
    """Records what `HfApi` is asked for."""

    calls: list[tuple]
    fails = False

    def __init__(self):
        self.calls = []

    def create_repo(self, name, private, exist_ok):
        self.calls.append(("create", name, private, exist_ok))
        return SimpleNamespace(repo_id=f"me/{name}")

    def create_branch(self, repo, branch, exist_ok):
        if self.fails:
            raise ConnectionError("no route")
        self.calls.append(("branch", repo, branch))

    def upload_folder(self, repo_id, folder_path, revision, ignore_patterns, commit_message):
        self.calls.append(("upload", repo_id, Path(folder_path).name, revision, ignore_patterns, commit_message))


def test_checkpoints_are_pushed_as_revisions_of_one_private_repository(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub)
    pusher = hub_push.HubPusher("my run")
    pusher.push(tmp_path / "step-00000200", 200)
    pusher.push(tmp_path / "step-00000400", 400)
    pusher.close()
    local = ["optimizer.pt", "rng.pt"]
    assert pusher._api.calls == [
        ("create", "my-run", True, True),
        *[
            call
            for step in (200, 400)
            for call in (
                ("branch", "me/my-run", f"step-{step}"),
                ("upload", "me/my-run", f"step-{step:08d}", f"step-{step}", local, f"step {step}"),
                ("upload", "me/my-run", f"step-{step:08d}", "main", local, f"step {step}"),
            )
        ],
    ]
    assert pusher.in_use == set()


def test_a_push_that_fails_is_a_warning_with_the_command_to_repeat_it(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub)
    pusher = hub_push.HubPusher("run")
    monkeypatch.setattr(FakeHub, "fails", True)
    with caplog.at_level(logging.WARNING):
        pusher.push(tmp_path / "step-00000200", 200)
        pusher.close()
    assert "step 200 was not pushed (no route)" in caplog.text
    assert f"hf upload me/run {tmp_path}/step-00000200 --revision step-200" in caplog.text


def test_pushing_without_a_login_is_told_before_training(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"--push_to_hub: cannot make the repository run .*hf auth login"):
        hub_push.HubPusher("run")
