"""The flags of inference_eval.py: the released ones with their defaults, and this project's own."""

import argparse
from collections.abc import Callable, Sequence

from common_lib import tracking
from common_lib.cli import ArgumentParser, UserError, check_rules
from common_lib.devices import check_device_name
from common_lib.shards import Shard
from engine_lib.arguments import add_engine_flags, add_sampling_flags, check_url, engine_rules, resolve_engine
from engine_lib.choose import VALUE_ENGINES
from eval_lib.stopping import STOP_VOTES, STOPS
from search_lib.tree import SELECTIONS, parse_search_type

ALPHA = 0.05  # of --stop certified


def parse_args(argv: Sequence[str] | None = None, description: str | None = None) -> argparse.Namespace:
    """Arguments, checked as far as they can be without reading a file. Raises UserError."""
    args = build_parser(description).parse_args(argv)
    rules = [
        ("num_repetitions", args.num_repetitions >= 1, "must be at least 1"),
        ("batch_size", args.batch_size >= 1, "must be at least 1"),
        ("max_problems", args.max_problems is None or args.max_problems >= 1, "must be at least 1"),
    ]
    check_rules(args, [*rules, *engine_rules(args)])
    parse_search_type(args.search_type, args.num_blocks, args.block_size, args.max_length)
    read_auto(args, "value_cache_gb", float, "a number of GB")
    read_auto(args, "value_batch_tokens", int, "a whole number of tokens")
    if args.shard is not None:
        args.shard = str(Shard.parse(args.shard, "--shard"))
    resolve_engine(args)
    resolve_value_engine(args)
    resolve_stopping(args)
    args.tracker = args.tracker or ("none" if args.neptune_project is None else "neptune")
    return args


def resolve_stopping(args: argparse.Namespace) -> None:
    """Checks the flags of --stop against each other, and gives those that are not given their defaults. Raises UserError."""
    if args.stop_vote is not None and args.stop == "none":
        raise UserError(
            f"--stop_vote {args.stop_vote} needs --stop sure or --stop certified: without it nothing is stopped"
        )
    if args.alpha is not None and args.stop != "certified":
        raise UserError(f"--alpha {args.alpha} needs --stop certified, not {args.stop}")
    args.stop_vote = args.stop_vote or "weighted"
    args.alpha = ALPHA if args.alpha is None else args.alpha
    check_rules(args, [("alpha", 0 < args.alpha < 1, "must be above 0 and below 1: it is a probability of error")])


def resolve_value_engine(args: argparse.Namespace) -> None:
    """Checks the flags of value models against each other. Raises UserError."""
    for name in args.value_device:
        check_device_name(name, "--value_device")
    for url in args.value_url:
        check_url(url, "--value_url")
    kind = args.value_engine
    if args.value_url and kind != "sglang-server":
        raise UserError(f"--value_url needs --value_engine sglang-server, not {kind}")
    if kind == "sglang-server" and not args.value_url:
        raise UserError(
            "--value_engine sglang-server needs --value_url http://HOST:PORT of a server of the value model"
        )
    if args.value_sglang_args and kind == "sglang-server":
        raise UserError(
            "--value_sglang_args are for --value_engine sglang; give them to the servers where those are started"
        )
    if args.value_sglang_args and kind == "local":
        raise UserError("--value_sglang_args need --value_engine sglang, not local")
    if len(args.value_device) > 1 and kind != "local":
        raise UserError(
            f"--value_device {' '.join(args.value_device)}: --value_engine {kind} takes one device; for several give "
            "--value_sglang_args tp_size=2 (one model on two), or a server each and --value_engine sglang-server"
        )


def read_auto(args: argparse.Namespace, name: str, kind: Callable[[str], float], words: str) -> None:
    """A flag that is `auto` or a number above 0. Raises UserError."""
    text = getattr(args, name)
    if text == "auto":
        return
    try:
        value = kind(text)
    except ValueError:
        raise UserError(f"--{name} {text!r} must be auto or {words}") from None
    if not 0 < value < float("inf"):
        raise UserError(f"--{name} {value} must be above 0")
    setattr(args, name, value)


# fmt: off
def build_parser(description: str | None = None) -> argparse.ArgumentParser:
    parser = ArgumentParser(description=description)

    flag = parser.add_argument_group("what is searched").add_argument
    flag("--benchmark", default="aime-24",
         help="aime-24, aime-25, hmmt-feb-24, hmmt-feb-25, or a .jsonl/.json/.parquet file or dataset folder with problem "
              "and answer")
    flag("--max_problems", type=int, help="only the first that many problems (default: all)")
    flag("--output_path", default="inference_outputs.jsonl", help="results; .meta.json and .tree.jsonl lie beside it")
    flag("--num_repetitions", type=int, default=1, help="independent searches of each problem, any number; may grow later")
    flag("--shard", metavar="I/N",
         help="search only the problems with data_idx %% N == I (I from 0), all their repetitions, and write X.shard-I-of-N.jsonl; "
              "report.py X.jsonl reads all of them as one run")
    flag("--seed", type=int, default=1337, help="decides every sampled token, as far as the engine is deterministic")

    flag = parser.add_argument_group("search").add_argument
    flag("--search_type", default="beam2",
         help="beamB: num_blocks/B beams of B candidates; bfs: one beam; bon: independent samples")
    flag("--num_blocks", type=int, default=8, help="candidates a round: the budget N of one search")
    flag("--block_size", type=int, default=4096, help="tokens of a block at most")
    flag("--max_length", type=int, default=16384, help="response tokens of a trace at most")
    flag("--selection", choices=SELECTIONS, default="value",
         help="random: a seeded draw instead of the best values (the paper's ablation)")
    add_sampling_flags(flag)
    flag("--batch_size", type=int, default=32,
         help="searches at once, over all problems and repetitions; with bf16 values it may change results")

    flag = parser.add_argument_group("stopping", "--num_repetitions is then the most a problem may get").add_argument
    flag("--stop", choices=STOPS, default="none",
         help="when a problem is searched no more. none: never; sure: when its vote can have no other winner, whatever the "
              "remaining repetitions answer; certified: then too, or when a test that may be looked at after each repetition "
              "shows, at error --alpha, which answer is heaviest in expectation. Only the repetitions up to then count. May "
              "change when a run goes on: it changes which lines count, no line")
    flag("--alpha", type=float,
         help=f"of --stop certified: probability that a problem is certified for an answer that is not the heaviest (default: "
              f"{ALPHA})")
    flag("--stop_vote", choices=STOP_VOTES, help="the vote that is to be decided (default: weighted)")

    flag = parser.add_argument_group("generator").add_argument
    flag("--piref_model", default="deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", help="folder or hub name")
    add_engine_flags(flag, attention="flash_attention_2", gpu_share=0.5)

    flag = parser.add_argument_group("value model").add_argument
    flag("--classifier_ckpt_path", default="VGS-AI/DeepSeek-VM-1.5B", help="folder or hub name")
    flag("--value_engine", choices=("local", *VALUE_ENGINES), default="local",
         help="local: in threads of this process; sglang: SGLang in this process, beside the generator; sglang-server: servers "
              "started by python -m engine_lib.value_server. A run that was begun with local values goes on with local ones")
    flag("--value_device", nargs="+", default=["auto"], metavar="DEVICE",
         help="one, or of local value models several, each with a model and a cache of its own: cuda:1 cuda:2, say; auto: the "
              "same as --device (default: auto). Which traces share a pass and a cache may move the last bits of a value")
    flag("--value_url", action="append", default=[], metavar="URL",
         help="a server of the value model, or a router; repeat for several")
    flag("--value_sglang_args", nargs="+", default=[], metavar="KEY=VALUE",
         help="passed to the SGLang engine of the value model: mem_fraction_static=0.7 chunked_prefill_size=2048 ...")
    flag("--value_dtype", choices=("auto", "bf16", "fp32"), default="auto",
         help="auto: bf16 on a GPU, fp32 on a CPU; servers must compute in it. In bf16 a value's last bits depend on what it was "
              "batched with, so --batch_size, --value_cache_gb, --value_batch_tokens and --attention_impl may change results; "
              "fp32 values do not depend on it")
    flag("--value_cache_gb", default="auto",
         help="bound on its caches and activations together, in GB a device; auto: the GPU memory that is free once the engine and "
              "the value model are loaded, less 5%% of the card (half of that beside --engine transformers on the same "
              "GPU); 25%% of the free RAM on a CPU. In bf16 it may change results")
    flag("--value_batch_tokens", default="auto",
         help="new tokens in one forward pass of it, at most (one trace goes whatever its length); auto: as many as an "
              "eighth of --value_cache_gb takes, 1024 to 32768. In bf16 it may change results")

    flag = parser.add_argument_group("tracking").add_argument
    flag("--neptune_project", nargs="?", const="",
         help="log to this neptune project; without a value NEPTUNE_PROJECT names it (default: no tracking)")
    flag("--tracker", choices=tracking.TRACKERS, help="(default: neptune if --neptune_project is given, else none; "
         "wandb and trackio take their project from --neptune_project too)")
    return parser
# fmt: on
