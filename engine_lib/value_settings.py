"""How SGLang is started for a value model, in this process and as a server: what it needs, and what may not be given."""

import argparse
import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from common_lib.cli import UserError
from engine_lib.sglang_wire import base_settings, parse_sglang_args
from engine_lib.value_base import ValueConfig
from engine_lib.value_wire import ARCHITECTURES

PACKAGE = "engine_lib.sglang_value_model"
ROOT = str(Path(__file__).resolve().parent.parent)
# `skip_tokenizer_init` (base_settings): a value model may have no tokenizer. Pages of 16 tokens cost 3 % more of them, since only
# whole ones are shared. CUDA's graphs of prefill do not tell the model which requests it computes.
VALUE_SETTINGS = {"is_embedding": True, "page_size": 1, "cuda_graph_backend_prefill": "disabled"}
# Of the memory that is free when it starts: what the generator of the same GPU has left.
SHARE_OF_GPU, SHARE_OF_RAM = 0.8, 0.3

_NEEDED = "leave it out: a value model needs the one setting that it is started with"
_SERVERS = "it makes every prefix be read once per rank; start a server for each GPU, and give each as --value_url"
REFUSED = {
    "model_path": "give --classifier_ckpt_path",
    "is_embedding": _NEEDED,
    "skip_tokenizer_init": _NEEDED,
    "cuda_graph_backend_prefill": _NEEDED,
    "cuda_graph_config": _NEEDED,
    "disable_radix_cache": "without its cache SGLang reads every trace again from the start",
    "load_format": "leave it out: some formats make weights up",
    "json_model_override_args": "leave it out: the model's own config.json says what it is",
    "speculative_algorithm": "a value model writes no tokens",
    "disaggregation_mode": "a value model writes no tokens",
    "encoder_only": _NEEDED,
    "tokenizer_worker_num": _NEEDED,
    "pp_size": "the value model is not split by layers; tp_size splits it",
    "dp_size": _SERVERS,
    "attn_dp_size": _SERVERS,
    "smg_grpc_mode": "values are asked for by HTTP",
    "grpc_mode": "values are asked for by HTTP",
    "config": "give each setting by itself: what a file sets would go unseen",
}
FLAGS_INSTEAD = {"device": "--value_device", "base_gpu_id": "--value_device", "dtype": "--value_dtype"}


def check_settings(names: Iterable[str], in_process: bool) -> None:
    """Raises UserError for a setting that would make values wrong, or that a flag of this project is for: one of
    --value_sglang_args, or a flag of a server."""
    for name in names:
        instead = f"give {FLAGS_INSTEAD[name]}" if in_process and name in FLAGS_INSTEAD else REFUSED.get(name)
        if instead:
            said = f"--value_sglang_args {name}" if in_process else f"--{name.replace('_', '-')}"
            raise UserError(f"{said}: {instead}")


def check_served_backbone(folder: Path) -> None:
    """Raises UserError for a model that the package does not have."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    architecture = (config.get("architectures") or [config.get("model_type")])[0]
    if architecture not in ARCHITECTURES or config.get("model_type") != "qwen2":
        raise UserError(
            f"--classifier_ckpt_path {folder} is a {architecture} with a {config.get('model_type')} backbone; SGLang serves "
            f"{', '.join(ARCHITECTURES)} with a qwen2 one so far: give --value_engine local"
        )


def value_engine_settings(config: ValueConfig, command_line: Callable[[], argparse.ArgumentParser]) -> dict[str, Any]:
    """Keyword arguments of `sgl.Engine` for a value model: ours, then those of --value_sglang_args. `command_line` makes
    the parser of sglang's own flags. Raises UserError."""
    parser = command_line() if config.sglang_args else argparse.ArgumentParser()
    given = parse_sglang_args(config.sglang_args, parser, "--value_sglang_args")
    check_settings(given, in_process=True)
    share = SHARE_OF_GPU if config.device.startswith("cuda") else SHARE_OF_RAM
    ours = base_settings(config.model_path, config.device, config.dtype) | VALUE_SETTINGS
    return ours | {"mem_fraction_static": share} | given


@contextlib.contextmanager
def model_package() -> Iterator[None]:
    """SGLang's processes that are started here have the model, and find this project wherever they are started from."""
    paths = [ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]
    wanted = {"SGLANG_EXTERNAL_MODEL_PACKAGE": PACKAGE, "PYTHONPATH": os.pathsep.join(paths)}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value
