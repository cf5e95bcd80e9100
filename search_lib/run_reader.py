"""The files of a search run as they are read, by the next start of the same run and by a report. No torch.

X.jsonl may come from the released code, which knows ten keys and writes neither settings nor a journal. Whatever is
wrong with a file is one UserError; a last line that is torn is left out. Token ids are never held for a whole run: of
results only their number is kept, and a journal is indexed in one pass and then read search by search.
"""

import json
import math
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common_lib.cli import UserError
from common_lib.files import read_lines
from search_lib.tree import Round, Tree

FORMAT = 1  # of X.meta.json
RELEASED_KEYS = ("repeat_idx", "data_idx", "global_idx", "problem", "gt_answer", "generated_ids", "generated_scores",
                 "processed_answer", "reward", "dt")  # fmt: skip
COUNTS = ("prompt_tokens", "tokens_generated", "tokens_scored", "tokens_reread", "tokens_cached", "seconds_generate",
          "seconds_score")  # fmt: skip
RESULT_KEYS = (*RELEASED_KEYS, "finish_reasons", *COUNTS)
ROUND_LISTS = ("parent", "tokens", "value", "kept", "finish", "text")

Key = tuple[int, int]  # data_idx, repeat_idx


@dataclass(frozen=True)
class RunPaths:
    """The three files of `--output_path X.jsonl`, and the lock that a process that writes them holds."""

    results: Path
    meta: Path
    tree: Path
    lock: Path

    @classmethod
    def of(cls, output_path: str | Path) -> "RunPaths":
        results = Path(output_path)
        stem = results.name.removesuffix(".jsonl")
        names = (f"{stem}.meta.json", f"{stem}.tree.jsonl", f".{stem}.lock")
        return cls(results, *map(results.with_name, names))


def read_meta(path: Path) -> dict[str, Any] | None:
    """The settings of a run, None where there are none. Raises UserError where the file is something else."""
    if not path.exists():
        return None
    try:
        meta = json.loads(path.read_bytes())
        if meta["format"] != FORMAT:
            raise UserError(f"{path}: format {meta['format']!r:.40} is not known; this version knows format {FORMAT}")
        whole = all(isinstance(meta[key], dict) for key in ("arguments", "search"))
        whole = whole and all(is_count(meta["search"][key]) for key in ("width", "branch", "num_blocks"))
        if not (whole and is_count(meta["num_problems"])):
            raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(
            f"{path}: not a run's settings (format, arguments, search, num_problems); restore or delete it"
        ) from None
    return meta


def _parse_lines(path: Path, what: str) -> Iterator[tuple[int, int, dict[str, Any] | None]]:
    """(line number, byte offset, row) of each line; None for a torn last one. Raises UserError naming what is no row.

    A last line that lacks nothing but its newline counts.
    """
    for number, offset, raw in read_lines(path):
        try:
            row = json.loads(raw)
            if not isinstance(row, dict):
                raise ValueError("not a JSON object")
        except (ValueError, RecursionError) as error:
            if raw.endswith(b"\n"):
                raise UserError(f"{path}: line {number} is not {what} ({error}); give a whole file") from None
            row = None
        yield number, offset, row


# ---------------------------------------------------------------------------------------------------------------------
# Results


def read_results(path: Path, num_problems: int | None) -> tuple[list[dict[str, Any]], list[str]]:
    """All lines of X.jsonl with the keys that are known, checked; and notes on what was left out.

    In place of `generated_ids` a line has `lengths` (tokens, by beam), `offset` (bytes, for `read_token_ids`) and `line`.
    num_problems: of the run, None where nothing tells it. Raises UserError, also for lines of several runs.
    """
    lines: list[dict[str, Any]] = []
    unknown: set[str] = set()
    notes = []
    for number, offset, row in _parse_lines(path, "a line of a run"):
        if row is None:
            notes.append(f"{path.name}: its last line is torn (a run in progress, or killed) and was left out")
            continue
        try:
            lengths = _check_result(row)
        except ValueError as error:
            raise UserError(f"{path}: line {number} {error}") from None
        unknown |= row.keys() - set(RESULT_KEYS)
        kept = {key: row[key] for key in RESULT_KEYS if key in row and key != "generated_ids"}
        kept |= {"gt_answer": str(row["gt_answer"]), "reward": list(map(bool, row["reward"]))}
        lines.append(kept | {"lengths": lengths, "offset": offset, "line": number})
    if unknown:
        notes.append(f"{path.name}: keys that are not known here were ignored: {', '.join(sorted(unknown)[:8])}")
    _check_one_run(path, lines, num_problems)
    return lines, notes


def read_token_ids(path: Path, line: dict[str, Any]) -> list[Sequence[int]]:
    """The responses of a line of `read_results`, read again from the file: [beams][tokens]."""
    with path.open("rb") as stream:
        stream.seek(line["offset"])
        return [array("I", ids) for ids in json.loads(stream.readline())["generated_ids"]]


def is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _compact(lists: Any) -> list[Sequence[int]]:
    """Lists of token ids, 4 bytes an id. Raises ValueError for anything else."""
    try:
        if not all(isinstance(ids, list) for ids in lists):
            raise TypeError
        return [array("I", ids) for ids in lists]
    except (TypeError, OverflowError):
        raise ValueError("has token ids that are not lists of whole numbers from 0") from None


def _check_result(line: dict[str, Any]) -> list[int]:
    """The lengths of its responses. Raises ValueError, in words for the user, where a line breaks the format."""
    if missing := [key for key in RELEASED_KEYS if key not in line]:
        raise ValueError(f"has no {', '.join(missing)}; is it a run's output file?")
    for key in ("repeat_idx", "data_idx", "global_idx"):
        if not is_count(line[key]):
            raise ValueError(f"{key} is {line[key]!r:.40}, it must be a whole number from 0")
    kinds: dict[str, tuple[Callable[[Any], bool], str]] = {
        "generated_scores": (_is_share, "values from 0 to 1"),
        "processed_answer": (lambda value: isinstance(value, str), "strings"),
        "reward": (lambda value: value in (0, 1), "true or false"),
    }
    for key, (is_right, words) in kinds.items():
        if not isinstance(line[key], list) or not all(map(is_right, line[key])):
            raise ValueError(f"{key} must be a list of {words}")
    lengths = list(map(len, _compact(line["generated_ids"])))
    beams = {"generated_ids": len(lengths)} | {key: len(line[key]) for key in kinds}
    if isinstance(line.get("finish_reasons"), list):
        beams["finish_reasons"] = len(line["finish_reasons"])
    if len(set(beams.values())) > 1 or 0 in beams.values():
        raise ValueError(f"its lists must have one entry a beam: {beams}")
    if not _is_number(line["dt"]) or not isinstance(line["problem"], str):
        raise ValueError("dt must be seconds and problem a string")
    for key in COUNTS:
        if key in line and not (_is_number(line[key]) and line[key] >= 0):
            raise ValueError(f"{key} is {line[key]!r:.40}, it must be a number from 0")
    return lengths


def _check_one_run(path: Path, lines: list[dict[str, Any]], num_problems: int | None) -> None:
    """Raises UserError where lines cannot be of one run: repeated searches, other problems, another problem count."""
    seen: dict[Key, int] = {}
    first: dict[int, dict[str, Any]] = {}
    for line in lines:
        number, data_idx, repeat_idx = line["line"], line["data_idx"], line["repeat_idx"]
        if (data_idx, repeat_idx) in seen:
            raise UserError(
                f"{path}: line {number} repeats problem {data_idx}, repetition {repeat_idx} of line "
                f"{seen[data_idx, repeat_idx]}; two runs in one file? Report each from its own file"
            )
        seen[data_idx, repeat_idx] = number
        other = first.setdefault(data_idx, line)
        if (other["problem"], other["gt_answer"]) != (line["problem"], line["gt_answer"]):
            raise UserError(
                f"{path}: lines {other['line']} and {number} have different problems under data_idx {data_idx}; runs on "
                "different benchmarks in one file? Report each from its own file"
            )
        rest = line["global_idx"] - data_idx
        if num_problems is None and repeat_idx:
            num_problems = rest // repeat_idx
        if num_problems is not None and rest != repeat_idx * num_problems:
            raise UserError(
                f"{path}: line {number} has global_idx {line['global_idx']}, which in a run of {num_problems} problems "
                f"is not repetition {repeat_idx} of problem {data_idx}; lines of several runs in one file?"
            )


# ---------------------------------------------------------------------------------------------------------------------
# The journal


class Journal:
    """Where the rounds of each search lie in X.tree.jsonl, whose lines interleave: 8 bytes a round are held.

    searches: data_idx -> repeat_idx -> byte offsets of its rounds; empty also where there is no file. torn: the last line
    is not whole and was left out.
    """

    def __init__(self, path: Path):
        """Read and check every line once. Raises UserError: a broken line, a round that is missing or there twice."""
        self.path, self.torn = path, False
        self.searches: dict[int, dict[int, array[int]]] = {}
        for number, offset, row in _parse_lines(path, "a round of a search") if path.is_file() else ():
            if row is None:
                self.torn = True
                continue
            try:
                _check_round(row)
            except (ValueError, KeyError, TypeError) as error:
                words = f"no {error}" if isinstance(error, KeyError) else str(error)
                raise UserError(f"{path}: line {number} is not a round of a search ({words}); restore it") from None
            offsets = self.searches.setdefault(row["data_idx"], {}).setdefault(row["repeat_idx"], array("Q"))
            if row["round"] < len(offsets):
                raise self._damage(row, f"is there twice (line {number}); journals of two runs in one file?")
            if row["round"] > len(offsets):
                raise self._damage(row, f"is there (line {number}), and a round before it is missing")
            offsets.append(offset)

    def read(self, data_idx: int, repeat_idx: int) -> tuple[Tree, list[str]]:
        """The tree as far as it was grown, its ids in 4 bytes each, and the text of each node ('' for the prompt)."""
        tree, text = Tree([], 0), [""]
        with self.path.open("rb") as stream:
            for offset in self.searches[data_idx][repeat_idx]:
                stream.seek(offset)
                row = json.loads(stream.readline())
                kept = sum(map(bool, row["kept"]))
                if row["round"] == 0:
                    tree = Tree(row["prompt_ids"], kept)
                if max(row["parent"]) >= len(tree.parent) or kept != len(tree.open_slots):
                    raise self._damage(row, "does not fit the rounds before it")
                known = {name: row[name] for name in Round.__dataclass_fields__ if name in row}
                tree.add(Round(**known | {"tokens": _compact(row["tokens"])}))
                text += row["text"]
        return tree, text

    def _damage(self, row: dict[str, Any], what: str) -> UserError:
        place = f"round {row['round']} of problem {row['data_idx']}, repetition {row['repeat_idx']}"
        return UserError(f"{self.path}: {place} {what}; restore the journal, or move it away")


def _check_round(row: dict[str, Any]) -> None:
    """Raises ValueError, KeyError or TypeError where a line of a journal breaks the format."""
    if not all(is_count(row[key]) for key in ("data_idx", "repeat_idx", "round")):
        raise ValueError("data_idx, repeat_idx and round must be whole numbers from 0")
    if not all(isinstance(row[key], list) and 0 < len(row[key]) == len(row["parent"]) for key in ROUND_LISTS):
        raise ValueError(f"{', '.join(ROUND_LISTS)} must be lists of one length")
    _compact(row["tokens"])
    if not all(map(is_count, row["parent"])):
        raise ValueError("a parent is not a node")
    if not all(map(_is_share, row["value"])) or not all(isinstance(text, str) for text in row["text"]):
        raise ValueError("values must be from 0 to 1, texts strings")
    if any(finish not in ("stop", "length", "") for finish in row["finish"]):
        raise ValueError("finish must be stop, length or empty")
    if not all(_is_number(row.get(key, 0)) for key in Round.__dataclass_fields__ if key.startswith("seconds")):
        raise ValueError("seconds must be numbers")
    if row["round"] == 0 and not isinstance(row["prompt_ids"], list):
        raise ValueError("prompt_ids must be a list")
