"""train_classifier.py run in this process with spies at its consumers: model, loss, optimizer, loader, tracker, hub."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from rollouts import write_rows
from tiny import save_generator
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.data import DataLoader

import train_classifier
from classifier_lib import Qwen2ForClassifier
from common_lib import tracking
from common_lib.cli import UserError

COLUMN = 200  # first token id of the roll-outs' numbers


def numbered_rows(first: int, num_rows: int, per_row: int = 4, seed: int = 0) -> list[dict]:
    """Rows whose traces tell which they are (`trace_name`), of different lengths; labels in a pattern, grades all 2."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(first, first + num_rows):
        name = [1 + number // 200, number % 200]
        rows.append(
            {
                "problem": f"problem {number}",
                "roll_in_ids": [[*name, COLUMN + i, *rng.integers(3, 200, 1 + i).tolist()] for i in range(per_row)],
                "roll_outs_ids": [rng.integers(3, 200, 1 + (number + 5 * i) % 17).tolist() for i in range(per_row)],
                "labels": [(number + i) % 3 for i in range(per_row)],
                "grades": [2] * per_row,
            }
        )
    return rows


def trace_name(tokens: list[int]) -> tuple[int, int]:
    """(row, roll-out) of a trace of `numbered_rows`."""
    return (tokens[0] - 1) * 200 + tokens[1], tokens[2] - COLUMN


@dataclass
class Forward:
    """One forward pass of the value model."""

    model: Qwen2ForClassifier
    training: bool
    input_ids: torch.Tensor
    position_ids: torch.Tensor | None
    mask: torch.Tensor | None
    logits: torch.Tensor
    anomaly: bool
    seed: int  # of torch's generator
    attention_dropout: list[float] = field(default_factory=list)  # as each call of the kernel had it

    @property
    def traces(self) -> list[tuple[int, int]]:
        return [trace_name(row) for row in self.input_ids.tolist()]


@dataclass
class OptimizerStep:
    """What the optimizer had when it stepped, and what it made of it."""

    groups: list[dict[str, Any]]
    gradient_norm: float
    before: dict[str, torch.Tensor]
    after: dict[str, torch.Tensor] = field(default_factory=dict)
    sharded: bool = False


@dataclass
class SpyTracker(tracking.Tracker):
    """Keeps what it is sent."""

    kind: str
    project: str | None
    run_id: str
    tags: list[str]
    configs: dict = field(default_factory=dict)
    metrics: list[tuple[int, dict]] = field(default_factory=list)
    ends: int = 0

    def __post_init__(self):
        super().__init__(self.run_id, f"a spy of {self.kind}")

    def send_configs(self, configs):
        self.configs |= configs

    def send_metrics(self, metrics, step):
        assert not self.ends
        self.metrics.append((step, metrics))

    def send_rest(self, *_):
        self.ends += 1


@dataclass
class Spied:
    """A run, and what reached whom."""

    run_dir: Path | None = None
    status: int | None = None
    error: str = ""
    log: str = ""
    forwards: list[Forward] = field(default_factory=list)
    targets: list[torch.Tensor] = field(default_factory=list)  # classes given to the cross entropy
    steps: list[OptimizerStep] = field(default_factory=list)
    loaders: list[dict] = field(default_factory=list)
    compiled: list[Callable] = field(default_factory=list)
    kernels: int = 0  # calls of the attention kernel, those that a backward pass repeats too
    trackers: list[SpyTracker] = field(default_factory=list)
    hub: list[tuple] = field(default_factory=list)

    @property
    def trained(self) -> list[Forward]:
        return [forward for forward in self.forwards if forward.training]

    @property
    def evaluated(self) -> list[Forward]:
        return [forward for forward in self.forwards if not forward.training]

    @property
    def records(self) -> list[dict]:
        """Lines of metrics.jsonl."""
        return [json.loads(line) for line in (self.run_dir / "metrics.jsonl").read_text().splitlines()]

    def values(self, name: str) -> list[float]:
        return [record[name] for record in self.records if name in record]

    @property
    def checkpoints(self) -> list[int]:
        return sorted(int(path.name.removeprefix("step-")) for path in self.run_dir.glob("step-*"))


def names(forwards: list[Forward]) -> list[tuple[int, int]]:
    """(row, roll-out) of all traces, in order."""
    return [trace for forward in forwards for trace in forward.traces]


def whole(parameter: torch.Tensor) -> torch.Tensor:
    value = parameter.detach()
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).clone()


def install(patch: pytest.MonkeyPatch, seen: Spied) -> list[Any]:
    """Spies in place; returns handles to be removed."""
    forward, loader_init, kernel = (
        Qwen2ForClassifier.forward, DataLoader.__init__, torch.nn.functional.scaled_dot_product_attention,
    )  # fmt: skip
    cross_entropy, dropouts = torch.nn.functional.cross_entropy, []

    def spy_forward(model, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        dropouts.clear()
        out = forward(model, input_ids, attention_mask, position_ids, **kwargs)
        seen.forwards.append(
            Forward(model, model.training, input_ids, position_ids, attention_mask, out.logits.detach().clone(),
                    torch.is_anomaly_enabled(), torch.initial_seed(), dropouts.copy())
        )  # fmt: skip
        return out

    def spy_kernel(*args, dropout_p=0.0, **kwargs):
        seen.kernels += 1
        dropouts.append(dropout_p)
        return kernel(*args, dropout_p=dropout_p, **kwargs)

    def spy_cross_entropy(logits, target, **kwargs):
        seen.targets.append(target)
        return cross_entropy(logits, target, **kwargs)

    def spy_loader(loader, dataset, **kwargs):
        seen.loaders.append(kwargs | {"dataset": dataset})
        loader_init(loader, dataset, **kwargs)

    def spy_compile(function, **kwargs):
        seen.compiled.append(function)
        return function

    patch.setattr(Qwen2ForClassifier, "forward", spy_forward)
    patch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy_kernel)
    patch.setattr(torch.nn.functional, "cross_entropy", spy_cross_entropy)
    patch.setattr(DataLoader, "__init__", spy_loader)
    patch.setattr(torch, "compile", spy_compile)
    for kind in ("neptune", "wandb", "trackio"):
        patch.setitem(tracking.TRACKERS, kind, spy_maker(kind, seen))
    patch.setattr("huggingface_hub.HfApi", lambda: SpyHub(seen.hub))
    return [register_optimizer_step_pre_hook(spy_before(seen)), register_optimizer_step_post_hook(spy_after(seen))]


def spy_maker(kind: str, seen: Spied):
    def make(project, run_id, tags, *_):
        seen.trackers.append(SpyTracker(kind, project, run_id, tags))
        return seen.trackers[-1]

    return make


@dataclass
class SpyHub:
    calls: list[tuple]

    def create_repo(self, name, private, exist_ok):
        self.calls.append(("create", name, private))
        return SimpleNamespace(repo_id=f"me/{name}")

    def create_branch(self, repo, branch, exist_ok):
        self.calls.append(("branch", repo, branch))

    def upload_folder(self, repo_id, folder_path, revision, ignore_patterns, commit_message):
        assert (Path(folder_path) / "model.safetensors").is_file()
        self.calls.append(("upload", repo_id, Path(folder_path).name, revision))


def spy_before(seen: Spied):
    def before(optimizer, args, kwargs):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [whole(p.grad).double().norm() for p in parameters if p.grad is not None]
        groups = [
            {name: value for name, value in group.items() if name != "params"}
            | {"dims": {p.dim() for p in group["params"]}, "dtypes": {p.dtype for p in group["params"]}}
            for group in optimizer.param_groups
        ]
        norm = float(torch.stack(gradients).norm())
        seen.steps.append(OptimizerStep(groups, norm, parameters_of(seen)))
        seen.steps[-1].sharded = all(hasattr(p, "device_mesh") for p in parameters)

    return before


def spy_after(seen: Spied):
    def after(optimizer, args, kwargs):
        seen.steps[-1].after = parameters_of(seen)

    return after


def parameters_of(seen: Spied) -> dict[str, torch.Tensor]:
    return {name: whole(parameter) for name, parameter in seen.forwards[-1].model.named_parameters()}


def spied_run(argv: list[str], cache: Path, environment: dict[str, str] | None = None) -> Spied:
    """Run the script's `main` under the spies. cache: of the data sets."""
    seen, handler = Spied(), logging.Handler()
    said: list[str] = []
    handler.emit = lambda record: said.append(record.getMessage())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        for name, value in (environment or {}).items():
            patch.setenv(name, value)
        handles = install(patch, seen)
        patch.setattr(logging.getLogger(), "level", logging.INFO)
        logging.getLogger().addHandler(handler)
        try:
            seen.status = train_classifier.main(argv)
        except UserError as error:
            seen.error = str(error)
        finally:
            logging.getLogger().removeHandler(handler)
            for handle in handles:
                handle.remove()
    seen.log = "\n".join(said)
    return seen


def command(settings: dict[str, Any]) -> list[str]:
    """Flags as a list: True and False are switches, None leaves one out, a list is several values, "" none."""
    parts: list[str] = []
    for name, value in settings.items():
        if value is True or value is False:
            parts.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list):
            parts += [f"--{name}", *map(str, value)]
        elif value is not None:
            parts += [f"--{name}", str(value)]
    return parts


def write_small_inputs(folder: Path) -> Path:
    """A backbone and 20 rows of roll-outs, for `small_run`."""
    save_generator(folder / "backbone")
    write_rows(folder / "data", numbered_rows(0, 20))
    return folder


def small_run(inputs: Path, save_dir: Path, **changes: Any) -> Spied:
    """A run SAVE_DIR/run of few small steps without evaluation, under the spies. changes: of its flags."""
    settings = {
        "model_path": inputs / "backbone", "data_path": inputs / "data", "data_num_response": 4, "max_length": 40,
        "total_batch_size": 8, "micro_batch_size": 4, "num_steps": 5, "eval_every": -1, "max_lr": 1e-3,
        "save_dir": save_dir, "run_name": "run", "device": "cpu",
    }  # fmt: skip
    seen = spied_run(command(settings | changes), inputs / "cache")
    seen.run_dir = save_dir / "run"
    return seen
