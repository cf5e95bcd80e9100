"""Going on with a search run: which flags may change, where it may have been stopped, and what its journal must hold."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import search_spy

from common_lib.cli import UserError
from common_lib.signals import Stopped
from data_utils import format_prompt
from engine_lib.base import EngineError
from search_lib.arguments import build_parser
from search_lib.run_files import RunFiles


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    search_spy.write_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory) -> search_spy.Seen:
    """A run that nobody stopped."""
    return search_spy.run(search_spy.base_flags(folder, tmp_path_factory.mktemp("whole") / "out.jsonl"))


@pytest.fixture(scope="module")
def half_done(folder, tmp_path_factory) -> search_spy.Seen:
    """A run whose engine died twice: some searches are finished, some are in the middle of their rounds."""

    def dies_at(group, length):
        def write(request, nth):
            if request.group == group and len(request.prompt_ids) >= PROMPT + length:
                raise EngineError("the spy died")
            return search_spy.by_seed(request, nth)

        return write

    flags, seen = search_spy.base_flags(folder, tmp_path_factory.mktemp("half") / "out.jsonl"), search_spy.Seen()
    for batch_size, group, length in (("1", "2/0", 24), ("3", "3/0", 12)):
        search_spy.run([*flags, "--batch_size", batch_size], dies_at(group, length), seen=seen)
    finished = set(map(search_of, seen.rows))
    assert seen.status == 1
    assert {(0, 0), (1, 0)} <= finished
    assert {search_of(row) for row in seen.rounds} - finished >= {(2, 0), (3, 0)}
    assert [row["round"] for row in seen.rounds if search_of(row) == (2, 0)] == [0, 1, 2]
    return seen


@pytest.fixture
def again(folder, half_done, tmp_path):
    """The half-done run in files of its own, and a start of it with more flags."""
    for path in half_done.output.parent.glob("*"):
        shutil.copy(path, tmp_path)

    def again(*more):
        words = [word.replace("FOLDER", str(folder)).replace("OUT", str(tmp_path)) for word in more]
        return search_spy.run([*search_spy.base_flags(folder, tmp_path / "out.jsonl"), *words])

    return again


PROMPT = len(format_prompt("What is 2 + 2?", "r1", search_spy.TOKENIZER))  # tokens; all four are equally long


def search_of(row: dict) -> tuple[int, int]:
    return row["data_idx"], row["repeat_idx"]


def assert_same_lines(seen, whole):
    """Ids, answers and rewards equal, values to rounding."""
    lines = {search_of(row): row for row in seen.rows}
    for row in whole.rows:
        line = lines[search_of(row)]
        for key in (
            "global_idx",
            "problem",
            "gt_answer",
            "generated_ids",
            "processed_answer",
            "reward",
            "finish_reasons",
        ):
            assert line[key] == row[key]
        assert line["generated_scores"] == pytest.approx(row["generated_scores"], abs=2e-2)


# --------------------------------------------------------------------------------------------------------------- flags

# What a start that goes on may give, flag by flag: None where it goes on, else what the refusal says.
ENGINE = "engine and dtypes differ"
CHANGES = {
    "benchmark": [("FOLDER/problems_copy.jsonl", None), ("FOLDER/others.jsonl", "the benchmark's problems differ")],
    "max_problems": [("3", "--max_problems was None and is 3")],
    "output_path": [("OUT/other.jsonl", None)],
    "num_repetitions": [("3", None), ("1", r"--num_repetitions was 2 and is 1 \(it may only grow\)")],
    "seed": [("4", "--seed was 1337 and is 4")],
    "search_type": [("beam1", "--search_type was 'beam2' and is 'beam1'")],
    "num_blocks": [("6", "--num_blocks was 4 and is 6")],
    "block_size": [("13", "--block_size was 12 and is 13")],
    "max_length": [("47", "--max_length was 48 and is 47")],
    "selection": [("random", "--selection was 'value' and is 'random'")],
    "temperature": [("0.7", "--temperature was 0.6 and is 0.7"), ("0", "--temperature was 0.6 and is 0.0")],
    "top_p": [("0.9", "--top_p was 0.95 and is 0.9")],
    "prompt_format": [("chat", "--prompt_format was 'r1' and is 'chat'")],
    "batch_size": [("1", None)],
    "piref_model": [("FOLDER/generator_copy", None), ("FOLDER/other_generator", "the generator's weights differ")],
    "engine": [("sglang", f"{ENGINE}.*transformers.*sglang"), ("sglang-server", ENGINE)],
    "device": [("cuda:0", f"{ENGINE}.*fp32.*bf16"), ("cpu", None)],
    "attention_impl": [("sdpa", None)],
    "piref_gpu_util": [("0.3", None)],
    "use_sglang_server": [("", ENGINE)],
    "sglang_port": [("31000", None)],
    "sglang_url": [("http://one:1 --engine sglang-server", ENGINE)],
    "sglang_args": [("tp_size=2 --engine sglang", ENGINE)],
    "deterministic": [("", "--deterministic was False and is True")],
    "seeded": [("", "--seeded was False and is True")],
    "request_timeout": [("5", None)],
    "classifier_ckpt_path": [("FOLDER/value_copy", None), ("FOLDER/other_value", "the value model's weights differ")],
    "value_device": [
        ("cuda:1 --value_dtype fp32", None),
        ("cpu cpu", None),
        ("cuda:1", f"{ENGINE}.*value_dtype.*fp32.*bf16"),
    ],
    "value_engine": [("local", None), ("sglang", f"{ENGINE}.*value_engine.*local.*sglang")],
    "value_url": [("http://one:1 --value_engine sglang-server", ENGINE)],
    "value_sglang_args": [("tp_size=2 --value_engine sglang", ENGINE)],
    "value_dtype": [("fp32", None), ("bf16", ENGINE)],
    "value_cache_gb": [("0.02", None)],
    "value_batch_tokens": [("100", None)],
    "stop": [("sure", None), ("certified", None)],
    "alpha": [("0.2 --stop certified", None)],
    "stop_vote": [("majority --stop sure", None)],
    "neptune_project": [("me/vgs", None)],
    "tracker": [("trackio", None)],
}
CASES = [(flag, words, refused) for flag, cases in CHANGES.items() for words, refused in cases]


def test_every_flag_has_its_rule():
    names = {option.removeprefix("--") for action in build_parser()._actions for option in action.option_strings}
    # A shard has files of its own: tests/search_lib/test_run_shards.py
    assert set(CHANGES) == names - {"h", "-h", "help", "shard"}


@pytest.mark.parametrize(("flag", "words", "refused"), [case for case in CASES if case[2]])
def test_what_changes_results_is_refused_by_name_and_nothing_is_touched(flag, words, refused, again, tmp_path):
    before = {path.name: path.read_bytes() for path in tmp_path.glob("[!.]*")}
    with pytest.raises(UserError, match=f"holds another configuration: .*{refused}"):
        again(f"--{flag}", *words.split())
    assert {path.name: path.read_bytes() for path in tmp_path.glob("[!.]*")} == before


@pytest.mark.parametrize(("flag", "words"), [case[:2] for case in CASES if not case[2]])
def test_what_changes_no_result_may_change_and_the_run_goes_on(flag, words, again, half_done, whole):
    seen = again(f"--{flag}", *words.split())
    assert seen.status == 0
    assert_same_lines(seen, whole)
    assert flag == "output_path" or len(seen.requests) + len(half_done.requests) < 1.5 * len(whole.requests) * (
        1.5 if flag == "num_repetitions" else 1
    )


def test_a_run_from_before_a_flag_goes_on_without_it(again, tmp_path, whole):
    """Its meta does not name the flag."""
    path = tmp_path / "out.meta.json"
    meta = json.loads(path.read_text())
    assert meta["arguments"].pop("seeded") is False
    path.write_text(json.dumps(meta))
    with pytest.raises(UserError, match="holds another configuration: --seeded was False and is True"):
        again("--seeded")
    seen = again()
    assert seen.status == 0
    assert_same_lines(seen, whole)


def test_engines_of_one_kind_may_take_over_from_each_other(folder, tmp_path, whole):
    flags = search_spy.base_flags(folder, tmp_path / "out.jsonl")
    assert search_spy.run([*flags, "--engine", "sglang"], fail_after=30).status == 1
    seen = search_spy.run([*flags, "--sglang_url", "http://one:1", "--engine", "sglang-server"])
    assert seen.status == 0
    assert_same_lines(seen, whole)


GPU, SERVERS = (
    ["--device", "cuda:0", "--value_dtype", "fp32"],
    ["--engine", "sglang-server", "--sglang_url", "http://one:1"],
)
INSIDE = ["--engine", "sglang"]


@pytest.mark.parametrize(
    ("first", "then"),
    [(SERVERS, SERVERS + GPU), (SERVERS + GPU, SERVERS), (INSIDE + GPU, SERVERS), (SERVERS, INSIDE + GPU)],
    ids=["from a laptop to a GPU node", "and back", "from a GPU to its servers", "from servers to a GPU"],
)
@pytest.mark.parametrize("old", [False, True], ids=["", "an old meta file"])
def test_where_servers_generate_this_machines_device_does_not_count(first, then, old, folder, tmp_path, whole):
    """Old files say of the servers what the client's device would have been."""
    flags = search_spy.base_flags(folder, tmp_path / "out.jsonl")
    seen = search_spy.run([*flags, *first], fail_after=30)
    assert seen.status == 1
    if old:
        numerics = seen.meta["numerics"] | {"generator_dtype": "bf16" if "cuda:0" in first else "fp32"}
        (tmp_path / "out.meta.json").write_text(json.dumps(seen.meta | {"numerics": numerics}))
    seen = search_spy.run([*flags, *then])
    assert seen.status == 0
    assert_same_lines(seen, whole)


VALUE_SERVERS = [
    ["--value_engine", "sglang-server", *(word for name in names for word in ("--value_url", f"http://{name}:1"))]
    for names in (["one"], ["two", "three"])
]


def test_value_engines_of_one_kind_may_take_over_from_each_other(folder, tmp_path):
    """SGLang in this process, a server, other servers; and what is computed again of a search that goes on is counted."""
    values_in_process = [["--value_engine", "sglang", *more] for more in ([], ["--value_sglang_args", "tp_size=2"])]
    whole = search_spy.run([*search_spy.base_flags(folder, tmp_path / "whole.jsonl"), *values_in_process[0]])
    flags = search_spy.base_flags(folder, tmp_path / "out.jsonl")
    kinds = [values_in_process[0], VALUE_SERVERS[0], VALUE_SERVERS[1], values_in_process[1]]
    for kind, calls in zip(kinds, (17, 9, 9), strict=False):
        assert search_spy.run([*flags, *kind], fail_after=calls).status == 1
    before = {search_of(row) for row in search_spy.read(tmp_path / "out.tree.jsonl")}
    finished = (
        set(map(search_of, search_spy.read(tmp_path / "out.jsonl"))) if (tmp_path / "out.jsonl").exists() else set()
    )
    seen = search_spy.run([*flags, *kinds[-1]])
    assert seen.status == 0
    assert_same_lines(seen, whole)
    assert before - finished
    assert all(row["tokens_reread"] > 0 for row in seen.rows if search_of(row) in before - finished)
    with pytest.raises(UserError, match=f"{ENGINE}.*'value_engine': 'sglang'.*'value_engine': 'local'"):
        search_spy.run(flags)


def test_values_of_a_run_from_before_value_engines_are_local(again, tmp_path, whole):
    path = tmp_path / "out.meta.json"
    meta = json.loads(path.read_text())
    assert meta["numerics"].pop("value_engine") == "local"
    for name in ("value_engine", "value_url", "value_sglang_args"):
        meta["arguments"].pop(name)
    meta["arguments"]["value_device"] = "auto"  # as it was then
    path.write_text(json.dumps(meta))
    with pytest.raises(UserError, match=f"holds another configuration: {ENGINE}"):
        again("--value_engine", "sglang")
    seen = again("--value_device", "cpu", "cpu")
    assert seen.status == 0
    assert_same_lines(seen, whole)


def test_a_value_engine_that_dies_ends_the_run_in_one_line(folder, tmp_path, capsys):
    flags = [*search_spy.base_flags(folder, tmp_path / "out.jsonl"), "--value_engine", "sglang"]
    seen = search_spy.run(flags, value_engine={"fail_after": 15})
    assert seen.status == 1
    assert seen.value_engines[0][1].closed == 1
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: the fake value engine died (")
    assert line.endswith("of 8 searches are finished; the same command goes on)")
    assert search_spy.run(flags).status == 0


def test_a_value_models_dtype_counts_beside_servers_too(folder, tmp_path):
    flags = [*search_spy.base_flags(folder, tmp_path / "out.jsonl"), *SERVERS]
    search_spy.run(flags, fail_after=30)
    with pytest.raises(UserError, match=f"{ENGINE}.*value_dtype.*fp32.*bf16"):
        search_spy.run([*flags, "--value_dtype", "bf16"])


# ------------------------------------------------------------------------------------------------------------- stopped


@pytest.mark.parametrize("calls", [1, 3, 7])
@pytest.mark.parametrize("batch_size", [2, 32])
def test_stopped_again_and_again_in_the_middle_of_rounds(calls, batch_size, folder, tmp_path, whole):
    """Each start asks a few times more than the searches under way need for a round. What the journal holds is never
    asked again, and what comes out is what an undisturbed run writes."""
    flags = [*search_spy.base_flags(folder, tmp_path / "out.jsonl"), "--batch_size", str(batch_size)]
    seen, starts = search_spy.Seen(), 0
    while seen.status != 0:
        known = {(*search_of(row), row["round"]) for row in tree_lines(tmp_path)}
        asked_before = len(seen.requests)
        search_spy.run(flags, fail_after=2 * min(batch_size, 8) + calls, seen=seen)
        for request in seen.requests[asked_before:]:
            data_idx, repeat_idx = map(int, request.group.split("/"))
            written = len(request.prompt_ids) - PROMPT
            assert (data_idx, repeat_idx, written // 12) not in known
        starts += 1
        assert starts < 40
    assert starts > (2 if batch_size == 2 else 1)
    assert_same_lines(seen, whole)
    assert [row["global_idx"] for row in seen.rows] == list(range(8))
    rounds = Counter((*search_of(row), row["round"]) for row in seen.rounds)
    assert set(rounds.values()) == {1}
    assert sorted(rounds) == sorted((*search_of(row), row["round"]) for row in whole.rounds)
    sessions = seen.meta["sessions"]
    assert len(sessions) == starts
    assert all(session["ended"] and session["seconds"] > 0 for session in sessions)


def tree_lines(folder: Path) -> list[dict]:
    path = folder / "out.tree.jsonl"
    return search_spy.read(path) if path.exists() else []


def test_read_again_tokens_are_counted_and_the_times_of_both_starts_add_up(again, half_done, tmp_path):
    """A search that goes on reads what its journal holds of the beams that go on, and keeps the seconds spent on it."""
    before, meta_file = half_done.rounds, tmp_path / "out.meta.json"
    meta_file.write_text(json.dumps(half_done.meta | {"started": "long ago"}))
    seen = again()
    went_on = set(map(search_of, before)) - set(map(search_of, half_done.rows))
    assert went_on
    for row in seen.rows:
        assert (row["tokens_reread"] > 0) == (search_of(row) in went_on)
        spent = sum(line["seconds"] for line in before if search_of(line) == search_of(row))
        assert row["dt"] > spent
    meta = seen.meta
    assert len(meta["sessions"]) == 3
    assert meta["started"] == "long ago"


def test_a_signal_between_two_lines_ends_with_its_status(folder, tmp_path, monkeypatch, capsys):
    import signal

    add, count = RunFiles.add_round, [0]

    def stops(self, *arguments):
        add(self, *arguments)
        count[0] += 1
        if count[0] == 12:
            raise Stopped(signal.SIGTERM)

    monkeypatch.setattr(RunFiles, "add_round", stops)
    flags = search_spy.base_flags(folder, tmp_path / "out.jsonl")
    seen = search_spy.run(flags)
    assert seen.status == 128 + signal.SIGTERM
    assert "of 8 searches are finished; the same command goes on" in capsys.readouterr().err
    assert len(seen.rounds) == count[0] >= 12  # another search may write before it is told


# ------------------------------------------------------------------------------------------------------------- journal


def rewrite(path: Path, change) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("".join(line + "\n" for line in change([json.loads(line) for line in lines], lines)))


@pytest.mark.parametrize("missing", [0, 1])
def test_a_journal_with_a_round_missing_is_refused(missing, again, tmp_path):
    """Also where lines of other searches stand between."""

    def without(rows, lines):
        numbered = zip(rows, lines, strict=True)
        return [line for row, line in numbered if (*search_of(row), row["round"]) != (2, 0, missing)]

    rewrite(tmp_path / "out.tree.jsonl", without)
    with pytest.raises(UserError, match=rf"round {missing + 1} of problem 2, repetition 0 .*before it is missing"):
        again()


def test_a_journal_with_a_round_twice_is_refused(again, tmp_path):
    rewrite(tmp_path / "out.tree.jsonl", lambda rows, lines: [*lines, lines[0]])
    with pytest.raises(UserError, match=r"round 0 of problem 0, repetition 0 is there twice"):
        again()


@pytest.mark.parametrize("key", ["parent", "kept", "value", "tokens", "finish", "text"])
def test_a_journal_whose_lists_have_lost_an_entry_is_refused(key, again, tmp_path):
    rewrite(
        tmp_path / "out.tree.jsonl",
        lambda rows, lines: [json.dumps(rows[0] | {key: rows[0][key][:-1]}), *lines[1:]],
    )
    with pytest.raises(UserError, match="line 1 has lists that do not belong together"):
        again()


def test_a_journal_that_keeps_other_numbers_of_beams_is_refused(again, tmp_path):
    def fewer(rows, lines):
        at = next(i for i, row in enumerate(rows) if (*search_of(row), row["round"]) == (2, 0, 1))
        return [*lines[:at], json.dumps(rows[at] | {"kept": [False] * len(rows[at]["kept"])}), *lines[at + 1 :]]

    rewrite(tmp_path / "out.tree.jsonl", fewer)
    with pytest.raises(UserError, match="does not fit the rounds before it"):
        again()
