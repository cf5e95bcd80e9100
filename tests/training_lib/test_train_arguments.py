"""Flags that are no good are named with the rule; defaults that depend on others."""

import pytest

from common_lib.cli import UserError
from training_lib.arguments import parse_args

POSITIVE = [
    "num_steps", "total_batch_size", "micro_batch_size", "data_num_response", "small_group_size", "save_every",
    "max_keep_ckpts", "eval_size", "max_lr", "grad_norm_clip",
]  # fmt: skip
REFUSED = dict.fromkeys(POSITIVE, ("0", "must be above 0")) | {
    "seed": ("-1", "must be 0 or more"),
    "num_workers": ("-1", "must be 0 or more"),
    "weight_decay": ("-0.1", "must be 0 or more"),
    "max_length": ("1", "must be at least 2"),
    "p_dropout": ("1", "must be at least 0 and below 1"),
    "beta1": ("1", "must be at least 0 and below 1"),
    "beta2": ("-0.5", "must be at least 0 and below 1"),
}
ALLOWED = {
    "seed": "0",
    "num_workers": "0",
    "weight_decay": "0",
    "max_length": "2",
    "p_dropout": "0",
    "beta1": "0",
    "beta2": "0",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_value_beyond_its_bounds_is_refused_by_name(name):
    value, rule = REFUSED[name]
    with pytest.raises(UserError, match=rf"--{name} {type_of(name)(value)} {rule}"):
        parse_args([f"--{name}={value}"])


@pytest.mark.parametrize("name", ALLOWED)
def test_the_bound_itself_is_allowed(name):
    assert getattr(parse_args([f"--{name}", ALLOWED[name]]), name) == float(ALLOWED[name])


def type_of(name: str) -> type:
    return float if name in ("max_lr", "grad_norm_clip", "weight_decay", "p_dropout", "beta1", "beta2") else int


@pytest.mark.parametrize(
    ("flags", "ranks", "message"),
    [
        ("--packing none --total_batch_size 24 --micro_batch_size 4", 4,
         "24 is not a multiple of 4 ranks x --micro_batch_size 4 = 16, .* the nearest that work: 16, 32"),
        ("--device cpu --total_batch_size 4 --micro_batch_size 4", 2,
         "4 is not a multiple of 2 ranks x --micro_batch_size 4 = 8, .* the nearest that work: 8"),
        ("--packing pack --total_batch_size 3", 4, "3 leaves one of 4 ranks without work; give 4 or more"),
        ("--total_batch_size 6 --num_labels 1 --train_bt_model", 4, "6 leaves one of 4 ranks without work; give 8 or more"),
        ("--packing tree --total_batch_size 9 --num_labels 1 --train_bt_model", 1, "9 must be even with --train_bt_model"),
        ("--row_tokens 16383", 1, "--row_tokens 16383 is too few: a row must hold a whole trace; give 16384 or more"),
        ("--row_tokens 99 --max_length 50 --num_labels 1 --train_bt_model", 1, "must hold a whole pair; give 100 or more"),
        ("--data_num_response 12 --small_group_size 5", 1,
         "--small_group_size 5 does not divide --data_num_response 12; the nearest that does: 4"),
        ("--packing none --micro_batch_size 1 --num_labels 1 --train_bt_model", 1, "--micro_batch_size 1 must be even"),
    ],
)  # fmt: skip
def test_what_does_not_divide_is_told_with_what_does(monkeypatch, flags, ranks, message):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    with pytest.raises(UserError, match=message):
        parse_args(flags.split())


def test_a_step_of_packed_rows_need_not_divide(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    for packing in ("pack", "tree", "auto"):  # auto: looked at again when it is known
        assert (
            parse_args(["--packing", packing, "--total_batch_size", "7", "--row_tokens", "16384"]).row_tokens == 16384
        )


def test_debug_is_a_short_trial_that_nobody_sees():
    flags = [
        "--debug",
        "--track",
        "--push_to_hub",
        "--model_path",
        "a/model",
        "--data_path",
        "some/data",
        "--num_steps",
    ]
    args = parse_args([*flags, "50"])
    assert (args.num_steps, args.tracker, args.push_to_hub, args.run_name) == (
        10,
        "none",
        False,
        "model-data-seed1337-debug",
    )
    assert parse_args([*flags, "5"]).num_steps == 5


def test_default_names_tell_runs_apart():
    names = {
        parse_args(flags).run_name
        for flags in (
            [],
            ["--seed", "2"],
            ["--model_path", "b"],
            ["--init_from", "c"],
            ["--data_path", "d"],
            ["--debug"],
        )
    }
    assert len(names) == 6 and "c-OpenR1-VM-seed1337" in names


def test_the_tracker_by_the_flags_given():
    def kind(*flags):
        return parse_args(flags).tracker

    assert (kind(), kind("--track"), kind("--neptune_project"), kind("--neptune_project", "a/b")) == ("none",) + 3 * (
        "neptune",
    )
    assert (kind("--tracker", "trackio"), kind("--track", "--tracker", "none")) == ("trackio", "none")


def test_what_is_held_out_follows_from_three_flags():
    def held_out(*flags):
        return parse_args(flags).held_out

    assert (held_out(), held_out("--eval_size", "3"), held_out("--eval_every", "-1")) == (128, 3, 0)
    assert (
        held_out("--validation_data_path", "v") == "v"
        and held_out("--validation_data_path", "v", "--eval_every", "0") == 0
    )
