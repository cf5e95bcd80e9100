"""The miniature: its task, its tokenizer, and the script that makes its generator."""

import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random

import pytest
import torch
from conftest import ROOT
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from common_lib.cli import UserError
from common_lib.files import lock
from data_utils import format_prompt, load_benchmark
from eval_utils import extract_answer
from examples.miniature import make_generator
from examples.miniature.task import (
    MAX_TRACE_TOKENS,
    DigitSum,
    Noise,
    clean_trace,
    draw_problem,
    draw_problems,
    is_endless,
    is_right_so_far,
    noisy_trace,
)
from examples.miniature.tokenizer import build_tokenizer

EXAMPLE = DigitSum(40, (2, 9, 9, 7, 4, 9))

# ---------------------------------------------------------------------------------------------------------------------
# Task


def carries(problem: DigitSum) -> int:
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
    short, long = DigitSum(1, (2,)), DigitSum(1, (2, 3))
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
        (["--max_lr", "-1"], "--max_lr -1.0 must be above 0"),
    ],
)
def test_bad_flags_of_the_generator_script(tmp_path, arguments, told):
    with pytest.raises(UserError, match=told):
        make_generator.parse_args(["--output_dir", str(tmp_path), *arguments])


def test_two_processes_do_not_make_one_generator(tmp_path):
    held = lock(tmp_path / ".lock", "")
    with pytest.raises(UserError, match="another process makes a generator in"):
        make_generator.main(["--output_dir", str(tmp_path), "--num_steps", "1"])
    held.release()
