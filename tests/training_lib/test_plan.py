"""What a run is set up with: attention, layout, loader and step as the flags ask, and what is told of a bad start."""

import json
import shutil

import pytest
import torch
from rollouts import write_rows
from tiny import save_generator, save_value_model
from train_spy import command, numbered_rows, spied_run

import train_classifier
from classifier_lib import Qwen2ForClassifier
from common_lib.cli import UserError
from common_lib.models import inspect_model
from common_lib.tracking import Tracker
from training_lib import attention, loop, plan
from training_lib import step as step_module
from training_lib.arguments import parse_args
from training_lib.layout import pair_cost
from training_lib.ranks import World


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    save_generator(folder / "backbone")
    save_value_model(folder / "value")
    write_rows(folder / "data", numbered_rows(0, 20))
    return folder


def settings(inputs, tmp_path, **changes):
    given = {
        "model_path": inputs / "backbone", "data_path": inputs / "data", "data_num_response": 4, "max_length": 40,
        "total_batch_size": 8, "micro_batch_size": 4, "num_steps": 3, "eval_every": 2, "eval_size": 5, "run_name": "run",
        "save_dir": tmp_path, "device": "cpu",
    }  # fmt: skip
    return command(given | changes)


@pytest.mark.parametrize(
    ("flags", "half"),
    [({}, False), ({"autocast": True}, True), ({"param_dtype": "bf16"}, True), ({"packing": "tree"}, False)],
)
def test_attention_is_chosen_by_layout_device_and_precision_and_says_how_rows_are_padded(
    inputs, tmp_path, monkeypatch, flags, half
):
    asked, plans = [], []

    def choose(*args):
        asked.append(args)
        return attention.FLEX

    def load_model(args, made, world):
        plans.append(made)
        raise UserError("so far")

    monkeypatch.setattr(plan, "choose_attention", choose)
    monkeypatch.setattr(step_module, "load_model", load_model)
    assert spied_run(settings(inputs, tmp_path, **flags), inputs / "cache").error == "so far"
    assert asked == [(flags.get("packing", "none"), "cpu", half, True)]
    assert plans[0].attention is attention.FLEX
    for batches in (plans[0].train, plans[0].validation):
        assert (batches.multiple, batches.prepare) == (128, attention.FLEX.prepare)
        assert batches.pair_cost == pair_cost(inspect_model(inputs / "backbone", ""))
    assert len(plans[0].validation.table.rows) == 5 and len(plans[0].train.table.rows) == 15


@pytest.mark.parametrize(
    "flags", [{"fsdp": True}, {"packing": "pack"}, {"train_bt_model": True, "num_labels": 1}, {"autocast": True}]
)
def test_the_step_knows_what_it_computes(inputs, tmp_path, monkeypatch, flags):
    made = []

    def make(*args, **kwargs):
        made.append(TrainStep(*args, **kwargs))
        raise UserError("so far")

    TrainStep = step_module.TrainStep
    monkeypatch.setattr(step_module, "TrainStep", make)
    assert spied_run(settings(inputs, tmp_path, **flags), inputs / "cache").error == "so far"
    [step] = made
    assert (step.sharded, step.packed, step.pairs, step.autocast) == tuple(
        name in flags for name in ("fsdp", "packing", "train_bt_model", "autocast")
    )
    assert step.total_batch_size == 8 and step.attention is attention.SDPA


@pytest.mark.parametrize(
    ("device", "given", "workers"), [("cpu", None, 0), ("cuda", None, 2), ("cuda", 0, 0), ("cpu", 3, 3)]
)
def test_data_workers_by_device(monkeypatch, device, given, workers):
    loaders = []
    monkeypatch.setattr(loop, "DataLoader", lambda batches, **kwargs: loaders.append(kwargs) or [])
    args = parse_args(["--num_steps", "9"] + ([f"--num_workers={given}"] if given is not None else []))
    assert list(loop.read_steps(args, [], 4, World(0, 1, torch.device(device)))) == []
    assert loaders[0]["num_workers"] == workers and list(loaders[0]["sampler"]) == [4, 5, 6, 7, 8]


def test_ranks_that_see_other_checkpoints_are_told(tmp_path):
    class TwoRanks(World):
        def gather(self, item):
            return [item, item if item is None else [*item, "step-00000009"]]

    args = parse_args(["--save_dir", str(tmp_path), "--run_name", "run"])
    with pytest.raises(UserError, match=f"--save_dir {tmp_path}: the ranks see different checkpoints"):
        plan.make_plan(args, TwoRanks(0, 2, torch.device("cpu")))


def test_a_head_of_other_labels_is_refused(inputs, tmp_path):
    seen = spied_run(settings(inputs, tmp_path, init_from=inputs / "value", num_labels=1), inputs / "cache")
    assert f"--init_from {inputs / 'value'} has a head of 3 labels, --num_labels is 1; they must agree" in seen.error


@pytest.mark.parametrize("name", ["trainer.json", "optimizer.pt", "rng.pt"])
def test_a_file_of_a_checkpoint_that_cannot_be_read_is_told(inputs, tmp_path, name):
    argv = settings(inputs, tmp_path, save_every=2, eval_every=-1)
    assert spied_run(argv, inputs / "cache").status == 0
    shutil.rmtree(tmp_path / "run/step-00000003")
    path = tmp_path / "run/step-00000002" / name
    path.write_bytes(path.read_bytes()[:20])
    error = spied_run(argv, inputs / "cache").error
    assert "step-00000002 cannot be read (" in error and "remove it to go on from the one before" in error


def test_eval_only_reads_the_newest_checkpoint_and_says_its_step(inputs, tmp_path):
    assert spied_run(settings(inputs, tmp_path, save_every=2, max_lr=0.1), inputs / "cache").status == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    seen = spied_run(settings(inputs, tmp_path, save_every=2, max_lr=0.1, eval_only=True), inputs / "cache")
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    [last] = [record for record in records if record["step"] == 3 and "eval/loss" in record]
    assert f"step 3 evaluation: loss {last['eval/loss']:.4f} accuracy {last['eval/accuracy']:.4f} auc" in seen.log
    newest = Qwen2ForClassifier.from_pretrained(tmp_path / "run/step-00000003").state_dict()
    assert all(torch.equal(value, newest[name]) for name, value in seen.forwards[0].model.state_dict().items())
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def test_bf16_parameters_stay_bf16_in_the_checkpoint_and_when_it_goes_on(inputs, tmp_path):
    argv = settings(inputs, tmp_path, param_dtype="bf16", save_every=2)
    first = spied_run(argv, inputs / "cache")
    assert json.loads((tmp_path / "run/latest/config.json").read_text())["dtype"] == "bfloat16"
    shutil.rmtree(tmp_path / "run/step-00000003")
    second = spied_run(argv, inputs / "cache")
    assert {value.dtype for value in second.steps[0].before.values()} == {torch.bfloat16}
    assert all(torch.equal(value, first.steps[2].after[name]) for name, value in second.steps[0].after.items())


def test_the_progress_line_and_the_end_are_told(inputs, tmp_path, capsys):
    spied_run(settings(inputs, tmp_path), inputs / "cache")
    said = capsys.readouterr().err
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    for record in (record for record in records if record["step"] in (1, 3) and "loss" in record):
        figures = f"loss {record['loss']:.4f} lr {record['lr']:.1e} norm {record['grad_norm']:.2f}"
        assert f"step {record['step']}/3 {figures} tokens/s " in said
    assert "step 2 evaluation: loss" in said and "step 3 evaluation: loss" in said
    assert f"done: 3 steps; the value model is {tmp_path / 'run/latest'}" in said


def test_only_the_first_rank_tracks_and_pushes(monkeypatch):
    made = []
    monkeypatch.setattr(train_classifier, "make_tracker", lambda *args: made.append(args) or Tracker())
    monkeypatch.setattr(train_classifier, "HubPusher", lambda name: made.append(name))
    args = parse_args(["--run_name", "run", "--track", "--push_to_hub", "--logger_tags", "a"])
    train_classifier.open_services(args, 1, "before")
    assert made == []
    train_classifier.open_services(args, 0, "before")
    assert made == ["run", ("neptune", None, "run", ["a"], "before")]
