"""Benchmarks and prompts."""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common_lib.cli import UserError, hub_errors
from common_lib.files import read_lines

logger = logging.getLogger(__name__)

# ---------------------------------------------------------------------------------------------------------------------
# Benchmarks


@dataclass(frozen=True)
class Problem:
    """A problem and the answer that grading holds to be true, both text."""

    problem: str
    answer: str


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark lies, on the hub or on this machine, and the columns it uses."""

    place: str
    problem: str = "problem"
    answer: str = "answer"


BENCHMARKS = {
    "aime-24": Benchmark("Maxwell-Jia/AIME_2024", "Problem", "Answer"),
    "aime-25": Benchmark("yentinglin/aime_2025"),
    "hmmt-feb-24": Benchmark("MathArena/hmmt_feb_2024"),
    "hmmt-feb-25": Benchmark("MathArena/hmmt_feb_2025"),
}
FILE_KINDS = (".jsonl", ".json", ".parquet")


def load_benchmark(name: str, max_problems: int | None = None) -> list[Problem]:
    """The problems of a named benchmark, a .jsonl/.json/.parquet file, or a dataset folder; at most `max_problems`.

    Files and folders need the columns `problem` and `answer`. Raises UserError.
    """
    if name not in BENCHMARKS and not os.path.exists(name):
        raise UserError(
            f"--benchmark {name!r} is neither a known benchmark ({', '.join(BENCHMARKS)}) "
            f"nor an existing {'/'.join(FILE_KINDS)} file or dataset folder"
        )
    source = BENCHMARKS.get(name, Benchmark(name))
    path = Path(source.place)
    rows = read_file(path) if path.is_file() else open_dataset(source.place, None).to_list()
    if not rows:
        raise UserError(f"benchmark {name} has no problems; give a file with at least one")
    problems = []
    for number, row in enumerate(rows[:max_problems], 1):
        if not isinstance(row, dict):
            raise UserError(f"benchmark {name}, row {number}: an object with problem and answer is needed")
        for column in (source.problem, source.answer):
            if row.get(column) is None:
                has = ", ".join(map(str, row)) or "none"
                raise UserError(f"benchmark {name}, row {number}, has no {column!r} (its columns: {has})")
        problems.append(Problem(str(row[source.problem]), str(row[source.answer])))
    return problems


def benchmark_name(name: str) -> str:
    """The name that results are logged under: the benchmark's, or the file's without its ending."""
    return name if name in BENCHMARKS else Path(name).stem


# ---------------------------------------------------------------------------------------------------------------------
# Data sets


def read_file(path: Path) -> Sequence[Any]:
    """Rows of a .jsonl, .json or .parquet file. Raises UserError."""
    if path.suffix not in FILE_KINDS:
        raise UserError(f"{path} ends in {path.suffix or 'nothing'!r}; known are {', '.join(FILE_KINDS)}")
    where, rows = "", []
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            return pyarrow.parquet.read_table(path).to_pylist()
        if path.suffix == ".json":
            rows = json.loads(path.read_text(encoding="utf-8"))
        else:
            for number, _, line in read_lines(path):
                where = f", line {number},"
                rows.append(json.loads(line))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}{where} is not JSON: {error}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(rows, list):
        raise UserError(f"{path} must hold a list of objects with problem and answer")
    return rows


def open_dataset(path: str, split: str | None = "train") -> Any:
    """A `datasets.Dataset`, memory-mapped, of the hub, a folder or file of parquet, or a `save_to_disk` folder.

    split: which of several; None: `test`, else the only one. Raises UserError.
    """
    import datasets

    datasets.disable_progress_bars()
    local = Path(path).expanduser()
    if not local.exists():
        if path.startswith((".", "/", "~")) or path.count("/") != 1:
            raise UserError(f"{path} does not exist; give a folder, a parquet file, or a hub name such as owner/name")
        with hub_errors(f"data set {path}"):
            return _pick_split(datasets.load_dataset(path), path, split)
    try:
        if (local / "state.json").is_file() or (local / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(str(local))
        elif local.is_file():
            return datasets.load_dataset("parquet", data_files=str(local), split="train")
        elif any(local.rglob("*.parquet")):
            loaded = datasets.load_dataset("parquet", data_dir=str(local))
        else:
            loaded = datasets.load_dataset(str(local))  # JSON lines, say
    except datasets.data_files.EmptyDatasetError:
        raise UserError(f"{path} holds neither parquet files nor a dataset made by save_to_disk") from None
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetGenerationError) as error:
        raise UserError(f"data set {path} cannot be read: {error.__cause__ or error}") from error
    return _pick_split(loaded, path, split)


def _pick_split(loaded: Any, path: str, split: str | None) -> Any:
    if not isinstance(loaded, dict):
        return loaded
    split = split or ("test" if "test" in loaded or len(loaded) > 1 else next(iter(loaded)))
    if split not in loaded:
        raise UserError(f"data set {path} has no split {split}; it has {', '.join(loaded)}")
    return loaded[split]


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
