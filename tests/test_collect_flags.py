"""Every flag of collect_rollouts.py, looked at where it is used: what an engine is made of and asked for, what is written."""

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from collect_spy import STOPS, collect, encode, make_inputs, write_problems

import collect_rollouts


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    """A private cache, and two GPUs to name."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def base(inputs, tmp_path_factory):
    """The run that all others are compared with."""
    with pytest.MonkeyPatch.context() as patch:
        return collect(patch.setattr, inputs, tmp_path_factory.mktemp("base") / "out")


def problems_of(run):
    return [row["problem"] for row in run.rows]


def in_config(field, value):
    return lambda run, base: getattr(run.config, field) == value != getattr(base.config, field)


def in_all_requests(field, value):
    def holds(run, base):
        return {getattr(request, field) for request in run.requests} == {value} and all(
            getattr(request, field) != value for request in base.requests
        )

    return holds


def asked(run, base, **counts):
    """How many roll-ins and roll-outs each problem was asked for."""
    for kind, wanted in ((True, counts["roll_ins"]), (False, counts["roll_outs"])):
        groups = [request.group for request, _ in run.of_kind(roll_ins=kind)]
        assert {groups.count(group) for group in set(groups)} == {wanted}
    return True


def shares_of_cuts(run):
    """Where roll-ins were cut, as a share of their length (a stop token left out)."""
    shares = []
    for group, prompt in run.prompts.items():
        roll_ins = [reply.token_ids for request, reply in run.of_kind(roll_ins=True) if request.group == group]
        roll_outs = [request for request, _ in run.of_kind(roll_ins=False) if request.group == group]
        for tokens, request in zip(roll_ins, roll_outs, strict=True):
            prefix = request.prompt_ids[len(prompt) :]
            assert tokens[: len(prefix)] == prefix
            shares.append(len(prefix) / (len(tokens) - (tokens[-1] in STOPS)))
    return shares


def mean_cut(expected):
    """Uniform: a half; by sqrt(t): 3/5; by 1 / sqrt(t): 1/3 (a little more where a roll-in is short)."""

    def holds(run, base):
        shares = shares_of_cuts(run)
        assert len(shares) > 300
        return abs(np.mean(shares) - expected) < 0.05

    return holds


MANY_CUTS = {
    "num_roll_ins": 60, "prefixes_per_roll_in": 1, "rollouts_per_prefix": 1, "max_length": 200, "keep_unsolved": True,
}  # fmt: skip


def second_file_only(run, base):
    return set(run.prompts) == {"4", "5"} and not (run.folder / "README.md").exists()


def served_roll_ins(run, base):
    """A server writes the roll-ins of its model, with the roll-outs: no turn of its own, and none loaded for it."""
    served, own = run.engines
    assert (served.name, served.config.sglang_urls) == ("sglang-server", ("http://a:1", "http://b:2"))
    assert (served.config.model_flag, served.config.url_flag) == ("--roll_in_models", "--roll_in_url")
    assert [engine.config.model_path.rsplit("/", 1)[1] for engine in run.engines] == ["other", "policy"]
    assert [(urls, size, what.rsplit("/", 1)[1]) for urls, size, what in run.checked] == [
        (["http://a:1", "http://b:2"], 264, "other")
    ]
    assert [len(engine.requests) for engine in run.engines] == [6 * 1, 6 * (2 + 12)]
    return served.closed and own.closed and own.name == "transformers"


def max_length_is_what_is_left(run, base):
    for run_, most in ((run, 90), (base, 60)):
        prompts = run_.prompts
        for request in run_.requests:
            assert len(request.prompt_ids) + request.max_new_tokens == len(prompts[request.group]) + most
    return True


def in_turn(run, base):
    """Models are p, o, t: roll-in i is by model i mod 3, and all roll-outs by the policy."""
    paths = [engine.config.model_path.rsplit("/", 1)[1] for engine in run.engines]
    assert paths == ["other", "third", "policy"] and all(engine.closed for engine in run.engines)
    for row in run.rows:
        length = len(encode(prompt_text(row["problem"])))
        letters = "".join(chr(ids[length] + 33) for ids in row["roll_in_ids"])
        assert letters == 2 * ("oooo" + "tttt" + "pppp")
        assert all(chr(ids[0] + 33) == "p" for ids in row["roll_outs_ids"])
    return True


def prompt_text(problem):
    return (
        f"<｜begin▁of▁sentence｜><｜User｜>{problem} Please think step-by-step and put your final answer within \\boxed{{}}."
        "<｜Assistant｜><think>\n"
    )


def other_seeds(run, base):
    """Everything that is drawn is drawn anew: tokens, and places of the same number of cuts."""
    assert len(run.seeds) == len(run.requests) == len(base.requests)
    return not run.seeds & base.seeds


def shards(run, base):
    assert [pq.read_metadata(path).num_rows for path in sorted(run.folder.glob("data/*"))] == [1, 1, 1, 1, 1, 1]
    return len(list(base.folder.glob("data/*"))) == 2


def unsolved_are_kept(run, base):
    for row in base.rows:
        assert 1 in row["labels"]
    return problems_of(run) == [f"Problem {i}?" for i in range(6)] and "Problem 5?" not in problems_of(base)


def at_once(run):
    """Problems, as they were and as they were announced, and announced requests: 3 roll-ins, then 12 roll-outs of each."""
    return run.most_at_once, run.config.groups_at_once, run.config.requests_at_once


def bare_prompts(run, base):
    assert {tuple(ids) for ids in base.prompts.values()} == {
        tuple(encode(prompt_text(f"Problem {i}?"))) for i in range(6)
    }
    expected = {
        tuple(encode(f"<｜begin▁of▁sentence｜><｜User｜>Problem {i}?<｜Assistant｜><think>\n")) for i in range(6)
    }
    return {tuple(ids) for ids in run.prompts.values()} == expected


FILES = "files"  # what the test makes before the run

# flag -> what is given beside the settings of the base run (a function of the inputs' folder), and what must be seen
FLAGS = {
    "problems": (lambda i: {"problems": write_problems(i / "two.jsonl", ["0", "1"]), "keep_unsolved": True},
                 lambda run, base: len(run.prompts) == 2),
    "split": (lambda i: {"problems": i / FILES, "split": "test", "keep_unsolved": True},
              lambda run, base: [row["answer"] for row in run.rows] == ["3"]),
    "max_problems": (lambda i: {"max_problems": 3, "keep_unsolved": True},
                     lambda run, base: problems_of(run) == ["Problem 0?", "Problem 1?", "Problem 2?"]),
    "output_dir": (lambda i: {}, lambda run, base: run.folder != base.folder and run.rows == base.rows),
    "num_roll_ins": (lambda i: {"num_roll_ins": 5}, lambda run, base: asked(run, base, roll_ins=5, roll_outs=20)),
    "prefixes_per_roll_in": (lambda i: {"prefixes_per_roll_in": 5},
                             lambda run, base: asked(run, base, roll_ins=3, roll_outs=30)),
    "cut_weight": (lambda i: MANY_CUTS | {"cut_weight": "inverse_sqrt"}, mean_cut(0.36)),
    "rollouts_per_prefix": (lambda i: {"rollouts_per_prefix": 3},
                            lambda run, base: asked(run, base, roll_ins=3, roll_outs=18)),
    "keep_unsolved": (lambda i: {"keep_unsolved": True}, unsolved_are_kept),
    "shard_size": (lambda i: {"shard_size": 1, "keep_unsolved": True}, shards),
    "shard": (lambda i: {"shard": "1/2"}, second_file_only),
    "max_length": (lambda i: {"max_length": 90}, max_length_is_what_is_left),
    "temperature": (lambda i: {"temperature": 0.3}, in_all_requests("temperature", 0.3)),
    "top_p": (lambda i: {"top_p": 0.55}, in_all_requests("top_p", 0.55)),
    "prompt_format": (lambda i: {"prompt_format": "bare"}, bare_prompts),
    "seed": (lambda i: {"seed": 4}, lambda run, base: other_seeds(run, base) and run.config.seed == 4),
    "piref_model": (lambda i: {"piref_model": i / "other"},
                    lambda run, base: run.config.model_path.endswith("/other") and len(run.engines) == 1),
    "roll_in_models": (lambda i: {"roll_in_models": [i / "other", i / "third", i / "policy"], "num_roll_ins": 6,
                                  "keep_unsolved": True}, in_turn),
    "roll_in_url": (lambda i: {"roll_in_models": [i / "policy", i / "other"],
                               "roll_in_url": [f"{i / 'other'}=http://a:1", f"{i / 'other'}=http://b:2/"]}, served_roll_ins),
    "batch_size": (lambda i: {"batch_size": 2}, lambda run, base: at_once(run) == (2, 2, 24) and at_once(base) == (4, 4, 48)),
    "engine": (lambda i: {"engine": "sglang"}, lambda run, base: run.engines[0].name == "sglang"),
    "device": (lambda i: {"device": "cuda:1"}, in_config("device", "cuda:1")),
    "attention_impl": (lambda i: {"attention_impl": "eager"}, in_config("attention", "eager")),
    "piref_gpu_util": (lambda i: {"piref_gpu_util": 0.4}, in_config("gpu_share", 0.4)),
    "use_sglang_server": (lambda i: {"use_sglang_server": True}, lambda run, base: run.engines[0].name == "sglang-server"),
    "sglang_port": (lambda i: {"engine": "sglang-server", "sglang_port": 4321},
                    in_config("sglang_urls", ("http://localhost:4321",))),
    "sglang_url": (lambda i: {"engine": None, "sglang_url": "http://a:1"}, in_config("sglang_urls", ("http://a:1",))),
    "sglang_args": (lambda i: {"engine": "sglang", "sglang_args": ["tp_size=2", "dp_size=3"]},
                    in_config("sglang_args", ("tp_size=2", "dp_size=3"))),
    "deterministic": (lambda i: {"deterministic": True}, in_config("deterministic", True)),
    "seeded": (lambda i: {"seeded": True}, in_config("seeded", True)),
    "request_timeout": (lambda i: {"request_timeout": 5}, in_config("request_timeout_s", 5.0)),
}  # fmt: skip


def test_the_table_names_every_flag_of_the_script():
    options = {word for action in collect_rollouts.build_parser()._actions for word in action.option_strings}
    assert options - {"-h", "--help"} == {f"--{name}" for name in FLAGS}


@pytest.mark.parametrize("name", FLAGS)
def test_a_flag_reaches_what_it_is_for(name, inputs, base, tmp_path, monkeypatch):
    (inputs / FILES).mkdir(exist_ok=True)
    for split, answers in (("train", ["1", "2"]), ("test", ["3"])):
        write_problems(inputs / FILES / f"{split}.jsonl", answers)
    changes, seen = FLAGS[name]
    run = collect(monkeypatch.setattr, inputs, tmp_path / "out", **changes(inputs))
    assert run.status == 0
    assert seen(run, base)


def test_defaults_are_those_of_the_paper():
    args = collect_rollouts.parse_args(["--problems", "p", "--output_dir", "o"])
    assert (args.num_roll_ins, args.prefixes_per_roll_in, args.rollouts_per_prefix, args.max_length) == (
        14,
        4,
        1,
        16384,
    )
    assert (args.temperature, args.top_p, args.prompt_format, args.cut_weight) == (0.6, 0.95, "r1", "sqrt")
    assert args.roll_in_models == [args.piref_model] == ["deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"]


@pytest.mark.parametrize(("weight", "mean"), [("sqrt", 0.6), ("uniform", 0.5)])
def test_roll_ins_are_cut_by_the_weight_that_was_asked_for(weight, mean, inputs, tmp_path, monkeypatch):
    run = collect(monkeypatch.setattr, inputs, tmp_path / "out", **MANY_CUTS, cut_weight=weight)
    assert mean_cut(mean + 0.01)(run, None)


def test_all_requests_have_what_was_asked_for(base):
    """Stop tokens of all sources; a seed of its own for every roll-in and every roll-out of every problem."""
    assert {request.stop_ids for request in base.requests} == {STOPS}
    assert {(request.temperature, request.top_p) for request in base.requests} == {(0.9, 0.8)}
    assert len(base.seeds) == len(base.requests) == 6 * (3 + 3 * 2 * 2)
    assert base.config.seed == 3 and base.config.samples and base.config.vocab_size == 264
    groups = {request.group: request.prompt_ids[: len(base.prompts[request.group])] for request in base.requests}
    assert len(groups) == 6 and len(set(map(tuple, groups.values()))) == 6  # a problem's requests are one group


@pytest.mark.parametrize(
    ("flags", "requests"),
    [("", 56), ("--num_roll_ins 0 --rollouts_per_prefix 4", 4), ("--num_roll_ins 9 --prefixes_per_roll_in 1", 9)],
)
def test_the_requests_of_a_problem_at_once(flags, requests):
    args = collect_rollouts.parse_args(["--problems", "p", "--output_dir", "o", *flags.split()])
    assert collect_rollouts.requests_each(args) == requests


def test_greedy_is_no_sampling(inputs, tmp_path, monkeypatch):
    run = collect(monkeypatch.setattr, inputs, tmp_path / "out", temperature=0)
    assert not run.config.samples


def test_a_generator_among_the_roll_in_models_writes_its_own_with_its_roll_outs(inputs, tmp_path, monkeypatch):
    """One engine after the other, each closed before the next is made."""
    alive = []

    def patch(module, name, value):
        if name == "make_engine":

            def one_at_a_time(kind, config, make=value):
                assert all(engine.closed for engine in alive)
                alive.append(make(kind, config))
                return alive[-1]

            value = one_at_a_time
        monkeypatch.setattr(module, name, value)

    run = collect(patch, inputs, tmp_path / "out", roll_in_models=[inputs / "policy", inputs / "other"])
    assert [engine.config.model_path.rsplit("/", 1)[1] for engine in run.engines] == ["other", "policy"]
    assert [len(engine.requests) for engine in run.engines] == [6 * 1, 6 * (2 + 12)]
