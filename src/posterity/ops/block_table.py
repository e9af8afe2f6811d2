"""The blocks of a mask as tensors, for kernels that visit blocks by themselves.

As in FlexAttention's `BlockMask`: which blocks of a mask hold edges, in order of rows and in order of columns, and the
edges of those that are neither empty nor full. Any rule of `Mask` becomes such a table, without a form of its own.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor

from posterity.errors import InputError
from posterity.ops.mask import Mask

_PAIRS_AT_ONCE = 2**26  # of a rule that is evaluated
_MOST_BYTES = 2**30  # of the edges of partial blocks


class BlockList(NamedTuple):
    """Blocks in the order of their rows (or of their columns)."""

    start: Int[Tensor, " line"]  # where the blocks of a row of a table begin; one more, the end
    other: Int[Tensor, " block"]  # number of the block's column (or row)
    partial: Int[Tensor, " block"]  # number of its edges in `BlockTable.edges`; -1: all pairs of it are edges


@dataclass(frozen=True)
class BlockTable:
    """The blocks of a mask that hold edges, for each document and head whose masks differ."""

    by_row: BlockList
    by_column: BlockList
    edges: UInt8[Tensor, "partial height width"]
    shape: tuple[int, int]  # of a block
    count: tuple[int, int]  # of rows of blocks, and of columns
    documents: int  # 1: all documents have the same mask
    heads: int

    @property
    def strides(self) -> tuple[int, int]:
        """By how many tables the one of the next document, and of the next head, lies behind."""
        return (self.heads if self.documents > 1 else 0), int(self.heads > 1)

    @classmethod
    def of(cls, mask: Mask, length: int, shape: tuple[int, int], device: torch.device) -> "BlockTable | None":
        """Divide a mask of so many queries and keys into blocks; None if too many of them are partial.

        Raises:
            InputError: The mask lets a query see a later key.
        """
        height, width = shape
        rows, columns = -(-length // height), -(-length // width)
        keys = torch.arange(columns * width, device=device)[None]
        step = max(1, _PAIRS_AT_ONCE // (height * keys.shape[1]))  # rows of blocks at once
        nonempty, numbers, edges, ahead, count = [], [], [], [], 0
        for first in range(0, rows, step):
            queries = torch.arange(first * height, min(first + step, rows) * height, device=device)[:, None]
            pairs = _evaluate(mask, queries, keys, length)
            ahead.append((pairs & (keys > queries)).any())
            blocks = pairs.unflatten(2, (-1, height)).unflatten(4, (-1, width)).transpose(3, 4)
            beyond = (queries >= length).view(-1, 1, height, 1)
            some, full = blocks.any(-1).any(-1), (blocks | beyond).all(-1).all(-1)
            partial = some & ~full
            edges.append(blocks[partial])
            number = torch.full(some.shape, -1, dtype=torch.int32, device=device)
            number[partial] = torch.arange(count, count + len(edges[-1]), dtype=torch.int32, device=device)
            count += len(edges[-1])
            if count * height * width > _MOST_BYTES:
                return None
            nonempty.append(some)
            numbers.append(number)
        if torch.stack(ahead).any():
            raise InputError("the mask lets a query see later keys: only causal attention can be accounted for")
        some, number = torch.cat(nonempty, 2), torch.cat(numbers, 2)
        by_row, by_column = (
            _list_blocks(x.flatten(0, 1), y.flatten(0, 1))
            for x, y in ((some, number), (some.transpose(2, 3), number.transpose(2, 3)))
        )
        return cls(by_row, by_column, torch.cat(edges).byte(), shape, (rows, columns), *some.shape[:2])


def block_table(mask: Mask, length: int, shape: tuple[int, int], device: torch.device) -> BlockTable | None:
    """Return `BlockTable.of`, made once for each mask."""
    if mask.plain:
        return _plain_table(length, shape, device)
    tables, call = mask.tables, (length, shape, device)
    if call not in tables:
        tables[call] = BlockTable.of(mask, length, shape, device)
    return tables[call]


@lru_cache(maxsize=4)
def _plain_table(length: int, shape: tuple[int, int], device: torch.device) -> BlockTable | None:
    return BlockTable.of(Mask(), length, shape, device)


def _evaluate(mask: Mask, queries: Tensor, keys: Tensor, length: int) -> Bool[Tensor, "batch head query key"]:
    """Evaluate the rule of a mask; pairs beyond the last position are no edges."""
    last = length - 1
    queries_inside, keys_inside = queries.clamp(max=last), keys.clamp(max=last)
    pairs = keys <= queries if mask.allowed is None else mask.allowed(queries_inside, keys_inside)
    pairs = pairs.reshape((1,) * (4 - pairs.dim()) + pairs.shape)
    pairs = pairs.expand(*pairs.shape[:2], len(queries), keys.shape[1])
    return pairs & (queries <= last) & (keys <= last)


def _list_blocks(some: Bool[Tensor, "table line other"], number: Int[Tensor, "table line other"]) -> BlockList:
    counts = some.sum(-1).flatten()
    start = torch.cat((counts.new_zeros(1), counts.cumsum(0))).int()
    return BlockList(start, some.nonzero()[:, 2].int(), number[some])
