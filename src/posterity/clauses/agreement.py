"""How far vectors of several draws agree: |E g|² / E|g|² without bias, from inner products of different draws.

It is 1 if all draws are alike and 0 if they have nothing in common. Sums over positions and heads are formed before the
division. The draws are futures (clause 9) or pasts (clause 10).
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from posterity.decomposition.accumulator import stack_layers
from posterity.results.stats import ratio

HALF = 0.5  # of the squared gradient: with more in common, one draw tells most of what all tell together


def pooled_ratio(part: np.ndarray, total: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the ratio of two sums over documents (the first axis), and its standard error."""
    dims = ["document", *(f"dim_{axis}" for axis in range(1, part.ndim))]
    with np.errstate(invalid="ignore", divide="ignore"):
        pooled = ratio(xr.DataArray(part, dims=dims), xr.DataArray(total, dims=dims))
    return pooled.share.values, pooled.error.values


def pair_means(products: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean inner product of two different draws and the mean squared norm.

    Args:
        products: Inner products of all draws with all, (..., draw, draw).
    """
    draws = products.shape[-1]
    squares = np.trace(products, axis1=-2, axis2=-1)
    return (products.sum((-2, -1)) - squares) / (draws * (draws - 1)), squares / draws


@dataclass(frozen=True)
class Agreement:
    """Inner products by segment, (document, layer, head, offset); NaN for heads that a layer does not have."""

    pairs: np.ndarray  # mean inner product between two draws
    norms: np.ndarray  # mean squared norm
    across: np.ndarray  # mean inner product with another segment; NaN for one segment

    def over(self, *axes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return agreement and its error, chance and its error, with sums over axes (the document is 0)."""
        pairs, norms, across = (np.nansum(x, axes) if axes else x for x in (self.pairs, self.norms, self.across))
        across = np.where(len(across) > 1, across, math.nan)
        return *pooled_ratio(pairs, norms), *_chance(across, norms)


def _chance(across: np.ndarray, norms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean product between two segments over the mean squared norm, and its jackknife error over segments.

    Each pair of segments is in the sum of both, so that they are not independent; without segment a the pairs' sum
    loses its own n - 1 products twice.
    """
    number = len(norms)
    with np.errstate(invalid="ignore", divide="ignore"):
        value = across.sum(0) / norms.sum(0)
        if number < 3:
            return value, np.full_like(value, math.nan)
        pairs = (number - 1) * across.sum(0) - 2 * (number - 1) * across
        leave_one_out = pairs / ((number - 1) * (number - 2)) / ((norms.sum(0) - norms) / (number - 1))
    deviations = leave_one_out - leave_one_out.mean(0)
    return value, np.sqrt((number - 1) / number * (deviations**2).sum(0))


class SegmentVectors:
    """Accumulates vectors of segments in several draws, layer by layer."""

    def __init__(self):
        """Start empty."""
        self.pairs: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.means: list[list[Tensor]] = []

    def add(self, layers: list[Tensor]) -> None:
        """Add the vectors of one segment, of each layer (draw, head, offset, dim)."""
        pairs, norms, means = [], [], []
        for x in layers:
            x = x.detach().cpu().double()
            draws, squares, total = len(x), x.square().sum((0, 3)), x.sum(0)
            pairs.append((total.square().sum(-1) - squares) / (draws * (draws - 1)))
            norms.append(squares / draws)
            means.append(total / draws)
        self.pairs.append(stack_layers(pairs, 0))
        self.norms.append(stack_layers(norms, 0))
        self.means.append(means)

    def agreement(self) -> Agreement:
        """Return the inner products of all segments."""
        across = []
        for layer in zip(*self.means, strict=True):
            means = torch.stack(layer)
            products = (means * (means.sum(0) - means)).sum(-1)
            across.append(products / (len(means) - 1 or math.nan))
        pairs, norms = torch.stack(self.pairs), torch.stack(self.norms)
        return Agreement(pairs.numpy(), norms.numpy(), stack_layers(across, 1).numpy())
