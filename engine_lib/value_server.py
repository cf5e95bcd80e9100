"""An SGLang server that serves a value model:

    python -m engine_lib.value_server --classifier_ckpt_path VGS-AI/DeepSeek-VM-1.5B --port 30010 --host 0.0.0.0

Any other flag goes to SGLang's own server, as `python -m sglang.launch_server --help` lists them, and wins over what is set
here; those that would make values wrong are refused. Searches use it with --value_engine sglang-server --value_url.
"""

import argparse
import logging
import os
from collections.abc import Sequence

from common_lib.cli import ArgumentParser, UserError, run_script
from common_lib.models import check_value_model, inspect_model, resolve_model
from engine_lib.sglang_wire import base_settings
from engine_lib.value_settings import PACKAGE, ROOT, VALUE_SETTINGS, check_served_backbone, check_settings


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m engine_lib.value_server", description=__doc__)
    parser.add_argument("--classifier_ckpt_path", required=True, help="the value model: a folder or a name on the hub")
    parser.add_argument("--port", type=int, required=True, help="of the server")
    return parser


def server_flags(folder: str, port: int, on_gpu: bool, given: Sequence[str]) -> list[str]:
    """The command line of SGLang's server: ours, then what is given, of which SGLang takes the last."""
    settings = base_settings(folder, "cuda" if on_gpu else "cpu", "bf16" if on_gpu else "fp32") | VALUE_SETTINGS
    del settings["log_level"]  # a server says what it does
    flags = ["--port", str(port)]
    for name, value in settings.items():
        flags += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return [*flags, *given]


def check_given(given: Sequence[str], parser: argparse.ArgumentParser | None = None) -> None:
    """Raises UserError for a flag of SGLang's that may not be given. With SGLang's `parser`, by each of its names."""
    names = parser._option_string_actions if parser else {}
    for word in given:
        flag = word.partition("=")[0]
        if flag.startswith("--"):
            name = names[flag].dest if flag in names else flag[2:].replace("-", "_")
            check_settings([name], in_process=False)


def device_of(given: Sequence[str]) -> str:
    """SGLang's --device, cuda where there is a GPU by itself."""
    from common_lib.devices import resolve_device

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--device", default="auto")
    return resolve_device(parser.parse_known_args(given)[0].device, "--device")


def main(argv: Sequence[str] | None = None) -> None:
    args, given = make_parser().parse_known_args(argv)
    if not 0 < args.port < 1 << 16:
        raise UserError(f"--port {args.port} is no port: 1 to 65535 are")
    check_given(given)
    folder = resolve_model(args.classifier_ckpt_path, "--classifier_ckpt_path")
    check_value_model(inspect_model(folder, "--classifier_ckpt_path"))
    check_served_backbone(folder)
    flags = server_flags(str(folder), args.port, device_of(given).startswith("cuda"), given)
    # For this process, and for those that SGLang starts.
    os.environ["SGLANG_EXTERNAL_MODEL_PACKAGE"] = PACKAGE
    os.environ["PYTHONPATH"] = os.pathsep.join([ROOT, *filter(None, [os.environ.get("PYTHONPATH")])])
    serve(flags, given)


def serve(flags: list[str], given: Sequence[str]) -> None:
    """SGLang's server, until it is stopped. Raises UserError for flags that it does not know, and where the model package
    does not load."""
    from engine_lib.sglang_import import command_line, import_model_package

    parser = command_line()
    check_given(given, parser)
    parser.parse_args(flags)  # its mistakes in one line
    import_model_package(PACKAGE)
    logging.getLogger("sglang").setLevel(logging.NOTSET)  # quieted for searches; a server says what it does
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    try:
        run_server(prepare_server_args(flags))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    run_script(main)
