"""How far the requests are that SGLang computes in several chunks: only the last chunk's output is returned."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

MOST_UNFINISHED = 256  # SGLang has one at a time; aborted ones stay until others take their place


@dataclass(slots=True)
class RequestProgress:
    """`total` tokens of a request, of which `computed` were computed; `rows` at the positions that it asks for."""

    total: int
    computed: int = 0
    rows: Any = None


class ProgressTable:
    """Of the requests that are not finished, by request id."""

    def __init__(self) -> None:
        self._unfinished: OrderedDict[str, RequestProgress] = OrderedDict()

    def __len__(self) -> int:
        return len(self._unfinished)

    def advance(self, request: str | None, prefix: int, length: int, total: int) -> RequestProgress:
        """A chunk of `length` tokens behind `prefix` ones of `total`. The id may be used again once a request is
        finished; one that is retracted and computed again costs both times."""
        progress = self._unfinished.pop(request, None) if request is not None else None
        if progress is None or progress.total != total:  # another request, the one before it was aborted
            progress = RequestProgress(total)
        progress.computed += length
        if request is not None and prefix + length < total:
            self._unfinished[request] = progress
            if len(self._unfinished) > MOST_UNFINISHED:
                self._unfinished.popitem(last=False)
        return progress
