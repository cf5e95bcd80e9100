"""Runs whose every number is written by hand: lines, journal and settings as the search script writes them."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from search_lib.run_reader import RunPaths

SHAPE = {
    "hidden_size": 8, "head_dim": 2, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 16, "vocab_size": 10,
}  # fmt: skip


def result(data_idx: int, repeat_idx: int, problems: int, answers, rewards, values, **more: Any) -> dict[str, Any]:
    """A line of X.jsonl with the released code's keys, and `more`."""
    return {
        "repeat_idx": repeat_idx, "data_idx": data_idx, "global_idx": repeat_idx * problems + data_idx,
        "problem": f"problem {data_idx}", "gt_answer": "1", "generated_ids": [[5, 6]] * len(answers),
        "generated_scores": list(values), "processed_answer": list(answers), "reward": list(rewards), "dt": 2.0,
    } | more  # fmt: skip


def journal_row(data_idx: int, repeat_idx: int, number: int, parent, lengths, value, kept, finish, text, **more: Any):
    """A line of X.tree.jsonl: a round whose candidates have blocks of these lengths."""
    return {
        "data_idx": data_idx, "repeat_idx": repeat_idx, "round": number, "parent": parent,
        "tokens": [[5] * length for length in lengths], "value": value, "kept": kept, "finish": finish, "text": text,
    } | ({"prompt_ids": [1, 2, 3]} if number == 0 else {}) | more  # fmt: skip


def settings(problems: int, repetitions: int, num_blocks: int, width: int, branch: int, **arguments: Any) -> dict:
    """X.meta.json; `arguments`: more flags."""
    flags = {"search_type": "beam2", "num_repetitions": repetitions, "selection": "value"} | arguments
    return {
        "format": 1, "arguments": flags, "num_problems": problems, "benchmark": "by hand", "versions": {"torch": "2"},
        "search": {"width": width, "branch": branch, "num_blocks": num_blocks}, "generator": SHAPE | {"path": "G"},
        "value_model": SHAPE | {"path": "V", "num_labels": 3}, "sessions": [],
    }  # fmt: skip


def write_run(path: Path, lines, journal=(), meta: dict | None = None) -> Path:
    paths = RunPaths.of(path)
    for where, rows in ((paths.results, lines), (paths.tree, journal)):
        if rows:
            where.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if meta:
        paths.meta.write_text(json.dumps(meta))
    return path


def random_lines(seed: int, problems: int = 6, repetitions: int = 4, beams: int = 3) -> list[dict[str, Any]]:
    """A run with ties, zeros, empty answers, answers written in several ways, and classes that are right in part.

    Answers 1, 01 and 1.0 are one class, 2 and 02 another; values are eighths, so that every sum is exact.
    """
    rng = random.Random(seed)
    lines = []
    for repeat_idx in range(repetitions):
        for data_idx in range(problems):
            answers = [rng.choice(["", "1", "1", "01", "1.0", "2", "02", "3"]) for _ in range(beams)]
            rewards = [
                answer != "" and (int(float(answer)) == 1 or rng.random() < (0.4 if int(float(answer)) == 2 else 0))
                for answer in answers
            ]
            values = [0.0 if data_idx == 1 else rng.randrange(0, 5) / 8 for _ in answers]
            lines.append(result(data_idx, repeat_idx, problems, answers, rewards, values))
    return lines


def read_data(path: Path) -> Any:
    """What a data file of the page gives to `VGS.receive`."""
    text = path.read_text(encoding="ascii")
    return json.loads(text[text.index(",") + 1 : text.rindex(");")])


def close(found: Any, expected: Any, where: str = "", rel: float = 1e-9) -> None:
    """Equal, numbers up to rounding."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            close(found[key], expected[key], f"{where}.{key}", rel)
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for i, pair in enumerate(zip(found, expected, strict=True)):
            close(*pair, f"{where}[{i}]", rel)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=rel, abs=1e-12), where
    else:
        assert found == expected, where
