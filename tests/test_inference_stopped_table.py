"""What a run with --stop prints and logs when it is over: rows of the first repetitions, and what was saved."""

import json
from dataclasses import replace

import kill_test
import pytest
import simulated_eval

import inference_eval


class RecordingTracker:
    where, id = "nowhere", "1"

    def __init__(self):
        self.logged = {}

    def log_configs(self, configs):
        pass

    def log_metrics(self, metrics, step):
        self.logged[step] = metrics

    def close(self):
        pass


def test_a_stopped_run_prints_and_logs_what_was_used_and_saved(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(simulated_eval, "BLOCK_SECONDS", 0.001)
    tracker, path = RecordingTracker(), tmp_path / "run.jsonl"
    loaders = replace(simulated_eval.LOADERS, tracker=lambda *args, **kwargs: tracker)
    flags = ["--num_repetitions", "6", "--stop", "sure", "--stop_vote", "majority", "--device", "cpu"]
    assert inference_eval.main([*kill_test.make_inputs(tmp_path, 3), *flags, "--output_path", str(path)], loaders) == 0
    meta = json.loads(path.with_name("run.meta.json").read_text())
    used = [meta["stopped"].get(str(i), 6) for i in range(3)]
    assert len(path.read_text().splitlines()) == sum(used) < 18  # else nothing is tested
    words = " ".join(capsys.readouterr().out.split())
    assert "Accuracy, % (--stop sure, majority vote, at most 6 repetitions)" in words
    assert f"{sum(used)} of 18 repetitions count ({1 - sum(used) / 18:.1%} saved)." in words
    counted = sum(json.loads(line)["tokens_generated"] for line in path.read_text().splitlines())
    assert f"Tokens generated: counted {counted:,} (" in words
    assert f"spent {counted + meta['tokens_uncounted']['generated']:,} (" in words
    blocks = meta["search"]["num_blocks"]
    (name,) = {key.split("/")[0] for metrics in tracker.logged.values() for key in metrics}
    assert sorted(tracker.logged) == [blocks * m for m in range(1, 7)]
    for m in range(1, 7):
        metrics = tracker.logged[blocks * m]
        mean = sum(min(m, T) for T in used) / 3
        assert metrics[f"{name}/repetitions_m"] == pytest.approx(mean)
        assert metrics[f"{name}/saved_m"] == pytest.approx(1 - mean / m)
        assert f"{name}/maj_m" in metrics and (f"{name}/wmaj_m" in metrics) == (m <= min(used))
        assert f"{name}/repeat_groups" not in metrics
