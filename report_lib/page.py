"""The page `report.html` and its data files: one a problem, text apart, read by script tags, so it works from a file.

    report.html                      the page; no data in it
    report_data/assets/              its scripts and style
    report_data/index.js             runs, tables, plots, one row a problem
    report_data/run0/p12.js          problem 12 of the first run: votes and trees, without text
    report_data/run0/p12-text0.js    texts of some of its searches, read when a block is shown
    report_data/live.js              of a page that is renewed (--watch): its version, which an open page asks for

Each file takes the place of an earlier report's whole: texts first, then problems, then the index. So a page that is open
meanwhile, or a report that is killed, reads nothing that is half there.
Everything is plain ASCII JSON: what a model wrote stands in it as escaped strings and the page shows it as text only.
"""

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common_lib.cli import UserError
from common_lib.files import OutputError, write_text
from eval_lib.tables import Table
from report_lib.analysis import Analysis
from report_lib.answer import Answer
from report_lib.problem import ANSWER_CHARACTERS, ProblemView, SearchView, count_vote

logger = logging.getLogger(__name__)

ASSETS = Path(__file__).resolve().parent / "assets"
DATA = "report_data"
PART_CHARACTERS = 3_000_000  # of text in one file, more or less
SETTINGS_SHOWN = ("search_type", "block_size", "max_length", "num_repetitions", "selection", "temperature", "top_p",
                  "seed")  # fmt: skip
Decode = Callable[[list[int]], str]


class PageWriter:
    """Writes the page's files while runs are analysed: nothing but the current problem is held."""

    def __init__(self, folder: Path, decode: Decode | None, live: int = 0):
        """Begin in a folder beside the final one. Raises UserError where `report_data` is something else's.

        decode: ids to text, for runs without a journal. live: version of a page that will be renewed, 0 for one that
        is not.
        """
        self.folder, self.final, self.decode, self.live = folder, folder / DATA, decode, live
        if self.final.exists() and not (self.final / "assets").is_dir():
            raise UserError(f"{self.final} exists and is no report's; give another --out, or move it away")
        folder.mkdir(parents=True, exist_ok=True)
        self.data = folder / f"{DATA}.part"
        self.discard()
        shutil.copytree(ASSETS, self.data / "assets", ignore=shutil.ignore_patterns("report.html"))

    def discard(self) -> None:
        """Remove what is not finished; an earlier report stays as it is."""
        shutil.rmtree(self.data, ignore_errors=True)

    def add(self, number: int, view: ProblemView) -> None:
        """Write a problem of run `number`."""
        (self.data / f"run{number}").mkdir(exist_ok=True)
        name = f"run{number}/p{view.data_idx}"
        searches = []
        parts: list[list[list[str]]] = [[]]
        for search in view.searches:
            if sum(len(text) for texts in parts[-1] for text in texts) >= PART_CHARACTERS:
                parts.append([])
            place = {"texts": len(parts) - 1, "at": len(parts[-1])}
            parts[-1].append(search.text if search.in_journal else beam_texts(search, self.decode))
            ids = not search.in_journal and self.decode is None
            searches.append(search_data(search) | {"ids": ids} | place)
        names = [self.write_texts(f"{name}-text{i}", part) for i, part in enumerate(parts)]
        for shown in searches:
            shown["texts"] = names[shown["texts"]]
        line = view.lines[0]
        head = {"id": view.data_idx, "problem": line["problem"], "truth": line["gt_answer"][:ANSWER_CHARACTERS]}
        self.write(name, head | {"vote": count_vote(view.searches), "searches": searches})

    def write_texts(self, name: str, texts: list[list[str]]) -> str:
        """Returns the name under which they are found: of a live page it changes with them, so that an open page does not
        look for an earlier search in later texts."""
        if self.live:
            name += "-" + hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:12]
        self.write(name, texts)
        return name

    def write(self, name: str, value: Any) -> None:
        (self.data / f"{name}.js").write_text(data_file(name, value), encoding="ascii")

    def finish(
        self, analyses: Sequence[Analysis], tables: Sequence[Table], plots: list[dict], answers: Sequence[Answer] = ()
    ) -> None:
        """index.js; then all files are put in their places."""
        runs = [
            {"name": a.run.name, "folder": f"run{i}", "settings": settings(a), "notes": a.notes, "problems": a.problems}
            for i, a in enumerate(analyses)
        ]
        shown = {"answers": list(map(vars, answers)), "tables": list(map(vars, tables)), "plots": plots}
        index: dict[str, Any] = {"runs": runs} | shown
        if self.live:
            index |= {"live": self.live, "as_of": time.strftime("%Y-%m-%d %H:%M:%S")}
            index["plots"] = [
                plot | {"png": f"{plot['png']}?{self.live}"} for plot in plots
            ]  # else an open page shows the old
            self.write("live", {"version": self.live, "state": "live"})
        self.write("index", index)
        self.publish()

    def publish(self) -> None:
        """Put every file in its place, those that name others after them; then remove what is left of an earlier report."""
        new = [path.relative_to(self.data) for path in self.data.rglob("*") if path.is_file()]
        last = ["index.js", "live.js"]
        for name in sorted(
            new, key=lambda name: (last.index(str(name)) + 1 if str(name) in last else 0, "-text" not in name.name)
        ):
            (self.final / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(self.data / name, self.final / name)
        shutil.copyfile(ASSETS / "report.html", self.data / "report.html")
        os.replace(self.data / "report.html", self.folder / "report.html")
        self.discard()
        for path in sorted(self.final.rglob("*"), reverse=True):
            if path.is_file() and path.relative_to(self.final) not in set(new):
                path.unlink()
            elif path.is_dir() and not any(path.iterdir()):
                path.rmdir()


def end_live(folder: Path, state: str) -> None:
    """Tell open pages of a live report that it is renewed no more; nothing where there is none, or they were told.

    state: `finished`, or `stopped` (the run goes on). Where the file cannot be written it is removed, which tells too.
    """
    path = folder / DATA / "live.js"
    if not path.is_file() or read_data_file(path)["state"] != "live":
        return
    version = read_data_file(path.with_name("index.js")).get("live")  # later than the other's if publishing was ended
    try:
        write_text(path, data_file("live", {"version": version, "state": state}))
    except OutputError as error:
        logger.warning("%s", error)
        path.unlink()


def data_file(name: str, value: Any) -> str:
    """One call with ASCII JSON, which is also JavaScript."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return f'VGS.receive("{name}",{text});\n'


def read_data_file(path: Path) -> dict[str, Any]:
    """The value in a file of `data_file`."""
    return json.loads(path.read_text(encoding="ascii").partition(",")[2].rpartition(")")[0])


def search_data(search: SearchView) -> dict[str, Any]:
    """A search as the page draws it; lists by node number."""
    tree, line = search.tree, search.line
    return {
        "repeat": search.repeat_idx,
        "over": line is not None,
        "flat": not search.in_journal,
        "beams": tree.beams if line else [],
        "vote": count_vote([search]) if line else None,
        "parent": tree.parent,
        "round": tree.round,
        "start": tree.start,
        "length": list(map(len, tree.tokens)),
        "value": [0.0, *(round(value, 5) for value in tree.value[1:])],
        "kept": list(map(int, tree.kept)),
        "finish": tree.finish,
        "graded": {node: [answer[:ANSWER_CHARACTERS], int(right)] for node, (answer, right) in search.grades.items()},
    }


def beam_texts(search: SearchView, decode: Decode | None) -> list[str]:
    """Texts by node where there is no journal: decoded, or the ids themselves."""
    responses = map(search.tree.response, search.tree.beams)
    return ["", *(decode(ids) if decode else " ".join(map(str, ids)) for ids in responses)]


def settings(analysis: Analysis) -> list[tuple[str, str]]:
    """What a run was, in words: name and value."""
    run, meta = analysis.run, analysis.run.meta or {}
    shown = {"file": run.path, "searches": f"{len(run.lines)} of {run.planned}", "benchmark": meta.get("benchmark")}
    shown |= {
        "generator": meta.get("generator", {}).get("path"),
        "value model": meta.get("value_model", {}).get("path"),
    }
    shown |= {"num_blocks": run.num_blocks} | {key: meta.get("arguments", {}).get(key) for key in SETTINGS_SHOWN}
    shown["versions"] = ", ".join(f"{name} {version}" for name, version in meta.get("versions", {}).items())
    return [(name, str(value)) for name, value in shown.items() if value not in (None, "")]
