"""collect_rollouts.py: the schema, the labels, resume, and the way from a generator to a searched problem."""

import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from rollouts import ROOT, run_script
from tiny import save_generator, tiny_tokenizer

import collect_rollouts
from common_lib.cli import UserError
from engine_lib.base import Reply
from training_lib.collection import cut_positions, draw_seed, labels_of, load_problems
from training_lib.collection_folder import SCHEMA, CollectionFolder
from training_lib.rollout_data import load_rollouts


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))  # for scripts
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """Two tiny generators with one tokenizer, and 12 problems."""
    folder = tmp_path_factory.mktemp("collect")
    save_generator(folder / "policy", seed=0)
    save_generator(folder / "other", seed=1)
    rows = [{"problem": f"What is {i} + {i}?", "answer": str(2 * i), "solution": f"s{i}"} for i in range(12)]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def flags(inputs, output, **changes):
    settings = {
        "problems": inputs / "problems.jsonl", "piref_model": inputs / "policy", "output_dir": output, "max_length": 24,
        "num_roll_ins": 2, "prefixes_per_roll_in": 3, "rollouts_per_prefix": 2, "shard_size": 5, "engine": "transformers",
        "device": "cpu", "temperature": 1.0, "top_p": 1.0, "keep_unsolved": True,
    }  # fmt: skip
    parts = []
    for name, value in (settings | changes).items():
        if value is True:
            parts.append(f"--{name}")
        elif value is not False and value is not None:
            parts += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return parts


def read(folder):
    return [row for path in sorted(folder.glob("data/*.parquet")) for row in pq.read_table(path).to_pylist()]


def test_rows_have_the_schema_and_nested_roll_ins(inputs, tmp_path, capsys):
    assert collect_rollouts.main(flags(inputs, tmp_path / "out")) == 0
    files = sorted(path.name for path in (tmp_path / "out/data").iterdir())
    assert files == [f"train-{i:05d}-of-00003.parquet" for i in range(3)]
    assert pq.read_schema(tmp_path / "out/data" / files[0]).remove_metadata() == SCHEMA
    rows = read(tmp_path / "out")
    assert [row["problem"] for row in rows] == [f"What is {i} + {i}?" for i in range(12)]
    tokenizer = tiny_tokenizer()
    for row in rows:
        assert all(
            len(row[name]) == 12 for name in ("roll_in_ids", "roll_outs_ids", "labels", "reward", "processed_answer")
        )
        prompt = tokenizer(
            f"<｜begin▁of▁sentence｜><｜User｜>{row['problem']} Please think step-by-step and put your final answer within "
            "\\boxed{}.<｜Assistant｜><think>\n",
            add_special_tokens=False,
        ).input_ids
        for roll_in in range(2):
            prefixes = row["roll_in_ids"][6 * roll_in : 6 * roll_in + 6]
            assert prefixes[0] == prefixes[1] and prefixes[2] == prefixes[3]  # two roll-outs from each prefix
            for shorter, longer in itertools.pairwise(prefixes):
                assert longer[: len(shorter)] == shorter
            assert all(prefix[: len(prompt)] == prompt and len(prefix) >= len(prompt) for prefix in prefixes)
        for prefix, roll_out, label, reward in zip(
            row["roll_in_ids"], row["roll_outs_ids"], row["labels"], row["reward"], strict=True
        ):
            assert len(roll_out) >= 1 and len(prefix) - len(prompt) + len(roll_out) <= 24
            ended = roll_out[-1] == 256
            assert (label == 2) == (not ended) and (reward == 1.0) == (label == 1)
    card = (tmp_path / "out/README.md").read_text()
    assert "12 problems; 0 of them are left out" in card and "144 roll-outs" in card
    assert "proportional to sqrt of t" in card and "| piref_model | " in card
    assert len(load_rollouts(str(tmp_path / "out"), vocab_size=264, max_length=200, num_response=56)) == 144
    assert datasets.load_dataset(str(tmp_path / "out"), split="train").num_rows == 12


def test_the_batch_does_not_matter_and_a_second_start_does_nothing(inputs, tmp_path, monkeypatch):
    collect_rollouts.main(flags(inputs, tmp_path / "a"))
    collect_rollouts.main(flags(inputs, tmp_path / "b", batch_size=1, shard_size=5))
    assert read(tmp_path / "a") == read(tmp_path / "b")
    monkeypatch.setattr(collect_rollouts, "make_engine", None)
    assert collect_rollouts.main(flags(inputs, tmp_path / "a")) == 0


def test_several_models_write_roll_ins_in_turn(inputs, tmp_path):
    both = [inputs / "policy", inputs / "other"]
    collect_rollouts.main(flags(inputs, tmp_path / "both", roll_in_models=both))
    collect_rollouts.main(flags(inputs, tmp_path / "one"))
    for mixed, alone in zip(read(tmp_path / "both"), read(tmp_path / "one"), strict=True):
        assert mixed["roll_in_ids"][:6] == alone["roll_in_ids"][:6]  # the first roll-in is the policy's in both
        assert mixed["roll_in_ids"][6:] != alone["roll_in_ids"][6:]


def test_without_roll_ins_roll_outs_start_at_the_prompt(inputs, tmp_path):
    collect_rollouts.main(flags(inputs, tmp_path / "out", num_roll_ins=0, rollouts_per_prefix=4))
    for row in read(tmp_path / "out"):
        assert len(row["labels"]) == 4 and all(ids == row["roll_in_ids"][0] for ids in row["roll_in_ids"])
        assert len({tuple(ids) for ids in row["roll_outs_ids"]}) > 1


def test_unsolved_problems_are_left_out_and_answers_are_graded(inputs, tmp_path, monkeypatch):
    """Whatever the generator writes is read as the answer 8, which is right for one of the problems."""
    monkeypatch.setattr(collect_rollouts.CollectionPlan, "decode", lambda self, ids: "</think> \\boxed{8}")
    changes = {"keep_unsolved": False, "num_roll_ins": 0, "rollouts_per_prefix": 6, "max_length": 200}
    assert collect_rollouts.main(flags(inputs, tmp_path / "out", **changes)) == 0
    rows = read(tmp_path / "out")
    assert [row["answer"] for row in rows] == ["8"]
    assert 1 in rows[0]["labels"] and set(rows[0]["processed_answer"]) == {"8"}
    assert "11 of them are left out because no roll-out succeeded" in (tmp_path / "out/README.md").read_text()
    assert len(load_rollouts(str(tmp_path / "out"), vocab_size=264, max_length=200, num_response=6)) == 6


def test_labels():
    assert labels_of(["stop", "stop", "length", "length"], [True, False, True, False]) == [1, 0, 2, 2]


def test_cuts_follow_the_stated_weights():
    drawn = np.array([cut_positions(101, 1, "sqrt", seed)[0] for seed in range(4000)])
    assert drawn.min() >= 1 and drawn.max() <= 100
    places = np.arange(1, 101)
    expected = (places**1.5).sum() / (places**0.5).sum()  # mean under P(t) ~ sqrt(t)
    assert abs(drawn.mean() - expected) < 4 * drawn.std() / np.sqrt(len(drawn))
    assert abs(np.mean([cut_positions(101, 1, "uniform", seed)[0] for seed in range(4000)]) - 50.5) < 2
    for seed in range(50):
        cuts = cut_positions(10, 4, "sqrt", seed)
        assert cuts == sorted(set(cuts)) and len(cuts) == 4
    assert cut_positions(1, 4, "sqrt", 0) == [0, 0, 0, 0]
    assert cut_positions(3, 4, "sqrt", 0) == sorted(cut_positions(3, 4, "sqrt", 0))
    assert len({draw_seed(0, i, j) for i in range(100) for j in range(100)}) > 9990


def test_killed_and_stopped_it_goes_on_to_the_same_data(inputs, tmp_path):
    """SIGKILL and then SIGTERM in the middle; a torn line."""
    more = {"batch_size": 1, "roll_in_models": [inputs / "other", inputs / "policy"]}
    collect_rollouts.main(flags(inputs, tmp_path / "whole", **more))
    arguments = flags(inputs, tmp_path / "out", **more)
    for number, wanted in ((signal.SIGKILL, 2), (signal.SIGTERM, 6)):
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "collect_rollouts.py"), *arguments], stderr=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        deadline = time.monotonic() + 100
        while process.poll() is None and time.monotonic() < deadline:
            lines = 0
            for path in (tmp_path / "out/.collect").glob("rows-*.jsonl"):
                with contextlib.suppress(FileNotFoundError):  # its file has just been finished
                    lines += path.read_text().count("\n")
            if lines + 5 * len(list((tmp_path / "out").glob("data/*.parquet"))) >= wanted:
                break
            time.sleep(0.002)
        assert process.poll() is None, process.stderr.read()
        process.send_signal(number)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 143 and "problems are done; the same command goes on" in said
    shard = len(list((tmp_path / "out").glob("data/*.parquet")))
    with (tmp_path / f"out/.collect/rows-{shard:05d}.jsonl").open("a") as file:
        file.write('{"i": 3, "mess')
    assert collect_rollouts.main(arguments) == 0
    assert read(tmp_path / "out") == read(tmp_path / "whole")
    assert not list((tmp_path / "out/.collect").glob("rows-*"))


def test_from_a_generator_to_a_search(inputs, tmp_path):
    """Collect, train on two ranks with evaluation, resume (sharded), search with the result: the real scripts."""
    assert collect_rollouts.main(flags(inputs, tmp_path / "rollouts")) == 0
    train = [
        "--model_path", inputs / "policy", "--data_path", tmp_path / "rollouts", "--data_num_response", 12,
        "--max_length", 160, "--total_batch_size", 8, "--micro_batch_size", 4, "--num_steps", 4, "--save_every", 2,
        "--eval_every", 2, "--eval_size", 3, "--save_dir", tmp_path / "runs", "--run_name", "run", "--device", "cpu",
        "--packing", "tree",
    ]  # fmt: skip
    for repeat in range(2):
        done = run_script([*train, "--fsdp"] if repeat else train, ranks=2)
        assert done.returncode == 0, done.stderr
        assert "step 4 evaluation: loss" in done.stderr
        if repeat == 0:
            (tmp_path / "runs/run/step-00000004/trainer.json").unlink()
    assert "going on from" in done.stderr
    search = [
        "--benchmark", inputs / "problems.jsonl", "--max_problems", 2, "--piref_model", inputs / "policy",
        "--classifier_ckpt_path", tmp_path / "runs/run/latest", "--engine", "transformers", "--device", "cpu",
        "--max_length", 24, "--block_size", 8, "--num_blocks", 4, "--output_path", tmp_path / "search.jsonl",
    ]  # fmt: skip
    done = run_script(search, script="inference_eval.py")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "search.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all(0 < score < 1 for row in rows for score in row["generated_scores"])


# ---------------------------------------------------------------------------------------------------------------------
# Engines that fail, disks that are full


class FakeEngine:
    """Random tokens, a function of the request; what `spoil` says of a request's number is sent back aborted."""

    name, context_length, vocab_size = "fake", 2048, 264

    def __init__(self, spoil=lambda number: False):
        self.asked, self.spoil, self.closed = 0, spoil, False

    async def generate(self, requests):
        return [self.reply(request) for request in requests]

    def reply(self, request):
        self.asked += 1
        if self.spoil(self.asked):
            return Reply([1], "abort", len(request.prompt_ids))
        draws = random.Random(request.seed)
        tokens = [draws.randrange(256) for _ in range(draws.randint(1, 2 * request.max_new_tokens))]
        ends = len(tokens) < request.max_new_tokens
        ids = [*tokens, 256] if ends else tokens[: request.max_new_tokens]
        return Reply(ids, "stop" if ends else "length", len(request.prompt_ids))

    async def close(self):
        self.closed = True


@pytest.fixture
def fake_engine(monkeypatch):
    """Put an engine in the place of the generator's."""

    def use(**settings):
        engine = FakeEngine(**settings)
        monkeypatch.setattr(collect_rollouts, "make_engine", lambda name, config: engine)
        return engine

    return use


def test_an_aborted_request_is_asked_for_again(inputs, tmp_path, fake_engine):
    fake_engine()
    assert collect_rollouts.main(flags(inputs, tmp_path / "whole")) == 0
    engine = fake_engine(spoil=lambda number: number % 5 == 0)
    assert collect_rollouts.main(flags(inputs, tmp_path / "out")) == 0
    assert engine.asked > 12 * 14 and engine.closed
    assert read(tmp_path / "out") == read(tmp_path / "whole")


def test_a_request_that_always_fails_ends_with_one_line(inputs, tmp_path, fake_engine, capsys):
    engine = fake_engine(spoil=lambda number: number > 40)
    assert collect_rollouts.main(flags(inputs, tmp_path / "out", batch_size=1)) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: the generator failed 4 times (asked for ")
    assert last.endswith("(2 of 12 problems are done; the same command goes on)")
    assert engine.closed


def test_an_engine_with_too_small_a_context_is_told(inputs, tmp_path, fake_engine):
    engine = fake_engine()
    engine.context_length = 100
    with pytest.raises(UserError, match="more than the 100 that the fake engine takes"):
        collect_rollouts.main(flags(inputs, tmp_path / "out"))
    assert engine.closed and not engine.asked


def test_a_full_disk_ends_with_one_line_and_the_same_command_goes_on(inputs, tmp_path, small_disk, fake_engine, capsys):
    fake_engine()
    more = {"max_length": 200, "batch_size": 2}
    assert collect_rollouts.main(flags(inputs, tmp_path / "whole", **more)) == 0
    filler, arguments = small_disk / "filler", flags(inputs, small_disk / "out", **more)
    for room in (
        1,
        10,
        40,
        80,
    ):  # KiB: for nothing, for a journal's beginning, for a shard's rows and not for the shard
        with filler.open("wb") as file:
            file.truncate(0)
            free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_bsize
            file.write(bytes(max(free - room * 1024, 0)))
        capsys.readouterr()
        assert collect_rollouts.main(arguments) == 1
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("error: cannot write ") and "No space left on device" in last
        assert last.endswith(" of 12 problems are done; the same command goes on)")
        assert not list(small_disk.rglob("*.tmp"))
    filler.unlink()
    assert collect_rollouts.main(arguments) == 0
    assert "(0 of 12" not in last
    assert read(small_disk / "out") == read(tmp_path / "whole")


def test_a_second_process_is_told(inputs, tmp_path, fake_engine):
    fake_engine()
    assert collect_rollouts.main(flags(inputs, tmp_path / "out")) == 0
    settings = json.loads((tmp_path / "out/.collect/settings.json").read_text())
    held = CollectionFolder(tmp_path / "out", settings)
    with pytest.raises(UserError, match="another process is collecting into"):
        collect_rollouts.main(flags(inputs, tmp_path / "out"))
    held.close()
    assert collect_rollouts.main(flags(inputs, tmp_path / "out")) == 0


# ---------------------------------------------------------------------------------------------------------------------
# Bad input

BAD = {
    "max_length": ({"max_length": 0}, "--max_length 0 must be at least 1"),
    "positions": ({"max_length": 4000}, "more than the 2048 positions of"),
    "nowhere": ({"problems": "/nowhere/problems.jsonl"}, "/nowhere/problems.jsonl does not exist"),
    "kind": ({"problems": __file__}, "must end in .jsonl, .json, .parquet"),
    "model": ({"piref_model": "/nowhere/model"}, "/nowhere/model"),
    "server": ({"engine": "sglang-server", "roll_in_models": ["a", "b"]}, "a server serves one model"),
    "server by url": (
        {"engine": None, "sglang_url": "http://a:1", "roll_in_models": ["a", "b"]},
        "a server serves one model",
    ),
    "server by flag": ({"use_sglang_server": True, "roll_in_models": ["a"]}, "a server serves one model"),
    "no model of the server": (
        {"roll_in_url": "http://a:1"},
        "--roll_in_url 'http://a:1' must be MODEL=URL: a model of --roll_in_models",
    ),
    "no roll-in model": (
        {"roll_in_url": "x=http://a:1"},
        "--roll_in_url x=http://a:1: x is none of --roll_in_models /",
    ),
    "no url of a roll-in model": (
        {"roll_in_models": ["a"], "roll_in_url": "a=node1"},
        "--roll_in_url 'node1' is no URL of a server; give http://HOST:PORT",
    ),
    "no roll-ins": (
        {"num_roll_ins": 0, "roll_in_models": ["a"], "roll_in_url": "a=http://a:1"},
        "--roll_in_url is for roll-ins, and --num_roll_ins 0 asks for none",
    ),
    "one of two served": (
        {"engine": "sglang-server", "roll_in_models": ["a", "b"], "roll_in_url": "a=http://a:1"},
        "--roll_in_models b: a server serves one model; give --roll_in_url b=URL, or --engine sglang, which loads one after",
    ),
    "url of no server": ({"sglang_url": "http://a:1"}, "--sglang_url needs --engine sglang-server, not transformers"),
    "gpu": ({"device": "cuda:99"}, "--device cuda:99"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_line_before_a_model_loads(inputs, tmp_path, name, monkeypatch):
    monkeypatch.setattr(collect_rollouts, "make_engine", None)
    changes, message = BAD[name]
    with pytest.raises(UserError) as error:
        collect_rollouts.main(flags(inputs, tmp_path / "out", **changes))
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_an_output_of_other_settings_is_left_alone(inputs, tmp_path):
    collect_rollouts.main(flags(inputs, tmp_path / "out", num_roll_ins=0))
    before = read(tmp_path / "out")
    with pytest.raises(UserError, match=r"begun with other settings: temperature was 1.0, is 0.5"):
        collect_rollouts.main(flags(inputs, tmp_path / "out", num_roll_ins=0, temperature=0.5))
    assert read(tmp_path / "out") == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and not of this script"):
        collect_rollouts.main(flags(inputs, tmp_path / "mine"))


def test_problems_without_answers_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"problem": "1", "answer": "1"}\n{"problem": "2", "key": 3}\n')
    with pytest.raises(UserError, match=r"row 1 has no answer \(it has problem, key\)"):
        load_problems(str(tmp_path / "a.jsonl"), "train", None)
    assert len(load_problems(str(tmp_path / "a.jsonl"), "train", 1)) == 1


def test_no_success_at_all_is_told(inputs, tmp_path):
    with pytest.raises(UserError, match="no problem was ever solved"):
        collect_rollouts.main(flags(inputs, tmp_path / "out", num_roll_ins=0, max_length=2, keep_unsolved=False))


def test_mistakes_in_the_flags_are_told_without_importing_torch(inputs, tmp_path):
    code = (
        "import sys, collect_rollouts\n"
        "from common_lib.cli import UserError\n"
        "for change in sys.argv[1].split():\n"
        "    try: collect_rollouts.main([*sys.argv[2:], *change.split('=')])\n"
        "    except UserError as error: print(error)\n"
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    changes = (
        "--max_length=0 --unknown=1 --device=gpu --problems=/nowhere --piref_model=/nowhere --roll_in_models=/nowhere"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, changes, *flags(inputs, tmp_path / "out")], cwd=ROOT, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert len(done.stdout.splitlines()) == 7 and done.stdout.endswith("\nset()\n"), done.stdout
