"""Search trees from a run's journal `X.tree.jsonl`, one problem at a time.

The journal interleaves searches and may have gigabytes. A first pass notes where each line lies; then the lines of a
problem are read together, without their token ids. Memory holds the index (40 bytes a line) and the texts of one
problem.
"""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from common_lib.cli import UserError
from report_lib.lines import find_key, is_count, is_share, iterate_lines, loads_without_ids

ROOT = 0
NODE_LISTS = ("parent", "tokens", "value", "kept", "finish", "text")


@dataclass
class SearchTree:
    """One search. Lists are by node number; node 0 is the prompt, whose `parent` is -1 and whose text is ''.

    start: response tokens before the node's block; length: of its block. finish: "stop", "length" or "" (goes on, or
    rejected). beams: the nodes now held, in the order of the output line; `is_over` where all of them are finished.
    seconds: by round, spent generating and scoring.
    """

    data_idx: int
    repeat_idx: int
    prompt_tokens: int
    parent: list[int]
    round: list[int]
    start: list[int]
    length: list[int]
    value: list[float]
    kept: list[bool]
    finish: list[str]
    text: list[str]
    beams: list[int]
    seconds: list[tuple[float, float]] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        return all(self.finish[node] for node in self.beams)

    @property
    def nodes(self) -> range:
        """All candidates (the prompt is none)."""
        return range(1, len(self.parent))

    @property
    def finished(self) -> list[int]:
        """Candidates that ended, kept or not."""
        return [node for node in self.nodes if self.finish[node]]

    def path(self, node: int) -> list[int]:
        """From the first block to `node`; the prompt is left out."""
        path = []
        while node != ROOT:
            path.append(node)
            node = self.parent[node]
        return path[::-1]

    def trace_text(self, node: int) -> str:
        """The response up to the end of `node`: the texts of its path joined."""
        return "".join(self.text[above] for above in self.path(node))


class TreeFile:
    """Where each line of a journal lies. `torn`: its last line is not whole and was left out."""

    def __init__(self, path: Path):
        self.path = path
        self.torn = False
        columns = [array("q") for _ in range(6)]  # data_idx, repeat_idx, round, offset, size, line number
        for number, offset, raw in iterate_lines(path):
            if not raw.endswith(b"\n") and not raw.rstrip().endswith(b"}"):
                self.torn = True
                break
            found = [leading_int(raw, key) for key in ("data_idx", "repeat_idx", "round")]
            keys = [key for key in found if key is not None]
            if len(keys) < len(found):
                raise UserError(
                    f"{path}: line {number} is not a round of a search; give the journal of one run, or move it away"
                )
            for column, value in zip(columns, (*keys, offset, len(raw), number), strict=True):
                column.append(value)
        self._index = np.array(columns, dtype=np.int64).T
        order = np.lexsort(self._index[:, 2::-1].T)
        self._index = self._index[order]
        same = (self._index[1:, :3] == self._index[:-1, :3]).all(axis=1)
        if same.any():
            at = int(np.argmax(same))
            data_idx, repeat_idx, round_idx = (int(v) for v in self._index[at, :3])
            numbers = sorted(int(v) for v in self._index[at : at + 2, 5])
            raise UserError(
                f"{path}: lines {numbers[0]} and {numbers[1]} are both round {round_idx} of problem {data_idx}, "
                "repetition "
                f"{repeat_idx}; journals of two runs in one file?"
            )

    @property
    def problems(self) -> list[int]:
        return [int(value) for value in np.unique(self._index[:, 0])]

    def __len__(self) -> int:
        return len(self._index)

    def trees(self, data_idx: int) -> list[SearchTree]:
        """The searches of one problem, by repetition. Raises UserError for a line that breaks the format."""
        begin, stop = np.searchsorted(self._index[:, 0], [data_idx, data_idx + 1])
        trees: dict[int, SearchTree] = {}
        with self.path.open("rb") as file:
            for _, repeat_idx, round_idx, offset, size, number in self._index[begin:stop].tolist():
                file.seek(offset)
                try:
                    record = loads_without_ids(file.read(size), "tokens")
                    if (record["data_idx"], record["repeat_idx"], record["round"]) != (data_idx, repeat_idx, round_idx):
                        raise ValueError("its keys are not at the top of the object")
                    add_round(trees, record)
                except (ValueError, KeyError, TypeError, RecursionError) as error:
                    words = f"no {error}" if isinstance(error, KeyError) else str(error)
                    raise UserError(f"{self.path}: line {number} is not a whole round of a search ({words})") from None
        return list(trees.values())


def open_trees(path: Path) -> TreeFile | None:
    """The journal, or None where there is none or it has no line."""
    if not path.is_file():
        return None
    trees = TreeFile(path)
    return trees if len(trees) else None


def leading_int(raw: bytes, key: str) -> int | None:
    """The whole number under `key`, without parsing the line."""
    begin = find_key(raw, key)
    digits = raw[begin : begin + 24].lstrip().split(b",")[0].split(b"}")[0].strip() if begin >= 0 else b""
    return int(digits) if digits.isdigit() else None


def new_tree(data_idx: int, repeat_idx: int, prompt_tokens: int, width: int) -> SearchTree:
    """A tree of the prompt alone, whose `width` beams all stand there."""
    nodes: dict = dict(parent=[-1], round=[-1], start=[0], length=[0], value=[0.0], kept=[True], finish=[""], text=[""])
    return SearchTree(data_idx, repeat_idx, prompt_tokens, beams=[ROOT] * width, **nodes)


def add_round(trees: dict[int, SearchTree], record: dict) -> None:
    """Append a parsed round to its search, which is begun with round 0. Raises ValueError, KeyError, TypeError."""
    count = len(record["parent"])
    if any(len(record[key]) != count for key in NODE_LISTS) or not count:
        raise ValueError("its lists differ in length")
    if not all(map(is_share, record["value"])) or not all(isinstance(text, str) for text in record["text"]):
        raise ValueError("values must be from 0 to 1, texts strings")
    if any(finish not in ("stop", "length", "") for finish in record["finish"]):
        raise ValueError("finish must be stop, length or empty")
    if record["round"] == 0:
        prompt = record["prompt_ids"]
        width = sum(map(bool, record["kept"]))
        trees[record["repeat_idx"]] = new_tree(record["data_idx"], record["repeat_idx"], len(prompt), width)
    tree = trees.get(record["repeat_idx"])
    if tree is None or record["round"] != tree.round[-1] + 1:
        raise ValueError("a round before it is missing")
    first = len(tree.parent)
    if not all(is_count(parent) and parent < first for parent in record["parent"]):
        raise ValueError("a parent is not an earlier node")
    tree.parent += record["parent"]
    tree.round += [record["round"]] * count
    tree.start += [tree.start[parent] + tree.length[parent] for parent in record["parent"]]
    tree.length += record["tokens"]
    tree.value += [float(value) for value in record["value"]]
    tree.kept += [bool(kept) for kept in record["kept"]]
    tree.finish += record["finish"]
    tree.text += record["text"]
    tree.seconds.append((float(record.get("seconds_generate", 0.0)), float(record.get("seconds_score", 0.0))))
    open_slots = [slot for slot, node in enumerate(tree.beams) if not tree.finish[node]]
    kept_nodes = [first + i for i, kept in enumerate(record["kept"]) if kept]
    for slot, node in zip(open_slots, kept_nodes, strict=True):
        tree.beams[slot] = node


def iterate_problems(trees: TreeFile) -> Iterator[tuple[int, list[SearchTree]]]:
    """(data_idx, its searches) for every problem of the journal."""
    for data_idx in trees.problems:
        yield data_idx, trees.trees(data_idx)
