"""A process that has imported sglang once and forks others that have it: servers and scripts start in 2 s, not in 25.

One JSON line on stdin for each: {"argv": [...], "cwd": ..., "log": path, "environment": {}}. argv is `server`, then the flags of
sglang.launch_server; or a script, then its flags. The answer is the pid. The child leads a process group, and its exit
status is written to `log` + ".status". sglang's own processes are forked too, instead of spawned.
"""

import contextlib
import json
import logging
import multiprocessing
import os
import runpy
import signal
import sys
import traceback


def child(order: dict) -> int:
    """Run what was ordered; the exit status."""
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    logging.getLogger().handlers.clear()  # importing sglang made some
    os.environ.update(order["environment"])
    os.chdir(order["cwd"])
    # A value model's package is found there. The interpreter has read its own PYTHONPATH already.
    sys.path[:0] = [order["cwd"], *filter(None, order["environment"].get("PYTHONPATH", "").split(os.pathsep))]
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    name, *flags = order["argv"]
    sys.argv = [name, *flags]
    try:
        if name == "server":
            from sglang.launch_server import run_server
            from sglang.srt.server_args import prepare_server_args

            run_server(prepare_server_args(flags))
        else:
            sys.path.insert(0, os.path.dirname(os.path.abspath(name)))
            runpy.run_path(name, run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def run_child(order: dict) -> None:
    """Never returns. Handlers of `atexit` run, as they would in a process of its own."""
    status = 1
    try:
        status = child(order)
        import atexit

        atexit._run_exitfuncs()
    finally:
        with open(order["log"] + ".status", "w") as file:
            file.write(str(status))
        os._exit(status)


def reap(*_) -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def main() -> None:
    import datasets  # noqa: F401
    import math_verify  # noqa: F401
    import sglang.launch_server
    import sglang.srt.entrypoints.engine
    import sglang.srt.entrypoints.http_server  # noqa: F401
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401

    set_start_method = multiprocessing.set_start_method
    multiprocessing.set_start_method = lambda method, force=False: set_start_method("fork", force=True)
    signal.signal(signal.SIGCHLD, reap)
    print("ready", flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            run_child(json.loads(line))
        print(pid, flush=True)


if __name__ == "__main__":
    main()
