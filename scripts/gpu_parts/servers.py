"""A server of SGLang for a while, ended with all its processes, also where its parent is killed."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WITH_PARENT = f"""import os, sys; sys.path.insert(0, {str(ROOT)!r})
from training_lib.launch import end_with_parent; end_with_parent("gpu_check.py is gone"); os.execv(sys.argv[1], sys.argv[1:])"""


@contextlib.contextmanager
def server(program: Sequence[str], patience_s: float = 180.0) -> Iterator[str]:
    """`python PROGRAM --port P` on a free port, up; its URL. program: its other flags too."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, *program, "--port", str(port), "--host", "127.0.0.1"]
    quiet = os.environ | {"PYTHONWARNINGS": "ignore", "TQDM_DISABLE": "1"}
    # A group of its own, so that all of it can be ended here; and where this part is killed, which takes its own group
    # only, the server ends with its parent, and SGLang's other processes with the server.
    process = subprocess.Popen([sys.executable, "-c", WITH_PARENT, *command], env=quiet, cwd=ROOT, process_group=0)
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + patience_s
    try:
        while not answers(f"{url}/health"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the SGLang server did not start; its messages are above")
            time.sleep(1)
        yield url
    finally:
        end_group(process)


def end_group(process: subprocess.Popen, patience_s: float = 10.0) -> None:
    """End a process that leads its group, and whatever is in the group: it may be gone, and its children not."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=patience_s)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return reply.status == 200
    except (urllib.error.URLError, OSError):
        return False
