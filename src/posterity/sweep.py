"""The sweep over all edges: credit, mass and attention for every lag, one block of scores at a time.

A block needs five products: scores, their gradients, and one for the credit of each stream. Its sums along the
diagonals, one per lag, take no loop: the block lies in memory with rows of `stride` numbers, zero before its columns;
read with rows of `stride + 1` numbers, every column of what is read is one diagonal.
"""

from itertools import groupby

import torch
from jaxtyping import Float
from torch import Tensor

from posterity.attention import Backward
from posterity.mask import Tile

# Scratch for the blocks of a few heads: a CPU's last cache should hold it.
_SCRATCH_BYTES = {"cpu": 24e6}
_SCRATCH_LARGE = 1e9


def sweep(back: Backward) -> Float[Tensor, "seven batch head lag"]:
    """Credit of (query, key, value), mass of (query, key, value), and attention, for each lag.

    Returns float64; memory is O(heads N + d N + block^2). Attention counts readers only (`Mask.readers`).
    """
    batch, heads, length = back.lse.shape
    device = back.lse.device
    out = torch.zeros(7, batch, heads, length, dtype=torch.float64, device=device)
    tiles = [tile for _, row in back.mask.tiles(length, length, device) for tile in row]
    tiles.sort(key=lambda tile: tile.shape)
    if not tiles:
        return out
    per_head = 6 * max(height * (height + width) for height, width in (tile.shape for tile in tiles))
    budget = _SCRATCH_BYTES.get(device.type, _SCRATCH_LARGE) / (per_head * back.lse.element_size())
    parts = min(heads, -(-heads // max(1, int(budget))))
    for document in range(batch):
        for some in torch.arange(heads).tensor_split(parts):
            _sweep_heads(back, document, slice(int(some[0]), int(some[-1]) + 1), tiles, out)
    return out


def _sweep_heads(back: Backward, document: int, heads: slice, tiles: list[Tile], out: Tensor) -> None:
    """Add the diagonals of all tiles to `out`, for a few heads of one document."""
    part = _Operands(back, document, heads)
    for shape, group in groupby(tiles, lambda tile: tile.shape):
        blocks = [_Block(len(part.query), *shape, part.query) for _ in range(6)]
        weight, score, to_query, to_key, to_value, mass = (block.tile for block in blocks)
        for tile in group:
            i, j = (slice(None), tile.rows), (slice(None), tile.columns)
            torch.bmm(part.query1[i], part.key1[j].mT, out=weight)
            torch.bmm(part.grad1[i], part.value1[j].mT, out=score)
            torch.bmm(part.grad_query[i], part.key[j].mT, out=to_query)
            torch.bmm(part.query[i], part.grad_key[j].mT, out=to_key)
            torch.bmm(part.grad[i], part.grad_value[j].mT, out=to_value)
            if back.softcap is not None:
                weight.div_(back.softcap).tanh_()
                score.mul_(1 - weight * weight)
                weight.mul_(back.softcap).sub_(part.lse[i])
            back.mask.fill_(weight.exp_(), tile, 0.0, document)
            score.mul_(weight)
            to_query.mul_(score)
            to_key.mul_(score)
            to_value.mul_(weight)
            torch.mul(score.abs_(), part.key_norm[j].mT, out=mass)
            sums = [block.diagonals() for block in blocks[2:]]
            sums += blocks[1].diagonals(part.query_norm[i].mT), blocks[0].diagonals(part.readers[i].mT)
            first = tile.lag - shape[1]  # of the sums; those below 0 and the outermost hold nothing
            by_lag = torch.cat(sums, 1).transpose(0, 1)[..., max(0, -first) : out.shape[-1] - first]
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

        def whole(x: Tensor) -> Tensor:
            return shared(x.unflatten(1, (-1, share)).sum(2)) if share > 1 else own(x)

        self.key, value = shared(back.key), shared(back.value)
        self.query, self.grad = back.scale * own(back.query), own(back.grad_output)
        self.grad_query = back.scale * own(back.grad_query)
        self.grad_key, self.grad_value = whole(back.grad_key), whole(back.grad_value)
        self.lse = own(back.lse)[..., None]
        one = torch.ones_like(self.lse)
        delta = (self.grad * own(back.output)).sum(-1, keepdim=True)
        lse = self.lse.clamp(max=1e30) if back.softcap is None else torch.zeros_like(one)
        self.query1, self.key1 = torch.cat((self.query, -lse), -1), torch.cat((self.key, one), -1)
        self.grad1, self.value1 = torch.cat((self.grad, -delta), -1), torch.cat((value, one), -1)
        self.key_norm = back.scale * self.key.norm(dim=-1, keepdim=True)
        self.query_norm = self.query.norm(dim=-1, keepdim=True)
        readers = back.mask.readers(len(self.lse[0]))
        reader = one if readers is None else one * readers[document, :, None]
        self.readers = torch.cat((self.grad.norm(dim=-1, keepdim=True), reader), -1)


class _Block:
    """Memory of one tile of scores for a few heads, readable along its diagonals."""

    def __init__(self, heads: int, height: int, width: int, like: Tensor):
        stride = height + width
        size = height * (stride + 1)
        memory = like.new_zeros(heads, size)
        self.tile = memory.as_strided((heads, height, width), (size, stride, 1), height)
        self._sheared = memory.as_strided((heads, height, stride + 1), (size, stride + 1, 1))

    def diagonals(self, weight: Float[Tensor, "head m rows"] | None = None) -> Float[Tensor, "head m diagonal"]:
        """Sums along the diagonals, plain or with weights per row, the smallest lag (upper right corner) first."""
        sums = self._sheared.sum(1, keepdim=True) if weight is None else weight @ self._sheared
        return sums.flip(-1)
