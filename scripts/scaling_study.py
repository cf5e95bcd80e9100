"""How far does a search scale over generator and value servers? Simulated in virtual time; no GPU, no model.

    python scripts/scaling_study.py                             # 8, 64 and 512 generators; 7 minutes
    python scripts/scaling_study.py --generators 8 --ratios 10 5 2.5 --pool_gb 0 60 --json scaling.json    # 40 s

Real: the search, the scorer of served values, the queue of searches, and the placement of searches on a process's servers.
Simulated: the servers. A generator writes 20,000 tokens/s, shared equally by its requests, at most 200 for one of them
(1.5B on an H100). A value server reads 100,000 tokens/s, one round after the other. Nothing else takes time: network,
tokenizing, the event loop itself. Tokens are counted in pieces of `--piece`, so that a search is cheap to simulate.

Work that is counted: on generators every new token, kept or not (their prefix caches are taken to suffice); on value servers
the prompt once, every new token, and what their caches have lost. bound: the largest of the generators' work, the value
servers' (with nothing lost), and the longest search alone. A process drives 8 generators of its own. One process places
searches on value servers itself; several share them through sglang-router, which keeps a search where it sent it first.

Lengths are those of the training benchmark (scripts/gpu_parts/training.py): lognormal, mean 6,000 and standard deviation
4,000, cut at 16,384; a candidate ends as its length says, given that its beam has not ended. Values do not depend on lengths.
"""

import argparse
import asyncio
import gc
import heapq
import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from common_lib.cli import ArgumentParser, UserError, check_rules, run_script
from common_lib.concurrency import gather_all, run_bounded
from common_lib.virtual_time import run_virtual
from engine_lib.base import Reply
from engine_lib.placement import Placement
from engine_lib.value_base import ValueConfig, Valued
from eval_lib.tables import Table, as_text, number
from search_lib.search import Generate, search
from search_lib.served_scorer import ServedScorer
from search_lib.tree import SearchConfig, SearchResult, SearchTask, parse_search_type

MEAN, DEVIATION = 6000, 4000  # of a response's tokens
BLOCK, MAX_LENGTH, PROMPT = 4096, 16_384, 256
LIMIT = 1.15  # of makespan over bound
BYTES_A_TOKEN = 28_672  # keys and values of 1.5B in bf16: 28 layers x 2 x 2 heads x 128 x 2 bytes
SIGMA2 = math.log(1 + (DEVIATION / MEAN) ** 2)
LOG_LENGTH = NormalDist(math.log(MEAN) - SIGMA2 / 2, math.sqrt(SIGMA2))
PROCESS = 8  # generators that one process drives
ASSIGNMENTS = ("placement", "min_group", "random")


@dataclass(frozen=True)
class Scale:
    """What is simulated. Rates are tokens/s of one server; `searches` is at once for each generator, and `waves` times as
    many are done; pool_gb: value cache of a server, 0 for enough; piece: tokens that are simulated as one."""

    generators: int
    value_servers: int
    searches: int = 32
    waves: int = 12
    pool_gb: float = 0.0
    assignment: str = "placement"
    writes: float = 20_000.0
    writes_each: float = 200.0
    reads: float = 100_000.0
    piece: int = 128
    seed: int = 0

    @property
    def processes(self) -> int:
        return max(1, self.generators // PROCESS)

    @property
    def pool(self) -> float:
        """Pieces."""
        return self.pool_gb * 1e9 / BYTES_A_TOKEN / self.piece or math.inf

    @property
    def config(self) -> SearchConfig:
        shape = parse_search_type("beam2", 8, BLOCK // self.piece, MAX_LENGTH // self.piece)
        return SearchConfig(*shape, MAX_LENGTH // self.piece, seed=self.seed)


# ---------------------------------------------------------------------------------------------------------------------
# Servers


class Decoder:
    """A generator: what runs on it gets equal shares of `rate`, of which nothing gets more than `each` (work a second).

    `level` is the work that something running since the beginning would have got, so that who ends next never changes.
    """

    def __init__(self, rate: float, each: float):
        self.rate, self.each = rate, each
        self.loop = asyncio.get_running_loop()
        self.running: list[tuple[float, int, asyncio.Future]] = []  # a heap by the level at which each ends
        self.level, self.since, self.count = 0.0, 0.0, 0
        self.timer: asyncio.TimerHandle | None = None

    async def write(self, works: Sequence[float]) -> None:
        """All of them at once, to the end of the last."""
        self._advance()
        ends = [self.loop.create_future() for _ in works]
        for work, end in zip(works, ends, strict=True):
            self.count += 1
            heapq.heappush(self.running, (self.level + work, self.count, end))
        self._plan()
        for end in ends:
            await end

    def _speed(self) -> float:
        return min(self.each, self.rate / len(self.running))

    def _advance(self) -> None:
        now = self.loop.time()
        if self.running:
            self.level += (now - self.since) * self._speed()
        self.since = now

    def _plan(self) -> None:
        """Wake at the next end. A timer that is too early only looks again."""
        if not self.running:
            return
        due = self.since + max(0.0, self.running[0][0] - self.level) / self._speed()
        if self.timer is None or self.timer.when() > due:
            if self.timer is not None:
                self.timer.cancel()
            self.timer = self.loop.call_at(due, self._wake)

    def _wake(self) -> None:
        self.timer = None
        self._advance()
        while self.running and self.running[0][0] <= self.level + 1e-6:
            heapq.heappop(self.running)[2].set_result(None)
        self._plan()


class Reader:
    """A value server: reads what it is sent one after the other, but what its cache holds.

    The cache gives up what was least recently used. Of a search, a round uses the paths of its open beams and adds its
    candidates; `used` has the tokens that were last used by each round, in order, so that what a search finds again is
    as far back as the tokens of all rounds since. needed: the smallest cache in which nothing is ever lost.
    """

    def __init__(self, rate: float, pool: float):
        """rate: work a second. pool: tokens, infinite for enough."""
        self.rate, self.pool, self.free_at = rate, pool, 0.0
        self.used: list[int] = []
        self.last: dict[str, tuple[int, set[int]]] = {}  # of a search: its last round in `used`, and ends of its traces
        self.needed = 0

    async def read(self, tokens: float) -> None:
        now = asyncio.get_running_loop().time()
        self.free_at = max(now, self.free_at) + tokens / self.rate
        await asyncio.sleep(self.free_at - now)

    def costs(self, group: str, traces: Sequence[Sequence[int]], prompt: int, block: int) -> list[float]:
        """Tokens to be computed of each trace of one round. Those of a round begin at the same token."""
        begin = max(0, len(traces[0]) - prompt - 1) // block * block + prompt if len(traces[0]) > prompt else 0
        held = paths_tokens(traces, prompt, block, begin)
        new = sum(map(len, traces)) - begin * len(traces)
        before, ends = self.last.get(group, (-1, set()))
        lost = 1.0
        if begin == 0:
            lost = 0.0  # a prompt: there is nothing to find
        elif all(trace[begin - 1] in ends for trace in traces):
            away = sum(self.used[before:])
            self.needed = max(self.needed, away)
            self.used[before] -= held
            lost = min(1.0, max(0.0, away - self.pool) / held)
        self.used.append(held + new)
        self.last[group] = len(self.used) - 1, {trace[-1] for trace in traces}
        return [len(trace) - begin + lost * begin for trace in traces]


def paths_tokens(traces: Sequence[Sequence[int]], prompt: int, block: int, begin: int) -> int:
    """Different tokens of the traces before `begin`: the prompt, and blocks, whose tokens are all alike."""
    blocks = {(start, trace[start]) for trace in traces for start in range(prompt, begin, block)}
    return min(prompt, begin) + block * len(blocks)


# ---------------------------------------------------------------------------------------------------------------------
# What the search is given


def new_tokens(start: int, seed: int) -> float:
    """Tokens to the end of a response that has not ended after `start` ones; seed: of 31 bits."""
    before = LOG_LENGTH.cdf(math.log(start)) if start else 0.0
    return math.exp(LOG_LENGTH.inv_cdf(before + (seed + 0.5) / 2**31 * (1 - before))) - start


def value_of(trace: Sequence[int]) -> float:
    return trace[-1] * 0x9E3779B1 % 2**31 / 2**31


def make_generate(scale: Scale, at_once: int) -> Generate:
    """One process's generators. A block is its seed, as often as it has pieces."""
    servers = [Decoder(scale.writes, scale.writes_each) for _ in range(min(PROCESS, scale.generators))]
    placement: Placement[Decoder] = Placement(at_once, asyncio.get_running_loop().time)
    prompt = PROMPT // scale.piece

    async def generate(prompt_ids: list[int], n: int, limit: int, seeds: list[int], tree_id: str) -> list[Reply]:
        start = (len(prompt_ids) - prompt) * scale.piece
        wanted = [max(1, math.ceil(new_tokens(start, seed) / scale.piece)) for seed in seeds]
        with placement.use(tree_id, servers) as server:
            await server.write([min(limit, count) * scale.piece for count in wanted])
        return [
            Reply([seed] * min(limit, count), "stop" if count <= limit else "length", len(prompt_ids))
            for seed, count in zip(seeds, wanted, strict=True)
        ]

    return generate


@dataclass
class ReaderPool:
    """A `ValueEngine` of simulated servers; several processes have one each, and the servers in common."""

    scale: Scale
    use: Callable[[str], Any]  # a context that tells the server of a search
    name: str = "simulated"
    context_length: int = 1 << 30
    pool_tokens: int = 1 << 30

    async def values(
        self, traces: Sequence[Sequence[int]], group: str, prefixes: Sequence[Sequence[int]] = ()
    ) -> list[Valued]:
        scale = self.scale
        with self.use(group) as server:
            costs = server.costs(group, traces, PROMPT // scale.piece, BLOCK // scale.piece)
            await server.read(sum(costs) * scale.piece)
        return [Valued(value_of(trace), round(cost)) for trace, cost in zip(traces, costs, strict=True)]

    async def close(self) -> None:
        """Nothing."""

    def describe(self) -> dict[str, object]:
        return {}


def placed(servers: list[Reader], at_once: int) -> Callable[[str], Any]:
    """A process that knows all value servers, and no router."""
    placement: Placement[Reader] = Placement(at_once, asyncio.get_running_loop().time)
    return lambda group: placement.use(group, servers)


def routed(servers: list[Reader], draw: random.Random | None) -> Callable[[str], Any]:
    """A router before them: with `draw` a new search goes anywhere, else to the server that has had the fewest."""
    assigned: dict[str, Reader] = {}

    @contextmanager
    def use(group: str) -> Iterator[Reader]:
        if group not in assigned:  # a router forgets nobody for four hours, so all have had equally many
            number = draw.randrange(len(servers)) if draw else len(assigned) % len(servers)
            assigned[group] = servers[number]
        yield assigned[group]

    return use


# ---------------------------------------------------------------------------------------------------------------------
# A run


@dataclass
class Work:
    """What the searches of a run asked for, in tokens, and the longest of them alone (s)."""

    written: float = 0.0
    to_read: float = 0.0  # with nothing lost
    read: float = 0.0
    longest: float = 0.0

    def add(self, scale: Scale, result: SearchResult) -> None:
        lengths = [[len(block) * scale.piece for block in record.tokens] for record in result.tree.rounds]
        new = sum(map(sum, lengths))
        self.written += new
        self.to_read += new + PROMPT
        self.read += result.total("tokens_scored") * scale.piece
        self.longest = max(self.longest, sum(map(max, lengths)) / scale.writes_each + new / scale.reads)


@dataclass(frozen=True)
class Outcome:
    """Seconds: `bounds` by name. cache_tokens: that the fullest value server needs so that nothing is read twice."""

    scale: Scale
    makespan: float
    bounds: dict[str, float]
    written: float
    read_share: float  # tokens read for each that had to be
    cache_tokens: int

    @property
    def bound_by(self) -> str:
        return max(self.bounds, key=lambda name: self.bounds[name])

    @property
    def over_bound(self) -> float:
        return self.makespan / self.bounds[self.bound_by]

    @property
    def cache_gb(self) -> float:
        return self.cache_tokens * BYTES_A_TOKEN / 1e9

    def to_json(self) -> dict[str, Any]:
        told = {name: getattr(self, name) for name in ("makespan", "bound_by", "over_bound", "cache_gb")}
        return (
            asdict(self.scale) | told | {"bounds": self.bounds, "written": self.written, "read_share": self.read_share}
        )


async def run(scale: Scale) -> Outcome:
    """Every process has as many searches to do, one queue each."""
    work, readers = Work(), [Reader(scale.reads, scale.pool) for _ in range(scale.value_servers)]
    at_once = scale.searches * scale.generators // scale.processes
    route = None
    if scale.assignment != "placement":
        route = routed(readers, random.Random(scale.seed) if scale.assignment == "random" else None)
    settings = ValueConfig("", vocab_size=2**31, num_labels=3)

    async def process(index: int) -> None:
        generate = make_generate(scale, at_once)
        scorer = ServedScorer(ReaderPool(scale, route or placed(readers, at_once)), settings)

        async def one(task: SearchTask) -> None:
            work.add(scale, await search(task, generate, scorer, scale.config))

        prompt = (0,) * (PROMPT // scale.piece)
        tasks = [SearchTask(index, number, prompt) for number in range(at_once * scale.waves)]
        await run_bounded(tasks, one, at_once)

    await gather_all(process(index) for index in range(scale.processes))
    bounds = {
        "generators": work.written / scale.generators / scale.writes,
        "value servers": work.to_read / scale.value_servers / scale.reads,
        "longest search": work.longest,
    }
    makespan, needed = asyncio.get_running_loop().time(), max(reader.needed for reader in readers)
    return Outcome(scale, makespan, bounds, work.written, work.read / work.to_read, needed * scale.piece)


def simulate(scale: Scale) -> Outcome:
    """`run`, without the collector of cycles: there are none, and looking for them takes a third of the time."""
    gc.disable()
    try:
        return run_virtual(run(scale))
    finally:
        gc.enable()


# ---------------------------------------------------------------------------------------------------------------------
# The table


def scales(args: argparse.Namespace) -> list[Scale]:
    """One for each row."""
    found = []
    for generators in args.generators:
        if generators > PROCESS and generators % PROCESS:
            raise UserError(f"--generators {generators} must be at most {PROCESS}, or a multiple of {PROCESS}")
        chosen = args.assignment or ("placement" if generators <= PROCESS else "min_group")
        base = Scale(
            generators, 0, args.searches, args.waves, assignment=chosen, writes_each=args.request_rate, piece=args.piece,
            seed=args.seed,
        )  # fmt: skip
        found += [
            replace(base, value_servers=math.ceil(generators / ratio), pool_gb=pool_gb)
            for ratio in args.ratios
            for pool_gb in args.pool_gb
        ]
    return found


COLUMNS = [
    "generators", "value servers", "cache GB", "searches", "bound, s", "by", "makespan, s", "over bound", "tokens/s",
    "read", "needed M", "GB",
]  # fmt: skip


def row(outcome: Outcome) -> list[str]:
    scale = outcome.scale
    return [
        str(scale.generators), str(scale.value_servers), f"{scale.pool_gb:g}" if scale.pool_gb else "enough",
        f"{scale.searches * scale.generators * scale.waves:,}", number(max(outcome.bounds.values()), ".0f"), outcome.bound_by,
        number(outcome.makespan, ".0f"), number(outcome.over_bound), f"{outcome.written / outcome.makespan:,.0f}",
        number(outcome.read_share, ".2f"), number(outcome.cache_tokens / 1e6, ".2f"), number(outcome.cache_gb, ".0f"),
    ]  # fmt: skip


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    flag = parser.add_argument
    flag("--generators", type=int, nargs="+", default=[8, 64, 512], help="up to 8, or a multiple of 8")
    flag("--ratios", type=float, nargs="+", default=[5.0], help="generators for each value server")
    flag("--pool_gb", type=float, nargs="+", default=[0.0], help="value cache of a server; 0: enough")
    flag("--searches", type=int, default=32, help="at once for each generator")
    flag("--waves", type=int, default=12, help="as many times --searches are done for each generator")
    flag("--request_rate", type=float, default=200.0, help="tokens/s of one request at most")
    flag("--assignment", choices=ASSIGNMENTS,
         help="who places searches on value servers: each process, or sglang-router by its --assignment-mode (default: "
              "placement for one process, min_group for more)")  # fmt: skip
    flag("--piece", type=int, default=128, help="tokens that are simulated as one")
    flag("--seed", type=int, default=0)
    flag("--json", type=Path, help="write the rows to this file, too")
    args = parser.parse_args(argv)
    rules = [(name, getattr(args, name) >= 1, "must be at least 1") for name in ("searches", "waves")]
    rules += [(name, min(getattr(args, name)) > 0, "must be above 0") for name in ("generators", "ratios")]
    rules += [
        ("pool_gb", min(args.pool_gb) >= 0, "must be 0 or more"),
        ("request_rate", args.request_rate > 0, "must be above 0"),
        ("piece", args.piece > 0 and PROMPT % args.piece == 0, f"must divide {PROMPT}"),
    ]
    check_rules(args, rules)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; exit status 1 where the makespan is more than 1.15 times its bound though caches are enough."""
    args = parse_args(argv)
    outcomes = []
    for scale in scales(args):
        begin = time.monotonic()
        outcomes.append(simulate(scale))
        print(f"{' '.join(row(outcomes[-1]))} ({time.monotonic() - begin:.0f} s)", file=sys.stderr)
    title = (
        f"{args.searches} searches at once for each generator, {args.waves} times as many in all; at most "
        f"{args.request_rate:g} tokens/s a request"
    )
    notes = [
        "read: tokens that value servers read, for each that had to be. needed: tokens in the cache of the fullest value server so "
        "that none is read twice (least recently used goes first), in millions, and in GB for 1.5B in bf16."
    ]
    print(as_text(Table(title, COLUMNS, list(map(row, outcomes)), notes, words=["by"])))
    if args.json:
        args.json.write_text(json.dumps([outcome.to_json() for outcome in outcomes], indent=1) + "\n", encoding="utf-8")
    return int(any(outcome.over_bound > LIMIT for outcome in outcomes if not outcome.scale.pool_gb))


if __name__ == "__main__":
    run_script(main)
