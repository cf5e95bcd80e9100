"""The shards of a run: files of several processes, each with its part of the problems, that are one run together.

`--output_path X.jsonl --shard 1/4` writes X.shard-1-of-4.jsonl and what belongs to it. data_idx, global_idx and the number
of problems are those of the whole benchmark, so the lines of all shards together are those of X.jsonl.
"""

import re
from pathlib import Path
from typing import Any

from common_lib.cli import UserError
from common_lib.shards import Shard
from search_lib.run_reader import RunPaths, read_meta

SHARD_NAME = re.compile(r"\.shard-(0|[1-9][0-9]*)-of-([1-9][0-9]*)")


def find_shards(whole: Path) -> dict[Shard, RunPaths]:
    """The shards of the run X.jsonl that are there, finished or begun. Raises UserError where they are not of one run: cut
    in different numbers, or beside an X.jsonl."""
    stem, found = whole.name.removesuffix(".jsonl"), {}
    for path in sorted(whole.parent.glob("*.jsonl")):
        rest = path.name.removeprefix(stem).removesuffix(".jsonl")
        if path.name.startswith(stem) and (name := SHARD_NAME.fullmatch(rest)):
            shard = Shard(int(name[1]), int(name[2]))
            paths = RunPaths.of(whole, shard)
            if _has_begun(paths):
                found[shard] = paths
    if found and whole.exists():
        raise UserError(
            f"{whole} lies beside {_listed(found)}: a whole run and shards of one under the same name; move one of them away"
        )
    if len(counts := sorted({shard.count for shard in found})) > 1:
        raise UserError(
            f"{whole}: there are shards of runs cut in {' and in '.join(map(str, counts))} ({_listed(found)}); move those of "
            "the other run away"
        )
    return dict(sorted(found.items(), key=lambda item: item[0].index))


def _has_begun(paths: RunPaths) -> bool:
    """Not one that ended before anything had come of it, as where its flags were wrong or its engine did not start."""
    if any(file.exists() and file.stat().st_size for file in (paths.results, paths.tree)):
        return True
    sessions = (read_meta(paths.meta) or {}).get("sessions") or [{"ended": ""}]
    return sessions[-1]["ended"] is None  # it is at work


def _listed(found: dict[Shard, RunPaths]) -> str:
    names = [paths.results.name for paths in found.values()]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def check_beside(output_path: str, shard: Shard | None) -> dict[RunPaths, dict[str, Any]]:
    """Before a start: what is there under this name must be shards of the same N, or no shards. Returns the settings of
    the other shards, as far as they have begun. Raises UserError."""
    whole, given = Path(output_path), f"--output_path {output_path}" + (f" --shard {shard}" if shard else "")
    if name := SHARD_NAME.search(whole.name):
        raise UserError(
            f"{given}: {name[0]!r} in the name is for files of shards; give the name of the whole run, and --shard"
        )
    found = find_shards(whole)
    if shard is None and found:
        raise UserError(
            f"{given}: shards of a run have that name ({_listed(found)}); give their --shard, or another name"
        )
    if shard is not None and whole.exists():
        raise UserError(f"{given}: {whole} is a whole run; give another --output_path")
    if shard is not None and found and next(iter(found)).count != shard.count:
        count = next(iter(found)).count
        raise UserError(f"{given}: {_listed(found)} beside it are of a run cut in {count}; give --shard I/{count}, or another "
                        "--output_path")  # fmt: skip
    metas = {paths: read_meta(paths.meta) for other, paths in found.items() if other != shard}
    return {paths: meta for paths, meta in metas.items() if meta is not None}


def whole_run(meta: dict[str, Any]) -> dict[str, Any]:
    """The settings of a shard as those of the run that it is a part of."""
    return meta | {"arguments": {name: value for name, value in meta["arguments"].items() if name != "shard"}}
