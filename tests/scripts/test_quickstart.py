"""The miniature: its task, tokenizer and generator, and the quickstart that runs the whole paper on it."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from random import Random

import pytest
import quickstart
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import collect_rollouts
import report
from common_lib.cli import UserError
from data_utils import format_prompt, load_benchmark
from eval_utils import extract_answer
from examples.miniature import make_generator
from examples.miniature.task import (
    MAX_TRACE_TOKENS,
    Noise,
    Problem,
    clean_trace,
    draw_problem,
    draw_problems,
    is_endless,
    is_right_so_far,
    noisy_trace,
)
from examples.miniature.tokenizer import build_tokenizer
from search_lib import arguments
from training_lib import arguments as training_args

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = Problem(40, (2, 9, 9, 7, 4, 9))

# ---------------------------------------------------------------------------------------------------------------------
# Task


def carries(problem: Problem) -> int:
    total, count = problem.start, 0
    for digit in problem.digits:
        count += total % 10 + digit >= 10
        total += digit
    return count


def test_the_example_of_the_documentation():
    assert EXAMPLE.text == "40a2b9c9d7e4f9"
    assert EXAMPLE.answer == "80"
    assert clean_trace(EXAMPLE) == "a2=42;b9^51;c9^60;d7=67;e4^71;f9^80;</think>\\boxed{80}"
    assert carries(EXAMPLE) == 4


def test_problems_are_distinct_seeded_and_do_not_depend_on_their_number():
    problems = draw_problems(1000, seed=3)
    assert len(set(problems)) == 1000
    assert draw_problems(100, seed=3) == problems[:100]
    assert draw_problems(100, seed=4) != problems[:100]


def test_the_number_of_carry_steps_is_uniform():
    rng = Random(0)
    counts = Counter(carries(draw_problem(rng)) for _ in range(7000))
    assert sorted(counts) == list(range(7))
    # 1,000 each are expected; 5 standard deviations are 146.
    assert all(850 < count < 1150 for count in counts.values())


def test_clean_traces_lead_to_the_answer():
    for problem in draw_problems(300, seed=1):
        trace = clean_trace(problem)
        assert extract_answer(trace) == problem.answer
        assert int(problem.answer) == (problem.start + sum(problem.digits)) % 100
        assert all(is_right_so_far(problem, trace[:end]) for end in range(len(trace) + 1))


def test_each_kind_of_noise():
    rng = Random(0)
    forgetful = noisy_trace(EXAMPLE, rng, Noise(forget_carry=1.0, skip_step=0.0, stall=0.0))
    assert forgetful == "a2=42;b9=41;c9=40;d7=47;e4=41;f9=40;</think>\\boxed{40}"
    assert noisy_trace(EXAMPLE, rng, Noise(0.0, 1.0, 0.0)) == "</think>\\boxed{40}"
    stalled = [noisy_trace(EXAMPLE, rng, Noise(0.0, 0.0, 1.0)) for _ in range(200)]
    endless = [trace for trace in stalled if is_endless(trace)]
    assert 60 < len(endless) < 200
    assert all(len(trace) == MAX_TRACE_TOKENS and not extract_answer(trace) for trace in endless)
    hesitant = [noisy_trace(EXAMPLE, rng, Noise(0.0, 0.0, 0.1)) for _ in range(200)]
    assert any("?" in trace and extract_answer(trace) == EXAMPLE.answer for trace in hesitant)


def test_a_wrong_answer_can_be_seen_in_the_trace_before_it():
    rng, wrong = Random(5), 0
    for problem in draw_problems(400, seed=2):
        trace = noisy_trace(problem, rng)
        if extract_answer(trace) not in ("", problem.answer):
            wrong += 1
            assert not is_right_so_far(problem, trace.split("\\boxed")[0])
    assert wrong > 100


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    """An untrained generator with its tokenizer."""
    folder = tmp_path_factory.mktemp("generator")
    torch.manual_seed(0)
    make_generator.save(folder / "generator", make_generator.new_generator(build_tokenizer()), build_tokenizer())
    return folder / "generator"


@pytest.mark.parametrize("loader", [PreTrainedTokenizerFast, AutoTokenizer])
def test_every_sign_is_one_token_however_the_folder_is_loaded(model_folder, loader):
    tokenizer = loader.from_pretrained(model_folder)
    prompt = format_prompt(EXAMPLE.text, "bare", tokenizer)
    text = f"<bos>{EXAMPLE.text}<think>"
    assert tokenizer.decode(prompt) == text
    assert len(prompt) == 1 + 14 + 1
    trace = clean_trace(EXAMPLE)
    ids = tokenizer(trace + "<eos>", add_special_tokens=False).input_ids
    assert len(ids) == 6 * 6 + 6 and ids[-1] == tokenizer.eos_token_id
    assert ids == build_tokenizer()(trace + "<eos>", add_special_tokens=False).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == trace
    assert extract_answer(tokenizer.decode(ids, skip_special_tokens=True)) == "80"
    assert len(tokenizer) == len(build_tokenizer()) == 48
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Generator


def test_prompts_and_padding_are_not_learned():
    tokenizer = build_tokenizer()
    short, long = Problem(1, (2,)), Problem(1, (2, 3))
    ids, labels = make_generator.encode(
        tokenizer, [f"<bos>{p.text}<think>" for p in (short, long)], [clean_trace(p) + "<eos>" for p in (short, long)]
    )
    assert ids.shape == labels.shape == (2, 8 + 18)
    for row, problem in zip(labels.tolist(), (short, long), strict=True):
        learned = [token for token in row if token != make_generator.IGNORED]
        assert tokenizer.decode(learned) == clean_trace(problem) + "<eos>"
        assert row[: len(problem.text) + 2] == [make_generator.IGNORED] * (len(problem.text) + 2)


def test_endless_traces_get_no_end_and_test_problems_are_never_learned():
    tokenizer, left_out = build_tokenizer(), set(draw_problems(50, seed=0))
    batches = make_generator.batches(tokenizer, 20, 16, Random(0), Noise(0.0, 0.0, 0.5), left_out)
    texts = [tokenizer.decode(row[row != 0]) for ids, _ in batches for row in ids]
    stalled = [text for text in texts if text.endswith("?")]
    assert stalled and all(text.endswith(("?", "<eos>")) for text in texts)
    assert not any("?" in text for text in texts[: 12 * 16]), "clean traces come first"
    assert not {text.removeprefix("<bos>").split("<think>")[0] for text in texts} & {p.text for p in left_out}


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "examples.miniature.make_generator", "--output_dir", str(folder), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_the_generator_script_is_repeatable_and_its_problems_are_disjoint(tmp_path):
    small = ("--num_steps", "3", "--batch_size", "4", "--num_train", "30", "--num_test", "20", "--seed", "7")
    for name in ("one", "two"):
        done = make(tmp_path / name, *small)
        assert done.returncode == 0, done.stderr
    weights = [(tmp_path / name / "generator" / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]
    train = load_benchmark(str(tmp_path / "one" / "problems_train.jsonl"))
    test = load_benchmark(str(tmp_path / "one" / "problems_test.jsonl"))
    assert (len(train), len(test)) == (30, 20)
    assert not {row.problem for row in train} & {row.problem for row in test}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--num_steps", "0"], "--num_steps 0 must be at least 1"),
        (["--stall", "1.5"], "--stall 1.5 is a probability"),
        (["--max_lr", "-1"], "--max_lr -1 must be above 0"),
    ],
)
def test_bad_flags_of_the_generator_script(tmp_path, arguments, told):
    with pytest.raises(UserError, match=told):
        make_generator.parse_args(["--output_dir", str(tmp_path), *arguments])


# ---------------------------------------------------------------------------------------------------------------------
# Quickstart: its commands, its journal, interruptions


@pytest.mark.parametrize("size", [quickstart.FULL, quickstart.FAST])
def test_every_command_is_one_that_its_script_takes(tmp_path, monkeypatch, size):
    monkeypatch.setenv("WORLD_SIZE", "2")
    folder = tmp_path / "with space"
    parsers = {
        "collect_rollouts.py": collect_rollouts.parse_args,
        "inference_eval.py": arguments.parse_args,
        "report.py": report.parse_args,
        "train_classifier.py": training_args.parse_args,
        "examples.miniature.make_generator": make_generator.parse_args,
    }
    seen = set()
    for command in (c for step in quickstart.make_steps(folder, 5, size) for c in step.commands):
        words = shlex.split(command.line)
        script = next(word for word in words if word in parsers)
        args = parsers[script](words[words.index(script) + 1 :])
        seen.add(script)
        assert any(str(folder) in str(value) for value in vars(args).values())
        shown = quickstart.wrapped(command.line)
        assert shlex.split(shown.replace(" \\\n", " ")) == ["$", *words]
    assert seen == set(parsers)


def write_command(name: str, output: Path, *sources: Path, delay: float = 0.0) -> quickstart.Command:
    """A command that appends a line to `output` and needs `sources`."""
    code = f"import sys, time; time.sleep({delay}); [open(p).close() for p in sys.argv[2:]]; print('x', file=open(sys.argv[1], 'a'))"
    return quickstart.Command(name, shlex.join(["python", "-c", code, str(output), *map(str, sources)]), (output,))


@pytest.fixture
def chain(tmp_path):
    """Three steps, each of which needs what the one before has made."""
    a, b, c = (tmp_path / name for name in "abc")
    commands = [write_command("make_a", a), write_command("make_b", b, a), write_command("make_c", c, b)]
    return [quickstart.Step("title", "why", (command,)) for command in commands]


def run_chain(chain, folder: Path) -> None:
    quickstart.run_steps(chain, quickstart.Journal(folder), folder)


def test_what_is_done_is_reused_and_said(chain, tmp_path, capsys):
    run_chain(chain, tmp_path)
    assert "reused: " not in capsys.readouterr().out
    run_chain(chain, tmp_path)
    assert capsys.readouterr().out.count("reused: ") == 3
    assert [(tmp_path / name).read_text() for name in "abc"] == ["x\n"] * 3


def test_what_was_made_from_something_that_is_made_again_is_made_again_too(chain, tmp_path):
    run_chain(chain, tmp_path)
    (tmp_path / "b").unlink()
    run_chain(chain, tmp_path)
    assert [(tmp_path / name).read_text() for name in "abc"] == ["x\n"] * 3
    changed = quickstart.Command("make_a", chain[0].commands[0].line + " ", (tmp_path / "a",))
    run_chain([quickstart.Step("title", "why", (changed,)), *chain[1:]], tmp_path)
    assert [(tmp_path / name).read_text() for name in "abc"] == ["x\nx\n", "x\n", "x\n"]


def test_what_an_unfinished_command_left_stays_for_it_to_go_on(chain, tmp_path):
    (tmp_path / "b").write_text("half\n")
    run_chain(chain[:1], tmp_path)
    quickstart.Journal(tmp_path).write()
    journal = quickstart.Journal(tmp_path)
    quickstart.run_steps(chain, journal, tmp_path)
    assert (tmp_path / "b").read_text() == "half\nx\n"


def test_a_failing_command_is_one_line_with_its_log(chain, tmp_path):
    bad = quickstart.Command("bad", "python -c 'print(1/0)'", (tmp_path / "never",))
    with pytest.raises(UserError, match=r"bad ended with status 1; .*logs/bad\.txt"):
        run_chain([quickstart.Step("title", "why", (bad,)), *chain], tmp_path)
    assert not (tmp_path / "a").exists()


def test_clean_removes_only_what_the_quickstart_made(tmp_path):
    mine, other = tmp_path / "seed1", tmp_path / "seed2"
    for folder in (mine, other):
        folder.mkdir()
        (folder / "file").write_text("x")
    (mine / quickstart.JOURNAL).write_text("{}")
    quickstart.run_folder(quickstart.parse_args(["--clean", "--output_dir", str(tmp_path)]))
    assert mine.exists() and not (mine / "file").exists()
    with pytest.raises(UserError, match="was not made by the quickstart"):
        quickstart.run_folder(quickstart.parse_args(["--clean", "--seed", "2", "--output_dir", str(tmp_path)]))
    assert (other / "file").exists()


def test_two_quickstarts_in_one_folder(tmp_path):
    with (
        quickstart.folder_lock(tmp_path),
        pytest.raises(UserError, match="another quickstart is at work"),
        quickstart.folder_lock(tmp_path),
    ):
        pass


# ---------------------------------------------------------------------------------------------------------------------
# The whole paper, small


def start_quickstart(folder: Path, log: Path) -> subprocess.Popen:
    command = [sys.executable, "scripts/quickstart.py", "--fast", "--seed", "1", "--output_dir", str(folder)]
    with log.open("w") as stream:
        return subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=stream, start_new_session=True)


def interrupt(child: subprocess.Popen, log: Path, text: str, seconds: float) -> None:
    """Ctrl-C some seconds after `text` was shown; it must end in order."""
    deadline = time.monotonic() + 300
    while text not in " ".join(log.read_text().replace("\\\n", "").split()):
        assert child.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    time.sleep(seconds)
    os.killpg(child.pid, signal.SIGINT)
    assert child.wait(60) == 130, log.read_text()
    assert "Nothing is lost: the same command goes on" in log.read_text()
    assert "Traceback" not in log.read_text()


@pytest.fixture(scope="module")
def quickstart_out(tmp_path_factory) -> Path:
    """Output folder of a fast quickstart that was interrupted in two of its steps."""
    folder = tmp_path_factory.mktemp("quickstart")
    out, log = folder / "out", folder / "log.txt"
    for text, seconds in (("$ python collect_rollouts.py", 6), ("--search_type beam2 --selection value", 6)):
        interrupt(start_quickstart(out, log), log, text, seconds)
    assert start_quickstart(out, log).wait(900) == 0, log.read_text()
    return out


def test_the_fast_quickstart_shows_the_papers_claim(quickstart_out):
    results = json.loads((quickstart_out / "seed1-fast" / "results.json").read_text())
    at_8 = results["8"]
    assert at_8["wmaj"] - at_8["maj"] >= 0.15, results
    assert at_8["vgs"] - at_8["wmaj"] >= 0.05, results
    assert at_8["random"] < at_8["wmaj"], results
    assert results["within_auc_75"] >= 0.9, results
    assert set(results["16"]) == set(at_8) == {"maj", "wmaj", "bon", "vgs", "random"}
    assert (quickstart_out / "seed1-fast" / "report" / "report.html").is_file()


def test_a_second_quickstart_reuses_everything_and_says_the_same(quickstart_out, tmp_path):
    results = quickstart_out / "seed1-fast" / "results.json"
    before, log, begin = results.read_text(), tmp_path / "log.txt", time.monotonic()
    assert start_quickstart(quickstart_out, log).wait(60) == 0
    assert log.read_text().count("reused: ") == 7
    assert "value-guided search" in log.read_text()
    assert time.monotonic() - begin < 20
    assert results.read_text() == before


# ---------------------------------------------------------------------------------------------------------------------
# README: its commands as written


@pytest.fixture(scope="module")
def checkout(quickstart_out, tmp_path_factory) -> Path:
    """A folder like a checkout in which the quickstart has run, with room for what commands write."""
    folder = tmp_path_factory.mktemp("checkout")
    for entry in ROOT.iterdir():
        if not entry.name.startswith(".") and entry.name not in ("quickstart_out", "runs"):
            (folder / entry.name).symlink_to(entry)
    (folder / "quickstart_out").mkdir()
    (folder / "quickstart_out" / "seed1").symlink_to(quickstart_out / "seed1-fast")
    return folder


def bash(line: str, folder: Path) -> str:
    """What it prints; it must end well. `python` and `torchrun` are this environment's."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", line],
        cwd=folder,
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def readme_block(text: str) -> str:
    """The first block of commands after `text`."""
    return (
        (ROOT / "README.md").read_text(encoding="utf-8").split(text, 1)[1].split("```bash\n", 1)[1].split("```", 1)[0]
    )


def test_the_readmes_commands_for_ones_own_generator(checkout):
    marker = "<!-- after the quickstart -->\n```bash\n"
    blocks = [part.split("```", 1)[0] for part in (ROOT / "README.md").read_text(encoding="utf-8").split(marker)[1:]]
    assert len(blocks) == 2
    for block in blocks:
        assert "weighted" in bash(block, checkout)
    assert (checkout / "my_report" / "report.html").is_file()
    assert (checkout / "my_comparison" / "report.html").is_file()
    assert (checkout / "runs" / "mine" / "latest" / "model.safetensors").is_file()


def test_the_papers_training_command_as_written_with_overriding_flags(checkout, monkeypatch):
    command = readme_block("Train the value model on 4 GPUs")
    words = shlex.split(command.replace("\\\n", " "))
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert training_args.parse_args(words[words.index("train_classifier.py") + 1 :]).num_steps == 12170
    bash(
        f"{command.rstrip()} --data_path quickstart_out/seed1/rollouts --model_path quickstart_out/seed1/generator "
        "--data_num_response 4 --max_length 80 --total_batch_size 16 --micro_batch_size 4 --num_steps 2 --no-compile "
        "--no-track --no-push_to_hub --device cpu",
        checkout,
    )
    assert (checkout / "runs" / "single_node_run" / "latest" / "model.safetensors").is_file()


def test_the_papers_search_command_as_written_with_overriding_flags(checkout):
    command = readme_block("Search a benchmark with it")
    words = shlex.split(command.replace("\\\n", " "))
    assert arguments.parse_args(words[words.index("inference_eval.py") + 1 :]).num_blocks == 8
    bash(
        f"{command.rstrip()} --benchmark quickstart_out/seed1/problems_test.jsonl --max_problems 5 --engine transformers "
        "--piref_model quickstart_out/seed1/generator --classifier_ckpt_path quickstart_out/seed1/value_model/latest "
        "--prompt_format bare --max_length 60 --block_size 6 --device cpu",
        checkout,
    )
    assert len((checkout / "inference_outputs.jsonl").read_text().splitlines()) == 5
