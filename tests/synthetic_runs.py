"""Small synthetic runs for tests of the report."""

import json

from make_synthetic_run import Options, make_synthetic_run

from eval_lib.grading import Grader
from report_lib.analysis import analyse
from report_lib.data import read_run


def make_run(folder, name="run", **changes):
    path = folder / f"{name}.jsonl"
    make_synthetic_run(path, Options(**(dict(problems=6, repetitions=4, max_length=160, block_size=40) | changes)))
    return path


def make_pair(folder):
    """A pruned run and the baseline on the same problems."""
    return make_run(folder, "vgs", early_stop=0.1), make_run(folder, "bon", search_type="bon")


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def analysis_of(path, **flags):
    with Grader() as grader:
        return analyse(read_run(path, path.stem, **flags), grader)
