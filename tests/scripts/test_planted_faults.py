"""The list of planted faults is kept up with the code, its runner tells survivors, and a seeded ten are caught."""

import planted_faults
import pytest
from conftest import ROOT
from planted_faults import CAUGHT, FAULTS, Fault, copy_project, planted, read_faults, try_fault

from common_lib.cli import UserError

ALL = read_faults(FAULTS)


def test_every_fault_can_be_planted_and_names_tests_that_are_there():
    gone = [f.name for f in ALL if planted((ROOT / f.file).read_text(encoding="utf-8"), f) is None]
    assert not gone, "their text does not stand once in the file"
    assert not [f.name for f in ALL if f.before == f.after]
    for fault in ALL:
        assert fault.tests
        for test in fault.tests:
            path, _, name = test.partition("::")
            name = name.split("[")[0].split("::")[-1]
            assert not name or f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), test


def test_there_are_faults_in_every_room():
    assert len(ALL) >= 120
    rooms = {fault.file.split("/")[0] for fault in ALL}
    assert rooms >= {
        "classifier_lib",
        "common_lib",
        "engine_lib",
        "eval_lib",
        "report_lib",
        "search_lib",
        "training_lib",
    }
    assert rooms >= {"collect_rollouts.py", "inference_eval.py", "scripts"}


def test_a_seeded_ten_are_caught(capfd):
    assert planted_faults.main(["--sample", "10", "--seed", "1"]) == 0, capfd.readouterr().out


@pytest.fixture
def copy(tmp_path):
    """A project of one file and one test, which looks at half of it."""
    (tmp_path / "sums.py").write_text("def add(a, b):\n    return a + b\n\n\ndef minus(a, b):\n    return a - b\n")
    (tmp_path / "test_sums.py").write_text("import sums\n\n\ndef test_add():\n    assert sums.add(2, 3) == 5\n")
    return tmp_path


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("a + b", "a * b", CAUGHT),
        ("a - b", "a * b", "SURVIVED"),
        ("(a, b)", "(b, a)", "its text stands 2 times in sums.py"),
        ("a / b", "a", "its text stands 0 times in sums.py"),
    ],
)
def test_what_is_said_of_a_fault(copy, before, after, said):
    text = (copy / "sums.py").read_text()
    fault = Fault("a fault", "sums.py", before, after, ("test_sums.py",))
    assert try_fault(fault, copy, 60).startswith(said)
    assert (copy / "sums.py").read_text() == text


def test_a_test_that_cannot_run_catches_nothing(copy):
    fault = Fault("a fault", "sums.py", "a + b", "a * b", ("test_sums.py::test_that_is_not_there",))
    assert try_fault(fault, copy, 60).startswith("its tests ended with status 4")
    with pytest.raises(UserError, match="without a fault the tests do not pass"):
        planted_faults.check_clean([fault], copy)


def test_a_copy_has_what_git_would_take(tmp_path):
    copied = copy_project(tmp_path)
    assert (copied / "eval_utils.py").read_bytes() == (ROOT / "eval_utils.py").read_bytes()
    assert not (copied / ".git").exists() and not (copied / ".venv").exists()
