"""Trackers: where data goes, what they take, and that they neither stop nor delay a run."""

import base64
import json
import logging
import os
import sqlite3
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest

from common_lib.cli import UserError
from common_lib.tracking import TRACKERS, Tracker, make_tracker

ROOT = Path(__file__).resolve().parents[2]


def token_for(url: str) -> str:
    return base64.b64encode(json.dumps({"api_address": url, "api_url": url}).encode()).decode()


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith(("NEPTUNE_", "TRACKIO_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NEPTUNE_LOG_DIRECTORY", str(tmp_path / "neptune"))


def stored_operations(folder: Path) -> bytes:
    databases = list(folder.glob("*/run_operations.sqlite3"))
    data = b""
    for database in databases:
        with sqlite3.connect(database) as connection:
            for (operation,) in connection.execute("SELECT operation FROM run_operations"):
                data += operation
    return data


def test_neptune_without_a_token_is_offline_and_keeps_configs_metrics_and_tags(tmp_path, monkeypatch):
    monkeypatch.setenv("NEPTUNE_PROJECT", "team/search")
    tracker = make_tracker("neptune", run_name="aime 24/beam2", tags=["test-tag"])
    tracker.log_configs({"search": {"num_blocks": 8, "stops": [1, 2]}, "none": None, "huge": 10**30, "path": Path("x")})
    tracker.log_metrics({"aime-24/maj_m": 0.5, "aime-24/maj_ci": None}, step=8)
    where, run_id = tracker.where, tracker.id
    tracker.close()
    assert "offline (no NEPTUNE_API_TOKEN)" in where
    database = where.split("neptune sync ")[1].split("`")[0]
    assert Path(database).is_file()
    stored = stored_operations(tmp_path / "neptune")
    for name in (b"search/num_blocks", b"search/stops", b"[1, 2]", b"aime-24/maj_m", b"test-tag", run_id.encode()):
        assert name in stored
    assert b"maj_ci" not in stored


def test_a_resumed_run_keeps_its_id():
    first = make_tracker("neptune", "team/search", run_name="train")
    first.close()
    second = make_tracker("neptune", "team/search", run_name="other", resume_id=first.id)
    second.close()
    assert second.id == first.id
    assert first.id.startswith("train-")
    assert first.where != second.where  # each session has its own file to sync


def test_neptune_mode_offline_is_respected_and_the_token_is_never_shown(monkeypatch, caplog, capfd):
    token = token_for("http://127.0.0.1:9")
    monkeypatch.setenv("NEPTUNE_API_TOKEN", token)
    monkeypatch.setenv("NEPTUNE_MODE", "Offline")
    with caplog.at_level(logging.DEBUG):
        tracker = make_tracker("neptune", "team/search")
        tracker.log_metrics({"a": 1.0}, step=0)
        tracker.close()
    assert "offline (as NEPTUNE_MODE says)" in tracker.where
    assert token not in "".join(capfd.readouterr()) + caplog.text + tracker.where


@pytest.mark.parametrize(
    ("variable", "token", "ending", "status"),
    [
        ("NEPTUNE_API_TOKEN", token_for("http://127.0.0.1:9"), "close", 0),
        ("NEPTUNE_API_KEY", token_for("http://127.0.0.1:9"), "crash", 3),
        ("NEPTUNE_API_TOKEN", "not-a-token-of-neptune", "close", 0),
    ],
    ids=["closed", "crashed", "no token of neptune"],
)
def test_a_host_that_is_not_there_delays_the_end_by_the_timeout_only(tmp_path, variable, token, ending, status):
    """The real sending process, at a port where nobody listens: neptune's own exit waits a minute or for ever."""
    program = f"""
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        from common_lib.tracking import make_tracker
        if __name__ == "__main__":
            tracker = make_tracker("neptune", "team/search")
            tracker.close_seconds = 1.0
            tracker.log_metrics({{"a": 1.0}}, step=0)
            print("logged", tracker.where, flush=True)
            if sys.argv[1] == "close":
                tracker.close()
            else:
                raise SystemExit(3)
    """
    path = tmp_path / "program.py"
    path.write_text(textwrap.dedent(program))
    done = subprocess.run(
        [sys.executable, str(path), ending], env=os.environ | {variable: token},
        capture_output=True, text=True, timeout=40, check=False,
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    assert "logged neptune project team/search" in done.stdout
    assert token not in done.stdout + done.stderr
    assert list((tmp_path / "neptune").glob("*/run_operations.sqlite3"))


def test_a_failing_tracker_warns_once_and_the_run_goes_on(caplog):
    class Broken(Tracker):
        def send_configs(self, configs):
            raise OSError("disk full")

        def send_metrics(self, metrics, step):
            raise OSError("disk full")

        def send_rest(self, seconds):
            raise OSError("disk full")

    tracker = Broken()
    tracker.log_configs({"a": 1})
    tracker.log_metrics({"a": 1}, step=1)
    tracker.close()
    tracker.close()
    assert [record.message for record in caplog.records].count(caplog.records[0].message) == len(caplog.records) == 1
    assert "disk full" in caplog.text


def test_a_tracker_that_does_not_start_is_a_warning(monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NEPTUNE_LOG_DIRECTORY", str(tmp_path / "file"))
    tracker = make_tracker("neptune", "team/search")
    tracker.log_metrics({"a": 1.0}, step=0)
    tracker.close()
    assert "does not start" in caplog.text
    assert "not tracked" in tracker.where


def test_closing_is_given_its_time_and_happens_once():
    seen = []

    class Recorder(Tracker):
        def send_rest(self, seconds):
            seen.append(seconds)

    tracker = Recorder()
    tracker.close_seconds = 7.0
    tracker.close()
    tracker.close()
    assert seen == [7.0]


def test_metrics_that_are_no_finite_numbers_are_left_out(caplog):
    seen = []

    class Recorder(Tracker):
        def send_metrics(self, metrics, step):
            seen.append((metrics, step))

    tracker = Recorder()
    tracker.log_metrics({"a": 1, "b": None, "c": float("nan"), "d": "0.5", "e": True}, step=3)
    tracker.log_metrics({"b": None}, step=4)
    tracker.close()
    assert seen == [({"a": 1.0, "e": 1.0}, 3)]
    assert "b, c, d" in caplog.text


@pytest.mark.parametrize(
    ("kind", "project", "word"),
    [
        ("mlflow", "a/b", "neptune, wandb, trackio, none"),
        ("neptune", None, "NEPTUNE_PROJECT"),
        ("neptune", "name", "WORKSPACE/PROJECT"),
    ],
)
def test_mistakes_are_told_in_one_line(kind, project, word):
    with pytest.raises(UserError, match=word):
        make_tracker(kind, project)


def test_a_missing_package_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(UserError, match="pip install trackio"):
        make_tracker("trackio")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        UserError, match='^wandb is not installed: pip install "wandb>=0.31,<0.32", or use --tracker none$'
    ):
        make_tracker("wandb")
    monkeypatch.setitem(sys.modules, "neptune_scale", None)
    with pytest.raises(UserError, match="pip install neptune-scale"):
        make_tracker("neptune", "a/b")


@pytest.mark.parametrize(
    "error", [ImportError("libstdc++ is too old"), ModuleNotFoundError("no pydantic", name="pydantic")]
)
def test_a_package_that_is_there_and_cannot_be_imported_is_not_called_missing(monkeypatch, error):
    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name == "wandb":
                raise error

    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    with pytest.raises(UserError, match=f"^wandb is installed but cannot be imported .*{error.args[0][:6]}"):
        make_tracker("wandb")


def test_both_scripts_take_every_tracker():
    from search_lib.arguments import parse_args as search_arguments
    from training_lib.arguments import parse_args as training_arguments

    for kind in TRACKERS:
        assert search_arguments(["--tracker", kind]).tracker == kind
        assert training_arguments(["--data_path", "x", "--tracker", kind]).tracker == kind


def test_no_tracker_takes_everything_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tracker = make_tracker("none")
    tracker.log_configs({"a": [1]})
    tracker.log_metrics({"a": 1.0}, step=0)
    tracker.close()
    assert list(tmp_path.iterdir()) == []


def test_trackio_keeps_configs_and_metrics_and_resumes(tmp_path):
    pytest.importorskip("trackio", reason="trackio is optional and not installed")
    program = """
        import sys
        sys.path.insert(0, sys.argv[1])
        from common_lib.tracking import make_tracker
        if __name__ == "__main__":
            tracker = make_tracker("trackio", "search", run_name="r", tags=["t"], resume_id=sys.argv[2] or None)
            tracker.log_configs({"blocks": 8, "stops": [1, 2]})
            tracker.log_metrics({"maj_m": 0.25 * int(sys.argv[3])}, step=int(sys.argv[3]))
            tracker.close()
            print("id", tracker.id)
    """
    run_id = ""
    for step in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program), str(ROOT), run_id, step],
            env=os.environ | {"TRACKIO_DIR": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        run_id = done.stdout.split("\nid ")[1].split()[0]
    with sqlite3.connect(next(tmp_path.glob("*.db"))) as connection:
        rows = connection.execute("SELECT run_name, step, metrics FROM metrics ORDER BY step").fetchall()
        configs = connection.execute("SELECT config FROM configs").fetchall()
    assert [(name, step, json.loads(metrics)["maj_m"]) for name, step, metrics in rows] == [
        (run_id, 1, 0.25),
        (run_id, 2, 0.5),
    ]
    assert json.loads(configs[0][0])["blocks"] == 8


def test_trackio_is_given_configs_tags_metrics_and_the_end(monkeypatch):
    """By a stand-in for the optional package."""
    calls = []

    class FakeRun:
        config: ClassVar = {}

        def log(self, metrics, step):
            calls.append((metrics, step))

    def init(**settings):
        calls.append(settings)
        return FakeRun()

    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(init=init, finish=lambda: calls.append("finish")))
    tracker = make_tracker("trackio", None, tags=["t"], resume_id="run-1")
    tracker.log_configs({"search": {"blocks": 8}})
    tracker.log_metrics({"maj_m": 0.5}, step=2)
    tracker.close()
    assert calls[0]["name"] == tracker.id == "run-1" and calls[0]["resume"] == "allow"
    assert calls[1:] == [({"maj_m": 0.5}, 2), "finish"]
    assert FakeRun.config == {"tags": '["t"]', "search/blocks": 8}
    assert "trackio show --project value-guided-search" in tracker.where


# ---------------------------------------------------------------------------------------------------------------------
# What neptune-scale is given, by a stand-in


class FakeNeptune:
    """Its Run, noting every call."""

    def __init__(self, **settings):
        self.settings, self.calls = settings, []
        FakeNeptune.made.append(self)

    made: ClassVar[list] = []

    def __getattr__(self, name):
        return lambda *given, **named: self.calls.append((name, *given, *named.items()))


@pytest.fixture
def neptune(monkeypatch):
    monkeypatch.setattr(FakeNeptune, "made", [])
    monkeypatch.setitem(sys.modules, "neptune_scale", SimpleNamespace(Run=FakeNeptune))
    return FakeNeptune.made


def test_neptune_is_given_names_values_steps_and_the_end(neptune, monkeypatch):
    monkeypatch.setenv("NEPTUNE_PROJECT", "team/from-environment")
    monkeypatch.setattr(Tracker, "close_seconds", 7.0)
    tracker = make_tracker("neptune", "team/given", run_name="a run", tags=("x", "y"), resume_id="the-id")
    tracker.log_configs({"search": {"blocks": 8, "deep": {"on": True, "rate": 0.5}}, "none": None, "words": ["a", 1]})
    for step in (3, 4):
        tracker.log_metrics({"a/b_m": step / 2, "left_out": float("inf")}, step=step)
    tracker.close()
    (run,) = neptune
    assert (run.settings["project"], run.settings["run_id"], tracker.id) == ("team/given", "the-id", "the-id")
    assert (run.settings["mode"], run.settings["api_token"]) == ("offline", None)
    assert run.calls == [
        ("add_tags", ["x", "y"]),
        ("log_configs", {"search/blocks": 8, "search/deep/on": True, "search/deep/rate": 0.5, "none": "None",
                         "words": '["a", 1]'}),
        ("log_metrics", {"a/b_m": 1.5}, ("step", 3)),
        ("log_metrics", {"a/b_m": 2.0}, ("step", 4)),
        ("close", ("timeout", 7.0)),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "mode", "token"),
    [
        ({}, "offline", None),
        ({"NEPTUNE_API_TOKEN": "t"}, "async", "t"),
        ({"NEPTUNE_API_KEY": "k"}, "async", "k"),
        ({"NEPTUNE_API_TOKEN": "t", "NEPTUNE_API_KEY": "k"}, "async", "t"),
        ({"NEPTUNE_API_TOKEN": "t", "NEPTUNE_MODE": "offline"}, "offline", "t"),
    ],
)
def test_where_neptune_sends_it(neptune, monkeypatch, environment, mode, token):
    for name, value in ({"NEPTUNE_PROJECT": "team/p"} | environment).items():
        monkeypatch.setenv(name, value)
    tracker = make_tracker("neptune")
    tracker.close()
    (run,) = neptune
    assert (run.settings["project"], run.settings["mode"], run.settings["api_token"]) == ("team/p", mode, token)
    assert ("offline" in tracker.where) == (mode == "offline")


def test_a_run_has_an_id_of_its_own_that_is_a_name_for_a_folder(neptune):
    ids = []
    for name in ("train 1/x", "train 1/x", "y" * 100, "///"):
        tracker = make_tracker("neptune", "team/p", run_name=name)
        tracker.close()
        ids.append(tracker.id)
    assert len(set(ids)) == 4 and [run.settings["run_id"] for run in neptune] == ids
    assert ids[0].startswith("train-1-x-") and ids[2].startswith("y" * 40 + "-") and ids[3].startswith("run-")
    assert all(len(name) <= 64 and "/" not in name for name in ids)


def test_trouble_of_the_sender_is_a_warning_without_the_token(neptune, monkeypatch, caplog):
    monkeypatch.setenv("NEPTUNE_API_TOKEN", "secret")
    tracker = make_tracker("neptune", "team/p")
    for name in ("on_network_error_callback", "on_error_callback", "on_warning_callback"):
        neptune[0].settings[name](OSError("secret is refused"), None)
    tracker.close()
    assert [record.message for record in caplog.records] == [
        "tracker: OSError: <token> is refused (the run goes on; later troubles of the tracker are not shown)"
    ]
