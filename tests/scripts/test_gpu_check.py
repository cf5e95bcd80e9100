"""The check of a GPU: every part reports, one that dies loses itself only, and what it checks would be found."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import gpu_check
import numpy as np
import pytest
import torch
from conftest import ROOT
from fake_parts import give_fake_parts
from gpu_parts import drawing, models, released, scoring, training
from gpu_parts.layouts import LAYOUTS
from gpu_parts.needs import NEEDS
from gpu_parts.report import Report
from parser_flags import flags_of

from classifier_lib import ValueScorer
from common_lib.cli import UserError
from common_lib.files import LineFile
from training_lib.attention import FLEX, SDPA
from training_lib.packing import packed_row

NEEDED = ("torch", "transformers", "numpy", "safetensors")
RIGHT, STEP = training.RIGHT, training.SPEED_TABLE
CASES = ["none, eager", "tree, groups of 4, eager", "pack, eager", "tree, groups of 1, eager"]
COMPILED, FLEX_CASE = "tree, groups of 4, compiled", "tree, groups of 4, packed_flex, eager"
FIGURES = {  # (table, case, figure) that --tiny must report
    "scoring": {
        *itertools.product(["largest difference of a value"], ["float32, sdpa", "bfloat16, sdpa"],
                           ["scorer - full pass", "full pass - full pass in float32", "spread of values"]),
        (scoring.DIFFERENCE, "float32, sdpa", "full pass - full pass in a batch of two"),
        *itertools.product(["growing trees"], ["1 tree", "8 trees"],
                           ["tokens scored", "seconds", "tokens/s", "MFU", "peak over the weights",
                            "re-reading / cached, tokens", "re-reading / cached, time"]),
        *itertools.product(["memory"], [""], [
            "time in copies of keys and values, 1 tree", "cache of 0.0006 GB: peak", "cache of 0.0006 GB: tokens read again",
            "cache of 0.0006 GB: difference of a value", "device too small: back-offs",
            "device too small: difference of a value"]),
    },
    "training": {
        *itertools.product(["tokens computed per loss token"], LAYOUTS,
                           ["groups of 2", "groups of 4", "padding", "memory of a rank", "activation budget"]),
        *itertools.product([RIGHT], [*CASES, COMPILED, FLEX_CASE], ["loss", "gradients"]),
        *itertools.product([RIGHT], [*CASES[1:], FLEX_CASE], ["gradients, planted wrong mask"]),
        *itertools.product([STEP], [*CASES, COMPILED],
                           ["step", "tokens computed", "real tokens/s", "loss tokens/s", "MFU", "peak memory"]),
        *itertools.product([released.TABLE], list(released.CASES),
                           ["step", "tokens computed", "real tokens/s", "loss tokens/s", "MFU", "peak memory",
                            "peak memory / estimated"]),
        *itertools.product([released.TABLE], ["tree (auto)", "pack"], ["loss tokens/s over none as released"]),
        (STEP, FLEX_CASE, "compile"),
        *itertools.product([STEP], [COMPILED], ["compile", "graphs", "compiled again for longer rows"]),
    },
    "memory": set(itertools.product(["GB promised and used"], ["beside transformers"], [
        "caches and activations, promised", "used", "left, promised", "free at the least", "tokens read again, %"])),
    "search": {
        *itertools.product(["searches"], [f"transformers, tiny model, 2 searches, blocks of 16: {order}"
                                          for order in ("this search", "lock-step")],
                           ["wall-clock", "tokens generated/s", "overlap", "engine idle", "prompts from the cache",
                            "tokens scored a token generated"]),
        *itertools.product(["searches"], ["transformers, tiny model, 2 searches, blocks of 16: this search"],
                           ["wall-clock / lock-step", "tokens / lock-step"]),
        *itertools.product([drawing.TABLE], ["8 rows of 4096 logits, float32"],
                           ["argmax alone", "from the shortlist", "where all are sorted"]),
    },
}  # fmt: skip
UNMEASURED = {
    "MFU",
    "peak over the weights",
    "peak memory",
    "peak memory / estimated",
    "cache of 0.0006 GB: peak",
    "used",
    "free at the least",
}  # on a CPU


# ---------------------------------------------------------------------------------------------------------------------
# The whole of it


def packages_of(names: tuple[str, ...]) -> set[str]:
    """Distributions that these need, themselves included, in the form of `metadata.packages_distributions`."""
    found, waiting = set(), list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop().lower())
        if name in found:
            continue
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        found.add(name)
        waiting += [re.match(r"[\w.-]+", need)[0] for need in needs if "extra ==" not in need]
    return found


def hide_other_packages(folder: Path) -> None:
    """A sitecustomize in the folder, for which only NEEDED and what they need are installed."""
    allowed = packages_of(NEEDED) | {"value-guided-search"}  # where `pip install -e .` was run
    hidden = {
        module for module, owners in metadata.packages_distributions().items()
        if not {re.sub(r"[-_.]+", "-", owner.lower()) for owner in owners} & allowed
    }  # fmt: skip
    assert {"datasets", "pyarrow", "matplotlib", "math_verify"} <= hidden and not {"torch", "yaml"} & hidden
    folder.joinpath("sitecustomize.py").write_text(
        f"import sys\nfrom importlib.machinery import PathFinder\nHIDDEN = {hidden!r}\n"
        "class Finder(PathFinder):\n"
        "    @classmethod\n"
        "    def find_spec(cls, name, path=None, target=None):\n"
        "        return None if name.partition('.')[0] in HIDDEN else super().find_spec(name, path, target)\n"
        "sys.meta_path[:] = [Finder if finder is PathFinder else finder for finder in sys.meta_path]\n"
    )


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """(results, table, what it printed) of the script, where nothing but NEEDED is installed."""
    folder, out = tmp_path_factory.mktemp("only"), tmp_path_factory.mktemp("check") / "new"
    hide_other_packages(folder)
    command = [sys.executable, "scripts/gpu_check.py", "--device", "cpu", "--tiny", "--minutes", "4", "--out", str(out)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((out / "gpu_check.json").read_text()), (out / "gpu_check.md").read_text(), done.stdout


def test_every_part_reports_every_figure_where_only_four_packages_are_installed(tiny_run):
    results, table, printed = tiny_run
    assert list(results["parts"]) == list(NEEDS) == list(FIGURES)
    for name, part in results["parts"].items():
        assert (part["status"], part["failed"]) == ("done", []), name
        found = {(row["table"], row.get("case", ""), row["figure"]) for row in part["figures"]}
        assert found == FIGURES[name], found ^ FIGURES[name]
        assert len(found) == len(part["figures"])
        assert {row["figure"] for row in part["figures"] if row["value"] is None} <= UNMEASURED
        assert all(row["good"] for row in part["figures"])
    assert table in printed


def test_the_table_says_what_was_measured_on_what(tiny_run):
    results, table, _ = tiny_run
    assert re.match(r"20\d\d-\d\d-\d\d \d\d:\d\d UTC$", results["date"])
    assert {name: results["versions"][name] for name in NEEDED} == {name: metadata.version(name) for name in NEEDED}
    assert re.match(rf"# GPU check: .+\n\n{results['date']}, [\dms]+, tiny models, random weights. CUDA ", table)
    assert f"torch {torch.__version__}" in table and "All parts ran, and every figure is within its bound." in table
    for part in NEEDS:
        assert f"\n## {part}: done, " in table
    assert "- not measured: MFU, peak over the weights" not in table.replace("\n", " ")  # each with its own reason
    for left_out in (
        "bfloat16, flash_attention_2 (it has no kernel for a CPU)",
        "compiled, but for one layout (--tiny",
        "sgl.Engine (--tiny",
    ):
        assert f"- left out: {left_out}" in table or f"- left out: search through {left_out}" in table


def test_every_key_is_documented(tiny_run):
    results, _, _ = tiny_run
    text = (ROOT / "docs/run_files.md").read_text(encoding="utf-8").partition("## The check of a GPU")[2]
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| ")]
    heads = [i for i, cells in enumerate(rows) if cells[1].strip().startswith("key of ")]
    first, second = (
        {name for cells in part for name in re.findall(r"`(\w+)`", cells[1])}
        for part in (rows[1 : heads[1]], rows[heads[1] + 1 :])
    )
    assert first == set(results)
    parts = results["parts"].values()
    assert second - {"said", "missing"} == set().union(*parts)
    (described,) = [cells[3] for cells in rows if cells[1].strip() == "`figures`"]
    words = set(re.findall(r"`(\w+)`", described))
    assert words == {key for part in parts for row in part["figures"] for key in row}


# ---------------------------------------------------------------------------------------------------------------------
# Parts that die

ENDINGS = {
    "pass": "done",
    "os.kill(os.getpid(), signal.SIGKILL)": "died: killed by signal SIGKILL",
    "os.abort()": "died: killed by signal SIGABRT",
    "raise ValueError('what went wrong')": "died: exit status 1",
    "time.sleep(60)": "stopped: it had not ended after 1 s",
    "os.write(lines._fd, b'{\"figure\": \"half a li'); os.kill(os.getpid(), signal.SIGKILL)": "died: killed by signal SIGKILL",
    "lines.append({'missing': 'No module named numpy'}); sys.exit(2)": "not run: No module named numpy",
    "time.sleep(0.01); sys.exit(3)": "died: exit status 3",
}  # fmt: skip


KILLED, ORDINARY = list(ENDINGS)[1], list(ENDINGS)[2:]


@pytest.mark.parametrize(
    ("ending", "place", "tiny"),
    [*itertools.product([KILLED], [0, 1, 2], [False, True]), *((ending, 0, False) for ending in ORDINARY)],
)
def test_a_part_that_dies_loses_itself_only(monkeypatch, tmp_path, capsys, ending, place, tiny):
    names = ["one", "two", "three"]
    give_fake_parts(monkeypatch, {name: ending if i == place else "pass" for i, name in enumerate(names)})
    minutes = 3 / 60 if "sleep(60)" in ending else 0.5
    flags = ["--device", "cpu", "--minutes", str(minutes), "--out", str(tmp_path), *(["--tiny"] if tiny else [])]
    assert gpu_check.main(flags) == 1
    parts = json.loads((tmp_path / "gpu_check.json").read_text())["parts"]
    assert list(parts) == names
    for i, name in enumerate(names):
        assert parts[name]["status"] == (ENDINGS[ending] if i == place else "done")
        assert [row["value"] for row in parts[name]["figures"]] == [2.0]
    table = (tmp_path / "gpu_check.md").read_text()
    assert f"- {names[place]} {ENDINGS[ending]}" in table and "# GPU check: a card" in table
    assert ("what went wrong" in table) == ("what went wrong" in ending)


def test_where_all_is_well_the_status_is_0(monkeypatch, tmp_path):
    give_fake_parts(monkeypatch, {"one": "pass"})
    assert gpu_check.main(["--device", "cpu", "--out", str(tmp_path)]) == 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_itself_it_leaves_the_parts_that_had_ended_and_no_process(tmp_path, number):
    started = tmp_path / "pid"
    ending = f"end_with_parent('x'); Path({str(started)!r}).write_text(str(os.getpid())); time.sleep(600)"
    program = (
        f"import signal, sys; sys.path[:0] = [{str(ROOT / 'scripts')!r}, {str(ROOT / 'tests')!r}]\n"
        "import pytest, gpu_check, fake_parts\n"
        f"fake_parts.give_fake_parts(pytest.MonkeyPatch(), {{'one': 'pass', 'two': {ending!r}}})\n"
        "signal.signal(signal.SIGTERM, gpu_check.leave)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell has its background jobs ignore it
        f"gpu_check.run_script(lambda _: gpu_check.main(['--device', 'cpu', '--out', {str(tmp_path)!r}]))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(lambda: started.exists() and started.read_text(), 180)
    process.send_signal(number)
    process.wait(timeout=120)
    assert list(json.loads((tmp_path / "gpu_check.json").read_text())["parts"]) == ["one"]
    wait_until(lambda: not Path(f"/proc/{started.read_text()}").exists(), 60)


def wait_until(holds, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_part_gets_its_share_of_the_time_that_is_left(monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr(gpu_check, "PARTS", {"a": ("", 1.0), "b": ("", 2.0), "c": ("", 1.0)})
    monkeypatch.setattr(gpu_check, "run_part", lambda part, args, seconds: given.append((part, seconds)) or part)
    args = gpu_check.parse(["--device", "cpu", "--minutes", "4"])
    assert [name for name, _ in gpu_check.run_parts(args)] == ["a", "b", "c"]
    assert given == [
        ("a", pytest.approx(60, abs=1)),
        ("b", pytest.approx(160, abs=1)),
        ("c", pytest.approx(240, abs=1)),
    ]


def test_what_a_part_is_started_with(monkeypatch):
    seen = []
    monkeypatch.setattr(gpu_check, "child_command", lambda *given: seen.append(given) or ["true"])
    args = gpu_check.parse([])
    for seconds in (200.0, 20.0):
        gpu_check.run_part("scoring", args, seconds)
    assert [given[2] for given in seen] == [192.0, 16.0]  # it stops by itself before it is stopped
    monkeypatch.undo()
    sizes = {"": ["cuda", "full"], "--tiny": ["cuda", "tiny"], "--device cpu": ["cpu", "small"],
             "--device cpu --tiny": ["cpu", "tiny"]}  # fmt: skip
    for flags, wanted in sizes.items():
        command = gpu_check.child_command("search", gpu_check.parse(flags.split()), 5.0, Path("x"))
        assert command[2:] == ["gpu_parts.search", *wanted, "5.0", "x"]


# ---------------------------------------------------------------------------------------------------------------------
# Users


def test_mistakes_are_one_line_before_anything_is_run(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check, "run_part", None)
    with pytest.raises(UserError, match="choose from '?scoring"):
        gpu_check.main(["--parts", "scores"])
    with pytest.raises(UserError, match="--minutes 0.0 must be above 0"):
        gpu_check.main(["--minutes", "0"])
    for name in ("gpu_check.json", "gpu_check.md"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(UserError, match=f"{name} exists; move it away, or give another --out"):
            gpu_check.main(["--out", str(tmp_path)])
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()
    assert flags_of(gpu_check.main, monkeypatch) == {"device", "tiny", "parts", "minutes", "out"}


def test_a_machine_without_a_gpu_is_told_in_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "scripts/gpu_check.py", "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: --device cuda: this machine has 0 usable GPUs; give --device cpu\n")
    assert not list(tmp_path.iterdir())


def test_flags_without_torch():
    program = (
        "import runpy, sys, atexit; sys.argv = ['gpu_check.py', '--help']\n"
        "atexit.register(lambda: print('slow:', sorted({'torch', 'transformers', 'numpy'} & set(sys.modules))))\n"
        "runpy.run_path('scripts/gpu_check.py', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.endswith("slow: []\n"), done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# The table


def figure(name, value, case="", good=True, table="t", **more):
    row = {"table": table, "figure": name, "value": value, "good": good, "why": "no reason", **more}
    return row | ({"case": case} if case else {})


def test_tables_have_a_row_a_case_and_show_what_is_bad():
    rows = [figure("speed", 1234.5, "a", unit="s"), figure("off", 0.5, "a", good=False, at_most=0.1), figure("speed", 2.0, "b"),
            figure("peak", None, "b"), figure("alone", 3.14159, table="u", at_least=3.0),
            figure("same", 1.0, table="u", at_least=1.0, at_most=1.0)]  # fmt: skip
    assert gpu_check.tables(rows) == [
        "| t | speed, s | off |", "|---|---:|---:|", "| a | 1,234 | **0.5** (BAD: ≤ 0.1) |", "| b | 2 |  |", "",
        "| u | |", "|---|---:|", "| alone | 3.14 (≥ 3) |", "| same | 1 (= 1) |", "",
    ]  # fmt: skip


def test_what_is_wrong_is_named_first():
    part = {"status": "done", "seconds": 1.0, "notes": [], "left_out": [], "failed": [{"failed": "fp8", "why": "no kernel"}],
            "figures": [figure("off", 0.5, "a", good=False, at_most=0.1)]}  # fmt: skip
    results = {
        "card": "C",
        "cuda": "1",
        "date": "D",
        "seconds": 2.0,
        "models": "M",
        "versions": {},
        "parts": {"p": part},
    }
    assert gpu_check.faults(results) == ["p: fp8 failed: no kernel", "p, t, a: off is 0.5, ≤ 0.1 is asked for"]
    assert "**2 wrong:**\n- p: fp8 failed: no kernel\n" in gpu_check.markdown(results)
    results["parts"]["p"] |= {"failed": [], "figures": [], "status": "died: x"}
    assert gpu_check.faults(results) == ["p died: x"]


# ---------------------------------------------------------------------------------------------------------------------
# What parts check


@pytest.fixture
def report(tmp_path):
    """A report, and `rows` of it."""
    lines = LineFile(tmp_path / "lines.jsonl")
    found = Report(lines, "cpu", "tiny", 1000.0)
    found.rows = lambda: [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    yield found
    lines.close()


def test_bounds_time_and_failures(report):
    report.figure("t", "low", 0.1, at_most=0.2)
    report.figure("t", "high", 0.3, at_most=0.2)
    report.figure("t", "less", 0.1, at_least=0.2)
    report.figure("t", "zero", 0.0, at_least=0.0)
    report.figure("t", "none", None, at_most=0.2, why="because")
    report.figure("t", "nan", float("nan"), at_most=0.2)
    assert [row["good"] for row in report.rows()] == [True, False, False, True, True, False]
    assert report.has_time(900, "this") and not report.has_time(1100, "that")
    with report.going_on("what"):
        raise ValueError("first\nsecond")
    assert report.rows()[-2]["left_out"] == "that" and report.rows()[-2]["why"].startswith(
        "no time: it takes about 1100 s, and 1000"
    )
    assert report.rows()[-1] == {"failed": "what", "why": "ValueError: first second"}


@pytest.mark.parametrize("packing", ["pack", "tree"])
@pytest.mark.parametrize("attention", [SDPA, FLEX])
def test_a_planted_wrong_mask_is_found(report, packing, attention):
    """A step whose rows see across traces fails the check that the right one passes, on every kernel of a CPU."""
    bench, case = training.StepBench(report), training.Case(packing, attention=attention)
    with training.flex_on_cpu():
        training.compare(bench, case, step := bench.step(case))
        training.compare(bench, case, replace(step, attention=training.with_wrong_mask(attention)))
    found = [row["good"] for row in report.rows() if row["table"] == RIGHT]
    assert found == [True, True, True, False, False, True]


def test_a_mask_that_is_right_is_not_called_wrong(report, monkeypatch):
    """The planted fault must be one: where it is not, the check says that it finds nothing."""
    monkeypatch.setattr(training, "with_wrong_mask", lambda attention: attention)
    bench, case = training.StepBench(report), training.Case("pack")
    training.compare(bench, case, bench.step(case))
    planted = report.rows()[-1]
    assert (planted["figure"], planted["good"]) == ("gradients, planted wrong mask", False)


def test_flash_attention_is_planted_too():
    """It goes by positions, not by `end`."""
    batch = packed_row([training.Trace(np.arange(1, 1 + length), 1, 1, (0, length)) for length in (5, 3)])
    from training_lib.attention import VARLEN_ATTENTIONS

    bounds = [
        training.with_wrong_mask(VARLEN_ATTENTIONS[0]).inputs(batch, torch.device("cpu"))["cu_seq_lens_q"].tolist()
    ]
    assert bounds == [[0, 8]] and VARLEN_ATTENTIONS[0].inputs(batch, torch.device("cpu"))["cu_seq_lens_q"].tolist() == [
        0,
        5,
        8,
    ]


@pytest.mark.parametrize("trees", [1, 3])
def test_what_scoring_reads_is_counted(trees):
    """In closed form and by those who read it: once each, against whole traces of all candidates and final beams."""
    growth = scoring.Growth(prompt=5, block=3, rounds=2, candidates=4, trees=trees)
    model = models.value_model("tiny", "cpu", torch.float32)
    scorer = ValueScorer(model)
    traces = scoring.cached(scorer, growth)
    assert scorer.usage.tokens_scored == growth.tokens_cached == trees * (5 + 2 * 4 * 3)
    assert scoring.rereading(model, growth) == growth.tokens_reread == trees * (4 * 8 + 4 * 11 + 2 * 11)
    assert sorted(len(ids) for ids, _ in traces) == [8] * 4 * trees + [11] * 4 * trees
    pairs = sum(range(1, 6)) + 4 * (6 + 7 + 8) + 4 * (9 + 10 + 11)
    assert growth.pairs == trees * pairs


def test_models_of_one_seed_have_the_same_weights_in_every_dtype():
    exact, rounded = (models.value_model("tiny", "cpu", dtype) for dtype in (torch.float32, torch.bfloat16))
    pairs = zip(exact.parameters(), rounded.parameters(), strict=True)
    assert all(torch.equal(a.bfloat16(), b) for a, b in pairs)
    assert rounded.model.rotary_emb.inv_freq.dtype == torch.float32


def test_a_value_that_is_off_is_found(report, monkeypatch):
    full, seen = scoring.full_value, []

    def off_for_one(model, ids, rows=1):
        seen.append(ids)
        return full(model, ids, rows) + 1e-4 * (ids == seen[0])

    monkeypatch.setattr(scoring, "full_value", off_for_one)
    scoring.differences(report)
    assert [row["good"] for row in report.rows() if row.get("figure") == "scorer - full pass"] == [False, True]


def test_synthetic_roll_outs_share_their_prefixes():
    table = training.synthetic_table(1, 50, scale=1 / 256)
    traces = [table.trace(rollout) for rollout in range(8)]
    starts = [trace.start for trace in traces]
    assert starts == sorted(starts[:4]) + sorted(starts[4:]) and table.max_length == 64
    assert np.array_equal(traces[0].tokens[: starts[0]], traces[3].tokens[: starts[0]])
    assert not np.array_equal(traces[0].tokens[: starts[0]], traces[4].tokens[: starts[0]])
    assert np.array_equal(table.trace(3).tokens, traces[3].tokens)


def test_a_compiled_step_is_the_real_one(report):
    """The model of a case is set up as a run's: checkpointing, training mode, head dropout; the optimizer takes the step."""
    bench = training.StepBench(report)
    step = bench.step(training.Case("tree"))
    assert step.model.training and step.model.is_gradient_checkpointing and step.packed and step.total_batch_size == 8
    before = step.model.score[2].weight.detach().clone()
    training.measure(bench, training.Case("none"))
    assert not any(row.get("failed") for row in report.rows()) and torch.equal(before, step.model.score[2].weight)
