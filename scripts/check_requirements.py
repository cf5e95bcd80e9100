"""Can requirements.txt be installed on a GPU node? Resolved for one, with nothing installed.

    python scripts/check_requirements.py

A node is x86-64 Linux with glibc 2.34 or newer (Ubuntu 22.04, Debian 12, RHEL 9): older ones have no sglang wheel. uv, of
requirements-dev.txt, resolves; that needs the network. Exit status: 0 all resolve, 1 some do not, 77 without a network.
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common_lib.cli import ArgumentParser, run_script

NODE = "x86_64-manylinux_2_34"
PYTHONS = ("3.11", "3.12")
SHOWN = (
    "torch",
    "transformers",
    "sglang",
    "flash-attn",
    "flash-attn-4",
    "triton",
    "nvidia-nccl-cu13",
    "numpy",
    "datasets",
)
UNSOLVABLE, SKIPPED = 1, 77  # uv's exit status; automake's of a test that could not be run


def resolve(requirements: Path, python: str, platform: str) -> tuple[int, str]:
    """uv's exit status, and what it said: the versions, or what is in the way."""
    command = [
        sys.executable,
        "-m",
        "uv",
        "pip",
        "compile",
        str(requirements),
        "--quiet",
        "--no-header",
        "--no-annotate",
    ]
    where = ["--python-version", python, "--python-platform", platform]
    done = subprocess.run([*command, *where], capture_output=True, text=True)
    return done.returncode, done.stdout if done.returncode == 0 else done.stderr.strip()


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--requirements", type=Path, default=ROOT / "requirements.txt", help="file to resolve")
    parser.add_argument("--platform", default=NODE, help=f"as uv names it (default: {NODE})")
    args: argparse.Namespace = parser.parse_args(argv)
    worst = 0
    for python in PYTHONS:
        status, said = resolve(args.requirements, python, args.platform)
        if status == 0:
            found = dict(re.findall(r"^([\w.-]+)==(\S+)", said, re.MULTILINE))
            versions = ", ".join(f"{name} {found[name]}" for name in SHOWN if name in found)
            print(f"Python {python}, {args.platform}: {len(found)} packages: {versions}")
        elif status == UNSOLVABLE:
            print(f"Python {python}, {args.platform}: does not resolve\n{said}", file=sys.stderr)
            worst = UNSOLVABLE
        else:
            print(
                f"skipped: uv did not run to its end, without a network say: {said.splitlines()[-1]}", file=sys.stderr
            )
            return SKIPPED
    return worst


if __name__ == "__main__":
    run_script(main)
