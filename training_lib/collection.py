"""What is collected: problems, places to cut, seeds and labels."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from common_lib.cli import UserError
from data_utils import FILE_KINDS, open_dataset, read_file


@dataclass(frozen=True)
class SourceProblem:
    message_id: str
    problem: str
    solution: str
    answer: str


def load_problems(path: str, split: str, max_problems: int | None) -> list[SourceProblem]:
    """Problems with answers: a .jsonl/.json/.parquet file, a dataset folder, or a hub data set. Raises UserError.

    Columns problem and answer are needed; solution and message_id (or uuid, or id) are kept where there are any.
    """
    local = Path(path)
    if local.is_file() and local.suffix not in FILE_KINDS:
        raise UserError(f"--problems {path} must end in {', '.join(FILE_KINDS)}, or be a folder or a hub name")
    rows = read_file(local) if local.is_file() else open_dataset(path, split)
    found = []
    for number, row in enumerate(islice(rows, max_problems)):
        columns = row if isinstance(row, dict) else {}
        for column in ("problem", "answer"):
            if columns.get(column) in (None, ""):
                has = ", ".join(columns) or "no columns"
                raise UserError(f"--problems {path}: row {number} has no {column} (it has {has})")
        text = str(row["problem"])
        names = [str(row[key]) for key in ("message_id", "uuid", "id") if row.get(key) is not None]
        name = names[0] if names else hashlib.sha256(text.encode()).hexdigest()[:16]
        found.append(SourceProblem(name, text, str(row.get("solution") or ""), str(row["answer"])))
    if not found:
        raise UserError(f"--problems {path} has no problems")
    return found


def draw_seed(*key: int) -> int:
    """A request's seed, 0 .. 2**31 - 1, a function of (seed, problem, roll-in, prefix, roll-out)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") & 0x7FFFFFFF


CUT_WEIGHTS = {"sqrt": 0.5, "uniform": 0.0, "inverse_sqrt": -0.5}  # powers of the place


def cut_positions(length: int, count: int, weight: str, seed: int) -> list[int]:
    """Where a roll-in of `length` response tokens is cut: `count` prefix lengths in 1 .. length - 1, ascending.

    Distinct where there are enough, drawn with P(t) proportional to sqrt(t), 1, or 1 / sqrt(t). A roll-in of one token
    or none gives the bare prompt: [0] * count.
    """
    places = np.arange(1, length)
    if len(places) == 0:
        return [0] * count
    weights = places.astype(np.float64) ** CUT_WEIGHTS[weight]
    rng = np.random.default_rng(seed)
    drawn = rng.choice(places, count, replace=len(places) < count, p=weights / weights.sum())
    return sorted(drawn.tolist())


def labels_of(finish_reasons: Sequence[str], right: Sequence[bool]) -> list[int]:
    """2 where the token limit ended a roll-out, whatever it says so far; else 1 where its answer is right, else 0."""
    return [2 if reason == "length" else int(good) for reason, good in zip(finish_reasons, right, strict=True)]
