"""What predicted prices stand for in nats, and how well they predict: read off windows that were held out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from posterity.results.ratios import mean_and_error

BIN_EDGES = torch.arange(-40, 20.25, 0.25, dtype=torch.float64)  # of predicted logarithms of prices
BIN_CENTRES = (BIN_EDGES[1:] + BIN_EDGES[:-1]) / 2
ENOUGH = 30  # pairs in a bin whose mean says anything


@dataclass(frozen=True)
class Judgement:
    """How well prices are predicted on windows that were held out.

    Attributes:
        windows: Their number.
        correlation: Rank correlation of predicted and measured prices over the pairs of all layers and heads.
        cheap_ratio: Of the three quarters of the pairs whose predicted prices are lowest: sum of the prices that the
            other held-out windows say, by the sum of the measured ones; NaN for one window.
    """

    windows: int
    correlation: float
    correlation_error: float
    cheap_ratio: float
    cheap_ratio_error: float


@dataclass(frozen=True)
class Predictions:
    """Predicted and measured prices of a window, by bins of the predicted logarithm."""

    correlation: float
    count: Float[Tensor, " bin"]
    measured: Float[Tensor, " bin"]  # sums

    @classmethod
    def of(cls, predicted: Float[Tensor, " pair"], measured: Float[Tensor, " pair"]) -> "Predictions":
        """Sort pairs into bins."""
        bins = torch.bucketize(predicted, BIN_EDGES)
        sums = torch.zeros(2, len(BIN_EDGES) + 1, dtype=torch.float64)
        sums[0].index_add_(0, bins, torch.ones_like(measured))
        sums[1].index_add_(0, bins, measured)
        return cls(rank_correlation(predicted, measured), *sums)

    def cheap_ratio(self, mean: Float[Tensor, " bin"]) -> float:
        """Return what `mean` says of the sum of the cheapest three quarters, by the sum of their measured prices.

        `mean`: of each bin.
        """
        cheap = self.count.cumsum(0) <= 0.75 * self.count.sum()
        return float((mean * self.count)[cheap].sum() / self.measured[cheap].sum())


def calibrate(trials: Sequence[Predictions]) -> Float[Tensor, "two point"]:
    """Return what predicted logarithms of prices stand for, from windows that were held out.

    Of each bin of predictions with enough pairs the mean of the measured prices, made to grow with the prediction.
    Without any window predictions stand for themselves.
    """
    if not trials:
        return torch.stack((BIN_CENTRES, BIN_CENTRES))[:, [0, -1]]
    count, measured = (torch.stack([getattr(x, name) for x in trials]).sum(0)[1:-1] for name in ("count", "measured"))
    known = (count >= ENOUGH) & (measured > 0)
    if not known.any():
        return torch.stack((BIN_CENTRES, BIN_CENTRES))[:, [0, -1]]
    growing = _grow((measured / count)[known], count[known])
    return torch.stack((BIN_CENTRES[known], growing.log()))


def apply_calibration(calibration: Float[Tensor, "two point"], logs: Float[Tensor, " pair"]) -> Float[Tensor, " pair"]:
    """Return logarithms of prices that predictions stand for; beyond the points they grow as the predictions do."""
    predictions, prices = calibration.to(logs)
    if len(predictions) == 1:
        return logs - predictions[0] + prices[0]
    inner = logs.clamp(predictions[0], predictions[-1])
    right = torch.bucketize(inner, predictions).clamp(1, len(predictions) - 1)
    left = right - 1
    slope = (prices[right] - prices[left]) / (predictions[right] - predictions[left])
    return prices[left] + slope * (inner - predictions[left]) + (logs - inner)


def _grow(values: Float[Tensor, " bin"], weights: Float[Tensor, " bin"]) -> Float[Tensor, " bin"]:
    """Return the growing sequence nearest to a sequence, by weighted squares (pool adjacent violators)."""
    pools: list[list[float]] = []  # mean, weight, length
    for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
        pools.append([value, weight, 1])
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (mean, heavy, length), (other, light, more) = pools[-2], pools.pop()
            pools[-1] = [(mean * heavy + other * light) / (heavy + light), heavy + light, length + more]
    return torch.tensor([mean for mean, _, length in pools for _ in range(int(length))], dtype=torch.float64)


def judge_predictions(trials: Sequence[Predictions]) -> Judgement | None:
    """Return how well prices are predicted; each window by what the others say of its bins."""
    if not trials:
        return None
    ratios = []
    for trial in trials:
        others = calibrate([other for other in trials if other is not trial])
        mean = torch.zeros_like(trial.count)
        mean[1:-1] = apply_calibration(others, BIN_CENTRES).exp()
        ratios.append(trial.cheap_ratio(mean) if len(trials) > 1 else math.nan)
    means, errors = mean_and_error([(trial.correlation, ratio) for trial, ratio in zip(trials, ratios, strict=True)])
    return Judgement(len(trials), float(means[0]), float(errors[0]), float(means[1]), float(errors[1]))


def rank_correlation(x: Float[Tensor, " pair"], y: Float[Tensor, " pair"]) -> float:
    """Return Spearman's rank correlation; equal numbers have the mean of their ranks."""
    return float(np.corrcoef(_ranks(x.numpy()), _ranks(y.numpy()))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return (last - (counts - 1) / 2)[inverse]
