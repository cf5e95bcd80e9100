"""A published stop, plainly: what vectorised ones are held against."""

from collections.abc import Iterable, Sequence


def equal_window(trees: Iterable[Sequence[int]], window: int) -> int | None:
    """ESC (Li et al. 2024, arXiv 2401.10480) on one problem. Repetitions come in windows, one after the other, and
    the first whose answers are all the same ends the sampling. Returns the repetitions until then, None where none is like that.

    trees: classes of the answers of each repetition; -1, an empty one, is like no other.
    """
    seen: set[int] = set()
    for count, classes in enumerate(trees, start=1):
        seen |= set(classes)
        if count % window == 0:
            if len(seen) == 1 and -1 not in seen:
                return count
            seen = set()
    return None
