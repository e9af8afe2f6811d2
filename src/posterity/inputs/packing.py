"""Rows of windows: one window each, or several short ones packed by first fit in reading order.

A window goes into the first of the last `LOOKBACK` rows that has room, else into a new row. A row that as many others
have followed is closed, so that a stream can be packed, and a limit keeps the first rows of all.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

LOOKBACK = 16  # rows
SHORTEST = 2  # tokens of a document with a loss


class Sized(Protocol):
    """What is packed."""

    @property
    def size(self) -> int:
        """Tokens."""
        ...


W = TypeVar("W", bound=Sized)


@dataclass(eq=False)
class PackedRows(Generic[W]):
    """Rows of at most `context` tokens, of which `limit` are asked for; each window has the number of its document."""

    context: int
    limit: int | None
    pack: bool
    rows: list[list[tuple[int, W]]] = field(default_factory=list)
    _room: list[int] = field(default_factory=list)

    @property
    def missing(self) -> int | None:
        """How many more rows may be needed at most; None: any number."""
        return None if self.limit is None else self.limit + LOOKBACK * self.pack - len(self.rows)

    @property
    def are_complete(self) -> bool:
        """Whether nothing to come can change the rows that were asked for."""
        if self.limit is None or len(self.rows) < self.limit:
            return False
        open_rows = range(max(0, len(self.rows) - LOOKBACK), self.limit) if self.pack else ()
        return all(self._room[index] < SHORTEST for index in open_rows)

    def add(self, number: int, window: W) -> None:
        """Put a window of a document into a row."""
        index = self._first_fit(window.size) if self.pack else len(self.rows)
        if index == len(self.rows):
            self.rows.append([])
            self._room.append(self.context)
        self.rows[index].append((number, window))
        self._room[index] -= window.size

    def _first_fit(self, size: int) -> int:
        recent = range(max(0, len(self.rows) - LOOKBACK), len(self.rows))
        return next((index for index in recent if self._room[index] >= size), len(self.rows))


def document_numbers(rows: Iterable[list[tuple[int, W]]]) -> set[int]:
    """Return the numbers of the documents in some rows."""
    return {number for row in rows for number, _ in row}
