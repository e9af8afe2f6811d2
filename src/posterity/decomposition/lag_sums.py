"""The sweep over all edges: credit, mass and attention for every lag, one block of scores at a time.

A block needs five products: scores, their gradients, and one for the credit of each stream. Its sums along the
diagonals, one per lag, take no loop: the block lies in memory with rows of `stride` numbers, zero before its columns;
read with rows of `stride + 1` numbers, every column of what is read is one diagonal.
"""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import groupby

import torch
from jaxtyping import Float
from torch import Tensor

from posterity.ops.attention import Backward, bias_block, dot
from posterity.ops.mask import Tile

# Scratch for the blocks of a few heads. On a CPU a thread's part should nearly fit its own cache, which other cores
# do not share: the passes over a block are slow beyond it.
_SCRATCH_BYTES = {"cpu": 2.5e6}  # for each thread
_SCRATCH_LARGE = 256e6
_LOG2_E = math.log2(math.e)


def sweep(back: Backward, scratch: "Scratch | None" = None) -> Float[Tensor, "seven batch head lag"]:
    """Credit of (query, key, value), mass of (query, key, value), and attention, for each lag.

    Returns float64; memory is O(heads N + d N + block^2). Attention counts readers only (`Mask.readers`).
    `scratch` keeps the memory of the blocks between calls.
    """
    scratch = Scratch() if scratch is None else scratch
    batch, heads, length = back.lse.shape
    device = back.lse.device
    tiles = [tile for _, row in back.mask.tiles(length, length, device) for tile in row]
    tiles.sort(key=lambda tile: tile.shape)
    if not tiles:
        return torch.zeros(7, batch, heads, length, dtype=torch.float64, device=device)
    height, width = (max(sizes) for sizes in zip(*(tile.shape for tile in tiles), strict=True))
    # The largest lag first, as in the blocks: index `length - lag`. Beyond lag 0: what blocks hold of key > query.
    sums = torch.zeros(7, batch, heads, 1 + length + height + width, dtype=torch.float64, device=device)
    threads = min(len(tiles), torch.get_num_threads() if device.type == "cpu" else 1)
    budget = _SCRATCH_BYTES.get(device.type, _SCRATCH_LARGE)
    some = max(1, int(budget / (_Blocks.COUNT * height * (height + width) * back.lse.element_size())))
    groups = [(one, slice(at, min(at + some, heads))) for one in range(batch) for at in range(0, heads, some)]
    left = len(groups) % threads  # of these every thread takes a part of the blocks, of the others one takes all
    jobs = [(group, tiles) for group in groups[: len(groups) - left]]
    jobs += [(group, tiles[at::threads]) for group in groups[len(groups) - left :] for at in range(threads)]
    run = partial(_run, back, 1 + length + height + width)
    back.wholes  # noqa: B018  (computed here once, and not in each thread)
    with _working(threads) as each:
        for found in each(run, [jobs[at::threads] for at in range(threads)], scratch.parts(threads)):
            for (document, part), x in found:
                sums[:, document, part] += x
    by_lag = sums[..., 1 : length + 1].flip(-1)
    by_lag[:2] *= back.scale  # so far of ds_ij, without the scale of the scores
    by_lag[3:5] *= back.scale
    return by_lag


def edges_(
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


@contextmanager
def _working(threads: int) -> Iterator[Callable]:
    """`map` over so many threads, in each of which operators have one: blocks are too small to share each operator."""
    if threads == 1:
        yield map
        return
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool.map
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def _run(
    back: Backward, width: int, jobs: list[tuple[tuple[int, slice], list[Tile]]], scratch: "Scratch"
) -> list[tuple[tuple[int, slice], Float[Tensor, "seven head width"]]]:
    """What one thread does: some blocks of some heads of a document, one after the other."""
    return [(group, _sweep_tiles(back, _Operands(back, *group), width, tiles, scratch)) for group, tiles in jobs]


def _sweep_tiles(
    back: Backward, part: "_Operands", width: int, tiles: list[Tile], scratch: "Scratch"
) -> Float[Tensor, "seven head width"]:
    """The sums along the diagonals of some tiles, for a few heads of one document."""
    length = part.query.shape[1]
    sums = torch.zeros(7, len(part.query), width, dtype=torch.float64, device=part.query.device)
    for shape, group in groupby(tiles, lambda tile: tile.shape):
        blocks = scratch.blocks(len(part.query), *shape, part.query)
        weight, score, credit = blocks.tiles
        sheared_weight, sheared_score, sheared_credit = blocks.sheared
        diagonals = blocks.diagonals
        for tile in group:
            i, j = (slice(None), tile.rows), (slice(None), tile.columns)
            rows = part.query[i], part.grad[i], part.lse[i], part.delta[i]
            bias = None if back.bias is None else part.bias(bias_block(back.bias, tile))
            edges_(weight, score, rows, (part.key[j], part.value[j]), back, bias)
            back.mask.fill_(weight, tile, 0.0, part.document, part.heads)
            score.mul_(weight)
            for stream, (left, right, factor) in enumerate(
                (
                    (part.grad_query, part.key, score),
                    (part.query, part.grad_key, score),
                    (part.grad, part.grad_value, weight),
                )
            ):
                torch.bmm(left[i], right[j].mT, out=credit)
                credit.mul_(factor)
                torch.sum(sheared_credit, 1, out=diagonals[stream])
            score.abs_()
            torch.bmm(part.query_norm[..., tile.rows], sheared_score, out=diagonals[4, :, None])
            score.mul_(part.key_norm[..., tile.columns])
            torch.sum(sheared_score, 1, out=diagonals[3])
            torch.bmm(part.readers[..., tile.rows], sheared_weight, out=diagonals[5:].transpose(0, 1))
            at = length - tile.lag - shape[0]
            sums[..., at : at + diagonals.shape[-1]] += diagonals
    return sums


class _Operands:
    """The factors of the products of a few heads, each (head, position, width)."""

    def __init__(self, back: Backward, document: int, heads: slice):
        dtype, share = back.lse.dtype, back.query.shape[1] // back.key.shape[1]
        groups = slice(heads.start // share, (heads.stop - 1) // share + 1)
        within = slice(heads.start - groups.start * share, heads.stop - groups.start * share)

        def own(x: Tensor) -> Tensor:
            return x[document, heads].to(dtype)

        def shared(x: Tensor) -> Tensor:
            return x[document, groups].to(dtype).repeat_interleave(share, 0)[within]

        self.query, self.grad, self.lse = own(back.query), own(back.grad_output), own(back.lse)[..., None]
        self.delta = dot(self.grad, own(back.output))[..., None]
        self.key, self.value = shared(back.key), shared(back.value)
        self.grad_query, self.grad_key, self.grad_value = (own(x) for x in back.wholes)
        self.key_norm = self.key.norm(dim=-1)[:, None]
        self.query_norm = self.query.norm(dim=-1)[:, None]
        readers = back.mask.readers(self.query.shape[1])
        reader = torch.ones_like(self.delta[..., 0])
        if readers is not None:
            reader = readers[document].to(dtype).expand_as(reader)
        self.readers = torch.stack((self.grad.norm(dim=-1), reader), 1)
        self.document, self.heads = document, heads

    def bias(self, block: Tensor) -> Tensor:
        """What these heads of this document have of a bias."""
        block = block[self.document if len(block) > 1 else 0]
        return block[self.heads] if len(block) > 1 else block


class Scratch:
    """Blocks that are used again: what lies outside their columns stays zero."""

    _SHAPES = 8  # kept at once

    def __init__(self):
        self._kept: dict[tuple, _Blocks] = {}
        self._parts: list[Scratch] = []

    def parts(self, threads: int) -> list["Scratch"]:
        """Some for each thread."""
        self._parts += [Scratch() for _ in range(threads - len(self._parts))]
        return self._parts[:threads]

    def blocks(self, heads: int, height: int, width: int, like: Tensor) -> "_Blocks":
        """The blocks of one shape."""
        wanted = (heads, height, width, like.dtype, like.device)
        if wanted not in self._kept:
            if len(self._kept) == self._SHAPES:
                self._kept.clear()
            self._kept[wanted] = _Blocks(heads, height, width, like)
        return self._kept[wanted]


class _Blocks:
    """Three blocks of a few heads, each readable in two ways: `tiles` by query and key, `sheared` along its diagonals.

    Column d of `sheared` is one diagonal, the largest lag first; its row r belongs to row r of the tile. `diagonals`
    takes seven sums of each.
    """

    COUNT = 3

    def __init__(self, heads: int, height: int, width: int, like: Tensor):
        stride = height + width
        size = height * (stride + 1)
        memory = [like.new_zeros(heads, size) for _ in range(self.COUNT)]
        self.tiles = [x.as_strided((heads, height, width), (size, stride, 1), height) for x in memory]
        self.sheared = [x.as_strided((heads, height, stride + 1), (size, stride + 1, 1)) for x in memory]
        self.diagonals = like.new_empty(7, heads, stride + 1)
