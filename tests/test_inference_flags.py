"""Every flag of inference_eval.py at its consumer: what the engine, the value model and the tracker get to see."""

import itertools
import json
from pathlib import Path
from statistics import fmean as mean

import kill_test
import pytest
import search_spy
import tiny
import torch

from common_lib.cli import UserError
from common_lib.models import stop_token_ids
from data_utils import INSTRUCTION
from engine_lib.value_base import ValueConfig
from eval_lib.stopping import Stopping
from search_lib.arguments import build_parser
from search_lib.tree import request_seed


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    search_spy.write_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def plain(folder, tmp_path_factory) -> search_spy.Seen:
    """A run without any of the flags below."""
    return search_spy.run(search_spy.base_flags(folder, tmp_path_factory.mktemp("plain") / "out.jsonl"))


def first_block(seen):
    return next(request.max_new_tokens for request in seen.requests)


def beams_and_candidates(seen):
    """(beams held, candidates written) of each search's first round, and whether there are more rounds."""
    first = [(sum(row["kept"]), len(row["kept"])) for row in seen.rounds if row["round"] == 0]
    return set(first), max(row["round"] for row in seen.rounds) > 0


def kept_are_the_best(seen):
    pairs = [sorted(zip(row["value"], row["kept"], strict=True), reverse=True) for row in seen.rounds]
    return all(not later or kept for row in pairs for (_, kept), (_, later) in itertools.pairwise(row))


def first_texts(seen):
    """The prompts as texts, special tokens included, of the first problem's first requests."""
    return {search_spy.TOKENIZER.decode(request.prompt_ids) for request in seen.requests[:2]}


def tracker(seen):
    made = seen.trackers[-1]
    return made.kind, made.project, bool(made.metrics), made.closed


def configs(seen):
    """The generator's, and the value engine's where there is one."""
    return [seen.config, *(engine.config for _, engine in seen.value_engines)]


def value_engine(seen):
    """Which, and what it alone is given."""
    return [word for kind, made in seen.value_engines for word in (kind, *made.config.sglang_args, *made.config.urls)]


FIRST = "What is 0 + 0?"
URLS = ("http://one:1", "http://two:2")
# flag -> what to give (FOLDER/x: a file of the inputs), what to look at, and what must be seen there
TABLE = {
    "benchmark": (["FOLDER/others.jsonl"], lambda seen: seen.rows[3]["problem"], "What is 3 plus 3?"),
    "max_problems": (["2"], lambda seen: {row["data_idx"] for row in seen.rounds}, {0, 1}),
    "output_path": (["OUT/other.jsonl"],
                    lambda seen: sorted(path.name for path in seen.output.parent.glob("[!.]*")),
                    ["other.jsonl", "other.meta.json", "other.tree.jsonl"]),
    "num_repetitions": (["3"], lambda seen: {request.group for request in seen.requests},
                        {f"{d}/{r}" for d in range(4) for r in range(3)}),
    "shard": (["1/2"], lambda seen: {request.group for request in seen.requests}, {"1/0", "1/1", "3/0", "3/1"}),
    "seed": (["7"], lambda seen: (seen.config.seed, seen.seeds[:4]),
             (7, [request_seed(7, 0, 0, 0, beam, candidate) for beam in range(2) for candidate in range(2)])),
    "search_type": (["beam1"], beams_and_candidates, ({(4, 4)}, True)),
    "num_blocks": (["6"], beams_and_candidates, ({(3, 6)}, True)),
    "block_size": (["16"], first_block, 16),
    "max_length": (["30"], lambda seen: max(len(ids) for row in seen.rows for ids in row["generated_ids"]), 30),
    "selection": (["random"], kept_are_the_best, False),
    "temperature": (["0"], lambda seen: ({r.temperature for r in seen.requests}, seen.config.samples), ({0.0}, False)),
    "top_p": (["0.7"], lambda seen: {request.top_p for request in seen.requests}, {0.7}),
    "prompt_format": (["bare"], first_texts,
                      {f"<｜begin▁of▁sentence｜><｜User｜>{FIRST}<｜Assistant｜><think>\n"}),
    "batch_size": (["3"], lambda seen: (seen.most_searches, seen.config.groups_at_once, seen.config.requests_at_once),
                   (3, 3, 3 * 4)),
    "piref_model": (["FOLDER/other_generator"], lambda seen: Path(seen.config.model_path).name, "other_generator"),
    "engine": (["sglang"], lambda seen: seen.engines[-1][0], "sglang"),
    "device": (["cuda:1"], lambda seen: (seen.config.device, seen.moved, seen.scorers[0].model.dtype),
               ("cuda:1", ["cuda:1"], torch.bfloat16)),
    "attention_impl": (["eager"], lambda seen: (seen.config.attention, seen.loaded[0][1]["attn_implementation"]),
                       ("eager", "eager")),
    "piref_gpu_util": (["0.3"], lambda seen: seen.config.gpu_share, 0.3),
    "use_sglang_server": ([], lambda seen: (seen.engines[-1][0], seen.config.sglang_urls),
                          ("sglang-server", ("http://localhost:30000",))),
    "sglang_port": (["31000", "--use_sglang_server"], lambda seen: seen.config.sglang_urls, ("http://localhost:31000",)),
    "sglang_url": ([URLS[0], "--sglang_url", URLS[1], "--use_sglang_server"], lambda seen: seen.config.sglang_urls, URLS),
    "sglang_args": (["tp_size=2", "dp_size=4", "--engine", "sglang"], lambda seen: seen.config.sglang_args,
                    ("tp_size=2", "dp_size=4")),
    "deterministic": ([], lambda seen: seen.config.deterministic, True),
    "seeded": ([], lambda seen: seen.config.seeded, True),
    "request_timeout": (["5", "--value_engine", "sglang"],
                        lambda seen: [config.request_timeout_s for config in configs(seen)], [5.0, 5.0]),
    "classifier_ckpt_path": (["FOLDER/other_value"], lambda seen: Path(seen.loaded[0][0]).name, "other_value"),
    "value_device": (["cuda:1"], lambda seen: (seen.config.device, seen.moved, seen.scorers[0].budget.limit),
                     ("cpu", ["cuda:1"], int(0.9e9))),
    "value_engine": (["sglang"], value_engine, ["sglang"]),
    "value_url": ([URLS[0] + "/", "--value_url", URLS[1], "--value_engine", "sglang-server"], value_engine,
                  ["sglang-server", *URLS]),
    "value_sglang_args": (["tp_size=2", "dp_size=4", "--value_engine", "sglang"], value_engine,
                          ["sglang", "tp_size=2", "dp_size=4"]),
    "value_dtype": (["bf16"], lambda seen: seen.scorers[0].model.score[0].weight.dtype, torch.bfloat16),
    "value_cache_gb": (["0.02"], lambda seen: seen.scorers[0].budget.limit, 20_000_000),
    "value_batch_tokens": (["100"], lambda seen: seen.scorers[0].max_batch_tokens, 100),
    "stop": (["sure"], lambda seen: (seen.stoppings[0].kind, "stopped" in seen.meta), ("sure", True)),
    "alpha": (["0.2", "--stop", "certified"], lambda seen: seen.stoppings[0],
              Stopping("certified", "weighted", 0.2, 2, 2)),
    "stop_vote": (["majority", "--stop", "sure"], lambda seen: seen.stoppings[0], Stopping("sure", "majority", 0.05, 2, 2)),
    "neptune_project": (["me/vgs"], tracker, ("neptune", "me/vgs", True, 1)),
    "tracker": (["trackio"], tracker, ("trackio", None, True, 1)),
}  # fmt: skip


def test_the_table_names_every_flag():
    names = {option.removeprefix("--") for action in build_parser()._actions for option in action.option_strings}
    assert set(TABLE) == names - {"h", "-h", "help"}


@pytest.mark.parametrize("flag", TABLE)
def test_a_flag_reaches_its_consumer(flag, folder, plain, tmp_path):
    given, look, expected = TABLE[flag]
    assert look(plain) != expected  # the row says something
    words = [word.replace("FOLDER", str(folder)).replace("OUT", str(tmp_path)) for word in given]
    seen = search_spy.run([*search_spy.base_flags(folder, tmp_path / "out.jsonl"), f"--{flag}", *words])
    assert seen.status == 0
    assert look(seen) == expected


@pytest.mark.parametrize(
    ("prompt_format", "text"),
    [
        ("r1", f"<｜begin▁of▁sentence｜><｜User｜>{FIRST} {INSTRUCTION}<｜Assistant｜><think>\n"),
        ("chat", f"<｜begin▁of▁sentence｜><｜User｜>{FIRST} {INSTRUCTION}<｜Assistant｜><thinking>\n"),
        ("bare", f"<｜begin▁of▁sentence｜><｜User｜>{FIRST}<｜Assistant｜><thinking>\n"),
    ],
)
def test_prompt_formats(prompt_format, text, folder, tmp_path):
    """With a template of the generator's own, so that it can be told from the released models' text."""
    tiny.save_generator(tmp_path / "own")
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("<think>", "<thinking>")
    tokenizer.save_pretrained(tmp_path / "own")
    flags = [*search_spy.base_flags(folder, tmp_path / "out.jsonl"), "--piref_model", str(tmp_path / "own")]
    seen = search_spy.run([*flags, "--prompt_format", prompt_format, "--max_problems", "1"])
    assert first_texts(seen) == {text}
    assert seen.rounds[0]["prompt_ids"] == seen.requests[0].prompt_ids
    assert all(row["prompt_tokens"] == len(seen.requests[0].prompt_ids) for row in seen.rows)


def test_all_stop_ids_reach_every_request(folder, tmp_path):
    """Those of the tokenizer, the config and the generation config."""
    tiny.save_generator(tmp_path / "many")
    for name, ids in (("config.json", [256, 40]), ("generation_config.json", 41)):
        path = tmp_path / "many" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": ids}))
    flags = [*search_spy.base_flags(folder, tmp_path / "out.jsonl"), "--piref_model", str(tmp_path / "many")]
    seen = search_spy.run(flags)
    assert {request.stop_ids for request in seen.requests} == {(40, 41, 256)}
    assert stop_token_ids(folder / "generator", tiny.tiny_tokenizer()) == (256,)


def test_a_request_asks_for_what_is_left_of_the_response(folder, tmp_path):
    """Blocks of 20 in a response of 48: 20, 20 and 8, after the prompt and what was written so far."""
    flags = [*search_spy.base_flags(folder, tmp_path / "out.jsonl"), "--block_size", "20", "--max_problems", "1"]
    seen = search_spy.run(flags)
    prompt = len(seen.rounds[0]["prompt_ids"])
    asked = {(len(request.prompt_ids) - prompt, request.max_new_tokens) for request in seen.requests}
    assert asked == {(0, 20), (20, 20), (40, 8)}


def test_auto_takes_sglang_where_it_is_installed(folder, tmp_path, monkeypatch):
    for installed, expected in ((object(), "sglang"), (None, "transformers")):
        monkeypatch.setattr("engine_lib.choose.importlib.util.find_spec", lambda name, found=installed: found)
        seen = search_spy.run([*search_spy.base_flags(folder, tmp_path / f"{expected}.jsonl"), "--engine", "auto"])
        assert seen.engines[0][0] == expected == seen.meta["numerics"]["engine"]


def test_dtypes_follow_the_devices(folder, tmp_path):
    """bf16 on a GPU and fp32 on a CPU, for generator and value model each by its own device."""
    for number, (devices, dtypes) in enumerate(
        [
            (["cpu", "auto"], ("fp32", "fp32")), (["cuda", "auto"], ("bf16", "bf16")),
            (["cuda", "cpu"], ("bf16", "fp32")), (["cpu", "cuda"], ("fp32", "bf16")),
        ]
    ):  # fmt: skip
        flags = [*search_spy.base_flags(folder, tmp_path / f"{number}.jsonl"), "--max_problems", "1"]
        seen = search_spy.run([*flags, "--device", devices[0], "--value_device", devices[1]])
        assert (seen.meta["numerics"]["generator_dtype"], seen.meta["numerics"]["value_dtype"]) == dtypes
        assert str(seen.scorers[0].model.dtype) == {"fp32": "torch.float32", "bf16": "torch.bfloat16"}[dtypes[1]]


def test_the_servers_dtype_is_not_that_of_this_device(folder, tmp_path):
    flags = [*search_spy.base_flags(folder, tmp_path / "out.jsonl"), "--max_problems", "1", "--sglang_url", URLS[0]]
    seen = search_spy.run([*flags, "--engine", "sglang-server"])
    assert seen.meta["numerics"] == {
        "engine": "sglang", "generator_dtype": None, "value_engine": "local", "value_dtype": "fp32",
    }  # fmt: skip


def test_a_served_value_model_is_told_all_that_it_needs(folder, tmp_path):
    flags = [*search_spy.base_flags(folder, tmp_path / "out.jsonl"), "--value_engine", "sglang", "--batch_size", "5"]
    seen = search_spy.run([*flags, "--value_device", "cuda:1"])
    assert (seen.status, seen.loaded, seen.scorers) == (0, [], [])  # no value model in this process
    assert seen.value_config == ValueConfig(
        str(folder / "value"), 264, 3, "cuda:1", "bf16", 3600.0, groups_at_once=5, requests_at_once=5 * 4
    )
    assert seen.value_engines[0][1].closed == 1
    assert seen.meta["value_engine"] == {"name": "fake"}
    assert seen.meta["numerics"]["value_engine"] == "sglang"
    assert seen.checked == [seen.value_config]
    assert all(row["tokens_scored"] == row["prompt_tokens"] + row["tokens_generated"] for row in seen.rows[:1])
    asked = {group for _, group in seen.value_engines[0][1].asked}
    assert asked == {f"{d}/{r}" for d in range(4) for r in range(2)}  # a search is a group, as the generator's


def test_two_devices_give_the_lines_of_one(folder, tmp_path):
    """64 searches; byte for byte, but for times and what was read again."""
    lines, seen = [], None
    for devices in (["cpu"], ["cpu", "cpu"]):
        flags = search_spy.base_flags(folder, tmp_path / f"{len(devices)}.jsonl")
        seen = search_spy.run([*flags, "--num_repetitions", "16", "--value_device", *devices])
        assert seen.status == 0
        lines.append(kill_test.read_run(seen.output))
    assert lines[0] == lines[1] and len(lines[0][0]) == 64
    assert seen.meta["value_engine"] == {"name": "local", "devices": ["cpu", "cpu"]}
    first, second = (scorer.usage.tokens_scored for scorer in seen.scorers)
    assert first == pytest.approx(second, rel=0.5)


def test_a_gpu_and_a_cpu_are_refused_unless_a_dtype_says_which_values(folder, tmp_path):
    flags = [*search_spy.base_flags(folder, tmp_path / "out.jsonl"), "--value_device", "cuda:1", "cpu"]
    with pytest.raises(
        UserError, match="--value_device cuda:1 cpu: --value_dtype auto is bf16 on a GPU and fp32 on a CPU"
    ):
        search_spy.run(flags)
    seen = search_spy.run([*flags, "--value_dtype", "fp32"])
    assert [str(scorer.model.dtype) for scorer in seen.scorers] == ["torch.float32"] * 2


def test_no_more_searches_are_announced_to_the_engine_than_there_are(plain):
    assert (plain.config.groups_at_once, plain.config.requests_at_once) == (8, 8 * 4)


# ------------------------------------------------------------------------------------------------------------- tracker


def right_best(row) -> bool:
    """Is the answer with the highest value right? An empty one does not count."""
    columns = zip(row["generated_scores"], row["reward"], row["processed_answer"], strict=True)
    return max(((value, right) for value, right, answer in columns if answer), default=(0.0, False))[1]


def test_what_is_tracked(folder, tmp_path):
    """The table's numbers at N = beams of so many repetitions, and the settings; a later start goes on with the same run."""
    flags = [*search_spy.base_flags(folder, tmp_path / "out.jsonl"), "--tracker", "trackio"]
    seen = search_spy.run(flags)
    (first,) = seen.trackers
    assert [step for step, _ in first.metrics] == [4, 8]
    names = {f"problems/{kind}_{what}" for kind in ("pass1", "pass", "bon", "maj", "wmaj") for what in ("m", "ci")}
    assert all(names <= metrics.keys() for _, metrics in first.metrics)
    rewards = [reward for row in seen.rows for reward in row["reward"]]
    assert 0 < sum(rewards) < len(rewards)
    pass1, best = mean(rewards), mean([right_best(row) for row in seen.rows])
    assert pass1 != best
    assert first.metrics[0][1]["problems/pass1_m"] == pytest.approx(pass1)
    assert first.metrics[0][1]["problems/bon_m"] == pytest.approx(best)
    assert first.configs["arguments/temperature"] == 0.6
    assert first.configs["generator/hidden_size"] == 32
    assert first.closed == 1

    again = search_spy.run([*flags, "--num_repetitions", "3"]).trackers[0]
    assert again.id == first.id
    assert [step for step, _ in again.metrics] == [4, 8, 12]
    other = search_spy.run([*flags, "--num_repetitions", "3", "--tracker", "neptune"]).trackers[0]
    assert other.id != first.id
    assert search_spy.run([*flags, "--num_repetitions", "3"]).trackers[0].id == first.id
    assert seen.meta["tracker_ids"] == {"trackio": first.id, "neptune": other.id}


def test_a_stopped_run_logs_no_table_and_still_closes_its_tracker(folder, tmp_path):
    flags = [*search_spy.base_flags(folder, tmp_path / "out.jsonl"), "--tracker", "trackio"]
    seen = search_spy.run(flags, fail_after=20)
    assert seen.status == 1
    assert (seen.trackers[0].metrics, seen.trackers[0].closed) == ([], 1)
    again = search_spy.run(flags)
    assert again.trackers[0].id == seen.trackers[0].id
    assert [step for step, _ in again.trackers[0].metrics] == [4, 8]
