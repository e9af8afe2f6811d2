"""Attention forward, and backward with the factors of a horizon by lag, for blocks that a table lists.

The formulas stand at the top of ops/attention.py. The passes are those of FlashAttention-2 (Dao 2023, arXiv
2307.08691), with two kernels for the backward pass, one that owns rows of queries and one that owns columns of keys: so
nothing is added up by atomics, and a run repeats to the bit.
"""

import triton
import triton.language as tl

from posterity.kernels.tiles import (
    LN_2,
    LOG2_E,
    key_value_head,
    load_matrix,
    store_matrix,
    tile_edges,
    tile_scores,
    tile_weights,
)


@triton.jit
def forward_kernel(
    query, key, value, sinks, output, lse_out,
    start, other, partial, tiles, scale, softcap,
    length, heads, groups, document_stride, head_stride, rows, dim, dim_v,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
    SOFTCAP: tl.constexpr, SINKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the output and the log-sum-exp of a row of blocks; 0 and +inf where a query has no edge."""
    block, head = rows - 1 - tl.program_id(0), tl.program_id(1).to(tl.int64)  # the longest rows first
    shared = key_value_head(head, heads, groups)
    line = (head // heads * document_stride + head % heads * head_stride) * rows + block
    row = block * HEIGHT + tl.arange(0, HEIGHT)
    q = load_matrix(query + head * length * dim, row, length, dim, DIM)
    dtype: tl.constexpr = lse_out.dtype.element_ty
    maximum = tl.full((HEIGHT,), float("-inf"), dtype)
    total = tl.zeros((HEIGHT,), dtype)
    if SINKS:
        maximum = tl.load(sinks + head * length + row, mask=row < length, other=0.0).to(dtype)
        total += 1.0
    weighted = tl.zeros((HEIGHT, DIM_V), dtype)
    for entry in range(tl.load(start + line), tl.load(start + line + 1)):
        column = tl.load(other + entry) * WIDTH + tl.arange(0, WIDTH)
        k = load_matrix(key + shared * length * dim, column, length, dim, DIM)
        v = load_matrix(value + shared * length * dim_v, column, length, dim_v, DIM_V)
        score, _ = tile_scores(q, k, scale, softcap, SOFTCAP, PRECISION)
        edges = tile_edges(tiles, tl.load(partial + entry), HEIGHT, WIDTH)
        score = tl.where(edges, score * LOG2_E, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(score, 1) * LN_2)
        base = tl.where(new_maximum == float("-inf"), 0.0, new_maximum) * LOG2_E
        weight = tl.exp2(score - base[:, None])
        shrink = tl.exp2(maximum * LOG2_E - base)
        total = total * shrink + tl.sum(weight, 1)
        weighted = weighted * shrink[:, None] + tl.dot(weight.to(v.dtype), v, input_precision=PRECISION)
        maximum = new_maximum
    empty = total == 0.0
    weighted = weighted / tl.where(empty, 1.0, total)[:, None]
    store_matrix(output + head * length * dim_v, row, length, dim_v, weighted, DIM_V)
    lse = tl.where(empty, float("inf"), maximum + tl.log(tl.where(empty, 1.0, total)))
    tl.store(lse_out + head * length + row, lse, mask=row < length)


@triton.jit
def query_kernel(
    grad_output, query, key, value, lse_in, delta_in, grad_query,
    start, other, partial, tiles, scale, softcap,
    length, heads, groups, document_stride, head_stride, rows, dim, dim_v,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write dq of a row of blocks."""
    block, head = rows - 1 - tl.program_id(0), tl.program_id(1).to(tl.int64)
    shared = key_value_head(head, heads, groups)
    line = (head // heads * document_stride + head % heads * head_stride) * rows + block
    row = block * HEIGHT + tl.arange(0, HEIGHT)
    q = load_matrix(query + head * length * dim, row, length, dim, DIM)
    grad = load_matrix(grad_output + head * length * dim_v, row, length, dim_v, DIM_V)
    lse = tl.load(lse_in + head * length + row, mask=row < length, other=float("inf"))
    delta = tl.load(delta_in + head * length + row, mask=row < length, other=0.0)
    total = tl.zeros((HEIGHT, DIM), lse.dtype)
    for entry in range(tl.load(start + line), tl.load(start + line + 1)):
        column = tl.load(other + entry) * WIDTH + tl.arange(0, WIDTH)
        k = load_matrix(key + shared * length * dim, column, length, dim, DIM)
        v = load_matrix(value + shared * length * dim_v, column, length, dim_v, DIM_V)
        number = tl.load(partial + entry)
        weight, slope = tile_weights(
            q, k, lse, scale, softcap, tiles, number, HEIGHT, WIDTH, SOFTCAP, PRECISION
        )  # fmt: skip
        grad_score = tl.dot(grad, tl.trans(v), input_precision=PRECISION) - delta[:, None]
        grad_score = weight * grad_score * slope
        total += tl.dot(grad_score.to(k.dtype), k, input_precision=PRECISION)
    store_matrix(grad_query + head * length * dim, row, length, dim, total * scale, DIM)


@triton.jit
def key_value_kernel(
    grad_output, query, key, value, lse_in, delta_in, grad_key, grad_value, key_factor, value_factor,
    start, other, partial, tiles, scale, softcap,
    length, heads, groups, document_stride, head_stride, columns, dim, dim_v,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
    SOFTCAP: tl.constexpr, KEY_FACTOR: tl.constexpr, VALUE_FACTOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write a query head's own dk and dv of a column of blocks, under the factors of a horizon."""
    block, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    shared = key_value_head(head, heads, groups)
    line = (head // heads * document_stride + head % heads * head_stride) * columns + block
    column = block * WIDTH + tl.arange(0, WIDTH)
    k = load_matrix(key + shared * length * dim, column, length, dim, DIM)
    v = load_matrix(value + shared * length * dim_v, column, length, dim_v, DIM_V)
    dtype: tl.constexpr = lse_in.dtype.element_ty
    total_key = tl.zeros((WIDTH, DIM), dtype)
    total_value = tl.zeros((WIDTH, DIM_V), dtype)
    for entry in range(tl.load(start + line), tl.load(start + line + 1)):
        row = tl.load(other + entry) * HEIGHT + tl.arange(0, HEIGHT)
        q = load_matrix(query + head * length * dim, row, length, dim, DIM)
        grad = load_matrix(grad_output + head * length * dim_v, row, length, dim_v, DIM_V)
        lse = tl.load(lse_in + head * length + row, mask=row < length, other=float("inf"))
        delta = tl.load(delta_in + head * length + row, mask=row < length, other=0.0)
        number = tl.load(partial + entry)
        weight, slope = tile_weights(
            q, k, lse, scale, softcap, tiles, number, HEIGHT, WIDTH, SOFTCAP, PRECISION
        )  # fmt: skip
        grad_score = tl.dot(grad, tl.trans(v), input_precision=PRECISION) - delta[:, None]
        grad_score = weight * grad_score * slope
        lag = tl.maximum(row[:, None] - column[None, :], 0)
        inside = lag < length
        if VALUE_FACTOR:
            weight *= tl.load(value_factor + lag, mask=inside, other=0.0)
        if KEY_FACTOR:
            grad_score *= tl.load(key_factor + lag, mask=inside, other=0.0)
        total_value += tl.dot(tl.trans(weight.to(grad.dtype)), grad, input_precision=PRECISION)
        total_key += tl.dot(tl.trans(grad_score.to(q.dtype)), q, input_precision=PRECISION)
    store_matrix(grad_key + head * length * dim, column, length, dim, total_key * scale, DIM)
    store_matrix(grad_value + head * length * dim_v, column, length, dim_v, total_value, DIM_V)
