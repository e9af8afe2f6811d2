"""Sums over the edges of blocks that a table lists: by bin of lags, and for prices.

A program recomputes a block of a_ij and ds_ij in registers and reduces it there, so that nothing of a block is written.
Programs own what they add up: `lag_kernel` some rows of blocks, for which it keeps one number for each sum and bin;
`pair_kernel` a column of keys, for all query heads of its group; `window_kernel` a row of blocks. What programs share
is added up afterwards in a fixed order, so that a run repeats to the bit. The formulas stand at the top of
decomposition/credit.py and price_sums.py. Sums within a block are in float32, over blocks in float64.
"""

import triton
import triton.language as tl

from posterity.kernels.tiles import key_value_head, load_matrix, tile_weights

SLOTS = tl.constexpr(8)  # for credit of (query, key, value), mass of the same, attention; one is free


@triton.jit
def lag_kernel(
    query, key, value, grad_output, lse_in, delta_in, grad_query, grad_key, grad_value,
    query_norm, key_norm, grad_norm, reader, counted, key_factor, value_factor,
    start, other, partial, tiles, far_end, first, bin_of, sums, scale, softcap,
    length, heads, groups, document_stride, head_stride, rows, dim, dim_v,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, BINS: tl.constexpr,
    SOFTCAP: tl.constexpr, KEY_FACTOR: tl.constexpr, VALUE_FACTOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the sums over all edges of some rows of blocks, by bin of lags; `far_end`: where near blocks begin."""
    part, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    document = head // heads
    shared = key_value_head(head, heads, groups)
    table = (document * document_stride + head % heads * head_stride) * rows
    queries, keys = head * length, shared * length
    key += keys * dim
    grad_key += keys * dim
    value += keys * dim_v
    grad_value += keys * dim_v
    totals = tl.zeros((SLOTS, BINS), tl.float64)
    dtype: tl.constexpr = lse_in.dtype.element_ty
    for block in range(part, rows, tl.num_programs(0)):
        row = block * HEIGHT + tl.arange(0, HEIGHT)
        here = row < length
        q = load_matrix(query + queries * dim, row, length, dim, DIM)
        dq = load_matrix(grad_query + queries * dim, row, length, dim, DIM)
        grad = load_matrix(grad_output + queries * dim_v, row, length, dim_v, DIM_V)
        lse = tl.load(lse_in + queries + row, mask=here, other=float("inf"))
        delta = tl.load(delta_in + queries + row, mask=here, other=0.0)
        q_norm = tl.load(query_norm + queries + row, mask=here, other=0.0)
        g_norm = tl.load(grad_norm + queries + row, mask=here, other=0.0)
        counts = tl.load(reader + document * length + row, mask=here, other=0.0)
        # Sums over keys of the bin at hand, for each row; the largest lags come first.
        current = 0
        a = tl.zeros((HEIGHT,), dtype)
        b, c, d, e, f, g = a, a, a, a, a, a
        begin, middle, end = (
            tl.load(start + table + block),
            tl.load(far_end + table + block),
            tl.load(start + table + block + 1),
        )
        for entry in range(begin, middle):  # blocks of one or two bins
            left = tl.load(other + entry) * WIDTH
            lag, weight, score, key_score, value_weight, to_query, to_key, to_value, k_norm = _edges(
                q, dq, grad, lse, delta, row, left, key, value, grad_key, grad_value, key_norm + keys,
                counted + document * length, key_factor, value_factor, tiles, tl.load(partial + entry),
                scale, softcap, length, dim, dim_v,
                HEIGHT, WIDTH, DIM, DIM_V, SOFTCAP, KEY_FACTOR, VALUE_FACTOR, PRECISION,
            )  # fmt: skip
            low = tl.load(bin_of + tl.maximum(block * HEIGHT - left - WIDTH + 1, 0))
            high = tl.load(bin_of + tl.minimum(block * HEIGHT + HEIGHT, length) - 1 - left)
            if high != current:
                totals += _bin_sums(current, a, b, c, d, e * q_norm, f * g_norm, g * counts, BINS)
                current = high
                a, b, c, d, e, f, g = a * 0, b * 0, c * 0, d * 0, e * 0, f * 0, g * 0
            border = tl.load(first + high)
            x, y, z, u, v, w, h = _row_sums(
                lag >= border, weight, score, key_score, value_weight, to_query, to_key, to_value, k_norm
            )  # fmt: skip
            a, b, c, d, e, f, g = a + x, b + y, c + z, d + u, e + v, f + w, g + h
            if low != high:
                totals += _bin_sums(current, a, b, c, d, e * q_norm, f * g_norm, g * counts, BINS)
                current = low
                a, b, c, d, e, f, g = _row_sums(
                    lag < border, weight, score, key_score, value_weight, to_query, to_key, to_value, k_norm
                )  # fmt: skip
        for entry in range(middle, end):  # blocks of many bins, near the diagonal
            left = tl.load(other + entry) * WIDTH
            lag, weight, score, key_score, value_weight, to_query, to_key, to_value, k_norm = _edges(
                q, dq, grad, lse, delta, row, left, key, value, grad_key, grad_value, key_norm + keys,
                counted + document * length, key_factor, value_factor, tiles, tl.load(partial + entry),
                scale, softcap, length, dim, dim_v,
                HEIGHT, WIDTH, DIM, DIM_V, SOFTCAP, KEY_FACTOR, VALUE_FACTOR, PRECISION,
            )  # fmt: skip
            low = tl.load(bin_of + tl.maximum(block * HEIGHT - left - WIDTH + 1, 0))
            high = tl.load(bin_of + tl.minimum(block * HEIGHT + HEIGHT, length) - 1 - left)
            for step in range(high - low + 1):
                number = high - step
                if number != current:
                    totals += _bin_sums(current, a, b, c, d, e * q_norm, f * g_norm, g * counts, BINS)
                    current = number
                    a, b, c, d, e, f, g = a * 0, b * 0, c * 0, d * 0, e * 0, f * 0, g * 0
                inside = (lag >= tl.load(first + number)) & (lag < tl.load(first + number + 1))
                x, y, z, u, v, w, h = _row_sums(
                    inside, weight, score, key_score, value_weight, to_query, to_key, to_value, k_norm
                )  # fmt: skip
                a, b, c, d, e, f, g = a + x, b + y, c + z, d + u, e + v, f + w, g + h
        totals += _bin_sums(current, a, b, c, d, e * q_norm, f * g_norm, g * counts, BINS)
    slot, bin_index = tl.arange(0, SLOTS), tl.arange(0, BINS)
    target = sums + (head * tl.num_programs(0) + part) * (SLOTS * BINS)
    tl.store(target + slot[:, None] * BINS + bin_index[None, :], totals)


@triton.jit
def _edges(
    q, dq, grad, lse, delta, row, left, key, value, grad_key, grad_value, key_norm, counted, key_factor, value_factor,
    tiles, number, scale, softcap, length, dim, dim_v,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
    SOFTCAP: tl.constexpr, KEY_FACTOR: tl.constexpr, VALUE_FACTOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return lags, a_ij and ds_ij of a block, the same under the factors of a horizon, and what credit is made of."""
    column = left + tl.arange(0, WIDTH)
    there = column < length
    k, dk = load_matrix(key, column, length, dim, DIM), load_matrix(grad_key, column, length, dim, DIM)
    v, dv = load_matrix(value, column, length, dim_v, DIM_V), load_matrix(grad_value, column, length, dim_v, DIM_V)
    k_norm = tl.load(key_norm + column, mask=there, other=0.0)
    weight, slope = tile_weights(q, k, lse, scale, softcap, tiles, number, HEIGHT, WIDTH, SOFTCAP, PRECISION)
    weight *= tl.load(counted + column, mask=there, other=0.0)[None, :]
    score = weight * (tl.dot(grad, tl.trans(v), input_precision=PRECISION) - delta[:, None]) * slope
    lag = row[:, None] - column[None, :]
    key_score, value_weight = score, weight
    if KEY_FACTOR:
        key_score = score * tl.load(key_factor + lag, mask=(lag >= 0) & (lag < length), other=0.0)
    if VALUE_FACTOR:
        value_weight = weight * tl.load(value_factor + lag, mask=(lag >= 0) & (lag < length), other=0.0)
    to_query = tl.dot(dq, tl.trans(k), input_precision=PRECISION)
    to_key = tl.dot(q, tl.trans(dk), input_precision=PRECISION)
    to_value = tl.dot(grad, tl.trans(dv), input_precision=PRECISION)
    return lag, weight, score, key_score, value_weight, to_query, to_key, to_value, k_norm


@triton.jit
def _row_sums(inside, weight, score, key_score, value_weight, to_query, to_key, to_value, k_norm):
    """Sum the pairs inside over keys: credits, then what masses and attention are made of."""
    score, key_score = tl.where(inside, score, 0.0), tl.where(inside, key_score, 0.0)
    weight, value_weight = tl.where(inside, weight, 0.0), tl.where(inside, value_weight, 0.0)
    return (
        tl.sum(score * to_query, 1),
        tl.sum(key_score * to_key, 1),
        tl.sum(value_weight * to_value, 1),
        tl.sum(tl.abs(score) * k_norm[None, :], 1),
        tl.sum(tl.abs(key_score), 1),
        tl.sum(value_weight, 1),
        tl.sum(weight, 1),
    )


@triton.jit
def _bin_sums(current, a, b, c, d, e, f, g, BINS: tl.constexpr):
    """Sum over rows; return each sum in a row of its own, in the column of a bin."""
    slot, bin_index = tl.arange(0, SLOTS), tl.arange(0, BINS)
    column = tl.where(slot == 0, tl.sum(a, 0), 0.0) + tl.where(slot == 1, tl.sum(b, 0), 0.0)
    column += tl.where(slot == 2, tl.sum(c, 0), 0.0) + tl.where(slot == 3, tl.sum(d, 0), 0.0)
    column += tl.where(slot == 4, tl.sum(e, 0), 0.0) + tl.where(slot == 5, tl.sum(f, 0), 0.0)
    column += tl.where(slot == 6, tl.sum(g, 0), 0.0)
    return tl.where(bin_index[None, :] == current, column.to(tl.float64)[:, None], 0.0)


@triton.jit
def pair_kernel(
    query, key, value, grad_output, lse_in, delta_in, counted, ends, squares,
    start, other, partial, tiles, scale, softcap,
    length, heads, groups, document_stride, head_stride, columns, dim, dim_v, segments,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, SEGMENTS: tl.constexpr,
    SOFTCAP: tl.constexpr, LARGEST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write for a column of keys the squares of what leaving out a pair costs its later readers, by segment."""
    block, shared = tl.program_id(0), tl.program_id(1).to(tl.int64)
    document, shares = shared // groups, heads // groups
    first_head = document * heads + shared % groups * shares
    column = block * WIDTH + tl.arange(0, WIDTH)
    k = load_matrix(key + shared * length * dim, column, length, dim, DIM)
    v = load_matrix(value + shared * length * dim_v, column, length, dim_v, DIM_V)
    counts = tl.load(counted + document * length + column, mask=column < length, other=0.0)
    dtype: tl.constexpr = lse_in.dtype.element_ty
    segment = tl.arange(0, SEGMENTS)
    totals = tl.zeros((SEGMENTS, WIDTH), tl.float64)
    line = document * document_stride * columns + block
    for entry in range(tl.load(start + line), tl.load(start + line + 1)):
        top = tl.load(other + entry) * HEIGHT
        row = top + tl.arange(0, HEIGHT)
        here = row < length
        number = tl.load(partial + entry)
        change = tl.zeros((HEIGHT, WIDTH), dtype)
        for share in range(shares):
            head = first_head + share
            q = load_matrix(query + head * length * dim, row, length, dim, DIM)
            grad = load_matrix(grad_output + head * length * dim_v, row, length, dim_v, DIM_V)
            lse = tl.load(lse_in + head * length + row, mask=here, other=float("inf"))
            delta = tl.load(delta_in + head * length + row, mask=here, other=0.0)
            weight, _ = tile_weights(
                q, k, lse, scale, softcap, tiles, number, HEIGHT, WIDTH, SOFTCAP, PRECISION
            )  # fmt: skip
            score = weight * (tl.dot(grad, tl.trans(v), input_precision=PRECISION) - delta[:, None])
            change += score / (1.0 - tl.minimum(weight, LARGEST))
        change = tl.where(row[:, None] == column[None, :], 0.0, change * counts[None, :])
        for number_of_segment in range(segments):
            begin, end = tl.load(ends + number_of_segment), tl.load(ends + number_of_segment + 1)
            if (begin < top + HEIGHT) & (end > top):
                inside = (row >= begin) & (row < end)
                part = tl.sum(tl.where(inside[:, None], change * change, 0.0), 0).to(tl.float64)
                totals += tl.where(segment[:, None] == number_of_segment, part[None, :], 0.0)
    target = squares + (shared * segments + segment[:, None]) * length + column[None, :]
    tl.store(target, totals, mask=(segment < segments)[:, None] & (column < length)[None, :])


@triton.jit
def window_kernel(
    query, key, value, grad_output, lse_in, delta_in, counted, beyond_weight, beyond_score,
    start, other, partial, tiles, scale, softcap,
    length, heads, groups, document_stride, head_stride, rows, dim, dim_v, octaves,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, OCTAVES: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write for a row of blocks the attention and ds_ij of each query, by octave of lags."""
    block, head = rows - 1 - tl.program_id(0), tl.program_id(1).to(tl.int64)
    document = head // heads
    shared = key_value_head(head, heads, groups)
    line = (document * document_stride + head % heads * head_stride) * rows + block
    row = block * HEIGHT + tl.arange(0, HEIGHT)
    here = row < length
    q = load_matrix(query + head * length * dim, row, length, dim, DIM)
    grad = load_matrix(grad_output + head * length * dim_v, row, length, dim_v, DIM_V)
    lse = tl.load(lse_in + head * length + row, mask=here, other=float("inf"))
    delta = tl.load(delta_in + head * length + row, mask=here, other=0.0)
    dtype: tl.constexpr = lse_in.dtype.element_ty
    octave = tl.arange(0, OCTAVES)
    weights, scores = tl.zeros((OCTAVES, HEIGHT), dtype), tl.zeros((OCTAVES, HEIGHT), dtype)
    for entry in range(tl.load(start + line), tl.load(start + line + 1)):
        left = tl.load(other + entry) * WIDTH
        column = left + tl.arange(0, WIDTH)
        k = load_matrix(key + shared * length * dim, column, length, dim, DIM)
        v = load_matrix(value + shared * length * dim_v, column, length, dim_v, DIM_V)
        weight, _ = tile_weights(
            q, k, lse, scale, softcap, tiles, tl.load(partial + entry), HEIGHT, WIDTH, SOFTCAP, PRECISION
        )  # fmt: skip
        weight *= tl.load(counted + document * length + column, mask=column < length, other=0.0)[None, :]
        score = weight * (tl.dot(grad, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        lag = row[:, None] - column[None, :]
        farthest = block * HEIGHT + HEIGHT - 1 - left
        nearest = tl.maximum(block * HEIGHT - left - WIDTH + 1, 1)
        for number in range(octaves):
            if ((1 << number) <= farthest) & ((2 << number) > nearest):
                inside = (lag >= (1 << number)) & (lag < (2 << number))
                some_weight = tl.sum(tl.where(inside, weight, 0.0), 1)
                some_score = tl.sum(tl.where(inside, score, 0.0), 1)
                weights += tl.where(octave[:, None] == number, some_weight[None, :], 0.0)
                scores += tl.where(octave[:, None] == number, some_score[None, :], 0.0)
    target = (head * octaves + octave[:, None]) * length + row[None, :]
    inside = (octave < octaves)[:, None] & here[None, :]
    tl.store(beyond_weight + target, weights, mask=inside)
    tl.store(beyond_score + target, scores, mask=inside)
