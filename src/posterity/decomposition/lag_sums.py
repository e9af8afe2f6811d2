"""Sums over all edges by lag: credit, mass and attention, from one block of scores at a time.

A block needs five products: scores, their gradients, and one for the credit of each stream. Its sums along the
diagonals, one per lag, take no loop: the block lies in memory with rows of `stride` numbers, zero before its columns;
read with rows of `stride + 1` numbers, every column of what is read is one diagonal.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch
from jaxtyping import Float
from torch import Tensor

from posterity.axes import STREAMS
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

# The sums of an edge lie in one tensor, in the order credit of (query, key, value), mass of the same, attention.
_MASS = len(STREAMS)
_ATTENTION = 2 * len(STREAMS)
SUMS = _ATTENTION + 1

HeadGroup = tuple[int, slice]  # a document and a few of its heads
Job = tuple[HeadGroup, list[Tile]]


@dataclass(frozen=True)
class LagSums:
    """Credit and mass of each stream's terms, and attention, summed over all edges of each lag, in float64.

    Attention counts readers only (`Mask.readers`).
    """

    credit: Float[Tensor, "stream batch head lag"]
    mass: Float[Tensor, "stream batch head lag"]
    attention: Float[Tensor, "batch head lag"]

    @classmethod
    def of(cls, sums: Float[Tensor, "sum batch head lag"], back: Backward) -> "LagSums":
        """Split sums that lie in one tensor; those of ds_ij get the scale of queries and keys, all a horizon's factors.

        The sums are changed in place.
        """
        credit, mass = sums[:_MASS], sums[_MASS:_ATTENTION]
        for terms in (credit, mass):
            terms[:2] *= back.scale
            for stream, factor in ((1, back.key_factor), (2, back.value_factor)):
                if factor is not None:
                    terms[stream] *= factor
        return cls(credit, mass, sums[_ATTENTION])


def sum_by_lag(
    back: Backward, scratch: "Scratch | None" = None, left_out: Sequence[Sequence[slice]] | None = None
) -> LagSums:
    """Sweep all blocks of one backward pass; memory is O(heads N + d N + block^2).

    Args:
        back: A backward pass.
        scratch: Keeps the memory of the blocks between calls.
        left_out: Keys whose edges are not counted, for each document of the batch.
    """
    left_out = [()] * len(back.lse) if left_out is None else left_out
    scratch = Scratch() if scratch is None else scratch
    batch, heads, length = back.lse.shape
    device = back.lse.device
    tiles = [tile for _, row in back.mask.tiles(length, length, device) for tile in row]
    tiles.sort(key=lambda tile: tile.shape)
    if not tiles:
        return LagSums.of(torch.zeros(SUMS, batch, heads, length, dtype=torch.float64, device=device), back)
    height, width = (max(sizes) for sizes in zip(*(tile.shape for tile in tiles), strict=True))
    # The largest lag first, as in the blocks: index `length - lag`. Beyond lag 0 there is room
    # for the masked entries (key after query) of blocks on the diagonal.
    diagonals = 1 + length + height + width
    sums = torch.zeros(SUMS, batch, heads, diagonals, dtype=torch.float64, device=device)
    threads = min(len(tiles), torch.get_num_threads() if device.type == "cpu" else 1)
    budget = _SCRATCH_BYTES.get(device.type, _SCRATCH_LARGE)
    size = max(1, int(budget / (_Blocks.COUNT * height * (height + width) * back.lse.element_size())))
    head_chunks = [
        (document, slice(first, min(first + size, heads)))
        for document in range(batch)
        for first in range(0, heads, size)
    ]
    jobs = _jobs(head_chunks, tiles, threads)
    back.total_gradients()  # computed once, before the threads start
    with _thread_map(threads) as thread_map:
        for results in thread_map(partial(_run_jobs, back, diagonals, left_out), jobs, scratch.parts(threads)):
            for (document, group), x in results:
                sums[:, document, group] += x
    return LagSums.of(sums[..., 1 : length + 1].flip(-1), back)


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
    back: Backward, diagonals: int, left_out: Sequence[Sequence[slice]], jobs: list[Job], scratch: "Scratch"
) -> list[tuple[HeadGroup, Float[Tensor, "sum head diagonal"]]]:
    """Sum some blocks of some heads, one after the other: the work of one thread."""
    return [
        (group, _sum_tiles(back, _Operands(back, *group, left_out[group[0]]), diagonals, tiles, scratch))
        for group, tiles in jobs
    ]


def _sum_tiles(
    back: Backward, operands: "_Operands", diagonals: int, tiles: list[Tile], scratch: "Scratch"
) -> Float[Tensor, "sum head diagonal"]:
    """Sum some blocks along their diagonals, for a few heads of one document."""
    length = operands.query.shape[1]
    sums = torch.zeros(SUMS, len(operands.query), diagonals, dtype=torch.float64, device=operands.query.device)
    for shape, group in groupby(tiles, lambda tile: tile.shape):
        blocks = scratch.blocks(len(operands.query), *shape, operands.query)
        weight, score, credit = blocks.tiles
        sheared_weight, sheared_score, sheared_credit = blocks.sheared
        by_diagonal = blocks.sums
        for tile in group:
            i, j = (slice(None), tile.rows), (slice(None), tile.columns)
            rows = operands.query[i], operands.grad[i], operands.lse[i], operands.delta[i]
            bias = None if back.bias is None else operands.select(bias_block(back.bias, tile))
            write_edges_(weight, score, rows, (operands.key[j], operands.value[j]), back, bias)
            back.mask.fill_(weight, tile, 0.0, operands.document, operands.heads)
            operands.leave_out_(weight, tile)
            score.mul_(weight)
            for stream, (left, right, edge) in enumerate(
                (
                    (operands.grad_query, operands.key, score),
                    (operands.query, operands.grad_key, score),
                    (operands.grad, operands.grad_value, weight),
                )
            ):
                torch.bmm(left[i], right[j].mT, out=credit)
                credit.mul_(edge)
                torch.sum(sheared_credit, 1, out=by_diagonal[stream])
            score.abs_()
            torch.bmm(operands.query_norm[..., tile.rows], sheared_score, out=by_diagonal[_MASS + 1, :, None])
            score.mul_(operands.key_norm[..., tile.columns])
            torch.sum(sheared_score, 1, out=by_diagonal[_MASS])
            # mass of the values and attention in one product
            torch.bmm(operands.readers[..., tile.rows], sheared_weight, out=by_diagonal[_MASS + 2 :].transpose(0, 1))
            first = length - tile.lag - shape[0]
            sums[..., first : first + by_diagonal.shape[-1]] += by_diagonal
    return sums


def write_edges_(
    weight: Float[Tensor, "head rows columns"],
    score: Float[Tensor, "head rows columns"],
    rows: tuple[Tensor, Tensor, Tensor, Tensor],
    columns: tuple[Tensor, Tensor],
    back: Backward,
    bias: Float[Tensor, "#head #rows #columns"] | None,
) -> None:
    """Write a_ij and slope (do_i.v_j - D_i) of a block, the mask left aside: a_ij times the second is ds_ij.

    `rows` are q, do, lse and D of the queries, the last two with a width of 1; `columns` are k and v.
    """
    query, grad, lse, delta = rows
    key, value = columns
    torch.baddbmm(delta.expand_as(score), grad, value.mT, beta=-1, out=score)
    # Powers of 2: exp takes three times longer, and thirty times where it underflows.
    if back.softcap is None:
        torch.baddbmm(lse.expand_as(weight), query, key.mT, beta=-_LOG2_E, alpha=back.scale * _LOG2_E, out=weight)
    else:
        torch.baddbmm(weight, query, key.mT, beta=0, alpha=back.scale / back.softcap, out=weight).tanh_()
        score.mul_(1 - weight * weight)
        weight.mul_(back.softcap * _LOG2_E).sub_(lse, alpha=_LOG2_E)
    if bias is not None:
        weight.add_(bias, alpha=_LOG2_E)
    weight.exp2_()


class _Operands:
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
        self.document, self.heads, self.left_out = document, heads, left_out

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
        self._by_shape: dict[tuple, _Blocks] = {}
        self._parts: list[Scratch] = []

    def parts(self, threads: int) -> list["Scratch"]:
        """Return one scratch for each thread."""
        self._parts += [Scratch() for _ in range(threads - len(self._parts))]
        return self._parts[:threads]

    def blocks(self, heads: int, height: int, width: int, like: Tensor) -> "_Blocks":
        """Return the blocks of one shape, with the dtype and device of `like`."""
        shape = (heads, height, width, like.dtype, like.device)
        if shape not in self._by_shape:
            if len(self._by_shape) == self._SHAPES:
                self._by_shape.clear()
            self._by_shape[shape] = _Blocks(heads, height, width, like)
        return self._by_shape[shape]


class _Blocks:
    """Three blocks of a few heads, each readable in two ways: `tiles` by query and key, `sheared` along its diagonals.

    Column d of `sheared` is one diagonal, the largest lag first; its row r belongs to row r of the tile. `sums` takes
    the seven sums of each diagonal.
    """

    COUNT = 3

    def __init__(self, heads: int, height: int, width: int, like: Tensor):
        stride = height + width
        size = height * (stride + 1)
        memory = [like.new_zeros(heads, size) for _ in range(self.COUNT)]
        self.tiles = [x.as_strided((heads, height, width), (size, stride, 1), height) for x in memory]
        self.sheared = [x.as_strided((heads, height, stride + 1), (size, stride + 1, 1)) for x in memory]
        self.sums = like.new_empty(SUMS, heads, stride + 1)
