"""Where the requests of a search go: which server, or which data-parallel rank of one. No I/O, and no engine."""

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

logger = logging.getLogger(__name__)

Place = TypeVar("Place", bound=Hashable)

LOAD_BOUND = 1.25  # a place that has more than so many times its share of the groups gives some away
OVER_AFTER = 2.0  # times the longest pause between two rounds of a group; idle for longer, it is taken to be over
SHORTEST_PAUSE_S = 5.0  # that is taken for the longest, and the first guess
REMEMBERED = 4096  # groups, the last used ones
GROUPS_A_PLACE = 8  # below, a place has nothing to do while its few searches are scored


@dataclass
class _Group(Generic[Place]):
    place: Place
    running: int = 0  # requests
    idle_since: float = 0.0  # where none is running


class Placement(Generic[Place]):
    """Keeps the requests of a group (a search tree, a problem) on one place, whose cache holds what they share.

    A group goes to the least loaded place at its first request, and stays. It moves, between two rounds, only where its
    place is gone or has more than LOAD_BOUND times its share, as when another one came back.

    Load is groups that are under way; requests that run decide between equals only. Requests alone would mislead: a
    search that is being scored has none, and is back in a moment, so at any time some place looks free by chance.

    Nobody says that a group is over. It counts no more once it has been idle for longer than groups lately were between
    two rounds (OVER_AFTER); its place is remembered further, so one that was only slow still finds its cache.
    """

    def __init__(self, at_once: int = 0, clock: Callable[[], float] = time.monotonic, moves: bool = True):
        """at_once: most groups that are under way together; 0: not known. moves: also where its place is only crowded; else
        a group stays while its place is there, since what it would read again costs more than waiting."""
        self._at_once, self._clock, self._moves = at_once, clock, moves
        self._groups: dict[Hashable, _Group[Place]] = {}  # all that are remembered
        self._idle: dict[Hashable, _Group[Place]] = {}  # of them, the last used one last
        self._busy, self._requests = Counter[Place](), Counter[Place]()  # of the others: groups, requests that run
        self._longest_pause = SHORTEST_PAUSE_S  # of late

    @contextlib.contextmanager
    def use(self, group: str, places: Sequence[Place]) -> Iterator[Place]:
        """The place, of those that are there (at least one), for a request of this group; it counts as running inside the
        `with`. Requests of group "" share nothing: each goes to the least loaded place."""
        key: Hashable = group or object()
        entry = self._groups[key] = self._settle(key, places)
        entry.running += 1
        self._requests[entry.place] += 1
        try:
            yield entry.place
        finally:
            entry.running -= 1
            self._requests[entry.place] -= 1
            if not entry.running:
                entry.idle_since = self._clock()
                self._busy[entry.place] -= 1
                self._idle[key] = entry
            if not group:
                del self._groups[key], self._idle[key]

    def _settle(self, key: Hashable, places: Sequence[Place]) -> _Group[Place]:
        """The group's entry, taken out of the table, with the place that it is to use from now on."""
        now, entry = self._clock(), self._groups.pop(key, None)
        if entry is None:
            self._forget()
        elif entry.running and entry.place in places:
            return entry  # a round stays together
        elif entry.running:
            self._busy[entry.place] -= 1
            self._requests[entry.place] -= entry.running
        else:
            del self._idle[key]
            self._longest_pause = max(now - entry.idle_since, 0.999 * self._longest_pause, SHORTEST_PAUSE_S)
        loads = self._loads(places, now)
        least = min(places, key=lambda place: loads[place])
        if entry is None:
            entry = _Group(least)
        elif entry.place not in loads or (self._moves and self._is_crowded(loads, entry.place, least)):
            entry.place = least
        self._busy[entry.place] += 1
        self._requests[entry.place] += entry.running
        return entry

    def _loads(self, places: Sequence[Place], now: float) -> dict[Place, tuple[float, int]]:
        """(groups under way, requests that run) of each place. Idle groups count for less where they and the busy ones are
        more than `at_once`: some of them must be over."""
        idle_since = now - OVER_AFTER * self._longest_pause
        idle = Counter[Place]()
        for entry in reversed(self._idle.values()):
            if entry.idle_since < idle_since:
                break
            idle[entry.place] += 1
        left = max(0, self._at_once - 1 - self._busy.total()) if self._at_once else idle.total()
        weight = min(1.0, left / max(1, idle.total()))
        return {place: (self._busy[place] + weight * idle[place], self._requests[place]) for place in places}

    def _is_crowded(self, loads: dict[Place, tuple[float, int]], home: Place, least: Place) -> bool:
        """Whether one more group at `home` is far over its share, and `least` is better for it. loads: without it."""
        share = max(1, round((sum(groups for groups, _ in loads.values()) + 1) / len(loads)))
        return loads[home][0] + 1 > LOAD_BOUND * share and loads[least][0] < loads[home][0]

    def _forget(self) -> None:
        """Make room for a new group: the least recently used idle one goes."""
        if len(self._groups) >= REMEMBERED:
            oldest = next(iter(self._idle), None)
            self._idle.pop(oldest, None)
            self._groups.pop(oldest, None)


def warn_of_few_groups(groups: int, places: int, what: str, of: str = "engine") -> None:
    """`of` whom the message speaks. Say that so few searches or problems at once (0: not known) leave places idle."""
    if places > 1 and 0 < groups < GROUPS_A_PLACE * places:
        logger.warning(
            "%s: %d at once for %d %s are %.1f each; a search stays on one of them, and some will wait for work: give "
            "--batch_size %d (%d each) or more, where there is so much to do",
            of, groups, places, what, groups / places, GROUPS_A_PLACE * places, GROUPS_A_PLACE,
        )  # fmt: skip
