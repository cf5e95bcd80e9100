"""Which flags a script has, whatever way it builds its parser: for tables that must name them all."""

import argparse
from collections.abc import Callable


class Seen(Exception):
    """The parser was built and is about to read the command line."""


def flags_of(parse: Callable[[list[str]], object], monkeypatch) -> set[str]:
    """Names of all arguments (`dest`) of the parser that `parse` builds."""
    found = set()

    def note(parser, *_, **__):
        found.update(action.dest for action in parser._actions if action.dest != "help")
        raise Seen

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", note)
        try:
            parse([])
        except Seen:
            return found
    raise AssertionError("no parser was built")


def words(flags: dict[str, object]) -> list[str]:
    """A command line; values of several words are several arguments."""
    return [word for name, value in flags.items() for word in (f"--{name}", *str(value).split())]
