"""Every flag of the developers' scripts at its consumer: models, engine, study or trials in whose place stands a spy."""

import contextlib
import json
import math
from pathlib import Path
from types import SimpleNamespace

import benchmark_scoring
import benchmark_search
import benchmark_training
import compare_with
import coverage_study
import kill_test
import make_real_models
import make_synthetic_run
import pytest
import tiny
import torch
from parser_flags import flags_of
from transformers import LlamaConfig, LlamaForCausalLM

from common_lib.cli import UserError
from examples.miniature import make_generator


def words(flags):
    return [word for name, value in flags.items() for word in (f"--{name}", *str(value).split())]


# ---------------------------------------------------------------------------------------------------------------------
# The miniature's generator

GENERATOR = {
    "num_steps": 5, "batch_size": 3, "max_lr": 0.002, "num_train": 7, "num_test": 4, "forget_carry": 0.1, "skip_step": 0.2,
    "stall": 0.3, "seed": 5,
}  # fmt: skip


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Make a generator; returns its folder, learning rates, batch shapes and the noise of its traces."""
    rates, shapes, noises = [], [], []
    adamw, encode, noisy = torch.optim.AdamW, make_generator.encode, make_generator.noisy_trace

    class Spy(adamw):
        def step(self, *args, **more):
            rates.append(self.param_groups[0]["lr"])
            return super().step(*args, **more)

    def encode_spy(tokenizer, prompts, traces):
        shapes.append(len(traces))
        return encode(tokenizer, prompts, traces)

    def noise_spy(problem, rng, noise):
        noises.append(noise)
        return noisy(problem, rng, noise)

    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    monkeypatch.setattr(make_generator, "encode", encode_spy)
    monkeypatch.setattr(make_generator, "noisy_trace", noise_spy)

    def make(name, **changes):
        for seen in (rates, shapes, noises):
            seen.clear()
        folder = tmp_path / name
        assert make_generator.main([*words(GENERATOR | changes), "--output_dir", str(folder)]) == 0
        return folder, list(rates), list(shapes), list(noises)

    return make


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_flags_of_the_generator_script(made, monkeypatch):
    folder, rates, shapes, noises = made("one")
    assert shapes == [3] * 5
    assert rates == pytest.approx(
        [0.002 * min((s + 1) / 40, 0.5 * (1 + math.cos(math.pi * s / 5))) for s in range(5)]
    )  # fmt: skip
    assert {tuple(vars(noise).values()) if hasattr(noise, "__dict__") else (noise.forget_carry, noise.skip_step, noise.stall)
            for noise in noises} == {(0.1, 0.2, 0.3)}  # fmt: skip
    assert len(noises) == 2 * 3  # of the last two steps; the first three learn clean traces
    assert (len(lines_of(folder / "problems_train.jsonl")), len(lines_of(folder / "problems_test.jsonl"))) == (7, 4)
    known = flags_of(make_generator.parse_args, monkeypatch)
    assert known == {*GENERATOR, "output_dir"}


def test_the_seed_changes_problems_weights_and_traces(made, monkeypatch):
    """And each apart: what is drawn first must not be all that depends on it."""
    drawn = []
    train = make_generator.train

    def spy(model, steps, num_steps, max_lr):
        drawn.append((model.model.embed_tokens.weight.detach().clone(), list(steps)))
        return train(model, iter(drawn[-1][1]), num_steps, max_lr)

    monkeypatch.setattr(make_generator, "train", spy)
    folders = [made(str(seed), seed=seed)[0] for seed in (5, 6)]
    problems = [lines_of(folder / "problems_train.jsonl") for folder in folders]
    assert problems[0] != problems[1]
    assert not torch.equal(drawn[0][0], drawn[1][0])
    assert [ids.tolist() for ids, _ in drawn[0][1]] != [ids.tolist() for ids, _ in drawn[1][1]]


# ---------------------------------------------------------------------------------------------------------------------
# Benchmarks

SEARCH = {
    "searches": 5, "rounds": 3, "block_size": 7, "prompt": 11, "num_beams": 6, "beam_width": 3, "repeats": 2,
    "engine": "sglang", "sglang_args": "a=1 b=2", "piref_gpu_util": 0.25, "value_cache_gb": 0.5, "generator": "G",
    "value_model": "V", "shape": "1.5b", "device": "cpu",
}  # fmt: skip


def test_flags_of_the_search_benchmark(monkeypatch, tmp_path, capsys):
    seen = SimpleNamespace()

    def compare(make_bench, args, engine):
        seen.bench, seen.engine = make_bench(args.searches), engine
        seen.repeats = args.repeats

        async def none():
            return {"lock-step": [{"x": 1.0}], "this search": [{"x": 2.0}]}

        return none()

    def make_models(args, folder):
        seen.models = (args.generator, args.value_model, args.shape, args.device)
        return tmp_path, "the value model"

    info = SimpleNamespace(path="path", vocab_size=50)
    monkeypatch.setattr(benchmark_search, "compare", compare)
    monkeypatch.setattr(benchmark_search, "make_models", make_models)
    monkeypatch.setattr(benchmark_search, "inspect_model", lambda folder, flag: info)
    monkeypatch.setattr(benchmark_search, "choose_engine", lambda name: f"chosen {name}")
    monkeypatch.setattr(benchmark_search, "make_engine", lambda kind, config: (kind, config))
    assert benchmark_search.main(words(SEARCH)) == 0
    assert seen.models == ("G", "V", "1.5b", "cpu")
    kind, config = seen.engine
    assert (kind, config.gpu_share, tuple(config.sglang_args), config.device) == (
        "chosen sglang",
        0.25,
        ("a=1", "b=2"),
        "cpu",
    )
    bench = seen.bench
    assert (len(bench.prompts), {len(prompt) for prompt in bench.prompts}) == (5, {11})
    shape = bench.config
    assert (shape.num_beams, shape.beam_width, shape.block_size, shape.max_length) == (6, 3, 7, 21)
    assert (bench.model, bench.cache_bytes, seen.repeats) == ("the value model", int(0.5e9), 2)
    assert "5 searches of 6 x 3 candidates, 3 blocks of 7 tokens, prompts of 11" in capsys.readouterr().out
    assert flags_of(benchmark_search.main, monkeypatch) == set(SEARCH)


def test_random_or_named_models_of_the_search_benchmark(monkeypatch, tmp_path, value_folder):
    small = dict(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=32,
    )
    monkeypatch.setitem(benchmark_search.SHAPES, "small", small)
    args = SimpleNamespace(device="cpu", generator=None, value_model=None, shape="small")
    generator, model = benchmark_search.make_models(args, tmp_path)
    assert json.loads((generator / "config.json").read_text())["hidden_size"] == model.config.hidden_size == 16
    args = SimpleNamespace(device="cpu", generator="named", value_model=str(value_folder), shape="small")
    generator, model = benchmark_search.make_models(args, tmp_path)
    assert (generator, model.config.hidden_size) == (Path("named"), 32)


SCORING = {
    "shape": "1.5b", "device": "cpu", "dtype": "bf16", "attention": "eager", "prompt": 5, "block": 3, "rounds": 2,
    "candidates": 4, "cache_gb": 0.25,
}  # fmt: skip


def test_flags_of_the_scoring_benchmark(monkeypatch, capsys):
    """Tokens read: once each, against whole traces of every candidate in every round and of the final beams."""
    small = dict(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=32,
    )
    monkeypatch.setitem(benchmark_scoring.SHAPES, "1.5b", small)
    made, caches = [], []
    make_model, scorer = benchmark_scoring.make_model, benchmark_scoring.ValueScorer

    def model_spy(*given):
        made.append(given)
        return make_model(*given)

    def scorer_spy(model, cache_bytes):
        caches.append(cache_bytes)
        return scorer(model, cache_bytes)

    monkeypatch.setattr(benchmark_scoring, "make_model", model_spy)
    monkeypatch.setattr(benchmark_scoring, "ValueScorer", scorer_spy)
    benchmark_scoring.main(words(SCORING))
    assert made == [("1.5b", "cpu", torch.bfloat16, "eager")]
    assert caches == [int(0.25e9)]
    printed = capsys.readouterr().out
    read = {
        line.split("|")[1].strip(): line.split("|")[3].strip() for line in printed.splitlines() if line.count("|") == 5
    }
    assert (read["re-reading"], read["cached"]) == (str(4 * 8 + 4 * 11 + 2 * 11), str(5 + 2 * 4 * 3))
    assert flags_of(benchmark_scoring.main, monkeypatch) == set(SCORING)


def test_flags_of_the_training_benchmark(monkeypatch):
    rows = []
    monkeypatch.setattr(benchmark_training, "make_table", lambda folder, count, *scale: rows.append((count, *scale)))
    monkeypatch.setattr(benchmark_training, "benchmark_counts", lambda table: None)
    monkeypatch.setattr(benchmark_training, "benchmark_step", lambda *given: None)
    assert benchmark_training.main(["--rows", "3"]) == 0
    assert rows[0] == (3,)
    assert flags_of(benchmark_training.main, monkeypatch) == {"rows"}


# ---------------------------------------------------------------------------------------------------------------------
# Studies and trials


def test_flags_of_the_coverage_study(monkeypatch, capsys):
    """And its exit status: 1 where a gated figure leaves its band, whatever the ungated ones say."""
    asked, covered = [], {(2.0, 2.0): 0.95, (0.5, 0.5): 0.95, (0.3, 0.5): 0.95, (0.1, 0.9): 0.5, (0.05, 0.02): 0.5}

    def study(alpha, beta, *numbers):
        asked.append(numbers)
        return [
            ["mean", 1, 0.5, covered[alpha, beta], 0.5, 0.1],
            ["paired test rejects", 1, 0.05, rejects, math.nan, 0.0],
        ]

    monkeypatch.setattr(coverage_study, "study", study)
    for cover, rejects, status in ((0.95, 0.05, 0), (0.92, 0.05, 1), (0.98, 0.05, 1), (0.95, 0.07, 1), (0.95, 0.03, 1)):
        covered[0.3, 0.5] = cover
        assert coverage_study.main(["--simulations", "11", "--problems", "12", "--seed", "13"]) == status
    assert set(asked) == {(11, 12, 13)}
    assert "1 gated figures outside" in capsys.readouterr().out
    assert flags_of(coverage_study.main, monkeypatch) == {"simulations", "problems", "seed"}


def test_the_study_depends_on_its_seed_its_runs_and_its_problems(monkeypatch):
    monkeypatch.setattr(coverage_study, "TRUTH_PROBLEMS", 5000)
    rows = [coverage_study.study(0.5, 0.5, *numbers) for numbers in ((20, 8, 1), (20, 8, 1), (20, 8, 2), (20, 9, 1))]
    assert str(rows[0]) == str(rows[1])  # NaN is not equal to itself
    assert str(rows[0]) != str(rows[2])
    assert str(rows[0]) != str(rows[3])
    assert [row[3] * 40 % 2 for row in rows[0]] == [0.0] * len(rows[0])  # shares of 20 runs


@pytest.mark.parametrize("train", [False, True])
def test_flags_of_the_kill_test(monkeypatch, train):
    calls = []
    monkeypatch.setattr(kill_test, "kill_trials", lambda *given: calls.append(given[:4]) or 1)
    monkeypatch.setattr(kill_test, "train_trials", lambda *given: calls.append(given[:3]))
    flags = ["--times", "7", "--engine", "transformers", "--problems", "3", "--ranks", "4", "--seed", "9"]
    status = kill_test.main([*flags, "--train"] if train else flags)
    assert status == (0 if train else 1)
    kinds = [*kill_test.KINDS, *kill_test.KINDS[:2]]
    assert calls == ([(kinds, 4, 9)] if train else [(7, "transformers", 3, 9)])
    assert flags_of(kill_test.main, monkeypatch) == {"times", "engine", "problems", "train", "ranks", "seed"}


def test_the_kill_test_sees_what_was_lost_or_done_twice(tmp_path):
    """compare: equal but for what a second start may change; anything else is named."""
    lines = [
        {"data_idx": i, "repeat_idx": 0, "global_idx": i, "reward": [1], "generated_scores": [0.5], "dt": 1.0}
        for i in range(2)
    ]
    rounds = [{"data_idx": i, "repeat_idx": 0, "round": r} for i in range(2) for r in range(2)]

    def write(name, lines, rounds):
        for ending, rows in ((".jsonl", lines), (".tree.jsonl", rounds)):
            (tmp_path / f"{name}{ending}").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / f"{name}.jsonl"

    reference = write("reference", lines, rounds)
    again = [line | {"dt": 9.0, "tokens_reread": 5} for line in lines]
    kill_test.compare(write("again", again, rounds), reference, 0.0)
    near = [line | {"generated_scores": [0.5 + 1e-7]} for line in lines]
    kill_test.compare(write("near", near, rounds), reference, 1e-6)
    for spoilt, journal, told in [
        (lines[:1], rounds, "1 results, but 2 searches"), (lines[::-1], rounds, "not 0 .. 1 in order"),
        ([lines[0], lines[1] | {"reward": [0]}], rounds, "a line differs"), (near, rounds, "scores differ by 1.00e-07"),
        (lines, rounds[:-1] + rounds[-2:-1], r"rounds of search \(1, 0\) are \[0, 0\]"),
        (lines, rounds[1:], r"rounds of search \(0, 0\) are \[1\]"), (lines, rounds[:2], "2 results, but 1 searches"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=told):
            kill_test.compare(write("spoilt", spoilt, journal), reference, 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# What makes inputs

SYNTHETIC = {
    "problems": 3, "repetitions": 2, "num_blocks": 6, "block_size": 50, "max_length": 100, "seed": 4, "search_type": "beam3",
    "early_stop": 0.2, "noise": 0.5, "beta": "0.25 0.75",
}  # fmt: skip


def test_flags_of_the_synthetic_run(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(
        make_synthetic_run, "make_synthetic_run", lambda path, options: seen.append((path, vars(options)))
    )
    assert make_synthetic_run.main([str(tmp_path / "x.jsonl"), *words(SYNTHETIC), "--released"]) == 0
    ((path, options),) = seen
    assert path == tmp_path / "x.jsonl"
    assert options == SYNTHETIC | {"beta": (0.25, 0.75), "released": True, "problem_texts": []}
    assert flags_of(make_synthetic_run.main, monkeypatch) == {*SYNTHETIC, "released", "output_path"}


def test_a_llama_model_gives_the_same_logits_as_qwen2(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, rms_norm_eps=1e-3, rope_theta=500.0, tie_word_embeddings=True,
    )  # fmt: skip
    llama = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in llama.parameters():
            weight.mul_(3)
    ids = torch.arange(20)[None]
    qwen = make_real_models.as_qwen2(llama)
    assert torch.allclose(qwen(ids).logits, llama(ids).logits, atol=1e-4)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    with pytest.raises(UserError, match="is not empty; give a new folder"):
        make_real_models.main(["--out", str(tmp_path / "full")])
    assert tiny.tiny_config().model_type == "qwen2"


def test_flags_of_the_comparison_of_two_trees(monkeypatch, tmp_path):
    """The revision is checked out; both trees run, that one's outputs come first; status 1 where they differ."""
    calls = []

    @contextlib.contextmanager
    def worktree(revision):
        calls.append(revision)
        yield tmp_path / "tree"

    def make_inputs(tree, folder):
        (folder.parent / "work").mkdir()
        calls.append(tree)

    monkeypatch.setattr(compare_with, "worktree", worktree)
    monkeypatch.setattr(compare_with, "make_inputs", make_inputs)
    monkeypatch.setattr(compare_with, "run_all", lambda tree, folder: calls.append((tree, folder)))
    for equal, status in ((True, 0), (False, 1)):
        calls.clear()
        monkeypatch.setattr(
            compare_with, "compare", lambda before, after, equal=equal: calls.append((before, after)) or equal
        )
        keep = tmp_path / f"kept{status}"
        assert compare_with.main(["some-revision", "--keep", str(keep)]) == status
        assert calls == [
            "some-revision", tmp_path / "tree", (tmp_path / "tree", keep / "before"), (compare_with.ROOT, keep / "after"),
            (keep / "before", keep / "after"),
        ]  # fmt: skip
    assert flags_of(compare_with.main, monkeypatch) == {"revision", "keep"}
