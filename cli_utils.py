"""What every script shares: how a user's mistake is told."""

import sys
from collections.abc import Callable, Sequence


class UserError(Exception):
    """A mistake the user can mend. The message is one line: what was given, the rule, what to do."""


def run_script(main: Callable[[Sequence[str] | None], int | None]) -> None:
    """Run `main(argv)` and exit: status 0, what it returns, or 2 with one line on stderr for a `UserError`."""
    try:
        status = main(None)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        status = 2
    sys.exit(status or 0)
