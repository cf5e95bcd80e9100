"""What a script under torchrun does before its slow imports; imports nothing slow itself."""

import os
import signal
import sys


def follow_parent() -> None:
    """Have Linux kill this rank when torchrun dies, or a killed torchrun would leave ranks that train on unseen.

    torchrun starts its ranks in sessions of their own, so that no signal to its process group reaches them.
    """
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        import ctypes

        set_parent_death_signal = 1
        ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, signal.SIGKILL)
        if os.getppid() == 1:  # it died before
            sys.exit("torchrun is gone")
