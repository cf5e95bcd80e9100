"""The flags of inference_eval.py: the released ones with their defaults, and this project's own."""

import argparse
from collections.abc import Sequence

from cli_utils import ArgumentParser, UserError
from data_utils import PROMPT_FORMATS
from search_utils import SELECTIONS, parse_search_type

ENGINES = ("auto", "sglang", "sglang-server", "transformers")
ATTENTIONS = ("auto", "flash_attention_2", "sdpa", "eager")
TRACKERS = ("neptune", "trackio", "none")


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
    flag("--seed", type=int, default=1337, help="decides every sampled token, as far as the engine is deterministic")

    flag = parser.add_argument_group("search").add_argument
    flag("--search_type", default="beam2",
         help="beamB: num_blocks/B beams of B candidates; bfs: one beam; bon: independent samples")
    flag("--num_blocks", type=int, default=8, help="candidates a round: the budget N of one search")
    flag("--block_size", type=int, default=4096, help="tokens of a block at most")
    flag("--max_length", type=int, default=16384, help="response tokens of a trace at most")
    flag("--selection", choices=SELECTIONS, default="value",
         help="random: a seeded draw instead of the best values (the paper's ablation)")
    flag("--temperature", type=float, default=0.6, help="0 is greedy")
    flag("--top_p", type=float, default=0.95, help="mass of the nucleus that is sampled from")
    flag("--prompt_format", choices=PROMPT_FORMATS, default="r1",
         help="r1: the released models' own; chat: the generator's chat template with the instruction; bare: that "
              "template with the problem alone")
    flag("--batch_size", type=int, default=32, help="searches at once, over all problems and repetitions")

    flag = parser.add_argument_group("generator").add_argument
    flag("--piref_model", default="deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", help="folder or hub name")
    flag("--engine", choices=ENGINES, default="auto", help="auto: sglang where installed, else transformers")
    flag("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    flag("--attention_impl", choices=ATTENTIONS, default="flash_attention_2",
         help="of the value model and the transformers engine; auto takes the fastest installed")
    flag("--piref_gpu_util", type=float, default=0.5,
         help="SGLang's mem_fraction_static: share of the GPU's memory for the generator")
    flag("--use_sglang_server", dest="engine", action="store_const", const="sglang-server",
         help="the same as --engine sglang-server; of these two flags the last one counts")
    flag("--sglang_port", type=int, default=30000, help="of the server on this machine, where no --sglang_url is given")
    flag("--sglang_url", action="append", default=[], metavar="URL", help="a server or router; repeat for several")
    flag("--sglang_args", nargs="+", default=[], metavar="KEY=VALUE",
         help="passed to the SGLang engine: tp_size=2 dp_size=4 context_length=32768 ...")
    flag("--deterministic", action="store_true", help="SGLang's deterministic inference; without it SGLang ignores seeds")
    flag("--request_timeout", type=float, default=3600.0, help="seconds for one block of one request")

    flag = parser.add_argument_group("value model").add_argument
    flag("--classifier_ckpt_path", default="VGS-AI/DeepSeek-VM-1.5B", help="folder or hub name")
    flag("--value_device", default="auto", help="auto: the same as --device")
    flag("--value_dtype", choices=("auto", "bf16", "fp32"), default="auto", help="auto: bf16 on a GPU, fp32 on a CPU")
    flag("--value_cache_gb", default="auto",
         help="bound on its caches, in GB; auto: 60%% of the GPU memory left, 25%% of the free RAM")

    flag = parser.add_argument_group("tracking").add_argument
    flag("--neptune_project", nargs="?", const="",
         help="log to this neptune project; without a value NEPTUNE_PROJECT names it (default: no tracking)")
    flag("--tracker", choices=TRACKERS, help="(default: neptune if --neptune_project is given, else none)")
    return parser
# fmt: on


def parse_args(argv: Sequence[str] | None = None, description: str | None = None) -> argparse.Namespace:
    """Arguments, checked as far as they can be without reading a file. Raises UserError."""
    args = build_parser(description).parse_args(argv)
    rules = (
        ("seed", args.seed >= 0, "must be 0 or more"),
        ("num_repetitions", args.num_repetitions >= 1, "must be at least 1"),
        ("batch_size", args.batch_size >= 1, "must be at least 1"),
        ("max_problems", args.max_problems is None or args.max_problems >= 1, "must be at least 1"),
        ("temperature", 0 <= args.temperature <= 100, "must be from 0 (greedy) to 100"),
        ("top_p", 0 < args.top_p <= 1, "must be above 0 and at most 1"),
        ("piref_gpu_util", 0 < args.piref_gpu_util < 1, "is a share of the GPU's memory: above 0 and below 1"),
        ("sglang_port", 1 <= args.sglang_port <= 65535, "must be from 1 to 65535"),
        ("request_timeout", args.request_timeout > 0, "must be above 0"),
    )
    for name, holds, rule in rules:
        if not holds:
            raise UserError(f"--{name} {getattr(args, name)} {rule}")
    parse_search_type(args.search_type, args.num_blocks, args.block_size, args.max_length)
    if args.value_cache_gb != "auto":
        try:
            args.value_cache_gb = float(args.value_cache_gb)
        except ValueError:
            raise UserError(f"--value_cache_gb {args.value_cache_gb!r} must be auto or a number of GB") from None
        if not 0 < args.value_cache_gb < float("inf"):
            raise UserError(f"--value_cache_gb {args.value_cache_gb} must be above 0")
    if args.sglang_url and args.engine not in ("auto", "sglang-server"):
        raise UserError(f"--sglang_url needs --engine sglang-server, not {args.engine}")
    if args.sglang_url:
        args.engine = "sglang-server"
    if args.engine == "sglang-server" and not args.sglang_url:
        args.sglang_url = [f"http://localhost:{args.sglang_port}"]
    args.tracker = args.tracker or ("none" if args.neptune_project is None else "neptune")
    return args
