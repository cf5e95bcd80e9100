"""The files of a search run as they are read, by the next start of the same run and by a report. No torch.

X.jsonl may come from the released code, which knows ten keys and writes neither settings nor a journal. Whatever is
wrong with a file is one UserError; a last line that is torn is left out. Token ids are never held for a whole run: of
results only their number is kept, and a journal is indexed in one pass and then read search by search.
"""

import contextlib
import json
import math
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from common_lib.cli import UserError
from common_lib.files import read_lines
from common_lib.shards import Shard
from search_lib.counted import Stopped, is_counted, stopped_of
from search_lib.tree import Round, Tree

FORMAT = 1  # of X.meta.json
Key = tuple[int, int]  # data_idx, repeat_idx


@dataclass(frozen=True)
class RunPaths:
    """The files of `--output_path X.jsonl`, and the lock that a process that writes them holds. uncounted: only of a run
    with --stop."""

    results: Path
    meta: Path
    tree: Path
    uncounted: Path
    lock: Path

    @classmethod
    def of(cls, output_path: str | Path, shard: Shard | None = None) -> "RunPaths":
        """shard: that the files are to hold alone."""
        results = Path(output_path)
        if shard is not None:
            results = results.with_name(f"{results.name.removesuffix('.jsonl')}{shard.suffix}.jsonl")
        stem = results.name.removesuffix(".jsonl")
        names = (f"{stem}.meta.json", f"{stem}.tree.jsonl", f"{stem}.uncounted.jsonl", f".{stem}.lock")
        return cls(results, *map(results.with_name, names))


def read_meta(path: Path) -> dict[str, Any] | None:
    """The settings of a run, None where there are none. Raises UserError where the file is something else."""
    if not path.exists():
        return None
    try:
        meta = json.loads(path.read_bytes())
        if meta["format"] != FORMAT:
            raise UserError(f"{path}: format {meta['format']!r:.40} is not known; this version knows format {FORMAT}")
        counts = [meta["num_problems"], *(meta["search"][key] for key in ("width", "branch", "num_blocks"))]
        stopped_of(meta)
        if not isinstance(meta["arguments"], dict) or not all(map(is_count, counts)):
            raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(
            f"{path}: not a run's settings (format, arguments, search, num_problems); restore or delete it"
        ) from None
    return meta


def _parse_lines(path: Path, form: "LineFormat", notes: list[str]) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """(line number, byte offset, row) of each line. Raises UserError.

    A last line that lacks nothing but its newline counts; one that is torn is left out, with a note.
    """
    for number, offset, raw in read_lines(path):
        row = None
        try:
            row = json.loads(raw)
            if not isinstance(row, dict):
                raise ValueError("is not a JSON object")
            form.check(row)
            yield number, offset, row
        except (ValueError, RecursionError) as error:
            if row is not None or raw.endswith(b"\n"):
                words = f"is not JSON ({error})" if row is None else str(error)
                raise UserError(f"{path}: line {number} {words}; is it a file of a run, and whole?") from None
            notes.append(f"{path.name}: its last line is torn (a run in progress, or killed) and was left out")


# ---------------------------------------------------------------------------------------------------------------------
# Results


def read_results(
    path: Path, num_problems: int | None, stopped: Stopped = MappingProxyType({})
) -> tuple[list[dict[str, Any]], list[str]]:
    """The lines of X.jsonl that count with the keys that are known, checked; and notes on what was left out.

    In place of `generated_ids` a line has `lengths` (tokens, by beam), and where it stands: `path`, `offset` (bytes), `line`.
    num_problems: of the run, None where nothing tells it. stopped: of the settings (`stopped_of`), all lines count without.
    Raises UserError, also for lines of several runs.
    """
    lines: list[dict[str, Any]] = []
    notes: list[str] = []
    unknown: set[str] = set()
    for number, offset, row in _parse_lines(path, RESULT, notes):
        lengths = list(map(len, row.pop("generated_ids")))
        unknown |= row.keys() - RESULT.keys
        kept = {key: value for key, value in row.items() if key in RESULT.keys}
        kept |= {"gt_answer": str(row["gt_answer"]), "reward": list(map(bool, row["reward"]))}
        lines.append(kept | {"lengths": lengths, "path": path, "offset": offset, "line": number})
    if unknown:
        notes.append(f"{path.name}: keys that are not known here were ignored: {', '.join(sorted(unknown)[:8])}")
    _check_one_run(path, lines, num_problems)
    return [line for line in lines if is_counted(stopped, line["data_idx"], line["repeat_idx"])], notes


def read_token_ids(line: dict[str, Any]) -> list[Sequence[int]]:
    """The responses of a line of `read_results`, read again from its file: [beams][tokens]."""
    with line["path"].open("rb") as stream:
        stream.seek(line["offset"])
        return _compact(json.loads(stream.readline())["generated_ids"])


def _check_one_run(path: Path, lines: list[dict[str, Any]], num_problems: int | None) -> None:
    """Raises UserError where lines cannot be of one run: repeated searches, other problems, another problem count."""

    def refuse(line: dict[str, Any], words: str) -> NoReturn:
        raise UserError(
            f"{path}: line {line['line']} {words}; lines of several runs in one file? Report each from its own file"
        )

    seen: dict[Key, int] = {}
    first: dict[int, dict[str, Any]] = {}
    for line in lines:
        data_idx, repeat_idx = line["data_idx"], line["repeat_idx"]
        search = f"repetition {repeat_idx} of problem {data_idx}"
        if (data_idx, repeat_idx) in seen:
            refuse(line, f"is {search} again, after line {seen[data_idx, repeat_idx]}")
        seen[data_idx, repeat_idx] = line["line"]
        other = first.setdefault(data_idx, line)
        if (other["problem"], other["gt_answer"]) != (line["problem"], line["gt_answer"]):
            refuse(line, f"has another problem under data_idx {data_idx} than line {other['line']}")
        rest = line["global_idx"] - data_idx
        if num_problems is None and repeat_idx:
            num_problems = rest // repeat_idx
        if num_problems is not None and rest != repeat_idx * num_problems:
            place = f"global_idx {line['global_idx']}, which in a run of {num_problems} problems"
            refuse(line, f"has {place} is not {search}")


# ---------------------------------------------------------------------------------------------------------------------
# The journal


class Journal:
    """Where the rounds of each search lie in X.tree.jsonl, whose lines interleave: 8 bytes a round are held. Of a run in
    shards, in those of all of them; a problem is in one.

    searches: data_idx -> repeat_idx -> byte offsets of its rounds; empty also where there is no file.
    """

    def __init__(self, *paths: Path):
        """Read and check every line once. Raises UserError: a broken line, a round that is missing or there twice."""
        self.paths = paths
        self.notes: list[str] = []
        self.searches: dict[int, dict[int, array[int]]] = {}
        self._path_of: dict[int, Path] = {}
        for path in paths:
            self._index(path)

    def path_of(self, data_idx: int) -> Path:
        return self._path_of[data_idx]

    def _index(self, path: Path) -> None:
        for number, offset, row in _parse_lines(path, ROUND, self.notes) if path.is_file() else ():
            if self._path_of.setdefault(row["data_idx"], path) != path:
                raise self._damage(row, f"is in {path.name} too (line {number}); shards of two runs?")
            offsets = self.searches.setdefault(row["data_idx"], {}).setdefault(row["repeat_idx"], array("Q"))
            if row["round"] < len(offsets):
                raise self._damage(row, f"is there twice (line {number}); journals of two runs in one file?")
            if row["round"] > len(offsets):
                raise self._damage(row, f"is there (line {number}), and a round before it is missing")
            offsets.append(offset)

    def read(self, data_idx: int, repeat_idx: int) -> tuple[Tree, list[str]]:
        """The tree as far as it was grown, its ids in 4 bytes each, and the text of each node ('' for the prompt)."""
        tree, text = Tree([], 0), [""]
        with self._path_of[data_idx].open("rb") as stream:
            for offset in self.searches[data_idx][repeat_idx]:
                stream.seek(offset)
                row = json.loads(stream.readline())
                kept = sum(map(bool, row["kept"]))
                if row["round"] == 0:
                    tree = Tree(row.get("prompt_ids", []), kept)
                if max(row["parent"]) >= len(tree.parent) or kept != len(tree.open_slots):
                    raise self._damage(row, "does not fit the rounds before it")
                known = {name: row[name] for name in Round.__dataclass_fields__ if name in row}
                tree.add(Round(**known | {"tokens": _compact(row["tokens"])}))
                text += row["text"]
        return tree, text

    def _damage(self, row: dict[str, Any], what: str) -> UserError:
        place = f"round {row['round']} of problem {row['data_idx']}, repetition {row['repeat_idx']}"
        return UserError(f"{self._path_of[row['data_idx']]}: {place} {what}; restore the journal, or move it away")


# ---------------------------------------------------------------------------------------------------------------------
# What a line must be


def is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any, most: float = math.inf) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= most and value < math.inf


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _are_ids(lists: Any) -> bool:
    with contextlib.suppress(TypeError, OverflowError):
        return len(_compact(lists)) == sum(isinstance(ids, list) for ids in lists)
    return False


def _compact(lists: Iterable[list[int]]) -> list[Sequence[int]]:
    """Token ids in 4 bytes each."""
    return [array("I", ids) for ids in lists]


def _list_of(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda values: isinstance(values, list) and all(map(holds, values))


Rules = dict[str, tuple[Callable[[Any], bool], str]]  # key -> does its value hold, and what it must be
COUNT = (is_count, "a whole number from 0")
AMOUNT = (_is_number, "a number from 0")
VALUES = (_list_of(lambda value: _is_number(value, 1)), "a list of values from 0 to 1")
FLAGS = (_list_of(lambda value: value in (0, 1)), "a list of true and false")
TEXTS = (_list_of(_is_text), "a list of strings")
IDS = (_are_ids, "lists of token ids")


@dataclass(frozen=True)
class LineFormat:
    """The keys of a line; those in `parallel` hold lists that run side by side."""

    required: Rules
    optional: Rules
    parallel: tuple[str, ...]

    @property
    def keys(self) -> set[str]:
        return {*self.required, *self.optional}

    def check(self, row: dict[str, Any]) -> None:
        """Raises ValueError, in words for the user."""
        if missing := [key for key in self.required if key not in row]:
            raise ValueError(f"has no {', '.join(missing)}")
        for key, (holds, words) in (self.required | self.optional).items():
            if key in row and not holds(row[key]):
                raise ValueError(f"has {key} {row[key]!r:.40}, it must be {words}")
        lengths = {key: len(row[key]) for key in self.parallel if key in row}
        if len(set(lengths.values())) > 1 or 0 in lengths.values():
            raise ValueError(f"has lists that do not belong together: {lengths}")


SPENT = ("tokens_scored", "tokens_reread", "tokens_cached", "seconds_generate", "seconds_score")
RESULT = LineFormat(
    required={  # what the released code writes
        **dict.fromkeys(("repeat_idx", "data_idx", "global_idx"), COUNT),
        "problem": (_is_text, "a string"),
        "gt_answer": (lambda value: True, ""),
        "generated_ids": IDS,
        "generated_scores": VALUES,
        "processed_answer": TEXTS,
        "reward": FLAGS,
        "dt": AMOUNT,
    },
    optional={"finish_reasons": TEXTS, **dict.fromkeys(("prompt_tokens", "tokens_generated", *SPENT), AMOUNT)},
    parallel=("generated_ids", "generated_scores", "processed_answer", "reward", "finish_reasons"),
)
ROUND = LineFormat(
    required={
        **dict.fromkeys(("data_idx", "repeat_idx", "round"), COUNT),
        "parent": (_list_of(is_count), "a list of node numbers"),
        "tokens": IDS,
        "value": VALUES,
        "kept": FLAGS,
        "finish": (_list_of(lambda value: value in ("stop", "length", "")), "a list of stop, length or nothing"),
        "text": TEXTS,
    },
    optional={"prompt_ids": (_list_of(is_count), "token ids"), **dict.fromkeys((*SPENT, "seconds"), AMOUNT)},
    parallel=("parent", "tokens", "value", "kept", "finish", "text"),
)
