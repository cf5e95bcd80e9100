"""What a shell would start: README's recipes and the script for Slurm, with programs in their places that only note it."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
# Notes how it was called; with WAITS, where one of its words is an argument, it waits for SIGTERM and notes that too.
STUB = """#!{python} -S
import json, os, signal, sys, time
def note(what):
    line = json.dumps({{"argv": sys.argv[1:], "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"), "what": what}}) + "\\n"
    with open({calls!r}, "a") as file:
        file.write(line)
def told(*_):
    note("told to end")
    os._exit(0)
signal.signal(signal.SIGTERM, told)
note("started")
if set(sys.argv) & set(os.environ.get("WAITS", "").split()):
    time.sleep(60)
sys.exit(int(os.environ.get("STATUS", "0")))
"""


@dataclass(frozen=True)
class Call:
    """Of `python`; what: started, told to end."""

    argv: list[str]
    gpus: str | None
    what: str = "started"

    def value(self, flag: str) -> str:
        return self.argv[self.argv.index(flag) + 1]


class Stubs:
    """A folder for PATH with a `python` that notes its calls, and a `curl`: by default it finds a server well that has
    noted its start."""

    def __init__(self, folder: Path, curl_status: int | None = None):
        self.folder, self.file = folder, folder / "calls"
        has_started = f"""port=${{2#*:}}; grep -qs "\\"${{port%%/*}}\\"" {self.file}"""
        programs = {
            "python": STUB.format(python=sys.executable, calls=str(self.file)),
            "curl": f"#!/bin/bash\n{has_started if curl_status is None else f'exit {curl_status}'}\n",
        }
        for name, text in programs.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)

    def start(self, command: list[str], **environment: str) -> subprocess.Popen:
        path = {"PATH": f"{self.folder}{os.pathsep}{os.environ['PATH']}"}
        return subprocess.Popen(
            command, cwd=ROOT, env=os.environ | path | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )  # fmt: skip

    def calls(self) -> list[Call]:
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        return [Call(**json.loads(line)) for line in lines]


def recipe(name: str, folder: Path) -> list[Call]:
    """The calls of README's block after `<!-- recipe: NAME -->`, in the order of their servers' ports, the others last."""
    block = README.split(f"<!-- recipe: {name} -->\n```bash\n", 1)[1].split("```", 1)[0]
    stubs = Stubs(folder, curl_status=0)
    process = stubs.start(["bash", "-euo", "pipefail", "-c", f"{block}\nwait"])
    said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    return sorted(stubs.calls(), key=lambda call: call.value("--port") if "--port" in call.argv else "9")
