"""What every script shares: how a user's mistake is told, and what the model hub says in one line."""

import argparse
import contextlib
import difflib
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NoReturn

NOISY = ("httpx", "httpcore", "urllib3", "filelock", "datasets", "transformers", "neptune", "fsspec", "asyncio")


class UserError(Exception):
    """A mistake the user can mend. The message is one line: what was given, the rule, what to do."""


Rule = tuple[str, bool, str]  # flag, does its value hold, the rule in words


def check_rules(args: argparse.Namespace, rules: Iterable[Rule]) -> None:
    """Raises UserError for the first flag whose value breaks its rule."""
    for name, holds, rule in rules:
        if not holds:
            raise UserError(f"--{name} {getattr(args, name)} {rule}")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The description as it is written; each flag's default after its help, where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, [], False) or "(default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """Mistakes are a `UserError`, so they are told in one line; an unknown flag names the nearest known one."""

    def __init__(self, **settings):
        super().__init__(formatter_class=_HelpFormatter, allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        prefix = "unrecognized arguments: "
        if message.startswith(prefix):
            flag = message.removeprefix(prefix).split()[0]
            near = difflib.get_close_matches(flag, [o for a in self._actions for o in a.option_strings], 1)
            message = f"unknown argument {flag}" + (f"; did you mean {near[0]}?" if near else "; see --help")
        raise UserError(message)


def run_script(main: Callable[[Sequence[str] | None], int | None]) -> None:
    """Run `main(argv)` and exit: status 0, what it returns, or 2 with one line on stderr for a `UserError`."""
    try:
        status = main(None)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    sys.exit(status or 0)


def set_up_logging() -> None:
    """Log lines of this project's modules to stderr; the libraries' only from warnings on, and no progress bars."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.WARNING)


def quiet_transformers() -> None:
    """No progress bars of model loading, and no warnings about what this project does on purpose."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def enable_fast_transfers() -> None:
    """Honour HF_HUB_ENABLE_HF_TRANSFER=1 as what replaced it. Call before huggingface_hub is imported."""
    if os.environ.pop("HF_HUB_ENABLE_HF_TRANSFER", "0").upper() in ("1", "TRUE", "ON", "YES"):
        os.environ.setdefault("HF_XET_HIGH_PERFORMANCE", "1")


@contextlib.contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Turn what the hub's libraries raise (offline, unknown, gated) into one line about `what`."""
    from huggingface_hub import errors as hub

    try:
        yield
    except hub.GatedRepoError as error:
        raise UserError(f"{what} is gated: accept its terms on the hub and log in with `hf auth login`") from error
    except (hub.RepositoryNotFoundError, hub.HFValidationError) as error:
        raise UserError(f"{what} is neither a local path nor known to the hub; check the name") from error
    except (hub.LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{what} is neither a local path nor in the local cache, and the hub cannot be reached; "
            "download it where there is a network, and give its folder"
        ) from error
