"""Does it work on this GPU, how fast is it, and where is the time? An answer in at most nine minutes.

    python scripts/gpu_check.py                         # on a GPU: the shapes of the 1.5B models, random weights
    python scripts/gpu_check.py --parts scoring --minutes 2
    python scripts/gpu_check.py --parts values --minutes 4  # the value model by itself, in SGLang and on a server of it
    python scripts/gpu_check.py --device cpu            # small models: what is counted, and ratios of times
    python scripts/gpu_check.py --device cpu --tiny     # under a minute: does everything run?

It needs torch, transformers, numpy and safetensors, and no network; with sglang and flash-attn it measures those too.
Each part is a process of its own, so one that crashes or hangs loses itself only. Writes gpu_check.json after every
part, and gpu_check.md, a table to read. Exit status 1 where a part failed or a figure is beyond its bound.
"""

import argparse
import contextlib
import datetime
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from gpu_parts.needs import ASKED_FOR, NEEDS

from common_lib.cli import ArgumentParser, UserError, check_rules, run_script
from common_lib.files import write_json, write_text
from common_lib.progress import format_seconds

PACKAGES = ("torch", "transformers", "numpy", "safetensors", "triton", "sglang", "flash-attn", "flash-attn-4")
LEAVE_S = 8.0  # before a part's time is over it should stop by itself
# Of each its module and its share of the time; a later one is a file and a row of NEEDS, or of ASKED_FOR.
PARTS = {name: (f"gpu_parts.{name}", sum(needs.values()) + LEAVE_S) for name, needs in (NEEDS | ASKED_FOR).items()}
SAID_LINES = 20  # of what a part said that did not end well
Part = dict[str, Any]  # status, seconds, figures and what else it told: docs/run_files.md


def child_command(part: str, args: argparse.Namespace, seconds: float, lines: Path) -> list[str]:
    """The process of a part, which writes to the file `lines` what it finds."""
    size = "tiny" if args.tiny else "full" if args.device == "cuda" else "small"
    where, program = [args.device, size, str(seconds), str(lines)], str(ROOT / "scripts/gpu_parts")
    return [sys.executable, program, PARTS[part][0], *where]


# ---------------------------------------------------------------------------------------------------------------------
# Parts


def run_part(part: str, args: argparse.Namespace, seconds: float) -> Part:
    """Run it for at most that long. Raises UserError for what no part can mend."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        lines, said = Path(folder) / "lines.jsonl", Path(folder) / "said"
        with said.open("wb") as stream:
            process = subprocess.Popen(
                child_command(part, args, max(seconds - LEAVE_S, 0.8 * seconds), lines),
                stdout=stream, stderr=stream, start_new_session=True, env=os.environ | {"PYTHONUNBUFFERED": "1"},
            )  # fmt: skip
            try:
                status = process.wait(timeout=seconds)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                with contextlib.suppress(ProcessLookupError):  # and whatever it has started
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        found = read_part(lines, status, seconds)
        if found["status"] != "done":
            found["said"] = said.read_text(encoding="utf-8", errors="replace").splitlines()[-SAID_LINES:]
    if "mistake" in found:
        raise UserError(found["mistake"])
    print(f"{part}: {found['status']}, {format_seconds(time.monotonic() - begin)}", flush=True)
    return found | {"seconds": round(time.monotonic() - begin, 1)}


def read_part(lines: Path, status: int | None, seconds: float) -> Part:
    """What a part has told until it ended, in whatever way."""
    found: Part = {"status": "", "machine": {}, "figures": [], "notes": [], "left_out": [], "failed": []}
    text = lines.read_text(encoding="utf-8") if lines.exists() else ""
    for line in text.splitlines(keepends=True):
        if not line.endswith("\n"):  # killed while it wrote
            break
        row = json.loads(line)
        if "figure" in row:
            found["figures"].append(row)
        elif "note" in row:
            found["notes"].append(row["note"])
        elif "left_out" in row or "failed" in row:
            found["left_out" if "left_out" in row else "failed"].append(row)
        else:
            found |= row
    if "missing" in found:
        found["status"] = f"not run: {found['missing']}"
    elif found.pop("done", False):
        measured = any(row["value"] is not None for row in found["figures"])
        found["status"] = "done" if measured else "ran, but measured nothing"
    elif status is None:
        found["status"] = f"stopped: it had not ended after {seconds:.0f} s"
    else:
        how = f"killed by signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        found["status"] = f"died: {how}"
    return found


def run_parts(args: argparse.Namespace) -> Iterator[tuple[str, Part]]:
    """Each part as it ends. On a GPU one at a time, with its share of the time that is left; on a CPU, tiny, two."""
    deadline, waiting = time.monotonic() + 60 * args.minutes, list(args.parts)
    if args.tiny and args.device == "cpu":
        with ThreadPoolExecutor(2) as pool:
            yield from zip(
                waiting, pool.map(lambda part: run_part(part, args, 60 * args.minutes), waiting), strict=True
            )
        return
    while waiting:
        part, left = waiting[0], deadline - time.monotonic()
        share = PARTS[part][1] / sum(PARTS[name][1] for name in waiting)
        yield part, run_part(part, args, max(left * share, 1.0))
        waiting.pop(0)


# ---------------------------------------------------------------------------------------------------------------------
# Results


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def faults(results: dict[str, Any]) -> list[str]:
    """What is wrong, a line each."""
    found = []
    for name, part in results["parts"].items():
        if part["status"] != "done":
            found.append(f"{name} {part['status']}")
        found += [f"{name}: {row['failed']} failed: {row['why']}" for row in part["failed"]]
        for row in part["figures"]:
            if not row["good"]:
                where = ", ".join((name, row["table"], row.get("case", ""))).removesuffix(", ")
                found.append(f"{where}: {row['figure']} is {number(row['value'])}, {bound(row)} is asked for")
    return found


def number(value: float | None) -> str:
    """With three digits or so."""
    if value is None:
        return "not measured"
    if value == 0 or 1000 <= abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def bound(row: dict[str, Any]) -> str:
    if "at_least" in row and row["at_least"] == row.get("at_most"):
        return f"= {number(row['at_least'])}"
    return " ".join(f"{sign} {number(row[key])}" for key, sign in (("at_least", "≥"), ("at_most", "≤")) if key in row)


def cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if row["value"] is None:
        return "–"
    limit = f" ({bound(row)})" if bound(row) else ""
    return f"{number(row['value'])}{limit}" if row["good"] else f"**{number(row['value'])}** (BAD: {bound(row)})"


def tables(figures: Sequence[dict[str, Any]]) -> list[str]:
    """Of each table a heading and its figures: a case a row, a name a column; or a name a row where there are no cases."""
    lines, found = [], {}
    for row in figures:
        found.setdefault(row["table"], []).append(row)
    for title, rows in found.items():
        cases: dict[str, dict[str, dict[str, Any]]] = {}
        for row in rows:
            cases.setdefault(row.get("case", ""), {})[row["figure"]] = row
        measured = {row["figure"] for row in rows if row["value"] is not None}
        columns = {row["figure"]: row for row in reversed(rows) if row["figure"] in measured}
        columns = dict(sorted(columns.items(), key=lambda item: rows.index(item[1])))
        if list(cases) == [""]:
            body = [f"| {head(row)} | {cell(row)} |" for row in columns.values()]
            lines += [f"| {title} | |", "|---|---:|", *body, ""] if body else []
            continue
        lines += [f"| {title} | {' | '.join(map(head, columns.values()))} |", "|---" + "|---:" * len(columns) + "|"]
        lines += [f"| {case} | {' | '.join(cell(row.get(name)) for name in columns)} |" for case, row in cases.items()]
        lines.append("")
    return lines


def head(row: dict[str, Any]) -> str:
    return f"{row['figure']}, {row['unit']}" if "unit" in row else row["figure"]


def markdown(results: dict[str, Any]) -> str:
    wrong = faults(results)
    shown = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = [
        f"# GPU check: {results['card'] or 'unknown device'}", "",
        f"{results['date']}, {format_seconds(results['seconds'])}, {results['models']}. CUDA {results['cuda']}; {shown}.", "",
        f"**{len(wrong)} wrong:**" if wrong else "All parts ran, and every figure is within its bound.",
        *(f"- {line}" for line in wrong), "",
    ]  # fmt: skip
    for name, part in results["parts"].items():
        lines += [f"## {name}: {part['status']}, {format_seconds(part['seconds'])}", ""]
        lines += [*(f"{note}." for note in part["notes"]), ""] if part["notes"] else []
        lines += tables(part["figures"])
        missing: dict[str, list[str]] = {}
        for row in part["figures"]:
            if row["value"] is None and row["figure"] not in missing.setdefault(row["why"], []):
                missing[row["why"]].append(row["figure"])
        lines += [f"- not measured: {', '.join(names)} ({why})" for why, names in missing.items()]
        lines += [f"- left out: {row['left_out']} ({row['why']})" for row in part["left_out"]] + [""]
        if part.get("said"):
            lines += ["```", *part["said"], "```", ""]
    return "\n".join(lines).replace("\n\n\n", "\n\n")


# ---------------------------------------------------------------------------------------------------------------------
# The script


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="the first GPU, or the CPU")
    parser.add_argument("--tiny", action="store_true", help="tiny models and a minute: does everything run?")
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=list(PARTS),
        default=[name for name in PARTS if name not in ASKED_FOR],
        help=f"which, in this order (default: all but {', '.join(ASKED_FOR)}, for which there is no time)",
    )
    parser.add_argument("--minutes", type=float, help="for all parts together (default: 9, or 1 with --tiny)")
    parser.add_argument("--out", default=".", metavar="DIR", help="where gpu_check.json and gpu_check.md go")
    args = parser.parse_args(argv)
    if args.minutes is None:
        args.minutes = 1.0 if args.tiny else 9.0
    args.parts = list(dict.fromkeys(args.parts))
    check_rules(args, [("minutes", args.minutes > 0, "must be above 0")])
    return args


def leave(*_) -> None:
    """On SIGTERM: in order, so that the part that runs ends too."""
    sys.exit(143)


def main(argv: Sequence[str] | None = None) -> int:
    args, begin = parse(argv), time.monotonic()
    out = Path(args.out)
    for path in (out / "gpu_check.json", out / "gpu_check.md"):
        if path.exists():
            raise UserError(f"{path} exists; move it away, or give another --out")
    out.mkdir(parents=True, exist_ok=True)
    models = "tiny models" if args.tiny else "the 1.5B shapes" if args.device == "cuda" else "small models"
    results: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"), "device": args.device, "card": "",
        "cuda": "none", "models": f"{models}, random weights", "versions": versions(), "seconds": 0.0, "parts": {},
    }  # fmt: skip
    for name, part in run_parts(args):
        results |= {key: value for key, value in part.pop("machine").items() if value}
        results["parts"][name] = part
        results["seconds"] = round(time.monotonic() - begin, 1)
        write_json(out / "gpu_check.json", results)
        write_text(out / "gpu_check.md", markdown(results))
    print(f"\n{markdown(results)}\nwritten: {out / 'gpu_check.json'} and {out / 'gpu_check.md'}")
    return 1 if faults(results) else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, leave)
    run_script(main)
