"""The simulated servers by hand and against plain ones, what is simplified against what is real, and the bound that is kept."""

import asyncio
import json
import math
import random
from collections import OrderedDict
from dataclasses import replace

import pytest
import scaling_study
from scaling_study import BLOCK, LOG_LENGTH, MAX_LENGTH, MEAN, Decoder, Outcome, Reader, Scale, new_tokens, simulate

from common_lib.cli import UserError
from common_lib.virtual_time import run_virtual

SMALL = Scale(2, 1, searches=16, waves=4)


@pytest.fixture(scope="module")
def eight() -> Outcome:
    """8 generators and a value server to at most five of them."""
    return simulate(Scale(8, 2))


# ------------------------------------------------------------------------------------------------------------- results


def test_with_a_value_server_to_five_generators_the_makespan_is_near_its_bound(eight):
    """64 and 512 generators: `python scripts/scaling_study.py`, whose status is 1 where this does not hold."""
    assert eight.bound_by == "generators"
    assert 1 < eight.over_bound <= 1.15
    assert eight.read_share == 1


def test_the_work_is_that_of_the_stated_lengths(eight):
    """8 candidates a round, as long as beams are open: 8 times the mean of a length, as it is cut."""
    mu, sigma, cut = LOG_LENGTH.mean, LOG_LENGTH.stdev, math.log(MAX_LENGTH)
    mean = MEAN * LOG_LENGTH.cdf(cut - sigma**2) + MAX_LENGTH * (1 - LOG_LENGTH.cdf(cut))
    searches, pieces = 8 * 32 * 12, 128 / 2  # a length is rounded up
    assert eight.written == pytest.approx(searches * 8 * (mean + pieces), rel=0.01)
    assert eight.bounds["generators"] == eight.written / 8 / 20_000
    assert eight.bounds["value servers"] == pytest.approx((eight.written + searches * 256) / 2 / 100_000)
    assert MAX_LENGTH / 200 < eight.bounds["longest search"] < MAX_LENGTH / 200 + 8 * MAX_LENGTH / 100_000
    assert mu + sigma**2 / 2 == pytest.approx(math.log(MEAN))


def test_lengths_are_those_of_the_training_benchmark():
    from gpu_parts import layouts

    assert (LOG_LENGTH.mean, LOG_LENGTH.stdev) == pytest.approx((layouts.MU, layouts.SIGMA))
    assert layouts.MAX_LENGTH == MAX_LENGTH


def test_what_has_not_ended_ends_as_its_length_says():
    """Drawn block by block or at once, lengths are the same."""
    rng = random.Random(0)
    whole = [new_tokens(0, rng.randrange(2**31)) for _ in range(20_000)]
    late = [length - BLOCK for length in whole if length > BLOCK]
    again = [new_tokens(BLOCK, rng.randrange(2**31)) for _ in range(20_000)]
    for share in (0.1, 0.5, 0.9):
        assert sorted(again)[int(20_000 * share)] == pytest.approx(sorted(late)[int(len(late) * share)], rel=0.06)


# ------------------------------------------------------------------------------------------------------ what is simplified


def test_coarse_pieces_and_a_router_change_little():
    """Against pieces of 32 tokens, and against the process's own placement of searches on value servers."""
    base = simulate(replace(SMALL, generators=4, value_servers=2))
    for other in (dict(piece=32), dict(assignment="min_group")):
        outcome = simulate(replace(base.scale, **other))
        assert outcome.makespan == pytest.approx(base.makespan, rel=0.03)
        assert outcome.cache_gb == pytest.approx(base.cache_gb, rel=0.15)


def test_processes_have_generators_of_their_own_and_value_servers_in_common():
    alone = simulate(replace(SMALL, generators=8, value_servers=2, searches=4, waves=2))
    both = simulate(replace(alone.scale, generators=16, value_servers=4, assignment="min_group"))
    assert both.scale.processes == 2
    assert both.written == pytest.approx(2 * alone.written, rel=0.1)
    assert both.makespan == pytest.approx(alone.makespan, rel=0.15)
    anywhere = simulate(replace(both.scale, assignment="random"))
    assert anywhere.cache_tokens > both.cache_tokens, "a server has more searches than the others"


def test_what_a_small_cache_loses_is_read_again():
    enough = simulate(SMALL)
    assert enough.read_share == 1
    as_much = simulate(replace(SMALL, pool_gb=enough.cache_gb))
    assert (as_much.read_share, as_much.makespan) == (1, enough.makespan)
    little = simulate(replace(SMALL, pool_gb=enough.cache_gb / 2))
    assert little.read_share > 1.2
    assert little.bounds["value servers"] == pytest.approx(enough.bounds["value servers"], rel=0.05), "nothing lost"


# -------------------------------------------------------------------------------------------------------------- servers


def test_requests_of_a_generator_share_its_rate():
    async def times(rate, each, works):
        """works: when they come, and how much they are."""
        loop, server = asyncio.get_running_loop(), Decoder(rate, each)

        async def one(begin, work):
            await asyncio.sleep(begin)
            await server.write([work])
            return loop.time()

        return await asyncio.gather(*(one(*work) for work in works))

    # 50/s each up to 2 s, then 80/s for what is left
    assert run_virtual(times(100, 80, [(0, 100), (0, 200)])) == pytest.approx([2, 3.25])
    # alone 80/s; from 1 s on three share 100, and 20 are left of each
    assert run_virtual(times(100, 80, [(0, 100), (1, 20), (1, 20)])) == pytest.approx([1.6, 1.6, 1.6])
    # what comes next is over first; then 80/s again for 70
    assert run_virtual(times(100, 80, [(0, 160), (1, 10)])) == pytest.approx([2.075, 1.2])


def test_a_call_ends_with_its_last_request():
    async def both():
        await Decoder(100, 100).write([50, 10])
        return asyncio.get_running_loop().time()

    assert run_virtual(both()) == pytest.approx(0.6)


def test_a_value_server_reads_one_round_after_the_other():
    async def times():
        server, loop = Reader(100, math.inf), asyncio.get_running_loop()

        async def one(begin, tokens):
            await asyncio.sleep(begin)
            await server.read(tokens)
            return loop.time()

        return await asyncio.gather(one(0, 100), one(0.5, 100), one(3, 50))

    assert run_virtual(times()) == pytest.approx([1, 2, 3.5])


def rounds(searches: int, seed: int):
    """(search, traces of one round) of searches whose turns are drawn; prompts of 2 and blocks of 4 tokens."""
    rng = random.Random(seed)
    beams = {f"{i}": [[0, 0]] * 2 for i in range(searches)}
    for name in beams:
        yield name, [[0, 0]]
    while beams:
        name = rng.choice(list(beams))
        traces = [beam + [rng.randrange(2**31)] * rng.choice([4, 4, 2]) for beam in beams[name] for _ in range(2)]
        yield name, traces
        beams[name] = [trace for trace in traces if (len(trace) - 2) % 4 == 0][:2]
        if not beams[name] or len(beams[name][0]) > 14:
            del beams[name]


class PlainCache:
    """Tokens in the order of their last use, those of one round together."""

    def __init__(self):
        self.last = OrderedDict()  # (search, place, block) -> round
        self.count = self.needed = 0

    def costs(self, name, traces):
        """Tokens that were never seen, and how far back the others were."""
        tokens = {(name, place, token) for trace in traces for place, token in enumerate(trace)}
        known = tokens & self.last.keys()
        if known:
            oldest = min(self.last[token] for token in known)
            self.needed = max(self.needed, sum(at >= oldest for at in self.last.values()))
        self.count += 1
        self.last |= dict.fromkeys(tokens, self.count)
        return len(tokens - known)


@pytest.mark.parametrize("seed", range(4))
def test_the_cache_that_is_needed_is_that_of_a_plain_one(seed):
    server, plain = Reader(1, math.inf), PlainCache()
    for name, traces in rounds(6, seed):
        new = plain.costs(name, traces)
        assert sum(server.costs(name, traces, 2, 4)) == new
    assert server.needed == plain.needed > 50


def test_a_search_that_comes_from_another_server_is_read_whole():
    here, there = Reader(1, math.inf), Reader(1, math.inf)
    first = [[0, 0, 7, 7, 7, 7], [0, 0, 8, 8]]
    assert here.costs("a", [[0, 0]], 2, 4) == [2]
    assert here.costs("a", first, 2, 4) == [4, 2]
    second = [[*first[0], 5, 5], [*first[0], 6]]
    assert there.costs("a", second, 2, 4) == [8, 7]
    assert here.costs("a", second, 2, 4) == [2, 1]
    tight = Reader(1, 7.0)
    tight.costs("a", [[0, 0]], 2, 4)
    tight.costs("a", first, 2, 4)  # 8 tokens, the 2 of the prompt among them
    assert tight.costs("a", second, 2, 4) == pytest.approx([2 + 6 / 6, 1 + 6 / 6]), "one of six tokens is lost"


# --------------------------------------------------------------------------------------------------------- the script


def test_rows_and_status(monkeypatch, capsys, tmp_path):
    """Status 1 where caches are enough, and the makespan is still too far from its bound."""
    for makespan, pool, status in ((115.0, "0", 0), (116.0, "0", 1), (116.0, "60", 0)):
        bounds = {"generators": 100.0, "value servers": 50.0, "longest search": 20.0}
        monkeypatch.setattr(
            scaling_study, "simulate", lambda scale, m=makespan, b=bounds: Outcome(scale, m, b, 2.3e6, 1.25, 4_000_000)
        )
        out = tmp_path / "rows.json"
        flags = ["--generators", "8", "--ratios", "5", "--pool_gb", pool, "--json", str(out)]
        assert scaling_study.main(flags) == status
        cells = capsys.readouterr().out.splitlines()[2].split()
        shown = "enough" if pool == "0" else pool
        rate = f"{2.3e6 / makespan:,.0f}"
        assert cells == [
            *("8", "2", shown, "3,072", "100", "generators", f"{makespan:.0f}", f"{makespan / 100:.3f}", rate),
            *("1.25", "4.00", "115"),
        ]
        (row,) = json.loads(out.read_text())
        assert (row["value_servers"], row["over_bound"], row["bounds"]) == (2, makespan / 100, bounds)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--generators 12", "--generators 12 must be at most 8, or a multiple of 8"),
        ("--generators 0", r"--generators \[0\] must be above 0"), ("--waves 0", "--waves 0 must be at least 1"),
        ("--piece 100", "--piece 100 must divide 256"), ("--pool_gb -1", "--pool_gb .* must be 0 or more"),
        ("--ratios 0", "--ratios .* must be above 0"), ("--request_rate 0", "--request_rate 0.0 must be above 0"),
    ],
)  # fmt: skip
def test_numbers_that_cannot_be(flags, message):
    with pytest.raises(UserError, match=message):
        scaling_study.main(flags.split())
