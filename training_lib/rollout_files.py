"""The parquet files of a collected data set: how they are called, and which of them are not there."""

import json
import logging
import re
from collections import defaultdict
from pathlib import Path

from common_lib.cli import UserError

logger = logging.getLogger(__name__)

WORK = ".collect"  # unfinished rows and settings; hidden, so that a data loader does not take them for data
NUMBERED = re.compile(r"(.+)-(\d{5,})-of-(\d{5,})\.parquet")  # as the hub's data sets have them too
MOST_NAMED = 3


def count_files(num_problems: int, problems_each: int) -> int:
    """Of how many parquet files a collection is."""
    return -(-num_problems // problems_each)


def file_places(folder: Path, number: int, count: int) -> tuple[Path, Path]:
    """Where a finished file is: the second place is that of one of which every problem was left out, which is kept
    apart, since no loader reads it."""
    return folder / f"data/train-{number:05d}-of-{count:05d}.parquet", folder / WORK / f"{number:05d}.empty"


def written_file(folder: Path, number: int, count: int) -> Path | None:
    """Where a finished file is; None: it is not finished."""
    return next((path for path in file_places(folder, number, count) if path.exists()), None)


def check_all_there(path: str) -> None:
    """Before a data set is read: UserError for a collection some of whose files are missing, naming them.

    In another folder only the names can tell, and what is missing may have been left out on purpose: a warning. Of a
    collection's own data/ the hidden folder beside it still tells which files are kept apart.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return
    settings = folder / WORK / "settings.json"
    if settings.is_file():
        made_with = json.loads(settings.read_text(encoding="utf-8"))
        count = count_files(made_with["num_problems"], made_with["shard_size"])
        if missing := [number for number in range(count) if written_file(folder, number, count) is None]:
            names = [file_places(folder, number, count)[0].name for number in missing]
            raise UserError(
                f"{path} lacks {_first(names)}: its collection has not ended; finish it with the collect_rollouts.py command "
                f"that began it, or give {folder / 'data'} to go without"
            )
        return
    found = defaultdict(set)
    for file in folder.rglob("*.parquet"):
        if match := NUMBERED.fullmatch(file.name):
            found[file.parent.resolve() / match[1], match[3]].add(int(match[2]))
    for (stem, of), numbers in found.items():
        collection = stem.parent.parent  # if it is one
        gaps = sorted(set(range(int(of))) - numbers)
        if gaps := [number for number in gaps if written_file(collection, number, int(of)) is None]:
            names = [f"{stem.name}-{number:05d}-of-{of}.parquet" for number in gaps]
            logger.warning("%s lacks %s, as the names of the others say; going on without", path, _first(names))


def _first(names: list[str]) -> str:
    """The first ones, and how many more there are."""
    more = f" and {len(names) - MOST_NAMED} more files" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more
