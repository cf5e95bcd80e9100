"""The house: what stands at the root, who may import whom, how long a function is, and nothing written twice."""

import ast
import subprocess
import sys
from collections import defaultdict
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPTS = ["collect_rollouts.py", "inference_eval.py", "report.py", "train_classifier.py"]
ROOT_FILES = sorted([*SCRIPTS, "data_utils.py", "eval_utils.py"])
# From the ground up: a room may import those of the floors below it, and nothing of its own floor but itself.
FLOORS = [
    {"classifier_lib", "common_lib"},
    {"data_utils", "eval_lib"},
    {"engine_lib", "eval_utils"},
    {"search_lib", "training_lib"},
    {"report_lib"},
    {"scripts", "examples", *(name.removesuffix(".py") for name in SCRIPTS)},
]
LONGEST_FUNCTION = 45
ALIKE = 6  # identical lines that stand in two places


@cache
def sources(*endings: str) -> dict[str, str]:
    """Text of the tracked files outside tests, by path."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = [path for path in listed.splitlines() if path.endswith(endings) and not path.startswith("tests/")]
    return {path: (ROOT / path).read_text(encoding="utf-8") for path in paths if (ROOT / path).exists()}


@cache
def trees() -> dict[str, ast.Module]:
    return {path: ast.parse(text) for path, text in sources(".py").items()}


def module_path(name: str, importer: str) -> str | None:
    """The project's file that `name` (a.b.c) is, if any; a script's neighbour may be imported by its bare name."""
    for base in ("", str(Path(importer).parent) + "/"):
        for ending in (".py", "/__init__.py"):
            path = (base + name.replace(".", "/") + ending).removeprefix("./")
            if path in trees():
                return path
    return None


def imports(path: str) -> set[str]:
    """Files of the project that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(trees()[path]):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            # `from room import file` names a file of the room, or something in the room's __init__
            files = {f"{node.module}.{alias.name}" for alias in node.names}
            names = [name if module_path(name, path) else node.module for name in files]
        found |= {target for name in names if (target := module_path(name, path))}
    return found - {path}


def room(path: str) -> str:
    return path.split("/")[0].removesuffix(".py")


def floor(path: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room(path) in rooms)


def test_nothing_is_loose_at_the_root():
    assert sorted(path for path in sources(".py") if "/" not in path) == ROOT_FILES


def test_every_room_says_what_it_holds():
    rooms = {room(path) for path in sources(".py") if "/" in path} - {"scripts", "examples"}
    assert rooms == set().union(*FLOORS[:5]) - {"data_utils", "eval_utils"}
    for name in rooms:
        assert ast.get_docstring(trees()[f"{name}/__init__.py"]), name


def test_imports_run_downwards():
    upwards = [
        f"{path} imports {target}"
        for path in trees()
        for target in imports(path)
        if room(path) != room(target) and floor(target) >= floor(path)
    ]
    assert not [line for line in upwards if not line.startswith(("scripts/", "examples/"))]
    # The scripts of the folder `scripts` drive those at the root.
    assert not [line for line in upwards if "imports scripts/" in line]


def test_no_circle():
    order = TopologicalSorter({path: imports(path) for path in trees() if not path.endswith("__init__.py")})
    try:
        order.prepare()
    except CycleError as error:
        pytest.fail(f"imports go round: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(("flags", "status"), [(["--help"], 0), (["--no_such_flag"], 2), (["--seed"], 2)])
def test_help_and_mistakes_are_answered_without_torch(script, flags, status):
    program = (
        f"import atexit, runpy, sys; sys.argv = [{script!r}, *{flags!r}]\n"
        "slow = {'torch', 'transformers', 'datasets', 'matplotlib'}\n"
        "atexit.register(lambda: print('slow:', sorted(slow & set(sys.modules))))\n"
        f"runpy.run_path({script!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == status, done.stderr
    assert done.stdout.endswith("slow: []\n")
    if status:
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def is_argument_table(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef) and node.name.endswith(("parser", "_flags"))


def test_no_function_is_long():
    long = [
        f"{path}:{node.lineno} {node.name}: {node.end_lineno - node.lineno + 1} lines"
        for path, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not is_argument_table(node)
        if node.end_lineno - node.lineno + 1 > LONGEST_FUNCTION
    ]
    assert not long


def test_no_file_is_long():
    limits = {path: 450 if floor(path) == 5 else 360 for path in trees()}
    long = {path: lines for path in trees() if (lines := sources(".py")[path].count("\n")) > limits[path]}
    assert not long


def test_nothing_is_written_twice():
    """No six identical lines, blank ones, imports and argument tables apart."""
    places = defaultdict(list)
    for path, text in sources(".py", ".js", ".sh").items():
        skipped = set()
        if path.endswith(".py"):
            for node in ast.walk(trees()[path]):
                if isinstance(node, (ast.Import, ast.ImportFrom)) or is_argument_table(node):
                    skipped.update(range(node.lineno, node.end_lineno + 1))
        lines = [
            (number, line.strip())
            for number, line in enumerate(text.splitlines(), 1)
            if line.strip() and number not in skipped
        ]
        for i in range(len(lines) - ALIKE + 1):
            window = lines[i : i + ALIKE]
            places[tuple(line for _, line in window)].append(f"{path}:{window[0][0]}")
    assert not [found for found in places.values() if len(found) > 1]


def test_no_two_classes_have_one_name():
    places = defaultdict(list)
    for path, tree in trees().items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                places[node.name].append(path)
    assert not {name: found for name, found in places.items() if len(found) > 1}
