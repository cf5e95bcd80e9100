"""What is kept of older checkpoints, and what a run goes on from."""

import json
import shutil

import pytest
from rollouts import losses
from train_spy import SpyHub, small_run, write_small_inputs

from classifier_lib import Qwen2ForClassifier
from training_lib import checkpoints
from training_lib.checkpoints import newest_resumable

STATE = {"optimizer.pt", "rng.pt"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_small_inputs(tmp_path_factory.mktemp("inputs"))


def run(inputs, tmp_path, **changes):
    return small_run(inputs, tmp_path, **{"save_every": 1} | changes)


def with_state(run_dir):
    return [int(path.name[-8:]) for path in checkpoints.checkpoints(run_dir) if (path / "optimizer.pt").exists()]


def test_the_newest_two_keep_optimizer_and_random_state(inputs, tmp_path):
    run_dir = run(inputs, tmp_path).run_dir
    names = [{path.name for path in checkpoint.iterdir()} for checkpoint in checkpoints.checkpoints(run_dir)]
    value_model = {"config.json", "model.safetensors", "trainer.json", "tokenizer.json", "tokenizer_config.json"}
    assert [found & STATE for found in names] == [set(), set(), set(), STATE, STATE]
    assert all(found - STATE >= value_model for found in names)
    assert newest_resumable(run_dir).name == "step-00000005"


def test_an_old_one_can_be_used_evaluated_and_trained_on_from(inputs, tmp_path):
    evaluated = {"eval_every": 5, "eval_size": 5}
    run_dir = run(inputs, tmp_path, **evaluated).run_dir
    shutil.rmtree(run_dir / "step-00000005")
    shutil.rmtree(run_dir / "step-00000004")
    assert Qwen2ForClassifier.from_pretrained(run_dir / "step-00000003").config.num_labels == 3
    assert "step 3 evaluation: loss" in run(inputs, tmp_path, **evaluated, eval_only=True).log

    refused = run(inputs, tmp_path, **evaluated)
    assert refused.error == (
        f"{run_dir} has no checkpoint to go on from: only the newest 2 of a run keep their optimizer state, and of those "
        f"that are left (step-00000001 to step-00000003) none has it; give --init_from {run_dir / 'step-00000003'} and "
        "another --run_name to train on from its weights"
    )
    assert sorted(path.name for path in run_dir.glob("step-*"))[-1] == "step-00000003"
    assert not refused.forwards
    other = run(inputs, tmp_path, init_from=run_dir / "step-00000003", run_name="other", num_steps=1)
    assert other.status == 0, other.error


def test_the_one_before_is_gone_on_from_where_the_newest_is_removed(inputs, tmp_path):
    run_dir = run(inputs, tmp_path).run_dir
    whole = losses(run_dir)
    shutil.rmtree(run_dir / "step-00000005")
    assert run(inputs, tmp_path).status == 0
    assert losses(run_dir) == whole and with_state(run_dir) == [4, 5]


def test_a_newer_one_without_state_is_told_and_nothing_new_is_pruned_for_it(inputs, tmp_path):
    """Its steps are done again; a checkpoint that is saved meanwhile is the newest."""
    run_dir = run(inputs, tmp_path, save_every=2).run_dir
    assert with_state(run_dir) == [4, 5]
    whole = losses(run_dir)
    (run_dir / "step-00000005/optimizer.pt").unlink()
    shutil.move(run_dir / "step-00000005", run_dir / "step-00000009")
    seen = run(inputs, tmp_path, save_every=2, max_keep_ckpts=1)
    assert seen.status == 0 and "step-00000009 has no optimizer state: going on from step-00000004" in seen.log
    assert losses(run_dir) == whole
    assert seen.checkpoints == [5, 9] and with_state(run_dir) == [5]


@pytest.mark.parametrize("killed", ["before", "between"])
def test_a_kill_while_old_state_is_removed_leaves_a_run_that_goes_on(inputs, tmp_path, monkeypatch, killed):
    whole = losses(run(inputs, tmp_path, run_name="whole").run_dir.with_name("whole"))
    prune, unlink, calls = checkpoints._prune, checkpoints.Path.unlink, []

    def dying(target, *args):
        assert json.loads((target / "trainer.json").read_text())["step"] == int(
            target.name[-8:]
        )  # the new one is whole
        assert (target.parent / "latest").resolve() == target
        calls.append(target)
        if len(calls) == 4:
            if killed == "between":
                monkeypatch.setattr(checkpoints.Path, "unlink", dying_unlink)
            else:
                raise KeyboardInterrupt
        prune(target, *args)

    def dying_unlink(path, **kwargs):
        unlink(path, **kwargs)
        if path.name == "optimizer.pt":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "_prune", dying)
        with pytest.raises(KeyboardInterrupt):
            run(inputs, tmp_path)
    monkeypatch.setattr(checkpoints.Path, "unlink", unlink)
    assert with_state(tmp_path / "run")[-2:] == [3, 4]
    seen = run(inputs, tmp_path)
    assert seen.status == 0 and losses(seen.run_dir) == whole and with_state(seen.run_dir) == [4, 5]
    assert not (STATE & {path.name for path in (seen.run_dir / "step-00000002").iterdir()})


def test_what_is_being_pushed_stays_but_for_its_state(inputs, tmp_path, monkeypatch):
    """The hub gets the value model alone; a checkpoint that waits for it stays beyond --max_keep_ckpts."""
    upload, present = SpyHub.upload_folder, {}

    def late(hub, repo_id, folder_path, *args, **kwargs):
        while len(present) == 0 and not (tmp_path / "run/step-00000005").exists():
            pass
        present[folder_path.name] = {path.name for path in folder_path.iterdir()}
        upload(hub, repo_id, folder_path, *args, **kwargs)

    monkeypatch.setattr(SpyHub, "upload_folder", late)
    seen = run(inputs, tmp_path, max_keep_ckpts=1, push_to_hub=True)
    assert seen.status == 0 and "was not pushed" not in seen.log
    assert len(present) == 5 and all(names >= {"config.json", "model.safetensors"} for names in present.values())
    assert not present["step-00000001"] & STATE and with_state(tmp_path / "run") == [4, 5]
