"""The sweep over all edges: credit, mass and attention for every lag, one block of scores at a time.

A block needs five products: scores, their gradients, and one for the credit of each stream. Its sums along the
diagonals, one per lag, take no loop: the block lies in memory with rows of `stride` numbers, zero before its columns;
read with rows of `stride + 1` numbers, every column of what is read is one diagonal.
"""

import math
from itertools import groupby

import torch
from jaxtyping import Float
from torch import Tensor

from posterity.attention import Backward, bias_block, dot
from posterity.mask import Tile

# Scratch for the blocks of a few heads: a CPU's last cache should hold it.
_SCRATCH_BYTES = {"cpu": 10e6}
_SCRATCH_LARGE = 256e6


def sweep(back: Backward, scratch: "Scratch | None" = None) -> Float[Tensor, "seven batch head lag"]:
    """Credit of (query, key, value), mass of (query, key, value), and attention, for each lag.

    Returns float64; memory is O(heads N + d N + block^2). Attention counts readers only (`Mask.readers`).
    `scratch` keeps the memory of the blocks between calls.
    """
    scratch = Scratch() if scratch is None else scratch
    batch, heads, length = back.lse.shape
    device = back.lse.device
    out = torch.zeros(7, batch, heads, length, dtype=torch.float64, device=device)
    tiles = [tile for _, row in back.mask.tiles(length, length, device) for tile in row]
    tiles.sort(key=lambda tile: tile.shape)
    if not tiles:
        return out
    per_head = _Blocks.COUNT * max(height * (height + width) for height, width in (tile.shape for tile in tiles))
    budget = _SCRATCH_BYTES.get(device.type, _SCRATCH_LARGE) / (per_head * back.lse.element_size())
    parts = min(heads, -(-heads // max(1, int(budget))))
    for document in range(batch):
        for some in torch.arange(heads).tensor_split(parts):
            _sweep_heads(back, document, slice(int(some[0]), int(some[-1]) + 1), tiles, out, scratch)
    return out


def _sweep_heads(
    back: Backward, document: int, heads: slice, tiles: list[Tile], out: Tensor, scratch: "Scratch"
) -> None:
    """Add the diagonals of all tiles to `out`, for a few heads of one document."""
    part = _Operands(back, document, heads)
    smallest = math.log(torch.finfo(back.lse.dtype).tiny)
    for shape, group in groupby(tiles, lambda tile: tile.shape):
        blocks = scratch.blocks(len(part.query), *shape, part.query)
        weight, score, credit = blocks.tiles
        sheared_weight, sheared_score, sheared_credit = blocks.sheared
        for tile in group:
            i, j = (slice(None), tile.rows), (slice(None), tile.columns)
            torch.bmm(part.query1[i], part.key1[j].mT, out=weight)
            torch.bmm(part.grad1[i], part.value1[j].mT, out=score)
            if back.softcap is not None:
                weight.div_(back.softcap).tanh_()
                score.mul_(1 - weight * weight)
                weight.mul_(back.softcap).sub_(part.lse[i])
            if back.bias is not None:
                weight.add_(part.bias(bias_block(back.bias, tile)))
            weight.clamp_(min=smallest).exp_()  # exp takes 30 times longer where it underflows
            back.mask.fill_(weight, tile, 0.0, document)
            score.mul_(weight)
            sums = []  # in the order of the result
            for left, right, factor in (
                (part.grad_query, part.key, score),
                (part.query, part.grad_key, score),
                (part.grad, part.grad_value, weight),
            ):
                torch.bmm(left[i], right[j].mT, out=credit)
                credit.mul_(factor)
                sums.append(sheared_credit.sum(1, keepdim=True))
            score.abs_()
            key_mass = part.query_norm[..., tile.rows] @ sheared_score
            score.mul_(part.key_norm[..., tile.columns])
            sums += [sheared_score.sum(1, keepdim=True), key_mass, part.readers[..., tile.rows] @ sheared_weight]
            first = tile.lag - shape[1]  # of the sums, once flipped; those below 0 hold nothing
            by_lag = torch.cat(sums, 1).transpose(0, 1).flip(-1)[..., max(0, -first) : out.shape[-1] - first]
            first = max(0, first)
            out[:, document, heads, first : first + by_lag.shape[-1]] += by_lag


class _Operands:
    """The factors of the products of a few heads, each (head, position, width).

    The scale is in the queries; lse and D = do.o ride along as one more column, so that a product subtracts them.
    """

    def __init__(self, back: Backward, document: int, heads: slice):
        dtype, share = back.lse.dtype, back.query.shape[1] // back.key.shape[1]
        groups = slice(heads.start // share, (heads.stop - 1) // share + 1)
        within = slice(heads.start - groups.start * share, heads.stop - groups.start * share)

        def own(x: Tensor) -> Tensor:
            return x[document, heads].to(dtype)

        def shared(x: Tensor) -> Tensor:
            return x[document, groups].to(dtype).repeat_interleave(share, 0)[within]

        def beside(x: Tensor, column: Tensor | float, factor: float = 1.0) -> tuple[Tensor, Tensor]:
            """`factor` x with one more column, and with zeros up to a multiple of 8 (65 numbers take longer than 72);
            and `factor` x alone, as a view."""
            width = x.shape[-1]
            made = x.new_zeros(*x.shape[:-1], width + 1 + -(width + 1) % 8)
            torch.mul(x, factor, out=made[..., :width])
            made[..., width] = column
            return made, made[..., :width]

        self.lse = own(back.lse)
        grad = own(back.grad_output)
        lse = self.lse.clamp(max=1e30) if back.softcap is None else 0.0
        self.query1, self.query = beside(own(back.query), -lse, back.scale)
        self.key1, self.key = beside(shared(back.key), 1.0)
        self.grad1, self.grad = beside(grad, -dot(grad, own(back.output)))
        self.value1, _ = beside(shared(back.value), 1.0)
        self.grad_query = back.scale * own(back.grad_query)
        self.grad_key, self.grad_value = (own(x) for x in back.wholes[1:])
        self.key_norm = back.scale * self.key.norm(dim=-1)[:, None]
        self.query_norm = self.query.norm(dim=-1)[:, None]
        readers = back.mask.readers(self.lse.shape[1])
        reader = torch.ones_like(self.lse) if readers is None else readers[document].to(dtype).expand_as(self.lse)
        self.readers = torch.stack((grad.norm(dim=-1), reader), 1)
        self.lse = self.lse[..., None]
        self._document, self._heads = document, heads

    def bias(self, block: Tensor) -> Tensor:
        """What these heads of this document have of a bias."""
        block = block[self._document if len(block) > 1 else 0]
        return block[self._heads] if len(block) > 1 else block


class Scratch:
    """Blocks that are used again: what lies outside their columns stays zero."""

    _SHAPES = 8  # kept at once

    def __init__(self):
        self._kept: dict[tuple, _Blocks] = {}

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

    Column d of `sheared` is one diagonal, the largest lag first; its row r belongs to row r of the tile.
    """

    COUNT = 3

    def __init__(self, heads: int, height: int, width: int, like: Tensor):
        stride = height + width
        size = height * (stride + 1)
        memory = [like.new_zeros(heads, size) for _ in range(self.COUNT)]
        self.tiles = [x.as_strided((heads, height, width), (size, stride, 1), height) for x in memory]
        self.sheared = [x.as_strided((heads, height, stride + 1), (size, stride + 1, 1)) for x in memory]
