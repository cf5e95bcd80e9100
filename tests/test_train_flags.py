"""Every flag of train_classifier.py at its consumer: what reaches model, loss, optimizer, loader, files, tracker, hub.

A row fails where its flag is ignored: the same run without the flag must not pass its check.
"""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from rollouts import write_rows
from tiny import save_generator, save_value_model
from train_spy import Spied, command, names, numbered_rows, spied_run

from classifier_lib import Qwen2ForClassifier
from training_lib.arguments import build_parser
from training_lib.step import learning_rate

PER_ROW = 4
Check = Callable[[Spied, Path], Any]


@dataclass(frozen=True)
class Row:
    """value: what is given; a Path is one in the folder of inputs. given: other flags, with and without this one."""

    value: Any
    check: Check  # asserts, or returns whether it holds
    given: dict[str, Any] = field(default_factory=dict)


def base(inputs: Path) -> dict[str, Any]:
    return {
        "model_path": inputs / "backbone", "data_path": inputs / "data", "data_num_response": PER_ROW, "max_length": 40,
        "total_batch_size": 8, "micro_batch_size": 4, "num_steps": 3, "eval_every": -1, "max_lr": 1e-3, "run_name": "run",
        "save_dir": inputs / "runs", "device": "cpu",
    }  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    save_generator(folder / "backbone")
    save_generator(folder / "other_backbone", seed=5)
    save_value_model(folder / "value")
    write_rows(folder / "data", numbered_rows(0, 20))
    write_rows(folder / "other", numbered_rows(100, 20))
    write_rows(folder / "many", numbered_rows(0, 300))
    bad = numbered_rows(0, 20)
    bad[3]["labels"][1] = 7
    write_rows(folder / "bad", bad)
    return folder


@pytest.fixture(scope="module")
def run(inputs, tmp_path_factory):
    """Run the script with changed flags, once for each set of them."""

    @cache
    def made(argv: tuple[str, ...], run_dir: Path | None) -> Spied:
        seen = spied_run(list(argv), inputs / "cache", {"NEPTUNE_PROJECT": "me/environment", "HF_HUB_OFFLINE": "1"})
        seen.run_dir = run_dir or next(iter(Path(argv[argv.index("--save_dir") + 1]).glob("*")), None)
        return seen

    folders: dict[tuple[str, ...], Path] = {}

    def run(changes: dict[str, Any]) -> Spied:
        settings = base(inputs) | {
            name: inputs / value if isinstance(value, Path) else value for name, value in changes.items()
        }
        argv = command(settings | {"save_dir": None})
        save_dir = folders.setdefault(tuple(argv), tmp_path_factory.mktemp("runs"))
        if "save_dir" in changes:
            save_dir = settings["save_dir"]
        run_dir = save_dir / settings["run_name"] if settings["run_name"] else None
        return made((*argv, "--save_dir", str(save_dir)), run_dir)

    return run


# ---------------------------------------------------------------------------------------------------------------------
# What is seen of a run


def rows_of(forwards) -> set[int]:
    return {row for row, _ in names(forwards)}


def rates(seen: Spied) -> list[float]:
    """The learning rates that the optimizer stepped with."""
    for step in seen.steps:
        assert len({group["lr"] for group in step.groups}) == 1
    return [step.groups[0]["lr"] for step in seen.steps]


def groups(seen: Spied, name: str) -> list:
    return [group[name] for step in seen.steps for group in step.groups]


def started_from(seen: Spied, folder: Path) -> bool:
    """Before the first step the model has the folder's weights."""
    model = (
        Qwen2ForClassifier.from_pretrained(folder)
        if folder.name == "value"
        else Qwen2ForClassifier.from_backbone(folder)
    )
    before = seen.steps[0].before
    kept = [name for name in before if folder.name == "value" or name.startswith("model.")]
    return all(torch.equal(before[name], model.state_dict()[name]) for name in kept)


def evaluated_at(seen: Spied) -> list[int]:
    return [record["step"] for record in seen.records if "eval/loss" in record]


def is_pairs(seen: Spied) -> bool:
    """The traces are (correct, incorrect) roll-outs of one row."""
    found = names(seen.trained)
    return all(a[0] == b[0] and sum(a) % 3 == 1 != sum(b) % 3 for a, b in zip(found[::2], found[1::2], strict=True))


def shares_prefixes(seen: Spied) -> bool:
    """The rows read are tries, in each of which the first token of all traces stands once."""
    return all(int((forward.input_ids == 1).sum()) == 1 for forward in seen.trained)


def groups_stay_together(seen: Spied, size: int) -> bool:
    """Each step of 8 roll-outs has whole groups only."""
    found = names(seen.trained)
    steps = [Counter((row, column // size) for row, column in found[i : i + 8]) for i in range(0, len(found), 8)]
    return all(count == size for step in steps for count in step.values())


def tracked(seen: Spied, kind: str, project: str | None) -> bool:
    """The run was tracked there from its configuration to its end, each step once, with the numbers of metrics.jsonl."""
    [tracker] = seen.trackers
    assert (tracker.configs["max_lr"], tracker.configs["attention"]) == (1e-3, "sdpa")
    assert tracker.configs["versions/torch"] == torch.__version__
    records = [(r["step"], {name: r[name] for name in r if name not in ("step", "attention")}) for r in seen.records]
    assert tracker.metrics == records and [step for step, _ in records] == [1, 2, 3]
    assert {"loss", "lr", "grad_norm", "tokens_per_s"} <= set(tracker.metrics[0][1])
    assert tracker.ends == 1
    return (tracker.kind, tracker.project) == (kind, project)


def pushed(step: int) -> list[tuple]:
    name = f"step-{step:08d}"
    return [
        ("branch", "me/run", f"step-{step}"),
        ("upload", "me/run", name, f"step-{step}"),
        ("upload", "me/run", name, "main"),
    ]


def other_seed(seen: Spied, run) -> bool:
    """Order, hold-out, head and dropout noise are others than those of the default seed."""
    default = run(EVALUATED)
    if seen is default:
        return False
    return (
        names(run({"seed": 7}).trained) != names(run({}).trained)
        and rows_of(seen.evaluated) != rows_of(default.evaluated)
        and not torch.equal(seen.steps[0].before["score.0.weight"], default.steps[0].before["score.0.weight"])
        and seen.forwards[0].seed != default.forwards[0].seed
    )


EVALUATED = {"eval_every": 3, "eval_size": 5}
TABLE: dict[str, Row] = {
    # data
    "data_path": Row(Path("other"), lambda seen, _: min(rows_of(seen.trained)) >= 100),
    "validation_data_path": Row(Path("other"), lambda seen, _: rows_of(seen.evaluated) == set(range(100, 105)), EVALUATED),
    "data_num_response": Row(2, lambda seen, _: {column for _, column in names(seen.trained)} == {0, 1}),
    "small_group_size": Row(4, lambda seen, _: groups_stay_together(seen, 4)),
    "label_key": Row("grades", lambda seen, _: {int(x) for target in seen.targets for x in target} == {2}),
    "skip_bad_rows": Row(
        True, lambda seen, _: seen.status == 0 and rows_of(seen.trained) == set(range(20)) - {3},
        {"data_path": Path("bad"), "num_steps": 9},
    ),
    "max_length": Row(16, lambda seen, _: max(forward.input_ids.shape[1] for forward in seen.trained) == 16),
    "packing": Row("tree", lambda seen, _: shares_prefixes(seen)),
    "row_tokens": Row(
        40, lambda seen, _: max(forward.input_ids.shape[1] for forward in seen.trained) == 40, {"packing": "pack"}
    ),
    "num_workers": Row(1, lambda seen, _: [loader["num_workers"] for loader in seen.loaders] == [1]),
    # model
    "model_path": Row(Path("other_backbone"), lambda seen, inputs: started_from(seen, inputs / "other_backbone")),
    "init_from": Row(Path("value"), lambda seen, inputs: started_from(seen, inputs / "value")),
    "num_labels": Row(1, lambda seen, _: {forward.logits.shape[-1] for forward in seen.trained} == {1}),
    "train_bt_model": Row(True, lambda seen, _: is_pairs(seen), {"num_labels": 1}),
    "p_dropout": Row(
        0.25, lambda seen, _: {(f.model.dropout.p, *f.attention_dropout) for f in seen.trained} == {(0.25, 0.25, 0.25)}
    ),
    "param_dtype": Row("bf16", lambda seen, _: set.union(*groups(seen, "dtypes")) == {torch.bfloat16}),
    "autocast": Row(True, lambda seen, _: {forward.logits.dtype for forward in seen.trained} == {torch.bfloat16}),
    "use_dora": Row(True, lambda seen, _: "--use_dora has no effect" in seen.log),
    # optimization
    "num_steps": Row(5, lambda seen, _: rates(seen) == [learning_rate(step, 5, 1e-3) for step in range(5)]),
    "total_batch_size": Row(16, lambda seen, _: len(names(seen.trained)) == 3 * 16 and len(seen.steps) == 3),
    "micro_batch_size": Row(2, lambda seen, _: [len(forward.traces) for forward in seen.trained] == [2] * 12),
    "max_lr": Row(3e-3, lambda seen, _: rates(seen) == [learning_rate(step, 3, 3e-3) for step in range(3)]),
    "disable_lr_schedule": Row(True, lambda seen, _: rates(seen) == [1e-3] * 3),
    "beta1": Row(0.7, lambda seen, _: groups(seen, "betas") == [(0.7, 0.95)] * 6),
    "beta2": Row(0.8, lambda seen, _: groups(seen, "betas") == [(0.9, 0.8)] * 6),
    "weight_decay": Row(
        0.3,
        lambda seen, _: {(group["weight_decay"], *group["dims"]) for step in seen.steps for group in step.groups}
        == {(0.3, 2), (0.0, 1)},
    ),
    "grad_norm_clip": Row(
        1e-3, lambda seen, _: [step.gradient_norm for step in seen.steps] == pytest.approx([1e-3] * 3, rel=1e-3)
    ),
    "seed": Row(7, other_seed, EVALUATED),
    # machine
    "device": Row(
        "cuda",
        lambda seen, _: "--device cuda: this machine has 0 usable GPUs" in seen.error
        or {forward.logits.device.type for forward in seen.forwards} == {"cuda"},
    ),
    "compile": Row(True, lambda seen, _: len(seen.compiled) == 2 and seen.status == 0),
    "gradient_checkpointing": Row(False, lambda seen, _: seen.kernels == 2 * len(seen.trained)),
    "activation_budget": Row(
        0.4, lambda seen, _: torch._functorch.config.activation_memory_budget == 0.4 and len(seen.steps) == 3, {"compile": True},
    ),
    "certify": Row(True, lambda seen, _: json.loads((seen.run_dir / "certificate.json").read_text())["passed"]),
    "fsdp": Row(True, lambda seen, _: all(step.sharded for step in seen.steps) and seen.checkpoints == [3]),
    "profile": Row(
        2, lambda seen, _: json.loads((seen.run_dir / "profile-step-00000003.json").read_text())["traceEvents"],
        {"num_steps": 5},
    ),
    # evaluation, checkpoints, log
    "eval_every": Row(2, lambda seen, _: evaluated_at(seen) == [2, 4, 5], {"num_steps": 5, "eval_size": 5}),
    "eval_size": Row(7, lambda seen, _: len(rows_of(seen.evaluated)) == 7, {"eval_every": 3}),
    "eval_only": Row(
        True,
        lambda seen, _: seen.status == 0 and not seen.steps and len(names(seen.evaluated)) == 20
        and "step 0 evaluation: loss" in seen.log and not seen.run_dir.exists() and not seen.trackers,
        EVALUATED | {"init_from": Path("value"), "track": True},
    ),
    "save_dir": Row(Path("elsewhere"), lambda _, inputs: (inputs / "elsewhere/run/step-00000003").is_dir()),
    "run_name": Row("named", lambda seen, _: seen.run_dir.name == "named" and seen.checkpoints == [3]),
    "dataset_name": Row(
        "mine", lambda seen, _: seen.run_dir.name == "mine-backbone-data-seed1337" and seen.checkpoints == [3],
        {"run_name": None},
    ),
    "save_every": Row(2, lambda seen, _: seen.checkpoints == [2, 4, 5], {"num_steps": 5}),
    "max_keep_ckpts": Row(2, lambda seen, _: seen.checkpoints == [3, 4], {"num_steps": 4, "save_every": 1}),
    "push_to_hub": Row(
        True, lambda seen, _: seen.hub == [("create", "run", True), *pushed(2), *pushed(3)], {"save_every": 2}
    ),
    "track": Row(True, lambda seen, _: tracked(seen, "neptune", None)),
    "tracker": Row("trackio", lambda seen, _: tracked(seen, "trackio", None)),
    "neptune_project": Row("me/mine", lambda seen, _: tracked(seen, "neptune", "me/mine")),
    "logger_tags": Row(["a", "b"], lambda seen, _: [tracker.tags for tracker in seen.trackers] == [["a", "b"]], {"track": True}),
    "debug": Row(
        True,
        lambda seen, _: len(seen.steps) == 10 and all(forward.anomaly for forward in seen.trained)
        and max(rows_of(seen.trained)) < 256 and not seen.trackers and not seen.hub,
        {"data_path": Path("many"), "num_steps": 12, "total_batch_size": 32, "micro_batch_size": 32, "track": True,
         "push_to_hub": True},
    ),
}  # fmt: skip


def test_the_table_names_every_flag_of_the_parser():
    assert set(TABLE) == {action.dest for action in build_parser("")._actions} - {"help"}


def holds(row: Row, seen: Spied, inputs: Path, run) -> bool:
    try:
        return bool(row.check(seen, run if row.check is other_seed else inputs))
    except (AssertionError, ValueError, AttributeError, IndexError, FileNotFoundError, TypeError):
        return False


@pytest.mark.parametrize("flag", TABLE)
def test_a_flag_reaches_its_consumer(inputs, run, flag):
    row = TABLE[flag]
    assert not holds(row, run(row.given), inputs, run), "the check passes without the flag"
    seen = run(row.given | {flag: row.value})
    assert row.check(seen, run if row.check is other_seed else inputs), (seen.status, seen.error, seen.log)
