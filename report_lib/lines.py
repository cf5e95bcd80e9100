"""One line of a run's files: parsed without its token ids, and checked.

A line may hold 100,000 token ids of which a report needs only the count. They are cut out of the raw line before it is
parsed, so a run of gigabytes is read at disk speed and in little memory.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RELEASED_KEYS = (
    "repeat_idx",
    "data_idx",
    "global_idx",
    "problem",
    "gt_answer",
    "generated_ids",
    "generated_scores",
    "processed_answer",
    "reward",
    "dt",
)
OWN_KEYS = (
    "finish_reasons",
    "prompt_tokens",
    "tokens_generated",
    "tokens_scored",
    "tokens_reread",
    "tokens_cached",
    "seconds_generate",
    "seconds_score",
)
IDS_ALPHABET = b"0123456789,[] \t"


def find_key(raw: bytes, key: str) -> int:
    """Where the value of a key begins in a line of JSON, -1 if nowhere.

    An unescaped `"key"` followed by a colon cannot be part of a string: a quote inside one is escaped.
    """
    needle = f'"{key}"'.encode()
    begin = raw.find(needle)
    while begin >= 0:
        after = begin + len(needle)
        while raw[after : after + 1] in (b" ", b"\t"):
            after += 1
        if raw[begin - 1 : begin] != b"\\" and raw[after : after + 1] == b":":
            return after + 1
        begin = raw.find(needle, begin + 1)
    return -1


def loads_without_ids(raw: bytes, key: str) -> dict:
    """Parse a line of JSON with lists of token ids under `key`; they become their lengths: [[7, 8], []] -> [2, 0].

    Raises ValueError for anything that is not an object with lists of non-negative integers there.
    """
    begin = find_key(raw, key)
    if begin < 0:
        record = json.loads(raw)
        if not isinstance(record, dict):
            raise ValueError("not a JSON object")
        return record
    stop = raw.find(b'"', begin)  # ids hold no quotes, so the next one belongs to the next key
    stop = raw.rfind(b"]", begin, stop if stop >= 0 else len(raw)) + 1
    array = raw[begin:stop].strip()
    if array.translate(None, IDS_ALPHABET) or array[:1] != b"[" or array.count(b"[") != array.count(b"]"):
        raise ValueError(f"{key} is not a list of lists of token ids")
    rows = array[1:-1].split(b"]")
    lengths = [
        row.count(b",") + 1 if row.strip() else 0 for row in (row.lstrip(b" ,").removeprefix(b"[") for row in rows)
    ]
    record = json.loads(raw[:begin] + json.dumps(lengths[:-1]).encode() + raw[stop:])
    if not isinstance(record, dict) or record.get(key) != lengths[:-1]:
        raise ValueError(f"{key} is not at the top of the object")
    return record


def iterate_lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """(line number from 1, byte offset, raw line) of the lines that are not blank."""
    offset = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if raw.strip():
                yield number, offset, raw
            offset += len(raw)


def is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_share(value: Any) -> bool:
    return is_number(value) and 0 <= value <= 1


def check_line(line: dict) -> None:
    """Raises ValueError, in words for the user, where a line breaks the format."""
    missing = [key for key in RELEASED_KEYS if key not in line]
    if missing:
        raise ValueError(f"has no {', '.join(missing)}; is it a run's output file?")
    for key in ("repeat_idx", "data_idx", "global_idx"):
        if not is_count(line[key]):
            raise ValueError(f"{key} is {line[key]!r:.40}, it must be a whole number from 0")
    kinds = {
        "generated_scores": (is_share, "values from 0 to 1"),
        "processed_answer": (lambda value: isinstance(value, str), "strings"),
        "reward": (lambda value: value in (0, 1), "true or false"),
    }
    for key, (is_right, words) in kinds.items():
        if not isinstance(line[key], list) or not all(map(is_right, line[key])):
            raise ValueError(f"{key} must be a list of {words}")
    beams = {key: len(line[key]) for key in ("generated_ids", *kinds) if isinstance(line[key], list)}
    if isinstance(line.get("finish_reasons"), list):
        beams["finish_reasons"] = len(line["finish_reasons"])
    if len(set(beams.values())) > 1 or 0 in beams.values():
        raise ValueError(f"its lists must have one entry a beam: {beams}")
    if not is_number(line["dt"]) or not isinstance(line["problem"], str):
        raise ValueError("dt must be seconds and problem a string")
    for key in OWN_KEYS[1:]:
        if key in line and not (is_number(line[key]) and line[key] >= 0):
            raise ValueError(f"{key} is {line[key]!r:.40}, it must be a number from 0")
