"""Checkpoints of a training run: one directory each with everything, whole or not there.

`RUN/step-00000200/` holds config.json and model.safetensors (a value model that `inference_eval.py` loads), the
tokenizer's files, optimizer.pt, rng.pt (a state per rank) and trainer.json (step, arguments, data, attention, tracker).
It is written beside, fsynced and renamed; `RUN/latest` points to the newest.
"""

import contextlib
import copy
import json
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import BaseFileLock
from safetensors.torch import save_file
from torch import nn

from common_lib import files
from common_lib.cli import UserError
from training_lib.ranks import World

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt",
                   "added_tokens.json", "chat_template.jinja")  # fmt: skip
WRITING = ".writing-"


def save_checkpoint(
    run_dir: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, world: World,
    trainer: dict[str, Any], tokenizer_dir: Path | None, keep: int, in_use: Collection[str] = (),
) -> Path:  # fmt: skip
    """Write the checkpoint of `step`, then remove the oldest beyond `keep`, but for those `in_use`.

    Every rank calls it; rank 0 writes. Where it cannot be written (disk full, no permission) all ranks raise the same
    UserError; older ones stay.
    """
    target = run_dir / f"step-{step:08d}"
    weights = {name: whole(value, world) for name, value in model.state_dict().items()}
    optimizer_state = {
        name: {key: whole(value, world) for key, value in optimizer.state[parameter].items()}
        for name, parameter in model.named_parameters()
    }
    rng = world.gather({name: generator.get_state() for name, generator in generators(world.device).items()})
    with world.together():
        if world.rank == 0:
            writing = run_dir / f"{WRITING}{target.name}"
            try:
                writing.mkdir()
                _write(writing, model, weights, optimizer_state, rng, trainer | {"step": step}, tokenizer_dir)
                _publish(writing, target)
                _prune(run_dir, keep, in_use)
            except Exception as error:  # torch and safetensors report a full disk by types of their own
                shutil.rmtree(writing, ignore_errors=True)
                good = checkpoints(run_dir)
                left = f"{good[-1].name} is whole" if good else "there is no earlier one"
                raise UserError(
                    f"the checkpoint of step {step} could not be written to {run_dir}: {_first_line(error)}; {left}; "
                    "make room, and the same command goes on from there"
                ) from error
    return target


def _write(folder, model, weights, optimizer_state, rng, trainer, tokenizer_dir) -> None:
    config = copy.deepcopy(model.config)
    config.architectures = ["Qwen2ForClassifier"]  # FSDP renames the class
    config.dtype = next(iter(weights.values())).dtype
    config.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # save_file lets only its owner read it
    torch.save(optimizer_state, folder / "optimizer.pt")
    torch.save(rng, folder / "rng.pt")
    for name in TOKENIZER_FILES if tokenizer_dir else ():
        if (tokenizer_dir / name).is_file():
            shutil.copyfile(tokenizer_dir / name, folder / name)
    (folder / "trainer.json").write_text(json.dumps(trainer, indent=1) + "\n", encoding="utf-8")


def _publish(writing: Path, target: Path) -> None:
    """Make the written directory durable, then visible under its name, then the newest."""
    for path in [*writing.iterdir(), writing]:
        files.fsync(path)
    if target.exists():  # not whole, or it would have been resumed from
        shutil.rmtree(target)
    writing.rename(target)
    link = target.parent / ".latest"
    link.unlink(missing_ok=True)
    link.symlink_to(target.name)
    link.replace(target.parent / "latest")
    files.fsync(target.parent)


def _prune(run_dir: Path, keep: int, in_use: Collection[str]) -> None:
    for old in checkpoints(run_dir)[:-keep]:
        if old.name not in in_use:
            # Renamed first: a directory that is half removed must not look whole.
            shutil.rmtree(old.rename(run_dir / f"{WRITING}removed-{old.name}"))


# ---------------------------------------------------------------------------------------------------------------------
# Going on


def checkpoints(run_dir: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(path for path in run_dir.glob("step-" + 8 * "[0-9]") if (path / "trainer.json").is_file())


def read_trainer(checkpoint: Path) -> dict[str, Any]:
    """trainer.json of a checkpoint. Raises UserError."""
    with _readable(checkpoint):
        return json.loads((checkpoint / "trainer.json").read_text(encoding="utf-8"))


def restore(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer, world: World) -> None:
    """Optimizer and random state of a checkpoint whose weights the model already has. Every rank calls it."""
    with world.together(), _readable(checkpoint):
        state = torch.load(checkpoint / "optimizer.pt", map_location="cpu", mmap=True, weights_only=True)
        rng = torch.load(checkpoint / "rng.pt", map_location="cpu", weights_only=True)
    for name, parameter in model.named_parameters():
        if name not in state:
            raise UserError(f"{checkpoint} is of another model: its optimizer knows no {name}")
        optimizer.state[parameter] = {key: placed_like(parameter, value) for key, value in state[name].items()}
    if len(rng) == world.size:  # with another number of ranks the draws of dropout differ anyway
        for name, generator in generators(world.device).items():
            if name in rng[world.rank]:
                generator.set_state(rng[world.rank][name])


def lock_run(run_dir: Path, patience_s: float = 10.0) -> BaseFileLock:
    """Hold the run's directory against a second process, and clear away what a killed one left half done.

    patience_s: a run that was just killed may take a moment to go. Returns the lock, to be kept. Raises UserError.
    """
    path = run_dir / ".lock"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        holder = path.read_text(encoding="utf-8").strip() if path.exists() else ""
    except OSError as error:
        raise UserError(f"--save_dir: cannot write to {run_dir} ({error.strerror}); give another directory") from error
    busy = f"process {holder or '?'} is training into {run_dir}; wait for it, or give another --run_name"
    held = files.lock(path, busy, patience_s)
    with files.output_errors(path):
        path.write_text(f"{os.getpid()}\n", encoding="utf-8")
    for leftover in run_dir.glob(f"{WRITING}*"):
        shutil.rmtree(leftover)
    return held


@contextlib.contextmanager
def _readable(checkpoint: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # torch reports a file cut short by types of its own
        raise UserError(
            f"{checkpoint} cannot be read ({_first_line(error)}); remove it to go on from the one before"
        ) from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


# ---------------------------------------------------------------------------------------------------------------------
# Tensors and random state


def whole(value: torch.Tensor, world: World) -> torch.Tensor | None:
    """All of a tensor that may be sharded, on the CPU; None but on rank 0, which writes. Every rank calls it."""
    value = value.full_tensor() if hasattr(value, "full_tensor") else value
    return value.detach().cpu().contiguous() if world.rank == 0 else None


def placed_like(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A whole tensor of optimizer state, on the parameter's device and sharded as it is; a step count as it comes."""
    if value.dim() and hasattr(parameter, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value.to(parameter.device, copy=True)


def generators(device: torch.device) -> dict[str, torch.Generator]:
    """What a run on this device draws from."""
    cuda = {"cuda": torch.cuda.default_generators[device.index]} if device.type == "cuda" else {}
    return {"cpu": torch.default_generator} | cuda
