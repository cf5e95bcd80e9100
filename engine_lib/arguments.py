"""The flags of generators and of sampling with their rules, the same for search and collection."""

import argparse
import urllib.parse
from collections.abc import Callable

from common_lib.cli import Rule, UserError
from common_lib.devices import check_device_name
from common_lib.models import ModelInfo
from data_utils import PROMPT_FORMATS
from engine_lib.base import EngineConfig
from engine_lib.choose import ENGINES

ATTENTIONS = ("auto", "flash_attention_2", "flash_attention_3", "flash_attention_4", "sdpa", "eager")
# Flags that came later, and what runs did before: files of older runs lack them.
LATER_ARGUMENTS = {"seeded": False}
# Where and how fast a generator runs, not what comes out: these may change when a stopped run goes on.
FREE_ARGUMENTS = {
    "engine", "device", "attention_impl", "piref_gpu_util", "sglang_port", "sglang_url", "sglang_args", "request_timeout",
}  # fmt: skip


class Given(float):
    """A number that the user gave, to be told from the same one as a default."""


def given(text: str) -> Given:
    return Given(text)


given.__name__ = "float"  # what argparse says was expected


# fmt: off
def add_sampling_flags(flag: Callable) -> None:
    """flag: the `add_argument` of a parser or of a group."""
    flag("--temperature", type=float, default=0.6, help="0 is greedy")
    flag("--top_p", type=float, default=0.95, help="mass of the nucleus that is sampled from")
    flag("--prompt_format", choices=PROMPT_FORMATS, default="r1",
         help="r1: the released models' own; chat: the generator's chat template with the instruction; bare: that "
              "template with the problem alone")


def add_engine_flags(flag: Callable, attention: str, gpu_share: float) -> None:
    """attention, gpu_share: defaults, which the scripts have of their own."""
    flag("--engine", choices=("auto", *ENGINES), default="auto", help="auto: sglang where installed, else transformers")
    flag("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    flag("--attention_impl", choices=ATTENTIONS, default=attention,
         help="of models that run in this process (value model, transformers engine); auto takes the fastest installed; "
              "in bf16 it may change results")
    flag("--piref_gpu_util", type=given, default=gpu_share,
         help="SGLang's mem_fraction_static: share of the GPU's memory for the generator; of the engine in this process "
              "only, servers take --mem-fraction-static")
    flag("--use_sglang_server", dest="engine", action="store_const", const="sglang-server",
         help="the same as --engine sglang-server; of these two flags the last one counts")
    flag("--sglang_port", type=int, default=30000, help="of the server on this machine, where no --sglang_url is given")
    flag("--sglang_url", action="append", default=[], metavar="URL", help="a server or router; repeat for several")
    flag("--sglang_args", nargs="+", default=[], metavar="KEY=VALUE",
         help="passed to the SGLang engine: tp_size=2 dp_size=4 context_length=32768 ...")
    flag("--deterministic", action="store_true",
         help="SGLang's deterministic inference; without it or --seeded SGLang ignores seeds. Costs 1.5 to 3 times the speed "
              "(estimated: its sampler sorts the logits of the whole vocabulary at each token)")
    flag("--seeded", action="store_true",
         help="SGLang draws each token by the request's own seed and position: the same tokens at any --batch_size and on any "
              "number of servers (started with --enable-custom-logit-processor, and no router before them), as far as the "
              "logits are the same. In fp32 they are, but for rounding; in bf16 they change with the batch, so that long "
              "texts part, and only --deterministic repeats them. Drawing keeps the GPU waiting for a moment each step")
    flag("--request_timeout", type=float, default=3600.0, help="seconds for one text of one request")
# fmt: on


def engine_rules(args: argparse.Namespace) -> list[Rule]:
    return [
        ("temperature", 0 <= args.temperature <= 100, "must be from 0 (greedy) to 100"),
        ("top_p", 0 < args.top_p <= 1, "must be above 0 and at most 1"),
        ("seed", args.seed >= 0, "must be 0 or more"),
        ("piref_gpu_util", 0 < args.piref_gpu_util < 1, "is a share of the GPU's memory: above 0 and below 1"),
        ("sglang_port", 1 <= args.sglang_port <= 65535, "must be from 1 to 65535"),
        ("request_timeout", args.request_timeout > 0, "must be above 0"),
    ]


def resolve_engine(args: argparse.Namespace) -> None:
    """Which engine the flags mean together, written to `engine` and `sglang_url`. Raises UserError."""
    check_device_name(args.device, "--device")
    for url in args.sglang_url:
        check_url(url)
    if args.sglang_url:
        if args.engine not in ("auto", "sglang-server"):
            raise UserError(f"--sglang_url needs --engine sglang-server, not {args.engine}")
        args.engine = "sglang-server"
    if args.sglang_args and args.engine == "transformers":
        raise UserError("--sglang_args need --engine sglang, not transformers")
    if args.seeded and args.deterministic:
        raise UserError(
            "--seeded and --deterministic both make SGLang keep to the seeds, and draw other tokens from them; give one: "
            "--deterministic repeats bf16 on a GPU too, --seeded is faster and works on a CPU"
        )
    if args.engine == "sglang-server":
        if args.sglang_args:
            raise UserError("--sglang_args are for --engine sglang; give them to the servers where those are started")
        args.sglang_url = args.sglang_url or [f"http://localhost:{args.sglang_port}"]


def check_url(url: str, flag: str = "--sglang_url") -> None:
    """Raises UserError for what is not the URL of a server."""
    try:
        parts = urllib.parse.urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise UserError(f"{flag} {url!r} is no URL of a server; give http://HOST:PORT")


def engine_config(
    args: argparse.Namespace, generator: ModelInfo, device: str, groups: int, requests_each: int
) -> EngineConfig:
    """What an engine for this generator is given. device: resolved. groups: searches or problems that there are to do,
    each of `requests_each` requests at once."""
    at_once = min(args.batch_size, groups)
    return EngineConfig(
        model_path=generator.path,
        vocab_size=generator.vocab_size,
        device=device,
        attention=args.attention_impl,
        gpu_share=float(args.piref_gpu_util),
        gpu_share_given=isinstance(args.piref_gpu_util, Given),
        seed=args.seed,
        samples=args.temperature > 0,
        deterministic=args.deterministic,
        seeded=args.seeded and args.temperature > 0,  # at 0 nothing is drawn
        request_timeout_s=args.request_timeout,
        groups_at_once=at_once,
        requests_at_once=at_once * requests_each,
        sglang_args=tuple(args.sglang_args),
        sglang_urls=tuple(url.rstrip("/") for url in args.sglang_url),
    )
