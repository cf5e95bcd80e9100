"""Which lines of a run count where --stop has decided problems, as X.meta.json says it: T repetitions of a problem, 0 .. T - 1.

While the run goes on X.jsonl may hold others too, which readers leave out. No torch.
"""

from collections.abc import Mapping, Sequence
from typing import Any

Stopped = Mapping[int, int]  # data_idx -> T, of the problems that are decided
STOP_KEYS = ("stopped", "stopped_by", "tokens_uncounted")  # of X.meta.json


def is_counted(stopped: Stopped, data_idx: int, repeat_idx: int) -> bool:
    return data_idx not in stopped or repeat_idx < stopped[data_idx]


def planned_searches(num_problems: int, repetitions: int, stopped: Stopped) -> int:
    """How many searches count in the end, as far as it is known: of an undecided problem all repetitions."""
    return num_problems * repetitions - sum(max(0, repetitions - count) for count in stopped.values())


def stopped_of(meta: Mapping[str, Any] | None) -> dict[int, int]:
    """From the settings of a run. Raises ValueError where they say something else there."""
    stopped = (meta or {}).get("stopped", {})
    if not isinstance(stopped, dict) or not all(type(count) is int and count >= 1 for count in stopped.values()):
        raise ValueError("stopped must be an object of repetitions by problem")
    return {int(data_idx): count for data_idx, count in stopped.items()}


def stop_settings(meta: Mapping[str, Any]) -> dict[str, Any]:
    """What decides which lines of a run count: the flags of --stop that have an effect, and how many repetitions there may
    be. Older runs have none of them."""
    arguments = meta["arguments"]
    kind = arguments.get("stop", "none")
    of_sure = ("stop_vote", "num_repetitions")
    names = {"none": (), "sure": of_sure, "certified": (*of_sure, "alpha")}.get(kind, ())
    return {"stop": kind} | {name: arguments.get(name) for name in names}


def join_stopped(metas: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The STOP_KEYS of a run in shards, each of which has stopped its own problems."""
    if not any("stopped" in meta for meta in metas):
        return {}
    spent = [meta.get("tokens_uncounted", {}) for meta in metas]
    return {
        **{
            key: {i: what for meta in metas for i, what in meta.get(key, {}).items()}
            for key in ("stopped", "stopped_by")
        },
        "tokens_uncounted": {name: sum(one.get(name, 0) for one in spent) for name in ("generated", "scored")},
    }
