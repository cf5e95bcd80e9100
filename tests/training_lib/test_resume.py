"""What a run that goes on may change: every flag is refused by name, told, or free."""

import json
import shutil
from pathlib import Path

import pytest
from rollouts import write_rows
from tiny import save_generator, save_value_model
from train_spy import command, numbered_rows, spied_run

from common_lib.cli import UserError
from training_lib import plan
from training_lib import step as step_module
from training_lib.arguments import AUTOMATIC, IDENTITY, OLD_BEHAVIOUR, ROUNDING, build_parser
from training_lib.attention import ATTENTIONS

FREE = {
    "num_workers", "use_dora", "save_every", "max_keep_ckpts", "push_to_hub", "track", "tracker", "neptune_project",
    "logger_tags", "eval_only", "profile", "certify",
}  # fmt: skip
PLACE = {"save_dir", "run_name", "dataset_name"}  # say which run it is
HELD_OUT = {"eval_every", "eval_size", "validation_data_path"}  # free but for what they hold out: `held_out`

OTHER = {
    "model_path": Path("backbone2"), "init_from": Path("value"), "data_path": Path("data2"), "data_num_response": 2,
    "small_group_size": 4, "label_key": "grades", "skip_bad_rows": True, "seed": 8, "total_batch_size": 16, "max_length": 30,
    "num_steps": 5, "disable_lr_schedule": True, "max_lr": 2e-3, "beta1": 0.8, "beta2": 0.9, "weight_decay": 0.2,
    "grad_norm_clip": 4.0, "p_dropout": 0.1, "num_labels": 1, "param_dtype": "bf16", "debug": True,
    "train_bt_model": True, "eval_size": 6, "validation_data_path": Path("data2"), "eval_every": -1,
    "micro_batch_size": 2, "packing": "tree", "row_tokens": 80, "compile": True, "gradient_checkpointing": False, "autocast": True,
    "activation_budget": 0.4, "fsdp": True, "certify": True,
    "device": "auto", "num_workers": 1, "use_dora": True, "save_every": 7, "max_keep_ckpts": 3, "push_to_hub": True,
    "profile": 1, "track": True, "tracker": "trackio", "neptune_project": "me/other", "logger_tags": ["a"], "eval_only": True,
}  # fmt: skip
FLAGS = {action.dest for action in build_parser("")._actions} - {"help"}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A folder of inputs, and a run of 4 steps with checkpoints at 2 and 4 of which the second is gone."""
    folder = tmp_path_factory.mktemp("resume")
    save_generator(folder / "backbone")
    save_value_model(folder / "value")
    write_rows(folder / "data", numbered_rows(0, 20))
    for copy in ("backbone", "data"):
        shutil.copytree(folder / copy, folder / f"{copy}2")
    seen = spied_run(command(settings(folder)), folder / "cache", {"NEPTUNE_PROJECT": "me/mine"})
    assert seen.status == 0, seen.error
    shutil.rmtree(folder / "runs/run/step-00000004")
    return folder


def settings(folder: Path, **changes):
    given = {
        "model_path": folder / "backbone", "data_path": folder / "data", "data_num_response": 4, "max_length": 40,
        "total_batch_size": 8, "micro_batch_size": 4, "num_steps": 4, "eval_every": 2, "eval_size": 5, "save_every": 2,
        "device": "cpu", "save_dir": folder / "runs", "run_name": "run",
    }  # fmt: skip
    return given | {name: folder / value if isinstance(value, Path) else value for name, value in changes.items()}


def resume(folder: Path, monkeypatch, **changes):
    """Go on with changed flags until a model would be loaded: `error` says what came of it, "accepted" if so far."""

    def load_model(*_):
        raise UserError("accepted")

    monkeypatch.setattr(step_module, "load_model", load_model)
    return spied_run(command(settings(folder, **changes)), folder / "cache", {"NEPTUNE_PROJECT": "me/mine"})


def test_every_flag_has_a_place():
    places = [set(IDENTITY) - {"held_out"}, set(ROUNDING) - {"world_size"}, FREE, PLACE, HELD_OUT]
    assert set().union(*places) == FLAGS
    assert sum(map(len, places)) == len(FLAGS), "a flag has two places"
    assert {"held_out"} <= set(IDENTITY) and {"world_size"} <= set(ROUNDING)
    assert set(OTHER) == FLAGS - PLACE


@pytest.mark.parametrize("flag", sorted((set(IDENTITY) & FLAGS) | HELD_OUT))
def test_what_decides_the_run_is_refused_by_name(stopped, monkeypatch, flag):
    before = sorted((stopped / "runs/run").rglob("*"))
    lines = (stopped / "runs/run/metrics.jsonl").read_text()
    more = {"num_labels": 1} if flag == "train_bt_model" else {}
    error = resume(stopped, monkeypatch, **more, **{flag: OTHER[flag]}).error
    assert "holds a run of another configuration" in error and "give the old values, or another --run_name" in error
    if flag in HELD_OUT:
        was, now = 5, {"eval_size": 6, "eval_every": 0, "validation_data_path": stopped / "data2"}[flag]
        assert f"what is held out (--eval_every, --eval_size, --validation_data_path) was {was}, is {now}" in error
    else:
        given = settings(stopped).get(flag, build_parser("").get_default(flag))
        now = stopped / OTHER[flag] if isinstance(OTHER[flag], Path) else OTHER[flag]
        assert f"--{flag} was {given}, is {now}" in error
        assert error.count(" was ") == 1 + len(more)
    assert sorted((stopped / "runs/run").rglob("*")) == before
    assert (stopped / "runs/run/metrics.jsonl").read_text() == lines


@pytest.mark.parametrize("flag", sorted((set(ROUNDING) & FLAGS) | (FREE - {"eval_only"})))
def test_what_does_not_is_accepted_and_told_where_it_rounds(stopped, monkeypatch, flag):
    if flag == "device":  # on this CPU auto is the same
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    more = {"compile": True, "gradient_checkpointing": False} if flag == "activation_budget" else {}  # it needs these
    seen = resume(stopped, monkeypatch, **more, **{flag: OTHER[flag]})
    assert seen.error == "accepted"
    told = f"changed since the checkpoint, equal to rounding (dropout apart): {', '.join([*more, flag])}"
    assert (told in seen.log) == (flag in ROUNDING) and seen.log.count("changed since") == (flag in ROUNDING)


def test_how_often_is_evaluated_is_free(stopped, monkeypatch):
    assert resume(stopped, monkeypatch, eval_every=3).error == "accepted"


def test_another_number_of_ranks_is_told(stopped, monkeypatch):
    path = stopped / "runs/run/step-00000002/trainer.json"
    text = path.read_text()
    trainer = json.loads(text)
    trainer["arguments"]["world_size"] = 2
    path.write_text(json.dumps(trainer))
    try:
        seen = resume(stopped, monkeypatch)
    finally:
        path.write_text(text)
    assert seen.error == "accepted" and "equal to rounding (dropout apart): world_size" in seen.log


@pytest.fixture
def trained_before(stopped):
    """Changes the arguments of the checkpoint that is gone on from: None takes one away."""
    path = stopped / "runs/run/step-00000002/trainer.json"
    text = path.read_text()

    def change(**arguments):
        trainer = json.loads(text)
        trainer["arguments"] = {k: v for k, v in (trainer["arguments"] | arguments).items() if v is not None}
        path.write_text(json.dumps(trainer))

    yield change
    path.write_text(text)


def settled(folder: Path, monkeypatch, **changes):
    """(packing, tokens of a row, what was told of changes) of the run that goes on."""
    plans = []

    def load_model(args, plan, world):
        plans.append(plan)
        raise UserError("accepted")

    monkeypatch.setattr(step_module, "load_model", load_model)
    seen = spied_run(command(settings(folder, **changes)), folder / "cache")
    assert seen.error == "accepted"
    told = [line.split(": ")[-1] for line in seen.log.splitlines() if "changed since" in line]
    return plans[0].train.packing, plans[0].train.row_tokens, *told


def test_what_is_left_to_the_run_is_what_its_checkpoint_was_trained_with(stopped, trained_before, monkeypatch):
    trained_before(packing="tree", row_tokens=90)
    assert settled(stopped, monkeypatch) == ("tree", 90)
    assert settled(stopped, monkeypatch, packing="pack") == ("pack", 90, "packing")
    assert settled(stopped, monkeypatch, row_tokens=50) == ("tree", 50, "row_tokens")
    assert settled(stopped, monkeypatch, eval_only=True) == ("none", None)  # no run goes on


def test_a_checkpoint_older_than_a_flag_goes_on_as_it_was(stopped, trained_before, monkeypatch):
    """Rows of micro_batch_size x max_length tokens, of which a smaller micro batch makes shorter ones."""
    trained_before(packing="pack", row_tokens=None)
    assert settled(stopped, monkeypatch) == ("pack", 4 * 40)
    assert settled(stopped, monkeypatch, micro_batch_size=2) == ("pack", 2 * 40, "micro_batch_size, row_tokens")
    assert settled(stopped, monkeypatch, row_tokens=99) == ("pack", 99, "row_tokens")


@pytest.mark.parametrize("before", ["sdpa", "packed_flex", None])
def test_what_attention_was_is_asked_for_where_a_run_goes_on(stopped, monkeypatch, before):
    """Which decides whether a kernel with dropout may be taken; an older checkpoint does not say."""
    asked = []
    choose = plan.choose_attention
    monkeypatch.setattr(plan, "choose_attention", lambda *args, kept: asked.append(kept) or choose(*args, kept=kept))
    path = stopped / "runs/run/step-00000002/trainer.json"
    text = path.read_text()
    trainer = json.loads(text) | {"attention": before}
    path.write_text(json.dumps(trainer))
    try:
        resume(stopped, monkeypatch)
    finally:
        path.write_text(text)
    assert asked == [ATTENTIONS.get(before)]


def test_every_choice_left_to_the_run_is_told_of_when_a_checkpoint_lacks_it():
    """`packing` and what else is as old as checkpoints apart, and none twice."""
    parser = build_parser("")
    assert all(parser.get_default(name) == automatic for name, automatic in AUTOMATIC.items())
    assert set(OLD_BEHAVIOUR) <= FLAGS and set(AUTOMATIC) - set(OLD_BEHAVIOUR) == {
        "packing",
        "fsdp",
        "gradient_checkpointing",
    }


def test_the_tracker_goes_on_under_its_id_and_the_first_checkpoint_stays_whole(stopped, tmp_path):
    """Stopped after step 3, the second start asks the tracker for the run that it had; metrics are those of one run."""
    given = settings(stopped, save_dir=tmp_path, track=True, logger_tags=["a"], save_every=1, max_keep_ckpts=9)
    first = spied_run(command(given), stopped / "cache", {"NEPTUNE_PROJECT": "me/mine"})
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    shutil.rmtree(tmp_path / "run/step-00000004")
    second = spied_run(command(given), stopped / "cache", {"NEPTUNE_PROJECT": "me/mine"})
    [one], [two] = first.trackers, second.trackers
    assert one.run_id == two.run_id and one.run_id.startswith("run-") and two.tags == ["a"]
    assert [step for step, _ in one.metrics] == [1, 2, 2, 3, 4, 4] and [step for step, _ in two.metrics] == [4, 4]
    assert one.configs == two.configs
    again = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [timeless(line) for line in again] == [timeless(line) for line in lines]
    assert f"going on from {tmp_path / 'run/step-00000003'}" in second.log
    # What the optimizer stepped from and to is what the uninterrupted run had, to the bit.
    for name, value in first.steps[3].before.items():
        assert (second.steps[0].before[name] == value).all() and (
            second.steps[0].after[name] == first.steps[3].after[name]
        ).all()


def timeless(line: str) -> dict:
    return {name: value for name, value in json.loads(line).items() if "seconds" not in name and "_per_s" not in name}


def test_the_checkpoint_is_looked_for_under_the_lock(stopped, tmp_path, monkeypatch):
    """A run that saves its last step while another starts: the second must not go on from the step before."""
    from training_lib import checkpoints

    given = settings(stopped, save_dir=tmp_path)
    assert spied_run(command(given), stopped / "cache").status == 0
    (tmp_path / "run/step-00000004").rename(tmp_path / "away")
    lock_run = checkpoints.lock_run

    def lock_when_the_other_is_done(*args, **kwargs):
        (tmp_path / "away").rename(tmp_path / "run/step-00000004")
        return lock_run(*args, **kwargs)

    monkeypatch.setattr(checkpoints, "lock_run", lock_when_the_other_is_done)
    seen = spied_run(command(given), stopped / "cache")
    assert seen.status == 0 and not seen.steps and "all 4 steps are done" in seen.log


@pytest.mark.parametrize(
    "way",
    [{"fsdp": "on", "autocast": True}, {"fsdp": "on", "packing": "tree", "row_tokens": 80}, {"packing": "pack", "autocast": True}],
    ids=["FSDP in bf16", "FSDP, tries", "packed, autocast"],
)  # fmt: skip
def test_however_it_is_run_a_resumed_run_is_the_same_to_the_bit(stopped, tmp_path, way):
    given = settings(stopped, save_dir=tmp_path, p_dropout=0.1, **way)
    whole = spied_run(command(given), stopped / "cache")
    assert whole.status == 0, whole.error
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    shutil.rmtree(tmp_path / "run/step-00000004")
    rest = spied_run(command(given), stopped / "cache")
    assert len(rest.steps) == 2 and [step.sharded for step in rest.steps] == [way.get("fsdp") == "on"] * 2
    for name, value in whole.steps[3].after.items():
        assert (rest.steps[1].after[name] == value).all(), name
    assert [timeless(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()] == [
        timeless(line) for line in lines
    ]
