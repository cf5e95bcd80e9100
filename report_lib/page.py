"""The page `report.html` and its data files: one a problem, text apart, read by script tags, so it works from a file.

    report.html                      the page; no data in it
    report_data/assets/              its scripts and style
    report_data/index.js             runs, tables, plots, one row a problem
    report_data/run0/p12.js          problem 12 of the first run: votes and trees, without text
    report_data/run0/p12-text0.js    texts of some of its searches, read when a block is shown

Everything is plain ASCII JSON: what a model wrote stands in it as escaped strings and the page shows it as text only.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common_lib.cli import UserError
from report_lib.analysis import Analysis
from report_lib.data import Run
from report_lib.problem import ProblemView, read_token_ids, search_votes

ASSETS = Path(__file__).resolve().parent / "assets"
DATA = "report_data"
PART_CHARACTERS = 3_000_000  # of text in one file, more or less
ANSWER_CHARACTERS = 1000  # of an answer are shown; its text has it all
SETTINGS_SHOWN = (
    "search_type",
    "num_blocks",
    "block_size",
    "max_length",
    "num_repetitions",
    "selection",
    "temperature",
    "top_p",
    "seed",
)
Decode = Callable[[list[int]], str]


class PageWriter:
    """Writes the page's files while runs are analysed: nothing but the current problem is held."""

    def __init__(self, folder: Path):
        """Begin in a folder beside the final one. Raises UserError where `report_data` is something else's."""
        self.folder, self.final = folder, folder / DATA
        if self.final.exists() and not (self.final / "assets").is_dir():
            raise UserError(f"{self.final} exists and is no report's; give another --out, or move it away")
        folder.mkdir(parents=True, exist_ok=True)
        self.data = folder / f"{DATA}.part"
        self.discard()
        shutil.copytree(ASSETS, self.data / "assets", ignore=shutil.ignore_patterns("report.html"))

    def discard(self) -> None:
        """Remove what is not finished; an earlier report stays as it is."""
        shutil.rmtree(self.data, ignore_errors=True)

    def problem_writer(self, number: int, run: Run, decode: Decode | None) -> Callable[[ProblemView], None]:
        """What to call with each problem of run `number`. `decode`: ids to text, for runs without a journal."""
        (self.data / f"run{number}").mkdir()
        return lambda view: self._write_problem(f"run{number}/p{view.data_idx}", run, view, decode)

    def _write_problem(self, name: str, run: Run, view: ProblemView, decode: Decode | None) -> None:
        lines = [line for line in view.lines if line is not None]
        parts = TextParts(self, name)
        searches = []
        for i, tree in enumerate(view.trees):
            texts = tree.text
            line = view.lines[i]
            if not view.journal[i] and line is not None:
                texts = ["", *beam_texts(run, line, decode)]
            flags = {"flat": not view.journal[i], "ids": not view.journal[i] and decode is None}
            searches.append(search_data(view, i) | flags | parts.add(texts))
        parts.flush()
        self.write(
            name,
            {
                "id": view.data_idx,
                "problem": lines[0]["problem"],
                "truth": lines[0]["gt_answer"][:ANSWER_CHARACTERS],
                "votes": search_votes(view, view.over),
                "searches": searches,
            },
        )

    def write(self, name: str, value: Any) -> None:
        """A data file: one call with ASCII JSON, which is also JavaScript."""
        text = json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
        (self.data / f"{name}.js").write_text(f'VGS.receive("{name}",{text});\n', encoding="ascii")

    def finish(self, analyses: Sequence[Analysis], tables: Sequence[dict], plots: Sequence[dict]) -> None:
        """index.js; then the data take the place of an earlier report's, and the page is written last."""
        runs = [
            {
                "name": analysis.run.name,
                "folder": f"run{i}",
                "settings": settings(analysis),
                "notes": analysis.notes,
                "problems": analysis.problems,
            }
            for i, analysis in enumerate(analyses)
        ]
        self.write("index", {"runs": runs, "tables": list(tables), "plots": list(plots)})
        shutil.rmtree(self.final, ignore_errors=True)
        self.data.rename(self.final)
        shutil.copyfile(ASSETS / "report.html", self.folder / "report.html")


class TextParts:
    """Texts of a problem's searches, in as many files as it takes to keep each small."""

    def __init__(self, page: PageWriter, name: str):
        self._page, self._name = page, name
        self._held: list[list[str]] = []
        self._size = self._written = 0

    def add(self, texts: list[str]) -> dict[str, Any]:
        """Where the page finds the texts of this search."""
        place = {"texts": f"{self._name}-text{self._written}", "at": len(self._held)}
        self._held.append(texts)
        self._size += sum(map(len, texts))
        if self._size >= PART_CHARACTERS:
            self.flush()
        return place

    def flush(self) -> None:
        if self._held:
            self._page.write(f"{self._name}-text{self._written}", self._held)
            self._held, self._size, self._written = [], 0, self._written + 1


def search_data(view: ProblemView, i: int) -> dict[str, Any]:
    """A search as the page draws it; lists by node number."""
    tree, line = view.trees[i], view.lines[i]
    return {
        "repeat": tree.repeat_idx,
        "over": line is not None,
        "seconds": line and line["dt"],
        "beams": tree.beams if line else [],
        "classes": view.classes[i] if line else [],
        "votes": search_votes(view, [i]) if line else None,
        "parent": tree.parent,
        "round": tree.round,
        "start": tree.start,
        "length": tree.length,
        "value": [round(value, 5) for value in tree.value],
        "kept": [int(kept) for kept in tree.kept],
        "finish": tree.finish,
        "graded": {node: [answer[:ANSWER_CHARACTERS], int(right)] for node, (answer, right) in view.grades[i].items()},
    }


def beam_texts(run: Run, line: dict, decode: Decode | None) -> list[str]:
    """Texts of a line's beams where there is no journal: decoded, or the ids themselves."""
    return [decode(ids) if decode else " ".join(map(str, ids)) for ids in read_token_ids(run, line)]


def settings(analysis: Analysis) -> list[tuple[str, str]]:
    """What a run was, in words: name and value."""
    run, meta = analysis.run, analysis.run.meta or {}
    shown = [("file", str(run.path)), ("searches", f"{len(run.lines)} of {run.planned}")]
    if meta.get("benchmark"):
        shown.append(("benchmark", str(meta["benchmark"])))
    for key, words in (("generator", "generator"), ("value_model", "value model")):
        if isinstance(meta.get(key), dict):
            shown.append((words, str(meta[key].get("path", "?"))))
    arguments = meta.get("arguments", {})
    shown += [(key, str(arguments[key])) for key in SETTINGS_SHOWN if key in arguments]
    if run.num_blocks and "num_blocks" not in arguments:
        shown.append(("num_blocks", str(run.num_blocks)))
    versions = meta.get("versions")
    if isinstance(versions, dict):
        shown.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    return shown
