"""The two ends of a rank under torchrun: before its slow imports, and instead of the interpreter's teardown. Imports
nothing slow itself."""

import logging
import os
import signal
import sys

from common_lib.cli import UserError


class RankError(UserError):
    """What this rank alone may be able to tell: another does not answer, or others cannot reach it."""


def follow_parent() -> None:
    """A rank ends with torchrun: a killed torchrun would leave ranks that train on unseen. It starts its ranks in
    sessions of their own, so that no signal to its process group reaches them."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent("torchrun is gone")


def end_with_parent(gone: str) -> None:
    """Have Linux kill this process when its parent dies; `gone` is said where that has happened already."""
    if sys.platform == "linux":
        import ctypes

        set_parent_death_signal = 1
        ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, signal.SIGKILL)
        if os.getppid() == 1:  # it died before
            sys.exit(gone)


def leave_ranks(status: int) -> None:
    """As one rank of several, end the process here: in the teardown gloo's threads now and then abort it ("terminate
    called without an active exception"). Everything has been written and closed by now.
    """
    if "torch" not in sys.modules:  # it never met the others: a mistake in the flags
        return
    from torch import distributed

    if distributed.is_initialized() and distributed.get_world_size() > 1:
        if status == 0:
            distributed.barrier()  # the first to go would take away the store that the others still use
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
