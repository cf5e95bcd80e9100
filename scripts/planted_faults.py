"""Plant realistic faults, one at a time, in a copy of the project: the tests named with each must fail.

    python scripts/planted_faults.py                       # all of them (minutes)
    python scripts/planted_faults.py --sample 10 --seed 3  # ten, drawn
    python scripts/planted_faults.py --only search_lib     # those of files (or with a name) that contain this

The faults lie in tests/faults/*.toml: `file`, `before` (must stand in the file exactly once), `after`, `tests` (pytest
arguments), and `name`, what is broken in words. A fault is caught where a test fails; one that every test lets pass
survives and is a hole in the tests. An entry whose text is no longer there fails: it is to be kept up with the code.

The tests of each fault run in a process of their own, forked from one that has imported torch and the other libraries
already: their import takes longer than most tests.
"""

import argparse
import importlib
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common_lib.cli import ArgumentParser, UserError, run_script
from common_lib.progress import format_seconds

FAULTS = ROOT / "tests" / "faults"
CAUGHT, FAILED_TESTS = "caught", 1  # pytest's exit status where tests ran and some failed
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONDONTWRITEBYTECODE": "1",
}
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([
    "pytest", "torch", "torch._dynamo", "torch.distributed.fsdp", "torch.nn.attention.flex_attention", "datasets",
    "transformers.models.qwen2.modeling_qwen2", "transformers.integrations.sdpa_attention", "pyarrow.parquet",
])  # fmt: skip


@dataclass(frozen=True)
class Fault:
    name: str
    file: str
    before: str
    after: str
    tests: tuple[str, ...]


def read_faults(folder: Path) -> list[Fault]:
    """All entries. Raises UserError for one that is not whole, or a name given twice."""
    faults: list[Fault] = []
    for path in sorted(folder.glob("*.toml")):
        for entry in tomllib.loads(path.read_text(encoding="utf-8"))["fault"]:
            try:
                faults.append(Fault(**entry | {"tests": tuple(entry["tests"])}))
            except (TypeError, KeyError) as error:
                raise UserError(f"{path}: the entry {entry.get('name', entry)} is not whole ({error})") from error
    names = [fault.name for fault in faults]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"{folder}: faults of one name: {', '.join(sorted(twice))}")
    return faults


def planted(text: str, fault: Fault) -> str | None:
    """The file's text with the fault in it; None where `before` does not stand there exactly once."""
    return text.replace(fault.before, fault.after) if text.count(fault.before) == 1 else None


def copy_project(folder: Path) -> Path:
    """The files that git tracks or would, without its ignored ones."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()  # fmt: skip
    for name in listed:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return folder


def run_tests(copy: Path, tests: Sequence[str], seconds: float) -> tuple[int | None, str]:
    """pytest's exit status (None where it took too long), and in a line what it said, failed tests by name."""
    with tempfile.NamedTemporaryFile() as said:
        process = FORKS.Process(target=_run_pytest, args=(copy, tests, said.name))
        process.start()
        process.join(seconds)
        if process.exitcode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
            return None, f"did not end in {seconds:g} s"
        lines = Path(said.name).read_text(encoding="utf-8", errors="replace").strip().splitlines()
        failed = [line for line in lines[:-1] if line.startswith(("FAILED", "ERROR"))]
        return process.exitcode, "; ".join([*failed[:3], *lines[-1:]]) or "nothing"


def _run_pytest(copy: Path, tests: Sequence[str], said: str) -> None:
    """In the forked process: `python -m pytest` in the copy, of which nothing has been imported yet."""
    os.setsid()  # so that a time-out ends whatever the tests have started
    output = os.open(said, os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    for name, module in list(sys.modules.items()):
        file = Path(getattr(module, "__file__", None) or "/")
        if file.is_relative_to(ROOT) and "site-packages" not in file.parts:
            del sys.modules[name]
    sys.path[:] = [
        str(copy),
        *(path for path in sys.path if Path(path) not in (ROOT, ROOT / "scripts", ROOT / "tests")),
    ]
    os.chdir(copy)
    # What the tests spawn imports the main module again: it is to be pytest's, not this script with the true project.
    sys.modules["__main__"] = importlib.import_module("pytest.__main__")
    sys.exit(sys.modules["pytest"].main(["-x", "-q", "-p", "no:cacheprovider", *tests]))


def check_clean(faults: Sequence[Fault], copy: Path) -> None:
    """Raises UserError where a test fails without a fault: it would seem to catch any."""
    tests = sorted({test for fault in faults for test in fault.tests})
    status, said = run_tests(copy, tests, seconds=3600)
    if status != 0:
        raise UserError(f"without a fault the tests do not pass; mend them first: {said}")


def try_fault(fault: Fault, copy: Path, seconds: float) -> str:
    """Plant it, run its tests, mend it. Returns CAUGHT, or what is wrong in words."""
    path = copy / fault.file
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    broken = planted(text, fault)
    if broken is None:
        return f"its text stands {text.count(fault.before)} times in {fault.file}; it must be there once"
    path.write_text(broken, encoding="utf-8")
    try:
        status, said = run_tests(copy, fault.tests, seconds)
    finally:
        path.write_text(text, encoding="utf-8")
    if status == FAILED_TESTS:
        return CAUGHT
    return "SURVIVED" if status == 0 else f"its tests ended with status {status}: {said}"


def try_all(faults: Sequence[Fault], jobs: int, seconds: float) -> dict[str, str]:
    """By name what came of each fault; said as it comes."""
    begin, results = time.monotonic(), {}
    os.environ.update(QUIET)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        copies: Queue[Path] = Queue()
        for number in range(jobs):
            copies.put(copy_project(Path(folder) / str(number)))
        check_clean(faults, copies.queue[0])

        def run(fault: Fault) -> str:
            copy = copies.get()
            try:
                return try_fault(fault, copy, seconds)
            finally:
                copies.put(copy)

        for number, (fault, result) in enumerate(zip(faults, pool.map(run, faults), strict=True), 1):
            results[fault.name] = result
            passed = format_seconds(time.monotonic() - begin)
            print(f"{number}/{len(faults)} {passed} {fault.file}: {fault.name}: {result}", flush=True)
    return results


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, help="try that many, drawn by --seed (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--only", default="", metavar="TEXT", help="try those whose file or name contains this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="at once")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for the tests of one fault")
    args: argparse.Namespace = parser.parse_args(argv)
    faults = [fault for fault in read_faults(FAULTS) if args.only in fault.file or args.only in fault.name]
    if args.sample is not None:
        faults = random.Random(args.seed).sample(faults, min(args.sample, len(faults)))
    if not faults:
        raise UserError(f"--only {args.only!r} fits no fault")
    results = try_all(faults, args.jobs, args.timeout)
    missed = {name: result for name, result in results.items() if result != CAUGHT}
    print(
        f"\n{len(results) - len(missed)} of {len(results)} faults in {len({fault.file for fault in faults})} files are caught"
    )
    for name, result in missed.items():
        print(f"NOT CAUGHT: {name}: {result}")
    return 1 if missed else 0


if __name__ == "__main__":
    run_script(main)
