"""Inner products between the pulls of continuations, and the test of the law that their mean is zero (clause 9).

A pull is the gradient of a continuation's log-likelihood at a cached key or value: see `continuations`.
"""

import math

import numpy as np

from posterity.clauses.agreement import pair_means, pooled_ratio
from posterity.clauses.continuations import Pull
from posterity.decomposition.credit import check_finite


class PullProducts:
    """Inner products and squares of the pulls of every prefix, in float64; NaN for heads that a layer does not have.

    Attributes:
        products: For each prefix, inner products of all draws with all: (layer, written, kv_head, draw, draw).
        squares: For each prefix, mean over draws: (layer, written, kv_head, position).
        text_squares: For each prefix, squared pull of the continuation after the draws: (layer, written).
    """

    def __init__(self):
        """Start empty."""
        self.products: list[np.ndarray] = []
        self.squares: list[np.ndarray] = []
        self.text_squares: list[np.ndarray] = []

    def add(self, layers: list[Pull], draws: int) -> None:
        """Add the pulls of one prefix; the first `draws` continuations are draws, any other is the text's own."""
        heads = max(x.shape[1] for pair in layers for x in pair)
        squares = np.full((len(layers), 2, heads, layers[0][0].shape[2]), math.nan)
        products = np.full((len(layers), 2, heads, draws, draws), math.nan)
        text_squares = np.full((len(layers), 2), math.nan)
        for layer, pair in enumerate(layers):
            for stream, grads in enumerate(pair):
                x = grads.detach().cpu().double().transpose(0, 1)  # head, draw, position, dim
                check_finite(x, "the gradient at cached keys and values")
                flat = x[:, :draws].flatten(2)
                products[layer, stream, : len(x)] = (flat @ flat.mT).numpy()
                squares[layer, stream, : len(x)] = x[:, :draws].square().sum(-1).mean(1).numpy()
                text_squares[layer, stream] = x[:, draws:].square().sum().item()
        self.products.append(products)
        self.squares.append(squares)
        self.text_squares.append(text_squares)

    def consensus(self) -> tuple[np.ndarray, np.ndarray]:
        """Return |mean pull|² over mean |pull|², sums over heads and positions, and its error: (layer, written)."""
        return _pooled_consensus([np.nansum(products, 2) for products in self.products])

    def model_consensus(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the consensus with sums over layers too, and its error: (written,)."""
        return _pooled_consensus([np.nansum(products, (0, 2)) for products in self.products])


def _pooled_consensus(products: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    means = [pair_means(prefix) for prefix in products]
    return pooled_ratio(*(np.stack(prefixes) for prefixes in zip(*means, strict=True)))


def mean_pull_z(products: np.ndarray) -> np.ndarray:
    """Return z of the law that the mean pull of the model's own futures is zero.

    T = sum of g_r.g_s over pairs r < s of draws of the same prefix has mean zero, for draws are independent and each
    has mean zero. For the same reason two different pairs are uncorrelated, also if they share a draw (given the shared
    one, the product is linear in one of mean zero), as are pairs of different prefixes: the variance of T is the sum of
    the mean squares of its terms, and the sum of their squares is an unbiased estimate of it.

    Args:
        products: (prefix, ..., draw, draw).
    """
    rows, columns = np.triu_indices(products.shape[-1], 1)
    pairs = products[..., rows, columns]
    with np.errstate(invalid="ignore", divide="ignore"):
        return pairs.sum((0, -1)) / np.sqrt((pairs**2).sum((0, -1)))
