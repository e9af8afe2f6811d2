"""What all Triton kernels share: a block of scores in the registers of a program, and which blocks a kernel visits.

Imports triton, which torch brings along for CUDA. Tensors are contiguous, (batch, head, position, width); a program
works on tiles of HEIGHT queries and WIDTH keys that a `BlockTable` lists.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_matrix(matrix, rows, height, width, WIDTH: tl.constexpr):
    """Return rows of a (height, width) matrix; zeros beyond it."""
    columns = tl.arange(0, WIDTH)
    inside = (rows < height)[:, None] & (columns < width)[None, :]
    return tl.load(matrix + rows.to(tl.int64)[:, None] * width + columns[None, :], mask=inside, other=0.0)


@triton.jit
def store_matrix(matrix, rows, height, width, x, WIDTH: tl.constexpr):
    """Write rows of a (height, width) matrix; what lies beyond it is left out."""
    columns = tl.arange(0, WIDTH)
    inside = (rows < height)[:, None] & (columns < width)[None, :]
    target = matrix + rows.to(tl.int64)[:, None] * width + columns[None, :]
    tl.store(target, x.to(matrix.dtype.element_ty), mask=inside)


@triton.jit
def key_value_head(head, heads, groups):
    """Return the key/value head, counted over the batch, of a query head counted over the batch."""
    return head // heads * groups + head % heads // (heads // groups)


@triton.jit
def tanh(x):
    """Return tanh, by its series near 0, where the quotient of exponentials loses digits."""
    square = x * x
    series = 62.0 / 2835.0 - square * (1382.0 / 155925.0)
    series = -17.0 / 315.0 + square * series
    series = 2.0 / 15.0 + square * series
    series = x * (1.0 + square * (-1.0 / 3.0 + square * series))
    return tl.where(tl.abs(x) < 0.25, series, 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0))


@triton.jit
def tile_weights(
    query, key, lse, scale, softcap, tiles, number,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return a_ij of a block, 0 off the edges, and the slope of the soft-cap."""
    score, slope = tile_scores(query, key, scale, softcap, SOFTCAP, PRECISION)
    weight = tl.exp2((score - lse[:, None]) * LOG2_E)
    return tl.where(tile_edges(tiles, number, HEIGHT, WIDTH), weight, 0.0), slope


@triton.jit
def tile_scores(query, key, scale, softcap, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """Return the scores of a block, and the slope of the soft-cap."""
    score = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
    if SOFTCAP:
        bent = tanh(score / softcap)
        score = softcap * bent
        slope = 1.0 - bent * bent
    else:
        slope = tl.full(score.shape, 1.0, score.dtype)
    return score, slope


@triton.jit
def tile_edges(tiles, number, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Return which pairs of a block are edges: all if it is full, which its number -1 says."""
    offsets = tl.arange(0, HEIGHT)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    partial = tl.where(number >= 0, offsets, -1) >= 0
    start = tl.maximum(number, 0).to(tl.int64) * (HEIGHT * WIDTH)
    return tl.load(tiles + start + offsets, mask=partial, other=1) != 0


def padded(width: int) -> int:
    """Return the width of a tile that holds so many numbers: a power of two, 16 at least."""
    return max(16, triton.next_power_of_2(width))
