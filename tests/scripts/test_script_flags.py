"""Every flag of the developers' scripts at its consumer: models, engine, study or trials in whose place stands a spy."""

import asyncio
import contextlib
import json
import math
from pathlib import Path
from types import SimpleNamespace

import benchmark_replay
import benchmark_search
import compare_with
import coverage_study
import kill_test
import make_real_models
import make_synthetic_run
import pytest
import scaling_study
import tiny
import torch
from handmade_runs import settings
from parser_flags import flags_of, words
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from common_lib.cli import UserError

# ---------------------------------------------------------------------------------------------------------------------
# Benchmarks

SEARCH = {
    "searches": 5, "rounds": 3, "block_size": 7, "prompt": 11, "num_beams": 6, "beam_width": 3, "repeats": 2,
    "engine": "sglang", "sglang_args": "a=1 b=2", "generator": "G", "value_model": "V", "device": "cpu",
}  # fmt: skip
TINY = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, vocab_size=32,
    max_position_embeddings=256, tie_word_embeddings=False, eos_token_id=0,
)  # fmt: skip


def test_flags_of_the_search_benchmark(monkeypatch, tmp_path, capsys):
    seen = SimpleNamespace()

    async def compare(make_bench, args, engine):
        seen.bench, seen.engine, seen.repeats = make_bench(args.searches), engine, args.repeats
        return {"lock-step": [{"x": 1.0}], "this search": [{"x": 2.0}]}

    def make_models(args, folder):
        seen.models = (args.generator, args.value_model, args.device)
        return tmp_path, "the value model"

    info = SimpleNamespace(path="path", vocab_size=50)
    monkeypatch.setattr(benchmark_search, "compare", compare)
    monkeypatch.setattr(benchmark_search, "make_models", make_models)
    monkeypatch.setattr(benchmark_search, "inspect_model", lambda folder, flag: info)
    monkeypatch.setattr(benchmark_search, "choose_engine", lambda name: f"chosen {name}")
    monkeypatch.setattr(benchmark_search, "make_engine", lambda kind, config: (kind, config))
    assert benchmark_search.main(words(SEARCH)) == 0
    assert seen.models == ("G", "V", "cpu")
    kind, config = seen.engine
    assert (kind, tuple(config.sglang_args), config.device) == ("chosen sglang", ("a=1", "b=2"), "cpu")
    bench = seen.bench
    assert (len(bench.prompts), {len(prompt) for prompt in bench.prompts}) == (5, {11})
    shape = bench.config
    assert (shape.num_beams, shape.beam_width, shape.block_size, shape.max_length) == (6, 3, 7, 21)
    assert (bench.model, seen.repeats) == ("the value model", 2)
    assert "5 searches of 6 x 3 candidates, 3 blocks of 7 tokens, prompts of 11" in capsys.readouterr().out
    assert flags_of(benchmark_search.main, monkeypatch) == set(SEARCH)


def test_each_order_is_measured_as_often_as_asked_on_new_prompts(monkeypatch):
    """After one warm-up of each; the engine is closed."""
    measured, closed = [], []

    async def measure(order, bench):
        measured.append((order.__name__, bench))
        return {"wall-clock, s": 1.0}

    async def close():
        closed.append(True)

    monkeypatch.setattr(benchmark_search, "measure", measure)
    numbers = iter(range(100))
    args, engine = SimpleNamespace(repeats=3, searches=9), SimpleNamespace(close=close)
    results = asyncio.run(benchmark_search.compare(lambda count: (count, next(numbers)), args, engine))
    assert {name: len(runs) for name, runs in results.items()} == {"lock-step": 3, "this search": 3}
    assert [name for name, _ in measured] == ["lock_step", "this_search"] * 4
    assert [count for _, (count, _) in measured] == [2, 2, *[9] * 6]
    assert len({number for _, (_, number) in measured}) == 8
    assert closed == [True]


def test_random_or_named_models_of_the_search_benchmark(monkeypatch, tmp_path, value_folder):
    monkeypatch.setattr(benchmark_search, "SMALL", TINY)
    args = SimpleNamespace(device="cpu", generator=None, value_model=None)
    generator, model = benchmark_search.make_models(args, tmp_path)
    assert json.loads((generator / "config.json").read_text())["hidden_size"] == model.config.hidden_size == 16
    args = SimpleNamespace(device="cpu", generator="named", value_model=str(value_folder))
    generator, model = benchmark_search.make_models(args, tmp_path)
    assert (generator, model.config.hidden_size) == (Path("named"), 32)


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
        covered[0.3, 0.5], covered["rejects"] = cover, rejects
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


def test_what_a_replay_costs_is_measured_on_a_run_of_that_size(monkeypatch, capsys):
    assert benchmark_replay.main(["--problems", "3", "--repetitions", "4", "--policies", "70"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("70 policies x 3 problems x 4 repetitions x 101 orders: replayed in ")
    policies = benchmark_replay.make_policies(1000, 16)
    assert len(set(policies)) == 1000 and {policy.stop for policy in policies} == {
        "none",
        "sure",
        "certified",
        "beta",
        "esc",
    }
    assert flags_of(benchmark_replay.main, monkeypatch) == {"problems", "repetitions", "policies"}


def test_flags_of_the_scaling_study(monkeypatch, tmp_path, capsys):
    asked = []

    def simulate(scale):
        asked.append(scale)
        return scaling_study.Outcome(scale, 1.0, {"generators": 1.0}, 1.0, 1.0, 1)

    monkeypatch.setattr(scaling_study, "simulate", simulate)
    flags = {
        "searches": 3, "waves": 4, "request_rate": 55.0, "assignment": "random", "piece": 64, "seed": 6,
        "json": tmp_path / "x",
    }  # fmt: skip
    lists = ["--generators", "5", "16", "--ratios", "5", "2", "--pool_gb", "0", "7.5"]
    assert scaling_study.main([*words(flags), *lists]) == 0
    numbers = [(scale.generators, scale.value_servers, scale.pool_gb) for scale in asked]
    assert numbers == [(g, s, p) for g, each in ((5, (1, 3)), (16, (4, 8))) for s in each for p in (0.0, 7.5)]
    rest = {(s.searches, s.waves, s.writes_each, s.assignment, s.piece, s.seed) for s in asked}
    assert rest == {(3, 4, 55.0, "random", 64, 6)}
    asked.clear()
    assert scaling_study.main(["--generators", "8", "16"]) == 0
    assert [(scale, scale.assignment) for scale in asked] == [
        (scaling_study.Scale(8, 2, assignment="placement"), "placement"),
        (scaling_study.Scale(16, 4, assignment="min_group"), "min_group"),
    ]
    assert flags_of(scaling_study.main, monkeypatch) == {*flags, "generators", "ratios", "pool_gb"}


@pytest.mark.parametrize("what", ["search", "stop sure", "train", "collect", "shards 5"])
def test_flags_of_the_kill_test(monkeypatch, what):
    calls = []
    monkeypatch.setattr(kill_test, "kill_trials", lambda *given: calls.append((*given[:4], *given[5:])) or 1)
    monkeypatch.setattr(kill_test, "train_trials", lambda *given: calls.append(given[:3]))
    monkeypatch.setattr(kill_test, "collect_trials", lambda *given: calls.append(given[:3]) or 1)
    monkeypatch.setattr(kill_test, "shard_trials", lambda *given: calls.append(given[:5]) or 1)
    flags = ["--times", "7", "--engine", "transformers", "--problems", "3", "--ranks", "4", "--seed", "9"]
    status = kill_test.main(flags if what == "search" else [*flags, *f"--{what}".split()])
    assert status == (0 if what == "train" else 1)
    kinds = [*kill_test.KINDS, *kill_test.KINDS[:2]]
    expected = {"search": (7, "transformers", 3, 9, "none"), "stop sure": (7, "transformers", 3, 9, "sure"),
                "train": (kinds, 4, 9), "collect": (7, 3, 9),
                "shards 5": (7, "transformers", 3, 5, 9)}  # fmt: skip
    assert calls == [expected[what]]
    assert flags_of(kill_test.main, monkeypatch) == {
        "times", "engine", "problems", "train", "collect", "shards", "stop", "ranks", "seed",
    }  # fmt: skip
    with pytest.raises(UserError, match="--collect: not allowed with argument --train"):
        kill_test.main(["--train", "--collect"])
    for other in (["--train"], ["--collect"], ["--shards", "2"]):
        with pytest.raises(UserError, match="--stop is for a search in one process"):
            kill_test.main(["--stop", "sure", *other])


def test_the_kill_test_sees_a_byte_and_a_journal_of_a_collection(tmp_path):
    """compare_collections: the same files but for locks; what differs, is missing or is left is named."""
    for name in ("one", "other"):
        (tmp_path / name / ".collect").mkdir(parents=True)
        (tmp_path / name / ".collect/settings.json").write_text("{}")
        (tmp_path / name / "README.md").write_text("card")
    (tmp_path / "one/.collect/lock.shard-0-of-3").touch()
    kill_test.compare_collections(tmp_path / "one", tmp_path / "other")
    (tmp_path / "one/README.md").write_text("cars")
    (tmp_path / "one/.collect/rows-00000.jsonl").touch()
    with pytest.raises(ValueError, match=r"^\.collect/rows-00000\.jsonl, README\.md differ$"):
        kill_test.compare_collections(tmp_path / "one", tmp_path / "other")


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


def test_the_kill_test_sees_what_should_not_count(tmp_path):
    """Of a run in which the first problem is decided after one repetition."""
    lines = [
        {"data_idx": i, "repeat_idx": r, "global_idx": 2 * r + i, "generated_scores": [0.5]}
        for r in range(2) for i in range(2)
    ]  # fmt: skip
    rounds = [{"data_idx": i, "repeat_idx": r, "round": 0} for r in range(2) for i in range(2)]

    def write(name, lines, aside=(), stopped=1):
        for ending, rows in ((".jsonl", lines), (".tree.jsonl", rounds), (".uncounted.jsonl", aside)):
            (tmp_path / f"{name}{ending}").write_text("".join(json.dumps(row) + "\n" for row in rows))
        meta = settings(2, 2, 2, 1, 2) | {"stopped": {"0": stopped}}
        (tmp_path / f"{name}.meta.json").write_text(json.dumps(meta))
        return tmp_path / f"{name}.jsonl"

    counted = [lines[0], lines[1], lines[3]]
    reference = write("reference", counted, lines[2:3])
    kill_test.compare(write("again", counted), reference, 0.0)
    for spoilt, aside, stopped, told in [
        (lines, [], 1, "global_idx 2 is in the wrong file"), (counted, lines[1:2], 1, "global_idx 1 is in the wrong file"),
        (lines, [], 2, "other problems are decided"), ([lines[1], lines[0], lines[3]], [], 1, "in order"),
        (counted[:2], [], 1, "2 results, but 3 searches"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=told):
            kill_test.compare(write("spoilt", spoilt, aside, stopped), reference, 0.0)


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


def test_flags_of_the_script_that_makes_real_models(monkeypatch, tmp_path):
    """Both models lie in --out with the tokenizer; --seed is that of the random head, the backbone is the generator's."""
    torch.manual_seed(0)
    config = LlamaConfig(**{**TINY, "vocab_size": 264, "eos_token_id": 256})
    llama = LlamaForCausalLM(config)
    monkeypatch.setattr(make_real_models, "download", lambda folder: folder / "model.gguf")
    monkeypatch.setattr(make_real_models.AutoTokenizer, "from_pretrained", lambda *a, **k: tiny.tiny_tokenizer())
    monkeypatch.setattr(make_real_models.LlamaForCausalLM, "from_pretrained", lambda *a, **k: llama)
    weights = []
    for number, seed in enumerate((3, 3, 4)):
        out = tmp_path / str(number)
        assert make_real_models.main(["--out", str(out), "--seed", str(seed)]) == 0
        assert all((out / name / "tokenizer.json").is_file() for name in ("generator", "value_model"))
        weights.append(load_file(out / "value_model/model.safetensors"))
        generator = load_file(out / "generator/model.safetensors")
        name = "model.layers.1.mlp.up_proj.weight"
        assert torch.equal(weights[-1][name], generator[name])
    heads = [found["score.0.weight"] for found in weights]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert flags_of(make_real_models.main, monkeypatch) == {"out", "seed"}


def test_flags_of_the_comparison_of_two_trees(monkeypatch, tmp_path):
    """The revision is checked out; both trees run, that one's outputs come first; status 1 where they differ."""
    calls = []

    @contextlib.contextmanager
    def worktree(revision):
        calls.append(revision)
        yield tmp_path / revision

    def make_inputs(tree, folder):
        (folder.parent / "work").mkdir()
        calls.append(tree)

    monkeypatch.setattr(compare_with, "worktree", worktree)
    monkeypatch.setattr(compare_with, "make_inputs", make_inputs)
    monkeypatch.setattr(compare_with, "run_all", lambda tree, folder: calls.append((tree, folder)))
    for equal, status in ((True, 0), (False, 1)):
        calls.clear()
        monkeypatch.setattr(compare_with, "compare", lambda *folders, equal=equal: calls.append(folders) or equal)
        keep = tmp_path / f"kept{status}"
        to = ["--to", "another"] if status else []
        assert compare_with.main(["some", *to, "--keep", str(keep)]) == status
        after = tmp_path / "another" if to else compare_with.ROOT
        assert calls == [
            "some", *to[1:], tmp_path / "some", (tmp_path / "some", keep / "before"), (after, keep / "after"),
            (keep / "before", keep / "after"),
        ]  # fmt: skip
    assert flags_of(compare_with.main, monkeypatch) == {"revision", "keep", "to"}
