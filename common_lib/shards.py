"""Which part of the work one of several processes does: `--shard I/N`."""

import re
from dataclasses import dataclass

from common_lib.cli import UserError


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count` equal parts, from 0: every count-th piece of the work, wherever the others run."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str, flag: str) -> "Shard":
        """From "I/N". flag: the one that gave it. Raises UserError."""
        found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
        if not found or not int(found[1]) < int(found[2]):
            raise UserError(f"{flag} {text!r} must be I/N with 0 <= I < N: 0/4, 1/4, 2/4 and 3/4 are all of four parts")
        return cls(int(found[1]), int(found[2]))

    def holds(self, number: int) -> bool:
        """Whether piece `number` of the work is of this part."""
        return number % self.count == self.index

    @property
    def suffix(self) -> str:
        """Of the names of files that hold this part alone."""
        return f".shard-{self.index}-of-{self.count}"

    def count_of(self, pieces: int) -> int:
        """How many of so many pieces are of this part."""
        return len(range(self.index, pieces, self.count))

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


WHOLE = Shard(0, 1)
