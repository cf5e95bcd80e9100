"""What is said to SGLang and how its answers are read, the same for the engine in this process and for servers. No I/O."""

import argparse
import contextlib
import difflib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from common_lib.cli import UserError
from engine_lib.base import EngineConfig, EngineError, Reply, Request
from engine_lib.placement import LOAD_BOUND
from engine_lib.seeded import check_seeded, seeded_params

logger = logging.getLogger(__name__)

# What a CPU needs; a GPU takes sglang's own choices. `disable_overlap_schedule`: twice as fast there.
CPU_SETTINGS = {"attention_backend": "torch_native", "sampling_backend": "pytorch", "disable_overlap_schedule": True}
GRAPH_SETTINGS = ("cuda_graph_max_bs_decode", "cuda_graph_max_bs")  # of 0.5.23, of earlier ones
# SGLang itself reserves 2 MB for each request of its largest graph, so these cost 2 GB beside --piref_gpu_util, 0.6 GB of
# it for logits; and a step of more requests is bound by its KV cache, not by Python.
MOST_GRAPHED = 1024
RETRY_STATUS = (408, 429, 500, 502, 504)


def sampling_params(request: Request, deterministic: bool, seeded: bool = False) -> dict[str, Any]:
    """SGLang's sampling parameters for a request. `seeded`: it goes with `engine_lib.seeded.logit_processor`.

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
    return params | seeded_params(request) if seeded else params


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
    the continuation; what it tells is that limit less 5 (scheduler.py and tp_worker.py of 0.5.23).
    """
    return max_req_input_len + 5 - 1


class ServerLost(Exception):
    """The server cannot be reached; another one may be."""


class TryFailed(Exception):
    """The server failed on a request; it may be tried again."""


@dataclass(frozen=True)
class ServerInfo:
    """What a server says of itself. `longest`: most tokens of prompt and continuation."""

    model_path: str
    architectures: tuple[str, ...]
    longest: int
    kv_pool_tokens: int | None
    deterministic: bool
    sglang: str | None
    dtype: str | None  # that it was started with; "auto": its model's
    ranks: int  # data-parallel ones
    custom_logit_processor: bool
    speculative: str | None


def check_status(response: httpx.Response) -> None:
    """Raises ServerLost, TryFailed, or EngineError for what no second try can mend, where it is not 200."""
    status = response.status_code
    if status == 503:  # starting, ending, or a router without servers
        raise ServerLost(f"503: {message_of(response)}")
    if status in RETRY_STATUS:
        raise TryFailed(f"{status}: {message_of(response)}")
    if status != 200:
        raise EngineError(f"{response.url} refused a request ({status}): {message_of(response)}")


def read_reply(request: Request, response: httpx.Response) -> Reply:
    """The reply of one `/generate`. Raises as `check_status` does."""
    check_status(response)
    try:
        return to_reply(request, response.json())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TryFailed(f"its reply is not SGLang's ({type(error).__name__}: {error})") from error


def read_info(model: Mapping[str, Any], server: Mapping[str, Any]) -> ServerInfo:
    """From the bodies of /model_info and /server_info. Raises KeyError, TypeError or ValueError for other bodies."""
    return ServerInfo(
        model_path=str(model["model_path"]),
        architectures=tuple(model.get("architectures") or ()),
        longest=longest_request(int(server["max_req_input_len"])),
        kv_pool_tokens=server.get("max_total_num_tokens"),
        deterministic=bool(server.get("enable_deterministic_inference")),
        sglang=server.get("version"),
        dtype=server.get("dtype"),
        ranks=data_parallel_ranks(server),
        custom_logit_processor=bool(server.get("enable_custom_logit_processor")),
        speculative=server.get("speculative_algorithm"),
    )


def message_of(response: httpx.Response) -> str:
    """The error's text, in whichever form a server or a router gives it."""
    with contextlib.suppress(ValueError, AttributeError):
        body = response.json()
        error = body.get("error", body.get("detail", body))
        return str(error.get("message", error) if isinstance(error, dict) else error)[:500]
    return " ".join(response.text.split())[:500] or "no message"


def same_model(served: str, path: Path) -> bool:
    """Whether the path or hub name that a server was started with is this folder, as far as names can tell."""
    if served == str(path) or (Path(served).exists() and Path(served).resolve() == path.resolve()):
        return True
    return f"models--{served.replace('/', '--')}" in path.resolve().parts  # the hub's cache


def base_settings(model_path: str, device: str, dtype: str) -> dict[str, Any]:
    """Keyword arguments of `sgl.Engine` for any model, on cpu or cuda:N, in "bf16" or "fp32"."""
    on_gpu = device.startswith("cuda")
    return {
        "model_path": model_path,
        "skip_tokenizer_init": True,
        "device": "cuda" if on_gpu else "cpu",
        "base_gpu_id": int(device.partition(":")[2] or 0),
        "dtype": {"bf16": "bfloat16", "fp32": "float32"}[dtype],
        "log_level": "error",
    } | ({} if on_gpu else CPU_SETTINGS)


def engine_settings(config: EngineConfig, command_line: Callable[[], argparse.ArgumentParser]) -> dict[str, Any]:
    """Keyword arguments of `sgl.Engine` for a generator: ours, then those of --sglang_args, which may change any.
    `command_line` makes the parser of sglang's own flags. Raises UserError."""
    on_gpu = config.device.startswith("cuda")
    settings = base_settings(config.model_path, config.device, "bf16" if on_gpu else "fp32") | {
        "mem_fraction_static": config.gpu_share,
        "random_seed": config.seed % (1 << 31),
        "enable_deterministic_inference": config.deterministic,
        "enable_custom_logit_processor": config.seeded,
    }
    if config.deterministic and not on_gpu:
        raise UserError("--deterministic needs a GPU: SGLang's deterministic inference has no attention for a CPU")
    graphs = on_gpu and config.requests_at_once > 0
    parser = command_line() if config.sglang_args or graphs else argparse.ArgumentParser()
    given = parse_sglang_args(config.sglang_args, parser)
    if graphs:
        settings |= decode_graphs(config.requests_at_once, data_parallel_ranks(given), parser)
    if config.deterministic != given.get("enable_deterministic_inference", config.deterministic):
        raise UserError(
            "--sglang_args enable_deterministic_inference: give --deterministic, which also passes the seeds"
        )
    settings |= given
    if config.seeded:
        processors, speculative = settings["enable_custom_logit_processor"], settings.get("speculative_algorithm")
        check_seeded(processors, speculative, "--sglang_args start SGLang", "leave enable_custom_logit_processor out")
    return settings


def decode_graphs(requests: int, ranks: int, parser: argparse.ArgumentParser) -> dict[str, int]:
    """Up to which number of requests a GPU decodes with a captured CUDA graph, for so many at once over all ranks. SGLang
    decides by the card alone (256 on an H100, 32 on an A100 of 40 GB); batches of more run without, at the pace of Python.
    """
    share = math.ceil(LOAD_BOUND * requests / ranks) if ranks > 1 else requests
    known = {action.dest for action in parser._actions}
    for name in GRAPH_SETTINGS:
        if name in known:
            return {name: min(share, MOST_GRAPHED)}
    logger.warning("engine: this sglang has no %s; it decides by itself which batches it captures", GRAPH_SETTINGS[0])
    return {}


def data_parallel_ranks(settings: Mapping[str, Any]) -> int:
    """Of an engine or server with these settings; attention alone may be data-parallel (0.5.23 counts it apart)."""
    return int(settings.get("dp_size") or 1) * int(settings.get("attn_dp_size") or 1)


def parse_sglang_args(
    items: Sequence[str], parser: argparse.ArgumentParser, flag: str = "--sglang_args"
) -> dict[str, Any]:
    """`KEY=VALUE` strings of `flag` as keyword arguments, each read as the parser would. Raises UserError."""
    actions, settings = {action.dest: action for action in parser._actions}, {}
    for item in items:
        key, equals, text = item.partition("=")
        key = key.removeprefix("--").replace("-", "_")
        if not equals:
            raise UserError(f"{flag} {item!r} has no '='; give KEY=VALUE, tp_size=2 say")
        if key not in actions:
            nearest = difflib.get_close_matches(key, actions, n=1, cutoff=0)
            raise UserError(f"{flag} {key!r} is no setting of SGLang's server; the nearest is {nearest[0]!r}")
        try:
            settings[key] = _read_value(parser, actions[key], text)
        except Exception as error:  # a type function may raise anything; argparse expects ValueError and its own
            raise UserError(f"{flag} {key}={text!r} cannot be read: {error}") from error
    return settings


def _read_value(parser: argparse.ArgumentParser, action: argparse.Action, text: str) -> Any:
    if action.nargs == 0 or action.type is bool:
        switch = {"true": True, "1": True, "false": False, "0": False}
        if text.lower() not in switch:
            raise ValueError("true or false is expected")
        return switch[text.lower()]
    several = action.nargs in ("*", "+") or isinstance(action.nargs, int)
    return parser._get_values(action, text.split(",") if several else [text])
