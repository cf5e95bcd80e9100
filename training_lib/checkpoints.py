"""Checkpoints of a training run: one directory each with everything, whole or not there.

`RUN/step-00000200/` holds config.json and model.safetensors (a value model that `inference_eval.py` loads), the
tokenizer's files, optimizer.pt, rng.pt (a state per rank) and trainer.json (step, arguments, data, attention, tracker).
It is written beside, fsynced and renamed; `RUN/latest` points to the newest. Only the newest two keep optimizer.pt and
rng.pt: the others are value models, to be used or trained on from, but no states of this run to go on from.
"""

import contextlib
import copy
import json
import logging
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
from training_lib.hub_push import LOCAL_ONLY
from training_lib.ranks import World

logger = logging.getLogger(__name__)

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt",
                   "added_tokens.json", "chat_template.jinja")  # fmt: skip
WRITING = ".writing-"
RESUMABLE = 2  # checkpoints that keep optimizer and random state, twice the size of the weights and more


def save_checkpoint(
    run_dir: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, world: World,
    trainer: dict[str, Any], tokenizer_dir: Path | None, keep: int, in_use: Collection[str] = (),
) -> Path:  # fmt: skip
    """Write the checkpoint of `step`, then remove the oldest beyond `keep`, but for those `in_use`.

    Older ones lose what only going on needs. Every rank calls it; rank 0 writes. Where it cannot be written (disk full,
    no permission) all ranks raise the same UserError; older ones stay.
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
                _prune(target, keep, in_use)
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
    if target.exists():  # not whole or without optimizer state, or it would have been resumed from
        shutil.rmtree(target)
    writing.rename(target)
    link = target.parent / ".latest"
    link.unlink(missing_ok=True)
    link.symlink_to(target.name)
    link.replace(target.parent / "latest")
    files.fsync(target.parent)


def _prune(target: Path, keep: int, in_use: Collection[str]) -> None:
    """Make room, now that `target` is whole. What is pushed to the hub is the value model alone, so that the rest of a
    checkpoint that is in use may go."""
    # Later ones, if any, are of steps that are done again.
    past = [path for path in checkpoints(target.parent) if path <= target]
    for old in past[:-keep]:
        if old.name not in in_use:
            # Renamed first: a directory that is half removed must not look whole.
            shutil.rmtree(old.rename(target.with_name(f"{WRITING}removed-{old.name}")))
    for old in past[:-RESUMABLE]:
        for name in LOCAL_ONLY:
            (old / name).unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# Going on


def checkpoints(run_dir: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(path for path in run_dir.glob("step-" + 8 * "[0-9]") if (path / "trainer.json").is_file())


def newest_resumable(run_dir: Path) -> Path | None:
    """The checkpoint that a run goes on from; None where there is none at all. Raises UserError."""
    whole = checkpoints(run_dir)
    found = [path for path in whole if all((path / name).is_file() for name in LOCAL_ONLY)]
    if whole and not found:
        raise UserError(
            f"{run_dir} has no checkpoint to go on from: only the newest {RESUMABLE} of a run keep their optimizer state, and "
            f"of those that are left ({whole[0].name} to {whole[-1].name}) none has it; give --init_from {whole[-1]} and "
            "another --run_name to train on from its weights"
        )
    if whole and found[-1] != whole[-1]:
        logger.warning("%s has no optimizer state: going on from %s", whole[-1], found[-1].name)
    return found[-1] if found else None


def read_trainer(checkpoint: Path) -> dict[str, Any]:
    """trainer.json of a checkpoint. Raises UserError."""
    with _readable(checkpoint):
        return json.loads((checkpoint / "trainer.json").read_text(encoding="utf-8"))


def restore(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer, world: World) -> None:
    """Optimizer and random state of a checkpoint whose weights the model already has.

    Every rank calls it. Rank 0 alone reads, and hands out one tensor after the other.
    """
    state, rng = {}, []
    with world.together():
        if world.rank == 0:
            with _readable(checkpoint):
                state = torch.load(checkpoint / "optimizer.pt", map_location="cpu", mmap=True, weights_only=True)
                rng = torch.load(checkpoint / "rng.pt", map_location="cpu", weights_only=True)
            if unknown := [name for name, _ in model.named_parameters() if name not in state]:
                raise UserError(f"{checkpoint} is of another model: its optimizer knows no {unknown[0]}")
    meta = {name: {key: value.to("meta") for key, value in tensors.items()} for name, tensors in state.items()}
    shapes, rng = world.from_rank0((meta, rng))
    for name, parameter in model.named_parameters():
        optimizer.state[parameter] = {
            key: placed_like(parameter, shape, state[name][key] if world.rank == 0 else None, world)
            for key, shape in shapes[name].items()
        }
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


def placed_like(parameter: torch.Tensor, like: torch.Tensor, value: torch.Tensor | None, world: World) -> torch.Tensor:
    """A tensor of optimizer state that rank 0 has whole, on the parameter's device and sharded as it is; a step count
    as it comes. like: one of its shape and dtype. Every rank calls it."""
    placed = torch.empty_like(like, device=parameter.device)
    if value is not None:
        placed.copy_(value)
    if like.dim() and hasattr(parameter, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(placed, parameter.device_mesh, parameter.placements)  # rank 0's is what is sent
    return world.broadcast(placed)


def generators(device: torch.device) -> dict[str, torch.Generator]:
    """What a run on this device draws from."""
    cuda = {"cuda": torch.cuda.default_generators[device.index]} if device.type == "cuda" else {}
    return {"cpu": torch.default_generator} | cuda
