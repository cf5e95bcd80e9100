"""What a search is: its settings, its seeds, and the tree that it grows. Pure Python, no model library."""

import hashlib
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from common_lib.cli import UserError

ROOT = 0  # node number of the prompt; candidates are numbered from 1 in the order they were written in
SELECTIONS = ("value", "random")


@dataclass(frozen=True)
class SearchConfig:
    """`num_beams` beams are kept, each extended by `beam_width` candidates a round; lengths are in response tokens."""

    num_beams: int
    beam_width: int
    block_size: int
    max_length: int
    selection: str = "value"
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        """For X.meta.json, whose keys are older than the names here."""
        names = {"num_beams": "width", "beam_width": "branch"}
        return {names.get(name, name): value for name, value in vars(self).items()}


def parse_search_type(search_type: str, num_blocks: int, block_size: int, max_length: int) -> tuple[int, int, int]:
    """(num_beams, beam_width, block_size) of a search type: `beamB`, `bfs` or `bon`.

    beamB: num_blocks / B beams of B candidates. bfs: one beam of num_blocks candidates. bon: num_blocks independent
    samples, that is beam1 with one block of max_length. Raises UserError.
    """
    for name, value in (("num_blocks", num_blocks), ("block_size", block_size), ("max_length", max_length)):
        if value < 1:
            raise UserError(f"--{name} is {value}; it must be at least 1")
    if search_type == "bon":
        return num_blocks, 1, max_length
    if block_size > max_length:
        raise UserError(f"--block_size {block_size} is more than --max_length {max_length}; give at most {max_length}")
    if search_type == "bfs":
        return 1, num_blocks, block_size
    digits = search_type.removeprefix("beam")
    if not search_type.startswith("beam") or not digits.isdecimal() or int(digits) < 1:
        raise UserError(f"--search_type {search_type!r} is unknown; give beamB (beam2, say), bfs or bon")
    beam_width = int(digits)
    if num_blocks % beam_width:
        divisors = (b for b in range(1, num_blocks + 1) if num_blocks % b == 0)
        nearest = min(divisors, key=lambda b: abs(b - beam_width))
        more = math.ceil(num_blocks / beam_width) * beam_width
        raise UserError(
            f"--num_blocks {num_blocks} is not divisible by the {beam_width} of --search_type {search_type}; "
            f"give beam{nearest} or --num_blocks {more}"
        )
    return num_blocks // beam_width, beam_width, block_size


@dataclass(frozen=True)
class SearchTask:
    """One search: which problem, which repetition, and the prompt."""

    data_idx: int
    repeat_idx: int
    prompt_ids: tuple[int, ...]

    @property
    def tree_id(self) -> str:
        return f"{self.data_idx}/{self.repeat_idx}"


def request_seed(seed: int, data_idx: int, repeat_idx: int, round_idx: int, beam: int, candidate: int) -> int:
    """A seed in 0 .. 2**31 - 1 that depends on these six numbers and nothing else."""
    packed = struct.pack("<6q", seed, data_idx, repeat_idx, round_idx, beam, candidate)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=4).digest(), "little") & 0x7FFFFFFF


@dataclass
class Round:
    """One finished round of one search: its candidates side by side. This is what the journal holds."""

    round: int
    parent: list[int]  # node numbers
    tokens: Sequence[Sequence[int]]
    value: list[float]
    kept: list[bool]
    finish: list[str]  # "stop", "length" (max_length reached), or "" (goes on if kept)
    seconds_generate: float = 0.0
    seconds_score: float = 0.0
    tokens_scored: int = 0
    tokens_reread: int = 0
    tokens_cached: int = 0
    seconds: float = 0.0  # wall-clock, waiting included; 0 in journals that do not tell


class Tree:
    """All nodes of a search and the beams that are still held. Built round by round, live or from a journal alike.

    Lists are by node number; node 0 is the prompt, with parent and round -1, value NaN and no tokens. start: response
    tokens before the node's own. beams: the nodes now held, in the order of an output line.
    """

    def __init__(self, prompt_ids: Sequence[int], num_beams: int):
        self.prompt_ids = list(prompt_ids)
        self.parent, self.round, self.start = [-1], [-1], [0]
        self.tokens: list[Sequence[int]] = [[]]
        self.value, self.kept, self.finish = [math.nan], [True], [""]
        self.beams = [ROOT] * num_beams
        self.rounds: list[Round] = []

    @property
    def open_slots(self) -> list[int]:
        """Places of the beams that are not finished; none where the search is over."""
        return [slot for slot, node in enumerate(self.beams) if not self.finish[node]]

    @property
    def finished(self) -> list[int]:
        """Candidates that ended, kept or not."""
        return [node for node, finish in enumerate(self.finish) if finish]

    def path(self, node: int) -> list[int]:
        """From the first block to `node`; the prompt is left out."""
        path = []
        while node != ROOT:
            path.append(node)
            node = self.parent[node]
        return path[::-1]

    def end(self, node: int) -> int:
        """Response tokens up to the end of this node."""
        return self.start[node] + len(self.tokens[node])

    def response(self, node: int) -> list[int]:
        """Response tokens from the prompt's end to the end of this node."""
        return [token for above in self.path(node) for token in self.tokens[above]]

    def add(self, record: Round) -> None:
        """Append a round. Kept candidates take the places of the beams they replace, in the order of the candidates."""
        first = len(self.parent)
        self.start += [self.end(parent) for parent in record.parent]
        self.parent += record.parent
        self.round += [record.round] * len(record.parent)
        self.tokens += record.tokens
        self.value += record.value
        self.kept += record.kept
        self.finish += record.finish
        kept = [first + i for i, keep in enumerate(record.kept) if keep]
        for slot, node in zip(self.open_slots, kept, strict=True):
            self.beams[slot] = node
        self.rounds.append(record)

    def history(self) -> list[tuple[int, Sequence[int]]]:
        """(parent, tokens) of every node but the prompt, for a scorer that has not seen them."""
        return list(zip(self.parent[1:], self.tokens[1:], strict=True))


@dataclass
class SearchResult:
    """A finished search. `beams` are node numbers of `tree`; `seconds` is its own wall-clock, waiting included."""

    task: SearchTask
    tree: Tree
    seconds: float

    @property
    def beams(self) -> list[int]:
        return self.tree.beams

    def total(self, name: str) -> Any:
        """Sum of a number over the rounds: seconds_generate, tokens_scored, ..."""
        return sum(getattr(record, name) for record in self.tree.rounds)
