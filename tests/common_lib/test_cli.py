"""How mistakes and the hub's troubles are told, and the exit status of a script."""

import argparse
import logging
import os
import sys

import pytest
from huggingface_hub import errors

from common_lib.cli import (
    ArgumentParser,
    UserError,
    check_rules,
    enable_fast_transfers,
    hub_errors,
    run_script,
    set_up_logging,
)


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


def test_the_nearest_flag_and_help_with_defaults():
    parser = ArgumentParser(description="first line\n    kept as it is")
    for name, settings in {
        "block_size": {"type": int, "default": 7, "help": "size"},
        "num_blocks": {"default": None, "help": "number"},
        "batch_size": {"default": [], "help": "batch"},
        "device": {"default": "auto", "help": "where (default: here)"},
        "fast": {"action": "store_true", "help": "quick"},
    }.items():
        parser.add_argument(f"--{name}", **settings)
    for wrong, near in (
        ("--blocksize", "--block_size"),
        ("--num_block", "--num_blocks"),
        ("--batchsize=3", "--batch_size"),
    ):
        with pytest.raises(UserError, match=rf"unknown argument {wrong}; did you mean {near}\?"):
            parser.parse_args([wrong])
    with pytest.raises(UserError, match="unknown argument --dev; "):  # no abbreviations: a new flag would change them
        parser.parse_args(["--dev", "cpu"])
    shown = parser.format_help()
    assert (
        "first line\n    kept as it is" in shown and "size (default: 7)" in shown and "where (default: here)\n" in shown
    )
    assert all(f"{word}\n" in shown for word in ("number", "batch", "quick"))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("GatedRepoError", "model x is gated: accept its terms"),
        ("RepositoryNotFoundError", "model x is neither a local path nor known to the hub; check the name"),
        ("HFValidationError", "model x is neither a local path nor known to the hub; check the name"),
        ("LocalEntryNotFoundError", "the hub cannot be reached"),
    ],
)
def test_each_trouble_of_the_hub_has_its_line(kind, message):
    error = getattr(errors, kind)
    made = error.__new__(error)  # some want a response
    Exception.__init__(made, "what it says")
    with pytest.raises(UserError, match=message), hub_errors("model x"):
        raise made
    with pytest.raises(KeyError), hub_errors("model x"):
        raise KeyError("another error stays what it is")


@pytest.mark.parametrize(("given", "expected"), [("1", "1"), ("true", "1"), ("ON", "1"), ("0", None), (None, None)])
def test_fast_transfers_only_where_they_are_asked_for(given, expected, monkeypatch):
    monkeypatch.delenv("HF_XET_HIGH_PERFORMANCE", raising=False)
    monkeypatch.delenv("HF_HUB_ENABLE_HF_TRANSFER", raising=False)
    if given:
        monkeypatch.setenv("HF_HUB_ENABLE_HF_TRANSFER", given)
    enable_fast_transfers()
    assert os.environ.get("HF_XET_HIGH_PERFORMANCE") == expected


def test_our_lines_are_shown_and_the_libraries_only_from_warnings_on(monkeypatch):
    said = []
    monkeypatch.setattr(logging, "basicConfig", lambda **settings: said.append(settings))
    for name in ("httpx", "datasets", "neptune"):
        monkeypatch.setattr(logging.getLogger(name), "level", logging.NOTSET)
    set_up_logging()
    assert said[0]["level"] == logging.INFO and said[0]["stream"] is sys.stderr and said[0]["format"] == "%(message)s"
    assert {logging.getLogger(name).level for name in ("httpx", "datasets", "neptune")} == {logging.WARNING}
