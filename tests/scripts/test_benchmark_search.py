"""The benchmark of the order of work: both orders do the work that they are said to do, and the times add up."""

import re

import benchmark_search
import pytest

from common_lib.cli import UserError


def cells(table: str) -> dict[str, tuple[float, float]]:
    rows = re.findall(r"^\| ([^|]+) \| ([\d,.-]+) \| ([\d,.-]+) \|", table, re.MULTILINE)
    return {name: (float(a.replace(",", "")), float(b.replace(",", ""))) for name, a, b in rows}


def test_both_orders_do_what_they_are_said_to_do(capsys):
    searches, rounds, block, prompt, beams, width = 3, 3, 4, 5, 2, 2
    flags = f"--searches {searches} --rounds {rounds} --block_size {block} --prompt {prompt} --num_beams {beams}"
    assert benchmark_search.main([*flags.split(), "--repeats", "1", "--engine", "transformers"]) == 0
    row = cells(capsys.readouterr().out)
    generated = searches * rounds * beams * width * block
    assert row["tokens generated"] == (generated, generated)
    traces = [prompt + block * (i + 1) for i in range(rounds)]
    assert row["tokens scored"] == (
        searches * (beams * width * sum(traces) + beams * traces[-1]),
        searches * prompt + generated,
    )
    for order in (0, 1):
        wall, busy, idle = (row[f"{name}, s"][order] for name in ("wall-clock", "engine busy", "engine idle"))
        assert busy + idle == pytest.approx(wall, abs=0.02)
        assert row["both at once, s"][order] <= min(busy, row["value model busy, s"][order]) + 0.01
    assert row["both at once, s"][0] == 0  # lock-step: never


def test_intervals():
    assert benchmark_search.length([(3, 4), (0, 2), (1, 3)]) == 4
    assert benchmark_search.length([(0, 1), (5, 7), (6, 8)]) == 4
    assert benchmark_search.both([(0, 4), (6, 9)], [(3, 7)]) == 2


def test_numbers_that_cannot_be():
    with pytest.raises(UserError, match="--rounds 0 must be at least 1"):
        benchmark_search.main(["--rounds", "0"])
