"""A mergeable accumulator: running sums plus one row per document. Ratios are formed once, at the end.

Sums over disjoint sets of documents add up, so a corpus can be measured in parts: one after another, or by several
processes.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

Key = tuple[str | None, str]  # layer (None: the whole model), variable
WeightKey = tuple[str, int, str, int]  # layer, stream, side, number of the parameter
K = TypeVar("K", Key, WeightKey)


class Accumulator:
    """Sums and rows by layer and variable; sums of weight gradients by layer, stream, side and parameter."""

    def __init__(self):
        """Start empty."""
        self.total: dict[Key, Tensor] = {}
        self.rows: dict[Key, list[Tensor]] = {}
        self.weight_total: dict[WeightKey, Tensor] = {}

    def add(self, key: Key, x: Tensor) -> None:
        """Add to a sum; a tensor with a shorter last dimension (a shorter context) is added to the first entries."""
        _add(self.total, key, x)

    def add_weight(self, key: WeightKey, x: Tensor) -> None:
        """Add one side of the gradient of one parameter."""
        _add(self.weight_total, key, x)

    def append_rows(self, key: Key, rows: Iterable[Tensor]) -> None:
        """Append one row per document."""
        self.rows.setdefault(key, []).extend(rows)

    def count(self, key: Key) -> int:
        """Return the number of documents with a row."""
        return len(self.rows.get(key, ()))

    def merge(self, other: "Accumulator") -> None:
        """Add the sums of other documents and append their rows."""
        for key, x in other.total.items():
            self.add(key, x)
        for weight, x in other.weight_total.items():
            self.add_weight(weight, x)
        for key, rows in other.rows.items():
            self.append_rows(key, rows)

    def clear(self) -> None:
        """Forget every document."""
        self.total.clear()
        self.rows.clear()
        self.weight_total.clear()

    def reorder(self, order: list[int]) -> None:
        """Permute the rows: row `order[n]` becomes row n."""
        self.rows = {key: [rows[index] for index in order] for key, rows in self.rows.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Return all sums and rows on the CPU, under the names that a state file gives them."""
        total = {_name(key): x for key, x in self.total.items()}
        total |= {_weight_name(key): x for key, x in self.weight_total.items()}
        rows = {f"rows:{_name(key)}": stack_rows(rows) for key, rows in self.rows.items() if rows}
        return {f"total:{name}": x.cpu().contiguous() for name, x in total.items()} | rows

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "Accumulator":
        """Restore an accumulator from its `tensors()`."""
        sums = cls()
        for entry, x in tensors.items():
            kind, _, name = entry.partition(":")
            if kind != "total":
                sums.rows[_key(name)] = list(x)
            elif weight := _WEIGHT.fullmatch(name):
                layer, stream, side, parameter = weight.groups()
                sums.weight_total[layer, int(stream), side, int(parameter)] = x
            else:
                sums.total[_key(name)] = x
        return sums


def stack_rows(rows: Sequence[Tensor]) -> Tensor:
    """Stack rows on the CPU; the last dimension of shorter documents is filled up with zeros."""
    if len({x.shape for x in rows}) > 1:
        length = max(x.shape[-1] for x in rows)
        rows = [torch.nn.functional.pad(x, (0, length - x.shape[-1])) for x in rows]
    return torch.stack([x.cpu() for x in rows])


def stack_layers(layers: Sequence[Tensor], head: int) -> Tensor:
    """Stack one tensor per layer along a new axis before the axis `head`, on the CPU; missing heads are NaN."""
    heads = max(x.shape[head] for x in layers)
    padded = []
    for x in layers:
        missing = [*x.shape[:head], heads - x.shape[head], *x.shape[head + 1 :]]
        padded.append(torch.cat((x, x.new_full(missing, torch.nan)), head).cpu())
    return torch.stack(padded, head)


_WEIGHT = re.compile(r"(.+)/weight/(\d+)/(\w+)/(\d+)")


def _name(key: Key) -> str:
    layer, variable = key
    return variable if layer is None else f"{layer}/{variable}"


def _key(name: str) -> Key:
    layer, slash, variable = name.rpartition("/")
    return layer if slash else None, variable


def _weight_name(key: WeightKey) -> str:
    layer, stream, side, parameter = key
    return f"{layer}/weight/{stream}/{side}/{parameter:04d}"


def _add(total: dict[K, Tensor], key: K, x: Tensor) -> None:
    current = total.get(key)
    if current is None:
        total[key] = x.clone()
    elif current.shape == x.shape and current.device == x.device:
        current.add_(x)
    else:
        total[key] = _padded_sum(current.to(x.device), x)


def _padded_sum(left: Tensor, right: Tensor) -> Tensor:
    """Add tensors whose last dimensions differ, from their first entries."""
    long, short = (left, right) if left.shape[-1] >= right.shape[-1] else (right, left)
    return long + torch.nn.functional.pad(short, (0, long.shape[-1] - short.shape[-1]))
