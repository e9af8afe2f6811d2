"""What a corpus statistic is made of: sums over documents, and a row for each document. They are divided later, once.

Sums of disjoint sets of documents add up, so a corpus can be measured in parts: one after another, or by several
processes.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


class Sums:
    """Sums and rows by name."""

    def __init__(self):
        """Nothing yet."""
        self.total: dict[str, Tensor] = {}
        self.rows: dict[str, list[Tensor]] = {}

    def add(self, name: str, x: Tensor) -> None:
        """Add to a sum. What has fewer entries along the last dimension (a shorter context) is the first of them."""
        before = self.total.get(name)
        if before is None:
            self.total[name] = x.clone()
        elif before.shape == x.shape and before.device == x.device:
            before.add_(x)
        else:
            self.total[name] = _plus(before.to(x.device), x)

    def note(self, name: str, rows: Iterable[Tensor]) -> None:
        """Keep one row for each of some documents."""
        self.rows.setdefault(name, []).extend(rows)

    def count(self, name: str) -> int:
        """How many documents have left a row."""
        return len(self.rows.get(name, ()))

    def merge(self, other: "Sums") -> None:
        """Take in what was summed over other documents; their rows come after those that are here."""
        for name, x in other.total.items():
            self.add(name, x)
        for name, rows in other.rows.items():
            self.note(name, rows)

    def reorder(self, order: list[int]) -> None:
        """Put the rows in another order: row `order[n]` becomes row n."""
        self.rows = {name: [rows[at] for at in order] for name, rows in self.rows.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Everything as tensors by name, on the CPU: what a file holds."""
        rows = {f"rows:{name}": torch.stack([x.cpu() for x in rows]) for name, rows in self.rows.items() if rows}
        return {f"total:{name}": x.cpu().contiguous() for name, x in self.total.items()} | rows

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Sums":
        """What `tensors` gave."""
        made = cls()
        for key, x in tensors.items():
            kind, _, name = key.partition(":")
            if kind == "total":
                made.total[name] = x
            else:
                made.rows[name] = list(x)
        return made


def _plus(one: Tensor, other: Tensor) -> Tensor:
    long, short = (one, other) if one.shape[-1] >= other.shape[-1] else (other, one)
    return long + torch.nn.functional.pad(short, (0, long.shape[-1] - short.shape[-1]))
