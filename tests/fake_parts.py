"""Parts of gpu_check.py that report one figure and then end in some way; without torch."""

import sys

import gpu_check
from conftest import ROOT

PART = """
import os, signal, sys, time
sys.path[:0] = [{root!r}, {root!r} + "/scripts"]
from pathlib import Path
from common_lib.files import LineFile
from gpu_parts.report import Report
from training_lib.launch import end_with_parent
lines = LineFile(Path(sys.argv[1]))
report = Report(lines, "cpu", "tiny", 60.0)
report.machine(card="a card", cuda="1.2")
report.figure("t", "speed", 2.0, "x")
{ending}
lines.append({{"done": True}})
"""


def give_fake_parts(monkeypatch, endings: dict[str, str]) -> None:
    """Each part's last lines by its name."""

    def command(part, args, seconds, lines):
        return [sys.executable, "-c", PART.format(root=str(ROOT), ending=endings[part]), str(lines)]

    monkeypatch.setattr(gpu_check, "PARTS", dict.fromkeys(endings, ("", 1.0)))
    monkeypatch.setattr(gpu_check, "child_command", command)
