"""How SGLang is imported without changing this process. Another version than TESTED_VERSION is warned of."""

import asyncio
import contextlib
import functools
import importlib
import logging
import os
import pkgutil
import warnings
from collections.abc import Iterator
from typing import Any

from common_lib.cli import ArgumentParser, UserError
from engine_lib.base import first_line

logger = logging.getLogger(__name__)

TESTED_VERSION = "0.5.23"


def import_sglang() -> Any:
    """The package. Raises UserError where it cannot be imported."""
    try:
        with process_unchanged():
            return importlib.import_module("sglang")
    except ImportError as error:
        raise UserError(
            f"sglang cannot be imported ({error}); install requirements.txt on a GPU node, or give --engine transformers (for "
            "a value model --value_engine local)"
        ) from error


def import_model_package(package: str) -> None:
    """Import the modules of a package of models. SGLang only logs what fails there, in processes that show no warnings, and
    then says that it ran out of memory. Raises UserError with the reason."""
    sglang = import_sglang()
    try:
        with process_unchanged():
            for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
                importlib.import_module(f"{package}.{module.name}")
    except Exception as error:
        raise UserError(
            f"SGLang cannot have the value model: its package {package} does not load ({type(error).__name__}: "
            f"{first_line(error)}); it was written for sglang {TESTED_VERSION}, and {sglang.__version__} is installed: install "
            "requirements.txt, or give --value_engine local"
        ) from error


@functools.cache  # said once
def warn_of_version(installed: str) -> None:
    if installed != TESTED_VERSION:
        logger.warning(
            "engine: sglang %s is installed and this was tested with %s, on whose insides it depends; where it does not "
            "start or end in order, install that one", installed, TESTED_VERSION,
        )  # fmt: skip


def command_line() -> ArgumentParser:
    """The flags of sglang's own server. Raises UserError where sglang cannot be imported."""
    import_sglang()
    parser = ArgumentParser(add_help=False)
    with process_unchanged():
        importlib.import_module("sglang.srt.server_args").ServerArgs.add_cli_args(parser)
    return parser


@contextlib.contextmanager
def process_unchanged() -> Iterator[None]:
    """Importing and starting sglang replaces the root logger's handlers and level and the policy of event loops, and its
    processes are talkative at their start: all is put back, and only their errors are shown."""
    root, policy = logging.getLogger(), asyncio.get_event_loop_policy()
    handlers, level = root.handlers[:], root.level
    quiet = {"PYTHONWARNINGS": "ignore", "TQDM_DISABLE": "1"}
    before = {name: os.environ[name] for name in quiet if name in os.environ}
    os.environ.update(quiet)
    logging.getLogger("sglang").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        asyncio.set_event_loop_policy(policy)
        root.handlers[:], root.level = handlers, level
        for name in quiet:
            os.environ.pop(name, None)
        os.environ.update(before)
