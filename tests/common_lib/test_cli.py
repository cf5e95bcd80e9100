"""How mistakes and the hub's troubles are told, and the exit status of a script."""

import argparse
import os

import pytest

from common_lib.cli import ArgumentParser, UserError, check_rules, enable_fast_transfers, hub_errors, run_script


@pytest.mark.parametrize(
    ("outcome", "status", "said"),
    [
        (None, 0, ""),
        (1, 1, ""),
        (UserError("--a 1\n  must be 2"), 2, "error: --a 1 must be 2\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_a_script_ends_with_a_status_and_one_line(outcome, status, said, capsys):
    def main(argv):
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    with pytest.raises(SystemExit) as end:
        run_script(main)
    assert (end.value.code, capsys.readouterr().err) == (status, said)


def test_flags_that_are_unknown_or_break_a_rule():
    parser = ArgumentParser(description="x")
    parser.add_argument("--num_blocks", type=int, default=8, help="blocks")
    for wrong, message in (
        (["--num_block", "1"], r"unknown argument --num_block; did you mean --num_blocks\?"),
        (["--zzz"], "unknown argument --zzz; see --help"),
        (["--num_blocks", "x"], "invalid int value: 'x'"),
    ):
        with pytest.raises(UserError, match=message):
            parser.parse_args(wrong)
    assert "blocks (default: 8)" in parser.format_help()
    args = argparse.Namespace(a=1, b=2)
    check_rules(args, [("a", True, "must hold")])
    with pytest.raises(UserError, match="--b 2 must be odd"):
        check_rules(args, [("a", True, "must hold"), ("b", False, "must be odd"), ("a", False, "comes later")])


def test_the_hub_out_of_reach_is_one_line():
    for error in (ConnectionError("refused"), OSError("offline")):
        with pytest.raises(UserError, match="benchmark x/y is neither a local path nor in the local cache"), \
             hub_errors("benchmark x/y"):  # fmt: skip
            raise error


def test_the_old_name_of_fast_transfers_is_honoured(monkeypatch):
    monkeypatch.setenv("HF_HUB_ENABLE_HF_TRANSFER", "1")
    monkeypatch.delenv("HF_XET_HIGH_PERFORMANCE", raising=False)
    enable_fast_transfers()
    assert os.environ["HF_XET_HIGH_PERFORMANCE"] == "1" and "HF_HUB_ENABLE_HF_TRANSFER" not in os.environ
