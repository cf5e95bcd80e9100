"""Starts real SGLang servers, routers and this project's scripts for tests, quickly, by tests/sglang_cpu/zygote.py."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil

from engine_lib.value_settings import PACKAGE, VALUE_SETTINGS

ROOT = Path(__file__).resolve().parent.parent
# What an engine on a CPU needs, small and fast.
CPU_FLAGS = {
    "device": "cpu", "dtype": "float32", "attention_backend": "torch_native", "sampling_backend": "pytorch",
    "max_total_tokens": 16384, "max_running_requests": 64, "disable_overlap_schedule": True,
}  # fmt: skip
# Data-parallel ranks on a CPU each want cores of their own.
TWO_RANKS = {"SGLANG_CPU_OMP_THREADS_BIND": f"0|{(os.cpu_count() or 1) - 1}"}
SGLANG_ARGS = [
    "--engine",
    "sglang",
    "--device",
    "cpu",
    "--sglang_args",
    "max_total_tokens=16384",
    "max_running_requests=64",
]
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore",
}


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


class Child:
    """A process that leads a group of its own, and its output."""

    def __init__(self, pid: int, log: Path):
        self.pid, self.log = pid, log
        self.process = psutil.Process(pid)

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def running(self) -> bool:
        return self.process.is_running() and self.process.status() != psutil.STATUS_ZOMBIE

    def family(self) -> list[psutil.Process]:
        return [self.process, *self.process.children(recursive=True)] if self.running else []

    def kill(self) -> None:
        """SIGKILL to it and to all that it started, as when a machine is lost."""
        family = self.family()
        for process in family:
            process.kill()
        psutil.wait_procs(family, timeout=20)

    def wait(self, seconds: float) -> int:
        """Its exit status."""
        wait_until(lambda: not self.running, seconds, self)
        return int(self.log.with_name(self.log.name + ".status").read_text())


class Server(Child):
    """An SGLang server or router."""

    def __init__(self, pid: int, log: Path, port: int):
        super().__init__(pid, log)
        self.port, self.url = port, f"http://127.0.0.1:{port}"

    def get(self, path: str):
        with urllib.request.urlopen(f"{self.url}/{path}", timeout=5) as reply:
            return json.loads(reply.read() or "null")

    def is_up(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as reply:
                return reply.status == 200
        except OSError:
            return False

    def serves(self, servers: int) -> bool:
        """Is this router up, with so many servers behind it?"""
        return self.is_up() and len(self.get("workers")["workers"]) == servers


def wait_until(condition, seconds: float, child: Child | None = None) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            said = f"; its output:\n{child.output[-3000:]}" if child else ""
            raise AssertionError(f"not within {seconds} s{said}")
        time.sleep(0.05)


class Host:
    """One zygote, and all that it started; `close` ends them."""

    def __init__(self, folder: Path):
        self.folder, self.children, self.count = folder, [], 0
        self.zygote = subprocess.Popen(
            [sys.executable, str(ROOT / "tests/sglang_cpu/zygote.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=(folder / "zygote.log").open("w"), text=True, cwd=ROOT, env=os.environ | ENVIRONMENT,
        )  # fmt: skip

    def _order(self, argv: list[str], **environment: str) -> tuple[int, Path]:
        if self.count == 0:
            ready = self.zygote.stdout.readline()
            assert ready == "ready\n", (self.folder / "zygote.log").read_text()
        self.count += 1
        log = self.folder / f"{self.count}.log"
        log.touch()
        order = {"argv": argv, "cwd": str(ROOT), "log": str(log), "environment": environment}
        self.zygote.stdin.write(json.dumps(order) + "\n")
        self.zygote.stdin.flush()
        pid = int(self.zygote.stdout.readline())
        return pid, log

    def _add(self, child):
        self.children.append(child)
        return child

    def script(self, name: str, *flags) -> Child:
        return self._add(Child(*self._order([str(ROOT / name), *map(str, flags)])))

    def server(self, model: Path, port: int | None = None, environment: dict | None = None, **settings) -> Server:
        """Started, not yet up."""
        port = port or free_port()
        flags = ["--model-path", str(model), "--port", str(port), "--log-level", "error"]
        for name, value in (CPU_FLAGS | settings).items():
            flags += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
        environment = (environment or {}) | (TWO_RANKS if settings.get("dp_size") == 2 else {})
        return self._add(Server(*self._order(["server", *flags], **environment), port))

    def value_server(self, model: Path, port: int | None = None, environment: dict | None = None, **settings) -> Server:
        """Of a value model, with all that engine_lib.value_server sets. Started, not yet up."""
        environment = {"SGLANG_EXTERNAL_MODEL_PACKAGE": PACKAGE} | (environment or {})
        return self.server(model, port, environment, **({"skip_tokenizer_init": True} | VALUE_SETTINGS | settings))

    def router(self, servers: list[Server], policy: str = "manual") -> Server:
        """sglang-router, a program of its own, in front of servers."""
        port, log = free_port(), self.folder / f"router{free_port()}.log"
        command = [
            sys.executable, "-m", "sglang_router.launch_router", "--worker-urls", *(server.url for server in servers),
            "--host", "127.0.0.1", "--port", str(port), "--policy", policy, "--prometheus-port", str(free_port()),
            "--worker-startup-check-interval", "1", "--health-check-interval-secs", "1",
        ]  # fmt: skip
        with log.open("w") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=output, env=os.environ | ENVIRONMENT, process_group=0
            )
        return self._add(Server(process.pid, log, port))

    def close(self) -> None:
        for child in self.children:
            child.kill()
        self.zygote.stdin.close()
        self.zygote.send_signal(signal.SIGTERM)
        self.zygote.wait(timeout=20)
