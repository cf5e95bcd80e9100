"""Benchmarks by name and from files, prompts, and texts of blocks."""

import json

import datasets
import pytest
import tiny

from common_lib.cli import UserError
from data_utils import (
    BENCHMARKS,
    INSTRUCTION,
    Problem,
    benchmark_name,
    check_prompt_format,
    format_prompt,
    load_benchmark,
    open_dataset,
    read_file,
)

ROWS = [{"problem": "1+1?", "answer": "2"}, {"problem": "{x} in \\boxed{}", "answer": 25}]
PROBLEMS = [Problem("1+1?", "2"), Problem("{x} in \\boxed{}", "25")]


def write(path, kind):
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS) + "\n")
    elif kind == "json":
        path.write_text(json.dumps(ROWS))
    else:
        text = [{"problem": p.problem, "answer": p.answer} for p in PROBLEMS]
        dataset = datasets.Dataset.from_list(text)
        {"parquet": dataset.to_parquet, "saved": dataset.save_to_disk}[kind](str(path))
    return str(path)


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "saved"])
def test_local_benchmarks(tmp_path, kind):
    path = write(tmp_path / ("set" if kind == "saved" else f"set.{kind}"), kind)
    assert load_benchmark(path) == PROBLEMS
    assert load_benchmark(path, 1) == PROBLEMS[:1]
    assert benchmark_name(path) == "set"


def test_a_folder_of_parquet_files(tmp_path):
    write(tmp_path / "test.parquet", "parquet")
    assert load_benchmark(str(tmp_path)) == PROBLEMS


def test_a_folder_of_json_lines_and_the_split_that_is_taken(tmp_path):
    text = [{"problem": p.problem, "answer": p.answer} for p in PROBLEMS]
    for split in ("dev", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row | {"answer": split}) + "\n" for row in text))
    assert [problem.answer for problem in load_benchmark(str(tmp_path))] == ["test", "test"]
    parts = {"a": datasets.Dataset.from_list(text), "b": datasets.Dataset.from_list(text[:1])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match="saved has no split test; it has a, b"):
        load_benchmark(str(tmp_path / "saved"))
    assert open_dataset(str(tmp_path / "saved"), "b").num_rows == 1


@pytest.mark.parametrize("name", BENCHMARKS)
def test_named_benchmarks_use_their_columns(name, monkeypatch):
    known = BENCHMARKS[name]
    asked = []

    def fake(repo):
        asked.append(repo)
        return {"train": datasets.Dataset.from_list([{known.problem: "p", known.answer: 33, "Solution": "s"}])}

    monkeypatch.setattr(datasets, "load_dataset", fake)
    assert load_benchmark(name) == [Problem("p", "33")]
    assert asked == [known.place]
    assert benchmark_name(name) == name


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("aime-2024", None, "neither a known benchmark .aime-24, aime-25, hmmt-feb-24, hmmt-feb-25."),
        ("a.csv", "x", "ends in '.csv'; known are .jsonl, .json, .parquet"),
        ("a.jsonl", "", "has no problems"),
        ("a.jsonl", '{"problem": "x", "answer": "y"}\nnope\n', "line 2, is not JSON"),
        ("a.jsonl", '{"problem": "x"}', "row 1, has no 'answer' .its columns: problem"),
        ("a.jsonl", '{"problem": "x", "answer": null}', "row 1, has no 'answer'"),
        ("a.jsonl", "[1, 2]", "row 1: an object"),
        ("a.json", '{"problem": "x"}', "must hold a list"),
        ("a.json", "{", "is not JSON"),
        ("a.parquet", "not parquet", "cannot be read"),
    ],
)
def test_bad_benchmarks_name_what_is_wrong(tmp_path, monkeypatch, name, text, message):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        load_benchmark(name)


def test_an_unreachable_hub_is_one_line(monkeypatch):
    def offline(repo):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(UserError, match="neither a local path nor in the local cache, and the hub cannot be reached"):
        load_benchmark("aime-24")


# -------------------------------------------------------------------------------------------------------------- prompts


def test_the_released_prompt_token_by_token():
    tokenizer = tiny.tiny_tokenizer()
    ids = format_prompt("Is {x} 1?", "r1", tokenizer)
    assert tokenizer.decode(ids) == (
        "<｜begin▁of▁sentence｜><｜User｜>Is {x} 1? Please think step-by-step and put your final answer within \\boxed{}."
        "<｜Assistant｜><think>\n"
    )
    special = tokenizer.convert_tokens_to_ids
    assert ids[:2] == special(["<｜begin▁of▁sentence｜>", "<｜User｜>"])
    assert ids[-3:-1] == special(["<｜Assistant｜>", "<think>"])
    assert ids.count(tokenizer.bos_token_id) == 1


def test_the_released_prompt_on_the_released_tokenizer(shared):
    from common_lib.models import load_tokenizer

    tokenizer = load_tokenizer(shared("tokenizer_r1_distill"), "--piref_model")
    ids = format_prompt("Find $x$.", "r1", tokenizer)
    assert ids[:2] == [151646, 151644]
    assert ids[-3:-1] == [151645, 151648]


def test_chat_and_bare_use_the_template():
    tokenizer = tiny.tiny_tokenizer()
    text = tokenizer.decode(format_prompt("Q", "chat", tokenizer))
    assert text == (
        "<｜begin▁of▁sentence｜><｜User｜>Q Please think step-by-step and put your final answer within \\boxed{}."
        "<｜Assistant｜><think>\n"
    )
    assert tokenizer.decode(format_prompt("Q", "bare", tokenizer)) == (
        "<｜begin▁of▁sentence｜><｜User｜>Q<｜Assistant｜><think>\n"
    )
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="needs a chat template"):
        format_prompt("Q", "chat", tokenizer)


def test_unknown_special_tokens_are_said(caplog):
    class Other:
        def get_vocab(self):
            return {"a": 0}

    check_prompt_format("r1", Other())
    assert "reads them as plain text" in caplog.text


@pytest.mark.parametrize("prompt_format", ["r1", "chat", "bare"])
def test_every_format_token_by_token(prompt_format):
    """Specials are one token each; the problem is ordinary text, braces and words of the template among it."""
    tokenizer = tiny.tiny_tokenizer()
    special = tokenizer.convert_tokens_to_ids
    problem = "Is {problem} or {x} {} 1?"
    text = problem if prompt_format == "bare" else f"{problem} {INSTRUCTION}"
    plain = [special(token) for token in tokenizer.tokenize(text)]
    assert format_prompt(problem, prompt_format, tokenizer) == [
        *special(["<｜begin▁of▁sentence｜>", "<｜User｜>"]), *plain, *special(["<｜Assistant｜>", "<think>"]),
        *tokenizer("\n", add_special_tokens=False).input_ids,
    ]  # fmt: skip


def test_formats_that_need_no_template_and_those_that_do():
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['role'] }}:{{ messages[0]['content'] }}|{{ add_generation_prompt }}"
    assert tokenizer.decode(format_prompt("Q", "bare", tokenizer)) == "user:Q|True"
    assert tokenizer.decode(format_prompt("Q", "chat", tokenizer)) == f"user:Q {INSTRUCTION}|True"
    tokenizer.chat_template = None
    assert tokenizer.decode(format_prompt("Q", "r1", tokenizer)).startswith("<｜begin▁of▁sentence｜><｜User｜>Q Please")


def test_specials_that_are_known_need_no_warning(caplog):
    check_prompt_format("r1", tiny.tiny_tokenizer())
    check_prompt_format("chat", object())
    assert not caplog.text


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("most", [1, 3, 7, 99, None])
def test_only_the_first_problems_are_taken_and_looked_at(tmp_path, kind, most):
    rows = [{"problem": f"p{i}", "answer": str(i), "other": None} for i in range(7)]
    path = tmp_path / f"set.{kind}"
    if kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    else:
        rows.append({"problem": "faulty"})
        path.write_text(json.dumps(rows) if kind == "json" else "".join(json.dumps(row) + "\n\n" for row in rows))
        if most in (99, None):
            with pytest.raises(UserError, match="row 8, has no 'answer'"):
                load_benchmark(str(path), most)
            return
    assert load_benchmark(str(path), most) == [Problem(f"p{i}", str(i)) for i in range(min(most or 7, 7))]


def test_named_benchmarks_obey_the_number_too(monkeypatch):
    rows = [{"Problem": f"p{i}", "Answer": i, "problem": "wrong", "answer": "wrong"} for i in range(5)]
    monkeypatch.setattr(datasets, "load_dataset", lambda repo: {"train": datasets.Dataset.from_list(rows)})
    assert load_benchmark("aime-24", 2) == [Problem("p0", "0"), Problem("p1", "1")]


@pytest.mark.parametrize(
    ("there", "asked", "taken"),
    [
        (["train"], None, "train"), (["dev"], None, "dev"), (["train", "test"], None, "test"),
        (["train", "dev"], None, None), (["train", "test"], "train", "train"), (["train", "dev"], "dev", "dev"),
        (["train"], "test", None),
    ],
)  # fmt: skip
def test_which_split_is_taken(tmp_path, there, asked, taken):
    parts = {name: datasets.Dataset.from_list([{"problem": name, "answer": "1"}]) for name in there}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    if taken is None:
        with pytest.raises(UserError, match=rf"has no split test; it has {', '.join(there)}"):
            open_dataset(str(tmp_path / "saved"), asked)
    else:
        assert open_dataset(str(tmp_path / "saved"), asked)[0]["problem"] == taken


def test_long_lines_and_blank_ones(tmp_path):
    rows = [{"problem": "x" * size, "answer": "€\u2028"} for size in (10, 70_000, 2 << 20, 3)]
    path = tmp_path / "long.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert read_file(path) == rows
    path.write_text(path.read_text(encoding="utf-8") + "\n\n{broken\n", encoding="utf-8")
    with pytest.raises(UserError, match="long.jsonl, line 10, is not JSON"):
        read_file(path)


def test_places_that_do_not_exist():
    for place in ("./nowhere", "/nowhere/x", "~/nowhere", "a/b/c", "name"):
        with pytest.raises(UserError, match=f"{place} does not exist; give a folder"):
            open_dataset(place)
