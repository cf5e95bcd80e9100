"""Benchmarks and prompts."""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common_lib.cli import UserError, hub_errors

logger = logging.getLogger(__name__)

# ---------------------------------------------------------------------------------------------------------------------
# Benchmarks


@dataclass(frozen=True)
class Problem:
    """A problem and the answer that grading holds to be true, both text."""

    problem: str
    answer: str


@dataclass(frozen=True)
class HubBenchmark:
    """Where a named benchmark lies on the hub, and the columns it uses."""

    repo: str
    problem: str = "problem"
    answer: str = "answer"


BENCHMARKS = {
    "aime-24": HubBenchmark("Maxwell-Jia/AIME_2024", "Problem", "Answer"),
    "aime-25": HubBenchmark("yentinglin/aime_2025"),
    "hmmt-feb-24": HubBenchmark("MathArena/hmmt_feb_2024"),
    "hmmt-feb-25": HubBenchmark("MathArena/hmmt_feb_2025"),
}
FILE_KINDS = (".jsonl", ".json", ".parquet")


def load_benchmark(name: str, max_problems: int | None = None) -> list[Problem]:
    """The problems of a named benchmark, a .jsonl/.json/.parquet file, or a dataset folder; at most `max_problems`.

    Files and folders need the columns `problem` and `answer`. Raises UserError.
    """
    known = BENCHMARKS.get(name)
    if known is not None:
        rows = _read_hub(known.repo)
        problems = _problems(rows, name, known.problem, known.answer)
    elif os.path.exists(name):
        problems = _problems(read_local(Path(name)), name, "problem", "answer")
    else:
        raise UserError(
            f"--benchmark {name!r} is neither a known benchmark ({', '.join(BENCHMARKS)}) "
            f"nor an existing {'/'.join(FILE_KINDS)} file or dataset folder"
        )
    return problems[:max_problems]


def benchmark_name(name: str) -> str:
    """The name that results are logged under: the benchmark's, or the file's without its ending."""
    return name if name in BENCHMARKS else Path(name).stem


def _problems(rows: Sequence[dict[str, Any]], source: str, problem: str, answer: str) -> list[Problem]:
    if not rows:
        raise UserError(f"benchmark {source} has no problems; give a file with at least one")
    found = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(f"benchmark {source}, row {number}: an object with problem and answer is needed")
        for column in (problem, answer):
            if row.get(column) is None:
                has = ", ".join(map(str, row)) or "none"
                raise UserError(f"benchmark {source}, row {number}, has no {column!r} (its columns: {has})")
        found.append(Problem(str(row[problem]), str(row[answer])))
    return found


def _read_hub(repo: str) -> Sequence[dict[str, Any]]:
    import datasets

    with hub_errors(f"benchmark {repo}"):
        splits = datasets.load_dataset(repo)
    return _only_split(splits, repo)


def read_local(path: Path) -> Sequence[dict[str, Any]]:
    """Rows of a .jsonl/.json/.parquet file or a dataset folder. Raises UserError."""
    if path.is_dir():
        return _read_folder(path)
    if path.suffix not in FILE_KINDS:
        raise UserError(f"benchmark {path} ends in {path.suffix or 'nothing'!r}; known are {', '.join(FILE_KINDS)}")
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            return pyarrow.parquet.read_table(path).to_pylist()
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"benchmark {path} cannot be read: {error}") from error
    return _parse_jsonl(text, path) if path.suffix == ".jsonl" else _parse_json(text, path)


def _parse_jsonl(text: str, path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise UserError(f"benchmark {path}, line {number}, is not JSON: {error}") from error
    return rows


def _parse_json(text: str, path: Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise UserError(f"benchmark {path} is not JSON: {error}") from error
    if not isinstance(rows, list):
        raise UserError(f"benchmark {path} must hold a list of objects with problem and answer")
    return rows


def _read_folder(path: Path) -> Sequence[dict[str, Any]]:
    import datasets

    try:
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            return _only_split(datasets.load_from_disk(str(path)), str(path))
        return _only_split(datasets.load_dataset(str(path)), str(path))
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"benchmark {path} is no dataset folder: {error}") from error


def _only_split(loaded: Any, source: str) -> Sequence[dict[str, Any]]:
    """A dataset as a list of rows; of several splits `test`, else the only one."""
    if not isinstance(loaded, dict):
        return loaded.to_list()
    if "test" in loaded:
        return loaded["test"].to_list()
    if len(loaded) > 1:
        raise UserError(f"benchmark {source} has the splits {', '.join(loaded)}, but no test; give one as a file")
    return next(iter(loaded.values())).to_list()


# ---------------------------------------------------------------------------------------------------------------------
# Prompts

INSTRUCTION = "Please think step-by-step and put your final answer within \\boxed{}."
R1_SPECIALS = ("<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")
# The format that the released models were trained with.
R1_PROMPT = "<｜begin▁of▁sentence｜><｜User｜>{problem} " + INSTRUCTION + "<｜Assistant｜><think>\n"
PROMPT_FORMATS = ("r1", "chat", "bare")


def format_prompt(problem: str, prompt_format: str, tokenizer: Any) -> list[int]:
    """Token ids of a prompt.

    r1: the released models' own text. chat: problem and instruction through the tokenizer's chat template. bare: the
    problem alone through that template. Raises UserError where there is no template.
    """
    if prompt_format == "r1":
        # Not `format`: a problem may contain braces.
        return tokenizer(R1_PROMPT.replace("{problem}", problem), add_special_tokens=False).input_ids
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"--prompt_format {prompt_format} needs a chat template, and the generator's tokenizer has none"
        )
    content = f"{problem} {INSTRUCTION}" if prompt_format == "chat" else problem
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    return tokenizer(text, add_special_tokens=False).input_ids


def check_prompt_format(prompt_format: str, tokenizer: Any) -> None:
    """Warn where the r1 format's special tokens are ordinary text to this tokenizer."""
    if prompt_format == "r1":
        vocabulary = tokenizer.get_vocab()
        if missing := [token for token in R1_SPECIALS if token not in vocabulary]:
            logger.warning(
                "--prompt_format r1 uses %s, which the generator's tokenizer does not know: it reads them as plain "
                "text (--prompt_format chat uses its own template)", ", ".join(missing)
            )  # fmt: skip
