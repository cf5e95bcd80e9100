"""Every flag of scripts/quickstart.py at the commands that it runs, and what is told of their results."""

import json
import shlex
import sys
from pathlib import Path

import pytest
import quickstart
from conftest import ROOT
from parser_flags import flags_of

from common_lib.signals import Stopped

COMMANDS = [
    "make_generator", "collect_rollouts", "train_classifier", "search_bon", "search_vgs", "search_random", "search_many",
    "what_if", "report",
]  # fmt: skip


class Runner:
    """In the place of `run_command`: notes each command by its log's name, and writes what the last ones would."""

    def __init__(self, stop_at: str | None = None):
        self.lines: dict[str, list[str]] = {}
        self.folder, self.stop_at = Path(), stop_at
        self.saved, self.same = 0.404, 1.0  # of the replay

    def __call__(self, line: str, log: Path) -> None:
        assert log.parent.name == "logs"
        self.folder = log.parent.parent
        self.lines[log.stem] = shlex.split(line)
        log.parent.mkdir(exist_ok=True)
        log.write_text("said")
        if log.stem == self.stop_at:
            raise Stopped(2)
        if log.stem == "report":
            self.write_results()

    def write_results(self) -> None:
        (self.folder / "report").mkdir(exist_ok=True)
        runs = []
        for number, name in enumerate(("vgs", "bon", "random"), 1):
            rows = [
                {"N": n, "maj_m": number / 10 + n / 1000, "wmaj_m": number / 10 + n / 1000 + 0.01, "bon_m": number / 20}
                for n in (8, 16)
            ]
            runs.append({"path": str(self.folder / f"{name}.jsonl"), "table": rows})
        (self.folder / "report/table.json").write_text(json.dumps({"runs": runs}))
        (self.folder / "what_if").mkdir(exist_ok=True)
        figures = {"saved": self.saved, "same_answer": self.same, "repetitions": 9.5, "accuracy": 1.0}
        rows = [{"policy": "weighted"}, {"policy": "weighted:sure"} | figures]
        (self.folder / "what_if/table.json").write_text(json.dumps({"runs": [{"what_if": rows}]}))
        (self.folder / "value_model").mkdir(exist_ok=True)
        lines = [
            {"step": 1, "loss": 1.0},
            {"step": 1, "eval/within_auc_at_75": 0.5},
            {"step": 2, "eval/within_auc_at_75": 0.9},
        ]
        (self.folder / "value_model/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def value(self, command: str, flag: str) -> str:
        words = self.lines[command]
        assert words.count(flag) == 1, (command, flag)
        return words[words.index(flag) + 1]


@pytest.fixture
def runner(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # the quickstart changes to the checkout; the test's end changes back
    runner = Runner()
    monkeypatch.setattr(quickstart, "run_command", runner)
    return runner


def seed(runner, tmp_path):
    """In every command that draws, and in the folder's name, so that runs lie side by side."""
    assert quickstart.main(["--seed", "31", "--output_dir", str(tmp_path / "out")]) == 0
    assert list(runner.lines) == COMMANDS
    assert {runner.value(name, "--seed") for name in COMMANDS if name not in ("what_if", "report")} == {"31"}
    assert runner.folder == tmp_path / "out/seed31"
    assert quickstart.main(["--output_dir", str(tmp_path / "out")]) == 0
    assert runner.folder == tmp_path / "out/seed1"


SIZES = {
    ("make_generator", "--num_steps"): (750, 500), ("make_generator", "--num_train"): (3000, 1500),
    ("make_generator", "--num_test"): (200, 100), ("train_classifier", "--num_steps"): (750, 400),
    ("train_classifier", "--eval_every"): (750, 400), ("train_classifier", "--eval_size"): (400, 300),
}  # fmt: skip


def fast(runner, tmp_path):
    """Sizes alone; the searches are the same."""
    commands = []
    for flags, which in ([], 0), (["--fast"], 1):
        assert quickstart.main([*flags, "--seed", "2", "--output_dir", str(tmp_path)]) == 0
        assert {key: int(runner.value(*key)) for key in SIZES} == {key: sizes[which] for key, sizes in SIZES.items()}
        assert runner.folder == tmp_path / ("seed2", "seed2-fast")[which]
        commands.append([[word.replace("seed2-fast", "seed2") for word in runner.lines[name]] for name in COMMANDS[3:]])
    assert commands[0] == commands[1]


def clean(runner, tmp_path):
    """The folder of this run goes, and that of no other; then all is made anew."""
    for number in "12":
        assert quickstart.main(["--seed", number, "--output_dir", str(tmp_path)]) == 0
        (tmp_path / f"seed{number}/generator").mkdir()
    runner.lines.clear()
    assert quickstart.main(["--seed", "1", "--output_dir", str(tmp_path)]) == 0
    assert "make_generator" not in runner.lines
    assert quickstart.main(["--seed", "1", "--output_dir", str(tmp_path), "--clean"]) == 0
    assert "make_generator" in runner.lines
    assert not (tmp_path / "seed1/generator").exists()
    assert (tmp_path / "seed2/generator").exists()


def output_dir(runner, tmp_path):
    """What one command writes the next ones read, all in the run's folder."""
    assert quickstart.main(["--seed", "1", "--output_dir", str(tmp_path / "some where")]) == 0
    folder = tmp_path / "some where/seed1"
    paths = {
        ("make_generator", "--output_dir"): "", ("collect_rollouts", "--problems"): "problems_train.jsonl",
        ("collect_rollouts", "--piref_model"): "generator", ("collect_rollouts", "--output_dir"): "rollouts",
        ("train_classifier", "--model_path"): "generator", ("train_classifier", "--data_path"): "rollouts",
        ("train_classifier", "--save_dir"): "",
    }  # fmt: skip
    for name in ("bon", "vgs", "random", "many"):
        paths |= {
            (f"search_{name}", "--benchmark"): "problems_test.jsonl", (f"search_{name}", "--piref_model"): "generator",
            (f"search_{name}", "--classifier_ckpt_path"): "value_model/latest",
            (f"search_{name}", "--output_path"): f"{name}.jsonl",
        }  # fmt: skip
    assert {key: Path(runner.value(*key)) for key in paths} == {key: folder / path for key, path in paths.items()}
    words = runner.lines["report"]
    assert words[2:5] == [str(folder / f"{name}.jsonl") for name in ("vgs", "bon", "random")]
    assert runner.value("report", "--out") == str(folder / "report")
    assert runner.lines["what_if"][2] == str(folder / "many.jsonl")
    assert runner.value("what_if", "--out") == str(folder / "what_if")
    assert (folder / "results.json").is_file()


FLAGS = {"seed": seed, "fast": fast, "clean": clean, "output_dir": output_dir}


@pytest.mark.parametrize("flag", FLAGS)
def test_each_flag_reaches_the_commands(flag, runner, tmp_path):
    FLAGS[flag](runner, tmp_path)


def test_the_table_names_every_flag(monkeypatch):
    assert flags_of(quickstart.parse_args, monkeypatch) == set(FLAGS)


def test_the_three_searches_differ_in_what_is_compared_alone(runner, tmp_path):
    quickstart.main(["--output_dir", str(tmp_path)])
    types = {name: runner.value(f"search_{name}", "--search_type") for name in ("bon", "vgs", "random")}
    assert types == {"bon": "bon", "vgs": "beam2", "random": "beam2"}
    assert runner.value("search_random", "--selection") == "random"
    assert "--selection" not in runner.lines["search_vgs"]
    own = {"--search_type", "beam2", "bon", "--block_size", "6", "--selection", "random"}
    rest = [
        [word for word in runner.lines[f"search_{name}"] if word not in own and not word.endswith(f"{name}.jsonl")]
        for name in ("bon", "vgs", "random")
    ]
    assert rest[0] == rest[1] == rest[2]
    sampling = [runner.value(name, "--temperature") for name in COMMANDS[1:6] if name != "train_classifier"]
    assert len(set(sampling)) == 1  # the value model is of the policy that is searched


def test_results_are_told_and_written_under_their_names(runner, tmp_path, capsys):
    quickstart.main(["--output_dir", str(tmp_path)])
    results = json.loads((tmp_path / "seed1/results.json").read_text())
    assert results["within_auc_75"] == 0.9  # the last evaluation's
    assert results["8"] == pytest.approx({"maj": 0.208, "wmaj": 0.218, "bon": 0.1, "vgs": 0.118, "random": 0.318})
    assert results["16"] == pytest.approx({"maj": 0.216, "wmaj": 0.226, "bon": 0.1, "vgs": 0.126, "random": 0.326})
    printed = capsys.readouterr().out
    for name, numbers in (("majority of N samples", "20.8 21.6"), ("value-guided search", "11.8 12.6"),
                          ("search, random choice", "31.8 32.6"), ("weighted majority of N samples", "21.8 22.6")):  # fmt: skip
        line = next(line for line in printed.splitlines() if line.strip().startswith(name))
        assert " ".join(line.split()[-2:]) == numbers
    told = " ".join(printed.split())
    assert "adds 1 points to the majority's, and searching by value -10 more" in told
    assert "90% of the time" in told
    assert results["what_if"] == {
        "policy": "weighted:sure", "saved": 0.404, "same_answer": 1.0, "repetitions": 9.5, "accuracy": 1.0,
    }  # fmt: skip
    assert "needs 9.5 of 16 repetitions: the same answers with 40 % fewer tokens." in told


def test_answers_that_are_not_all_the_same_are_not_called_so(runner, tmp_path, capsys):
    runner.same = 0.875
    quickstart.main(["--output_dir", str(tmp_path)])
    assert "the same answer on 87.5% of them with 40 % fewer tokens" in " ".join(capsys.readouterr().out.split())


def test_the_run_that_is_replayed_has_enough_repetitions_and_few_problems(runner, tmp_path):
    quickstart.main(["--output_dir", str(tmp_path)])
    found = {
        flag: runner.value("search_many", f"--{flag}") for flag in ("num_repetitions", "num_blocks", "max_problems")
    }
    assert found == {"num_repetitions": "16", "num_blocks": "4", "max_problems": "12"}
    assert runner.value("what_if", "--policy") == "weighted:sure" and "--what_if" in runner.lines["what_if"]


def test_a_command_runs_in_the_checkout_with_one_thread_and_no_hub(tmp_path, monkeypatch):
    """Whatever is set where the user stands, and under this Python; what it says is added to its log."""
    monkeypatch.chdir(tmp_path)
    for name in ("OMP_NUM_THREADS", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "7")
    log = tmp_path / "logs/name.txt"
    code = "import os, sys; print(os.getcwd(), os.environ['OMP_NUM_THREADS'], os.environ['HF_HUB_OFFLINE'], sys.executable)"
    for _ in range(2):
        quickstart.run_command(shlex.join(["python", "-c", code]), log)
    assert log.read_text() == f"{ROOT} 1 1 {sys.executable}\n" * 2


def test_a_stop_ends_it_with_the_signals_status_and_nothing_after_it_runs(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    runner = Runner(stop_at="search_bon")
    monkeypatch.setattr(quickstart, "run_command", runner)
    assert quickstart.main(["--output_dir", str(tmp_path)]) == 130
    assert list(runner.lines) == COMMANDS[:4]
    assert "the same command goes on" in capsys.readouterr().out
    assert not (tmp_path / "seed1/results.json").exists()
