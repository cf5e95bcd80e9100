"""What collect_rollouts.py writes belongs together; what goes on later, and what is refused then."""

import argparse
import json
import shutil

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from collect_spy import ANSWERS, STOPS, TOKENIZER, SpyGrader, collect, make_inputs, write_problems
from tiny import save_generator

import collect_rollouts
from common_lib.cli import UserError
from eval_utils import Grader
from training_lib.collection import cut_positions, load_problems
from training_lib.collection_folder import CollectionFolder, ProblemLines


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def base(inputs, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        return collect(patch.setattr, inputs, tmp_path_factory.mktemp("base") / "out", keep_unsolved=True)


# ---------------------------------------------------------------------------------------------------------------------
# Rows


def boxed(text: str) -> str:
    return text.rpartition("\\boxed{")[2].rpartition("}")[0]


def test_each_entry_is_one_roll_out_with_its_own_answer_and_label(base):
    """Against what the engine was asked and wrote; its answers differ within a problem, and problems end out of order."""
    written = {(tuple(request.prompt_ids), tuple(reply.token_ids)): reply for request, reply in base.of_kind(False)}
    ended = [int(request.group) for request, _ in base.of_kind(False) if int(request.group) < 4]
    assert ended != sorted(ended)
    assert [row["problem"] for row in base.rows] == [f"Problem {i}?" for i in range(6)]
    for number, row in enumerate(base.rows):
        assert (row["answer"], row["solution"]) == (ANSWERS[number], f"s{number}")
        entries = [row[name] for name in ("roll_in_ids", "roll_outs_ids", "processed_answer", "labels", "reward")]
        assert len({answer for answer in row["processed_answer"] if answer}) > 1
        for roll_in, roll_out, answer, label, reward in zip(*entries, strict=True):
            reply = written.pop((tuple(roll_in), tuple(roll_out)))
            if reply.finish_reason == "stop":
                assert answer == boxed(TOKENIZER.decode(roll_out)) != ""
                assert label == int(answer == row["answer"])
            else:
                assert label == 2
            assert reward == float(label == 1)
    assert not written
    labels = [label for row in base.rows for label in row["labels"]]
    assert min(labels.count(label) for label in (0, 1, 2)) >= 5


def test_prefixes_are_prefixes_of_the_roll_in_without_its_stop_token(base):
    for group, prompt in base.prompts.items():
        roll_ins = [reply for request, reply in base.of_kind(True) if request.group == group]
        prefixes = [request.prompt_ids[len(prompt) :] for request, _ in base.of_kind(False) if request.group == group]
        assert len(roll_ins) == 3 and len(prefixes) == 3 * 2 * 2
        for number, prefix in enumerate(prefixes):
            tokens = roll_ins[number // 4].token_ids
            assert tokens[: len(prefix)] == prefix and 1 <= len(prefix) < len(tokens) - (tokens[-1] in STOPS)
        for number in range(0, 12, 4):  # two from each of two prefixes, the shorter one first
            one, same, two, last = prefixes[number : number + 4]
            assert one == same and two == last and len(one) < len(two)


def test_the_longest_prefix_ends_one_token_before_the_end_of_the_thought(inputs, tmp_path, monkeypatch):
    """With cuts at every place: the stop token is no part of a roll-in, and a last token that is none is."""
    many = {"num_roll_ins": 6, "prefixes_per_roll_in": 400, "rollouts_per_prefix": 1, "max_problems": 2}
    run = collect(monkeypatch.setattr, inputs, tmp_path / "out", **many)
    ends = []
    for group, prompt in run.prompts.items():
        roll_ins = [reply.token_ids for request, reply in run.of_kind(True) if request.group == group]
        asked = [request.prompt_ids[len(prompt) :] for request, _ in run.of_kind(False) if request.group == group]
        for number, tokens in enumerate(roll_ins):
            prefixes = asked[400 * number : 400 * (number + 1)]
            assert all(tokens[: len(prefix)] == prefix for prefix in prefixes)
            assert max(map(len, prefixes)) == len(tokens) - (tokens[-1] in STOPS) - 1
            assert not any(set(prefix) & set(STOPS) for prefix in prefixes)
            ends.append(tokens[-1] if tokens[-1] in STOPS else "cut")
    assert set(ends) == {*STOPS, "cut"}


def test_the_real_grader_judges_each_answer_by_its_own_problem(inputs, tmp_path, monkeypatch):
    problems = write_problems(tmp_path / "problems.jsonl", ["\\frac{2}{2}", "2.0", "\\text{never}"])
    kind, seen = Grader, []

    class Noting(kind):
        async def agrade(self, pairs):
            verdicts = await super().agrade(pairs)
            seen.extend(zip(pairs, verdicts, strict=True))
            return verdicts

    def patch(module, name, value):
        monkeypatch.setattr(module, name, Noting if name == "Grader" else value)

    run = collect(patch, inputs, tmp_path / "out", problems=problems, keep_unsolved=True)
    truths = {"\\frac{2}{2}": "1", "2.0": "2", "\\text{never}": ""}
    for row in run.rows:
        right = [answer == truths[row["answer"]] for answer in row["processed_answer"]]
        assert [label == 1 for label in row["labels"]] == [
            r and label != 2 for r, label in zip(right, row["labels"], strict=True)
        ]
    assert sum(verdict for _, verdict in seen) >= 2 and len(seen) == 3 * 12
    assert {truth for (truth, _), _ in seen} == set(truths)


def test_the_card_counts_what_the_rows_hold(base):
    labels = np.array([label for row in base.rows for label in row["labels"]])
    lengths = [len(ids) for row in base.rows for ids in row["roll_outs_ids"]]
    card = (base.folder / "README.md").read_text()
    shares = "incorrect {:.1%}, correct {:.1%}, length-limited {:.1%}".format(
        *(np.mean(labels == k) for k in (0, 1, 2))
    )
    assert f"Labels: {shares}." in card
    assert (
        f"| roll-out | {np.mean(lengths):,.0f} | {np.percentile(lengths, 5):,.0f} | {np.median(lengths):,.0f} |" in card
    )
    assert f"| {max(lengths)} |\n" in card


@pytest.mark.parametrize(("weight", "power"), [("sqrt", 0.5), ("uniform", 0.0), ("inverse_sqrt", -0.5)])
def test_places_are_drawn_with_the_stated_probabilities(weight, power):
    drawn = [cut_positions(9, 1, weight, seed)[0] for seed in range(8000)]
    expected = np.arange(1, 9) ** power
    expected = 8000 * expected / expected.sum()
    statistic = ((np.bincount(drawn, minlength=9)[1:] - expected) ** 2 / expected).sum()
    assert statistic < 24.3  # of 7 degrees of freedom, 1 in 1000
    assert cut_positions(9, 8, weight, 0) == list(range(1, 9))
    repeated = cut_positions(3, 7, weight, 0)
    assert repeated == sorted(repeated) and set(repeated) <= {1, 2} and len(repeated) == 7


def test_problems_keep_their_names_and_texts(tmp_path):
    rows = [
        {"problem": "a", "answer": 1, "message_id": "m", "uuid": "u", "id": 7},
        {"problem": "b", "answer": "2", "uuid": "u", "id": 7, "solution": "s"},
        {"problem": "c", "answer": "3", "id": 0, "solution": None},
        {"problem": "d", "answer": "4"},
        {"problem": "e", "answer": ""},
    ]
    path = tmp_path / "p.json"
    path.write_text(json.dumps(rows))
    found = load_problems(str(path), "train", 4)
    assert [(p.message_id, p.problem, p.solution, p.answer) for p in found[:3]] == [
        ("m", "a", "", "1"), ("u", "b", "s", "2"), ("0", "c", "", "3"),
    ]  # fmt: skip
    assert len(found) == 4 and len(found[3].message_id) == 16
    with pytest.raises(UserError, match="row 4 has no answer"):
        load_problems(str(path), "train", 5)


# ---------------------------------------------------------------------------------------------------------------------
# Going on

# Where and how fast; anything else would make other data, and is refused.
FREE = {"output_dir", "batch_size", "engine", "use_sglang_server", "device", "attention_impl", "piref_gpu_util",
        "sglang_port", "sglang_url", "sglang_args", "request_timeout", "shard", "roll_in_url"}  # fmt: skip
OTHER = {
    "split": "test", "max_problems": 5, "num_roll_ins": 4, "prefixes_per_roll_in": 3, "cut_weight": "uniform",
    "rollouts_per_prefix": 1, "keep_unsolved": False, "shard_size": 5, "max_length": 61, "temperature": 0.8, "top_p": 0.7,
    "prompt_format": "chat", "seed": 4, "deterministic": True, "seeded": True, "engine": "sglang", "use_sglang_server": True,
    "device": "cuda:1", "attention_impl": "eager", "piref_gpu_util": 0.2, "sglang_port": 4000, "sglang_url": "http://a:1",
    "sglang_args": ["tp_size=2"], "request_timeout": 9, "batch_size": 1, "output_dir": None,
    "shard": "1/2",
}  # fmt: skip


def options() -> list[argparse.Action]:
    return [action for action in collect_rollouts.build_parser()._actions if action.dest != "help"]


@pytest.fixture
def begun(base, tmp_path):
    """A copy of the finished run, of which one shard is to be done again."""
    folder = tmp_path / "copy"
    shutil.copytree(base.folder, folder)
    return folder


def name_of(action: argparse.Action) -> str:
    return action.option_strings[0].removeprefix("--")


@pytest.mark.parametrize("name", map(name_of, options()))
def test_going_on_with_another_argument(name, inputs, base, begun, monkeypatch):
    other = OTHER | {
        "problems": inputs / "policy/problems.jsonl", "piref_model": inputs / "third",
        "roll_in_models": [inputs / "policy", inputs / "other"], "roll_in_url": f"{inputs / 'policy'}=http://a:1",
    }  # fmt: skip
    shutil.copy(inputs / "problems.jsonl", inputs / "policy/problems.jsonl")
    changes = {} if name == "output_dir" else {name: other[name]}
    if name in ("sglang_url", "sglang_args"):
        changes["engine"] = None
    monkeypatch.setattr("collect_rollouts.choose_engine", lambda name: "transformers")
    if name in FREE:
        run = collect(monkeypatch.setattr, inputs, begun, keep_unsolved=True, **changes)
        assert run.status == 0 and not run.engines and run.rows == base.rows
        return
    field = next(action.dest for action in options() if name_of(action) == name)
    with pytest.raises(UserError, match=rf"was begun with other settings: (.*; )?{field} was .*, is "):
        collect(monkeypatch.setattr, inputs, begun, **({"keep_unsolved": True} | changes))
    assert [pq.read_table(path).to_pylist() for path in sorted(begun.glob("data/*"))] == [
        pq.read_table(path).to_pylist() for path in sorted(base.folder.glob("data/*"))
    ]


def test_a_collection_from_before_a_flag_goes_on_without_it(inputs, base, begun, monkeypatch):
    """Its settings do not name the flag."""
    (path,) = begun.rglob("settings.json")
    settings = json.loads(path.read_text())
    assert settings.pop("seeded") is False
    path.write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"begun with other settings: seeded was False, is True"):
        collect(monkeypatch.setattr, inputs, begun, keep_unsolved=True, seeded=True)
    assert collect(monkeypatch.setattr, inputs, begun, keep_unsolved=True).rows == base.rows


def test_other_problems_or_weights_under_the_same_names_are_refused(tmp_path, monkeypatch):
    inputs = make_inputs(tmp_path)
    collect(monkeypatch.setattr, inputs, tmp_path / "out")
    write_problems(inputs / "problems.jsonl", [*ANSWERS[:-1], "another"])
    with pytest.raises(UserError, match=r"begun with other settings: problem_texts was"):
        collect(monkeypatch.setattr, inputs, tmp_path / "out")
    write_problems(inputs / "problems.jsonl", ANSWERS)
    save_generator(inputs / "policy", seed=9)
    with pytest.raises(UserError, match=r"begun with other settings: models was"):
        collect(monkeypatch.setattr, inputs, tmp_path / "out")


def test_what_is_done_is_not_done_again_and_the_rest_is_what_it_would_have_been(inputs, base, begun, monkeypatch):
    """One shard is gone, of which one problem's line is left; the rest of its file is torn, a long line."""
    (begun / "data/train-00001-of-00002.parquet").unlink()
    line = json.dumps({"i": 5} | base.rows[5])
    (begun / ".collect/rows-00001.jsonl").write_text(f"{line}\n" + '{"i": 4, "problem": "' + "x" * 70_000)
    run = collect(monkeypatch.setattr, inputs, begun, keep_unsolved=True)
    assert set(run.prompts) == {"4"} and run.rows == base.rows
    assert set(map(repr, run.requests)) <= set(map(repr, base.requests))


def test_roll_ins_of_another_model_are_kept(inputs, tmp_path, monkeypatch):
    """Stopped while the generator continues them: the other model is not asked again."""
    settings = {"roll_in_models": [inputs / "other", inputs / "policy"], "keep_unsolved": True}
    whole = collect(monkeypatch.setattr, inputs, tmp_path / "whole", **settings)
    broken = SpyGrader.agrade

    async def stop(self, pairs):
        raise KeyError("the power goes")

    monkeypatch.setattr(SpyGrader, "agrade", stop)
    with pytest.raises(KeyError):
        collect(monkeypatch.setattr, inputs, tmp_path / "out", **settings)
    monkeypatch.setattr(SpyGrader, "agrade", broken)
    run = collect(monkeypatch.setattr, inputs, tmp_path / "out", **settings)
    assert [engine.config.model_path.rsplit("/", 1)[1] for engine in run.engines] == ["policy"]
    assert run.rows == whole.rows


def test_a_shard_of_which_all_is_left_out_is_not_done_again(inputs, tmp_path, monkeypatch):
    problems = write_problems(tmp_path / "p.jsonl", ["never", "never", "0", "1", "2"])
    settings = {"problems": problems, "shard_size": 2, "num_roll_ins": 6}
    run = collect(monkeypatch.setattr, inputs, tmp_path / "out", **settings)
    assert [path.name for path in sorted(run.folder.glob("data/*"))] == [
        "train-00001-of-00003.parquet", "train-00002-of-00003.parquet",
    ]  # fmt: skip
    again = collect(monkeypatch.setattr, inputs, tmp_path / "out", **settings)
    assert not again.engines and [row["answer"] for row in again.rows] == ["0", "1", "2"]
    assert "5 problems; 2 of them are left out" in (run.folder / "README.md").read_text()


def test_lines_of_problems_are_in_their_order_and_the_folder_counts_them(tmp_path):
    settings = {"num_problems": 5, "shard_size": 3, "keep_unsolved": True}
    folder = CollectionFolder(tmp_path, settings)
    assert (folder.num_files, folder.missing(), folder.num_done) == (2, [0, 1, 2, 3, 4], 0)
    row = {"labels": [1], "roll_in_ids": [[1]], "roll_outs_ids": [[2]], "reward": [1.0], "processed_answer": ["1"],
           "message_id": "m", "problem": "p", "solution": "", "answer": "1"}  # fmt: skip
    for number in (4, 2, 0):
        folder.add(number, row | {"problem": str(number)})
    assert (folder.missing(), folder.num_done) == ([1, 3], 3)
    folder.close()
    lines = ProblemLines(tmp_path / ".collect/rows-00000.jsonl")
    assert [record["i"] for record in lines.records()] == [0, 2] and lines.done == {0, 2}
    lines.close()
