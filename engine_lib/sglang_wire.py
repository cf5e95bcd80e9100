"""SGLang as the generator: which engine, its settings, and what the engine here and servers elsewhere have in common.

The engine in this process is in sglang_engine.py, servers are in sglang_server.py. Facts about sglang in the comments
are of version 0.5.23.
"""

import argparse
import asyncio
import contextlib
import difflib
import importlib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from common_lib.cli import UserError
from engine_lib.base import EngineConfig, EngineError, Reply, Request

logger = logging.getLogger(__name__)

# What a CPU needs; a GPU takes sglang's own choices. `disable_overlap_schedule`: twice as fast there.
CPU_SETTINGS = {"attention_backend": "torch_native", "sampling_backend": "pytorch", "disable_overlap_schedule": True}


# ---------------------------------------------------------------------------------------------------------------------
# Requests and replies, the same for the engine and the servers


def sampling_params(request: Request, deterministic: bool) -> dict[str, Any]:
    """SGLang's sampling parameters for a request.

    The stop token stays in the output. The model's own EOS ids also stop a request unless `ignore_eos` is set, which
    switches off `stop_token_ids` as well; so it is set where there are none, and `to_reply` checks the other case.
    """
    params: dict[str, Any] = {
        "max_new_tokens": request.max_new_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "ignore_eos": not request.stop_ids,
    }
    if request.stop_ids:
        params["stop_token_ids"] = list(request.stop_ids)
    if deterministic:
        params["sampling_seed"] = request.seed
    return params


def to_reply(request: Request, output: Mapping[str, Any]) -> Reply:
    """A Reply from one of SGLang's outputs. Raises KeyError or TypeError for another form, EngineError for a stop
    at a token that the request does not name."""
    meta = output["meta_info"]
    tokens, reason = [int(token) for token in output["output_ids"]], meta["finish_reason"]["type"]
    if reason == "stop" and (not tokens or tokens[-1] not in request.stop_ids):
        raise EngineError(
            f"SGLang ended a text with token {tokens[-1] if tokens else None}, which is not among the stop tokens "
            f"{list(request.stop_ids)} of --piref_model; make eos_token_id "
            "the same in its config.json and generation_config.json, here and on servers"
        )
    if reason not in ("stop", "length"):
        reason = "abort"
    return Reply(tokens, reason, int(meta["prompt_tokens"]), int(meta.get("cached_tokens") or 0))


def longest_request(max_req_input_len: int) -> int:
    """Most tokens of prompt and continuation that SGLang's scheduler takes without cutting the continuation short.

    Its limit on both together is one less than the smaller of context length and KV pool, and one token less again for
    the continuation; what it tells is that limit less 5 (scheduler.py and tp_worker.py).
    """
    return max_req_input_len + 5 - 1


# ---------------------------------------------------------------------------------------------------------------------
# Settings of the engine in this process


def engine_settings(config: EngineConfig) -> dict[str, Any]:
    """Keyword arguments of `sgl.Engine`: ours, then those of --sglang_args, which may change any. Raises UserError."""
    on_gpu = config.device.startswith("cuda")
    settings: dict[str, Any] = {
        "model_path": config.model_path,
        "skip_tokenizer_init": True,
        "device": "cuda" if on_gpu else "cpu",
        "base_gpu_id": int(config.device.partition(":")[2] or 0),
        "dtype": "bfloat16" if on_gpu else "float32",
        "mem_fraction_static": config.gpu_share,
        "random_seed": config.seed % (1 << 31),
        "log_level": "error",
        "enable_deterministic_inference": config.deterministic,
    }
    if not on_gpu:
        settings |= CPU_SETTINGS
        if config.deterministic:
            raise UserError("--deterministic needs a GPU: SGLang's deterministic inference has no attention for a CPU")
    given = parse_sglang_args(config.sglang_args)
    if config.deterministic != given.get("enable_deterministic_inference", config.deterministic):
        raise UserError(
            "--sglang_args enable_deterministic_inference: give --deterministic, which also passes the seeds"
        )
    return settings | given


def parse_sglang_args(items: Sequence[str]) -> dict[str, Any]:
    """`KEY=VALUE` strings as keyword arguments, each read as sglang's own command line would. Raises UserError."""
    if not items:
        return {}
    parser = argparse.ArgumentParser(add_help=False)
    with process_unchanged():
        import_sglang()
        importlib.import_module("sglang.srt.server_args").ServerArgs.add_cli_args(parser)
    actions = {action.dest: action for action in parser._actions}
    return dict(_parse_setting(item, actions) for item in items)


def _parse_setting(item: str, actions: Mapping[str, Any]) -> tuple[str, Any]:
    key, equals, text = item.partition("=")
    key = key.removeprefix("--").replace("-", "_")
    if not equals:
        raise UserError(f"--sglang_args {item!r} has no '='; give KEY=VALUE, tp_size=2 say")
    if key not in actions:
        nearest = difflib.get_close_matches(key, actions, n=1, cutoff=0)
        raise UserError(f"--sglang_args {key!r} is no setting of SGLang's server; the nearest is {nearest[0]!r}")
    action = actions[key]
    try:
        if action.nargs == 0 or action.type is bool:  # a switch
            return key, {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        convert = action.type or str
        if action.nargs in ("*", "+") or isinstance(action.nargs, int):
            value: Any = [convert(part) for part in text.split(",")]
        else:
            value = convert(text)
    except Exception as error:  # a type function may raise anything; argparse expects ValueError and its own
        kind = "true or false" if action.nargs == 0 else getattr(action.type, "__name__", "another value")
        raise UserError(f"--sglang_args {key}={text!r} cannot be read; {kind} is expected") from error
    if action.choices is not None and value not in action.choices:
        raise UserError(f"--sglang_args {key}={text!r} is not one of {', '.join(map(str, action.choices))}")
    return key, value


def import_sglang() -> Any:
    """The package. Raises UserError where it cannot be imported."""
    try:
        return importlib.import_module("sglang")
    except ImportError as error:
        raise UserError(
            f"--engine sglang: sglang cannot be imported ({error}); install requirements.txt on a GPU node, or give "
            "--engine transformers"
        ) from error


@contextlib.contextmanager
def process_unchanged() -> Iterator[None]:
    """Importing and starting sglang replaces the root logger's handlers and level and the policy of event loops, and its
    processes are talkative at their start: all is put back, and only their errors are shown."""
    root, policy = logging.getLogger(), asyncio.get_event_loop_policy()
    handlers, level = root.handlers[:], root.level
    quiet = {"PYTHONWARNINGS": "ignore", "TQDM_DISABLE": "1"}
    before = {name: os.environ.get(name) for name in quiet}
    os.environ.update(quiet)
    logging.getLogger("sglang").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        asyncio.set_event_loop_policy(policy)
        root.handlers[:], root.level = handlers, level
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
