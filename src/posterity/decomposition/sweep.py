"""The sweep: all edges of one backward pass, one block of scores at a time, so that sums need no N x N memory.

A block needs two products, the scores and their gradients; what is summed over it may need more. Sums along the
diagonals, one per lag, take no loop: the block lies in memory with rows of `stride` numbers, zero before its columns;
read with rows of `stride + 1` numbers, every column of what is read is one diagonal.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from posterity.ops.attention import Backward
from posterity.ops.heads import repeat_heads
from posterity.ops.mask import Tile
from posterity.ops.precision import dot
from posterity.ops.scores import bias_block

# Scratch for the blocks of a few heads. On a CPU a thread's part should nearly fit its own cache, which other cores
# do not share: the passes over a block are slow beyond it.
_SCRATCH_BYTES = {"cpu": 2.5e6}  # for each thread
_SCRATCH_LARGE = 256e6
_LOG2_E = math.log2(math.e)

HeadGroup = tuple[int, slice]  # a document and a few of its heads
Job = tuple[HeadGroup, list[Tile]]
BlockViews = tuple[Tensor, Tensor]  # a block by query and key, and the same memory along its diagonals


@runtime_checkable
class PartialSums(Protocol):
    """Sums over some edges of a few heads of one document."""

    def add_(self, blocks: "Blocks", operands: "Operands", tile: Tile) -> None:
        """Add the edges of a block: a_ij in the first of `blocks`, ds_ij in the second."""
        ...


@runtime_checkable
class EdgeSums(Protocol):
    """Sums over all edges of a backward pass, made of partial ones."""

    @property
    def whole_groups(self) -> bool:
        """Whether partial sums need all query heads of a key/value head together."""
        ...

    def start_part(self, heads: int) -> PartialSums:
        """Return sums over no edges, of so many heads of a document."""
        ...

    def add_part_(self, document: int, heads: slice, part: Any) -> None:
        """Add what was summed over some edges of these heads of a document."""
        ...


def sweep(
    back: Backward,
    sums: Sequence[EdgeSums],
    scratch: "Scratch | None" = None,
    left_out: Sequence[Sequence[slice]] | None = None,
) -> None:
    """Add every edge of one backward pass to each of the sums; memory is O(heads N + d N + block^2) beside theirs.

    Args:
        back: A backward pass.
        sums: What is summed, in this order for each block; the last may overwrite the block.
        scratch: Keeps the memory of the blocks between calls.
        left_out: Keys whose edges are not counted, for each document of the batch.
    """
    left_out = [()] * len(back.lse) if left_out is None else left_out
    scratch = Scratch() if scratch is None else scratch
    batch, heads = back.lse.shape[:2]
    device = back.lse.device
    tiles = edge_tiles(back)
    if not tiles:
        return
    height, width = largest_tile(back)
    threads = min(len(tiles), torch.get_num_threads() if device.type == "cpu" else 1)
    budget = _SCRATCH_BYTES.get(device.type, _SCRATCH_LARGE)
    size = max(1, int(budget / (Blocks.COUNT * height * (height + width) * back.lse.element_size())))
    if any(x.whole_groups for x in sums):
        heads_per_group = heads // back.key.shape[1]
        size = max(1, size // heads_per_group) * heads_per_group
    head_chunks = [
        (document, slice(first, min(first + size, heads)))
        for document in range(batch)
        for first in range(0, heads, size)
    ]
    jobs = _jobs(head_chunks, tiles, threads)
    back.total_gradients()  # computed once, before the threads start
    with _thread_map(threads) as thread_map:
        for results in thread_map(partial(_run_jobs, back, sums, left_out), jobs, scratch.parts(threads)):
            for (document, group), parts in results:
                for total, part in zip(sums, parts, strict=True):
                    total.add_part_(document, group, part)


def edge_tiles(back: Backward) -> list[Tile]:
    """Return the blocks that hold edges of a backward pass, those of one shape together."""
    length = back.lse.shape[2]
    tiles = [tile for _, row in back.mask.tiles(length, length, back.lse.device) for tile in row]
    return sorted(tiles, key=lambda tile: tile.shape)


def largest_tile(back: Backward) -> tuple[int, int]:
    """Return the most rows and the most columns that a block of a backward pass has."""
    heights, widths = zip((0, 0), *(tile.shape for tile in edge_tiles(back)), strict=True)
    return max(heights), max(widths)


def _jobs(chunks: list[HeadGroup], tiles: list[Tile], threads: int) -> list[list[Job]]:
    """Divide the work into one list per thread: all blocks of a group, or a part of the blocks of the last chunks."""
    shared = len(chunks) % threads
    jobs = [(group, tiles) for group in chunks[: len(chunks) - shared]]
    jobs += [(group, tiles[n::threads]) for group in chunks[len(chunks) - shared :] for n in range(threads)]
    return [jobs[n::threads] for n in range(threads)]


@contextmanager
def _thread_map(threads: int) -> Iterator[Callable]:
    """Yield a `map` over threads in each of which operators have one: blocks are too small to share each operator."""
    if threads == 1:
        yield map
        return
    torch_threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool.map
    finally:
        torch.set_num_threads(torch_threads)


@torch.no_grad()
def _run_jobs(
    back: Backward,
    sums: Sequence[EdgeSums],
    left_out: Sequence[Sequence[slice]],
    jobs: list[Job],
    scratch: "Scratch",
) -> list[tuple[HeadGroup, list[PartialSums]]]:
    """Sum some blocks of some heads, one after the other: the work of one thread."""
    results = []
    for group, tiles in jobs:
        operands = Operands(back, *group, left_out[group[0]])
        parts = [x.start_part(len(operands.query)) for x in sums]
        for tile in tiles:
            blocks = scratch.blocks(len(operands.query), *tile.shape, operands.query, back.softcap is not None)
            operands.write_edges_(blocks, tile)
            for part in parts:
                part.add_(blocks, operands, tile)
        results.append((group, parts))
    return results


def write_edges_(
    weight: Float[Tensor, "head rows columns"],
    score: Float[Tensor, "head rows columns"],
    rows: tuple[Tensor, Tensor, Tensor, Tensor],
    columns: tuple[Tensor, Tensor],
    back: Backward,
    bias: Float[Tensor, "#head #rows #columns"] | None,
    capped: Float[Tensor, "head rows columns"] | None = None,
) -> None:
    """Write a_ij and slope (do_i.v_j - D_i) of a block, the mask left aside: a_ij times the second is ds_ij.

    `rows` are q, do, lse and D of the queries, the last two with a width of 1; `columns` are k and v. `capped` gets the
    second without the slope of a soft-cap, the derivative by the capped score.
    """
    query, grad, lse, delta = rows
    key, value = columns
    torch.baddbmm(delta.expand_as(score), grad, value.mT, beta=-1, out=score)
    # Powers of 2: exp takes three times longer, and thirty times where it underflows.
    if back.softcap is None:
        torch.baddbmm(lse.expand_as(weight), query, key.mT, beta=-_LOG2_E, alpha=back.scale * _LOG2_E, out=weight)
    else:
        torch.baddbmm(weight, query, key.mT, beta=0, alpha=back.scale / back.softcap, out=weight).tanh_()
        if capped is not None:
            capped.copy_(score)
        score.mul_(1 - weight * weight)
        weight.mul_(back.softcap * _LOG2_E).sub_(lse, alpha=_LOG2_E)
    if bias is not None:
        weight.add_(bias, alpha=_LOG2_E)
    weight.exp2_()


class Operands:
    """The operands of the products, for a few heads of one document: each (head, position, width)."""

    def __init__(self, back: Backward, document: int, heads: slice, left_out: Sequence[slice]):
        dtype, heads_per_group = back.lse.dtype, back.query.shape[1] // back.key.shape[1]
        groups = slice(heads.start // heads_per_group, (heads.stop - 1) // heads_per_group + 1)
        first = groups.start * heads_per_group
        within = slice(heads.start - first, heads.stop - first)
        self.query, self.grad, self.lse, output, self.grad_query, self.grad_key, self.grad_value = (
            x[document, heads].to(dtype)
            for x in (back.query, back.grad_output, back.lse[..., None], back.output, *back.total_gradients())
        )
        self.delta = dot(self.grad, output)[..., None]
        query_heads = heads_per_group * (groups.stop - groups.start)
        self.key, self.value = (
            repeat_heads(x[document : document + 1, groups].to(dtype), query_heads)[0, within]
            for x in (back.key, back.value)
        )
        self.key_norm = self.key.norm(dim=-1)[:, None]
        self.query_norm = self.query.norm(dim=-1)[:, None]
        readers = back.mask.readers(self.query.shape[1])
        reader = torch.ones_like(self.delta[..., 0])
        if readers is not None:
            reader = readers[document].to(dtype).expand_as(reader)
        self.readers = torch.stack((self.grad.norm(dim=-1), reader), 1)
        self.back, self.document, self.heads, self.left_out = back, document, heads, left_out

    def write_edges_(self, blocks: "Blocks", tile: Tile) -> None:
        """Write a_ij, ds_ij and, where they differ, the gradients of the capped scores into a block."""
        weight, score, *_ = blocks.tiles
        capped = None if self.back.softcap is None else blocks.capped[0]
        i, j = (slice(None), tile.rows), (slice(None), tile.columns)
        rows = self.query[i], self.grad[i], self.lse[i], self.delta[i]
        bias = None if self.back.bias is None else self.select(bias_block(self.back.bias, tile))
        write_edges_(weight, score, rows, (self.key[j], self.value[j]), self.back, bias, capped)
        self.back.mask.fill_(weight, tile, 0.0, self.document, self.heads)
        self.leave_out_(weight, tile)
        score.mul_(weight)
        if capped is not None:
            capped.mul_(weight)

    def leave_out_(self, weight: Float[Tensor, "head rows columns"], tile: Tile) -> None:
        """Write 0 over the attention on the keys that are left out, in place."""
        for keys in self.left_out:
            first, last = max(keys.start, tile.columns.start), min(keys.stop, tile.columns.stop)
            if first < last:
                weight[..., first - tile.columns.start : last - tile.columns.start] = 0.0

    def select(self, bias: Tensor) -> Tensor:
        """Return the part of a bias that these heads of this document have."""
        bias = bias[self.document if len(bias) > 1 else 0]
        return bias[self.heads] if len(bias) > 1 else bias


class Scratch:
    """Memory of blocks that is used again: what lies outside their columns stays zero."""

    _SHAPES = 8  # kept at once

    def __init__(self):
        """Start without blocks."""
        self._by_shape: dict[tuple, Blocks] = {}
        self._parts: list[Scratch] = []

    def parts(self, threads: int) -> list["Scratch"]:
        """Return one scratch for each thread."""
        self._parts += [Scratch() for _ in range(threads - len(self._parts))]
        return self._parts[:threads]

    def blocks(self, heads: int, height: int, width: int, like: Tensor, softcap: bool = False) -> "Blocks":
        """Return the blocks of one shape, with the dtype and device of `like`; with a soft-cap there is one more."""
        shape = (heads, height, width, like.dtype, like.device, softcap)
        if shape not in self._by_shape:
            if len(self._by_shape) == self._SHAPES:
                self._by_shape.clear()
            self._by_shape[shape] = Blocks(heads, height, width, like, Blocks.COUNT + softcap)
        return self._by_shape[shape]


class Blocks:
    """Blocks of a few heads, each readable in two ways: `tiles` by query and key, `sheared` along its diagonals.

    In order: a_ij, ds_ij, one that is free, and under a soft-cap the gradients of the capped scores. Column d of
    `sheared` is one diagonal, the largest lag first; its row r belongs to row r of the tile.
    """

    COUNT = 3

    def __init__(self, heads: int, height: int, width: int, like: Tensor, count: int):
        stride = height + width
        size = height * (stride + 1)
        memory = [like.new_zeros(heads, size) for _ in range(count)]
        self.tiles = [x.as_strided((heads, height, width), (size, stride, 1), height) for x in memory]
        self.sheared = [x.as_strided((heads, height, stride + 1), (size, stride + 1, 1)) for x in memory]

    @property
    def weight(self) -> BlockViews:
        """a_ij in both ways."""
        return self.tiles[0], self.sheared[0]

    @property
    def free(self) -> BlockViews:
        """A block that holds nothing."""
        return self.tiles[2], self.sheared[2]

    @property
    def capped(self) -> BlockViews:
        """Gradients of the scores as the softmax gets them, behind a soft-cap, in both ways."""
        index = 1 if len(self.tiles) == self.COUNT else self.COUNT
        return self.tiles[index], self.sheared[index]
