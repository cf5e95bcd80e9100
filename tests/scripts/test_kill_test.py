"""The kill test itself: what its trials run and count, and how it knows its moments."""

import json

import kill_test
import pytest
from handmade_runs import settings


@pytest.mark.parametrize(("engine", "tolerance"), [("simulated", 0.0), ("transformers", 1e-6)])
def test_trials_kill_run_on_and_compare_with_one_reference(tmp_path, monkeypatch, engine, tolerance):
    """Each trial is killed one to three times on its own output; what differs or fails is counted."""
    ran, killed, compared = [], [], []

    def run_to_end(cmd):
        ran.append(cmd)
        if len(ran) == 1:
            meta = settings(3, 3, 8, 4, 2) | {"sessions": [{"seconds": 4.0}]}
            (tmp_path / "reference.meta.json").write_text(json.dumps(meta))
        if len(ran) == 3:
            raise ValueError("exit status 1")

    def compare(output, reference, allowed):
        compared.append((output.name, reference.name, allowed))
        if output.name == "trial3.jsonl":
            raise ValueError("a line differs")

    monkeypatch.setattr(kill_test, "run_to_end", run_to_end)
    monkeypatch.setattr(kill_test, "stop_when", lambda due, cmd: killed.append(cmd) or True)
    monkeypatch.setattr(kill_test, "compare", compare)
    assert kill_test.kill_trials(6, engine, 3, seed=4, folder=tmp_path) == 2
    outputs = [cmd[-1].rpartition("/")[2] for cmd in ran]
    assert outputs == ["reference.jsonl", *(f"trial{i}.jsonl" for i in range(6))]
    counts = [sum(cmd[-1].endswith(f"/trial{i}.jsonl") for cmd in killed) for i in range(6)]
    assert set(counts) == {1, 2, 3}
    assert compared == [(f"trial{i}.jsonl", "reference.jsonl", tolerance) for i in (0, 2, 3, 4, 5)]
    assert ("--engine" in ran[0]) == (engine == "transformers")
    assert len((tmp_path / "problems.jsonl").read_text().splitlines()) == 3
    again = len(killed)
    ran.clear()
    kill_test.kill_trials(6, engine, 3, seed=5, folder=tmp_path)
    assert [sum(cmd[-1].endswith(f"/trial{i}.jsonl") for cmd in killed[again:]) for i in range(6)] != counts


def test_a_kill_is_due_some_time_after_the_journal_has_grown(tmp_path, monkeypatch):
    now, journal = [100.0], tmp_path / "x.tree.jsonl"
    monkeypatch.setattr(kill_test.time, "monotonic", lambda: now[0])
    journal.write_text("an earlier start's\n")
    due = kill_test.after_growth(journal, 3.0)
    for _ in range(2):
        now[0] += 50
        assert not due()
    journal.write_text("an earlier start's\nand one more\n")
    assert not due()
    now[0] += 2.9
    assert not due()
    now[0] += 0.2
    assert due()


def test_losses_so_far_are_those_of_whole_lines_in_order(tmp_path):
    lines = [{"step": 1, "loss": 3.0}, {"step": 1, "eval/loss": 9.0}, {"step": 2, "loss": 2.5}]
    assert kill_test.losses(tmp_path) == []
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 3, "lo')
    assert kill_test.losses(tmp_path) == [3.0, 2.5]
    (tmp_path / "metrics.jsonl").write_text(text + text)
    with pytest.raises(ValueError, match="steps are missing or repeated"):
        kill_test.losses(tmp_path)
    for name in ("step-00000005", "step-00000010", "latest"):
        (tmp_path / name).mkdir()
    assert kill_test.saved_step(tmp_path) == 10
