"""What uniform attention through all layers gives by position: a baseline beside counting the edges of one layer.

Without weights that tell positions apart, attention is the Cesaro matrix M_ij = 1/(i + 1) for j <= i, and a layer with
its residual stream mixes positions by R = (1 - mix) 1 + mix M. Gradients of the losses at the top are independent and
equally large at all positions. Below L layers the gradient at position i is then a sum over t of (R^L)_ti times that of
position t (arXiv 2603.10123 has the powers of R as a theory of position bias at initialization).
"""

import numpy as np
import xarray as xr

from posterity.axes import STREAMS
from posterity.results.ratios import check_result, describe

LONGEST = 1024  # tokens of a context: the powers of R are matrices
MIX = 0.5  # of attention in a layer, equal to that of its residual stream


@check_result
def uniform_attention(result: xr.Dataset) -> xr.DataArray | None:
    """Return the share of the credit that each position would have under uniform attention through all layers.

    With R^n for the n layers above, a value at j has the credit sum_t ((R^n M)_tj)^2. Queries, keys and values of
    different positions are independent: with e_i = sum_t ((R^n)_ti)^2 and i/(i + 1), the variance of v_j - o_i, a query
    has e_i i/(i + 1)^2 and a key sum_i M_ij^2 e_i i/(i + 1).

    Returns:
        Units 1, dims (stream, position); None for a context beyond 1,024 tokens, and unless every pair of positions is
        an edge.
    """
    context = int(result.position_end[-1]) + 1
    if context > LONGEST or not has_every_pair(result):
        return None
    credit = uniform_credit(result.sizes["layer"], context).sum(0)
    total = credit.sum(-1, keepdims=True)  # 0 for queries of a single token
    shares = np.divide(credit, total, out=np.full_like(credit, np.nan), where=total > 0)
    binned = np.add.reduceat(shares, result.position.values, axis=-1)
    share = xr.DataArray(binned, {"stream": list(STREAMS), "position": result.position}, ("stream", "position"))
    return describe(share, "share of the credit under uniform attention")


def uniform_credit(layers: int, context: int, mix: float = MIX) -> np.ndarray:
    """Return the expected credit of queries, keys and values by layer and position: (layer, stream, position)."""
    steps = np.arange(1, context + 1)
    mean = np.tril(np.ones((context, context))) / steps[:, None]
    step = (1 - mix) * np.eye(context) + mix * mean
    above, rows = np.eye(context), []
    for _ in range(layers):  # from the top
        energy = (above**2).sum(0) * (1 - 1 / steps)
        rows.append((energy / steps, (mean**2 * energy[:, None]).sum(0), ((above @ mean) ** 2).sum(0)))
        above = above @ step
    return np.array(rows[::-1])


def has_every_pair(result: xr.Dataset) -> bool:
    """Return whether every pair of positions is an edge: under a plain causal mask without padding."""
    readers = np.arange(int(result.position_end[-1]) + 1, 0, -1)
    edges = result.edges.sum("reader_of")
    every_pair = np.add.reduceat(readers, result.lag.values) / readers.sum()
    return bool(np.allclose(edges / edges.sum("lag"), every_pair, rtol=1e-9, atol=0))
