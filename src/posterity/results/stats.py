"""Shares of a result with their standard errors, as labelled arrays: public as `posterity.stats`.

    result = posterity.load("run.nc")
    posterity.stats.shares(result, by=["layer"]).share.sel(side="other", stream="value")

A result holds sums and counts only. Every ratio is formed once, after all sums; its standard error is taken over the
windows of text (dimension `document`). Shares have units "1" and sum to one over the labels that they compare.
`by` names the dimensions that are kept, "layer" and "head" (or "kv_head", which adds up the query heads of each
key/value head); all others are summed over, so that () gives one number for the model. A `by` that the sums do not have
raises InputError. `reader_of` selects edges by their key: "all", "first" (the first keys of a document, attention
sinks) or "rest". NaN marks a head that a layer does not have, and what was not measured.
"""

from posterity.results.head_stats import MAX_ERROR as MAX_ERROR
from posterity.results.head_stats import MIN_CREDIT as MIN_CREDIT
from posterity.results.head_stats import group_shares, shares, weak_heads
from posterity.results.lag_stats import (
    attention_mean,
    attention_profile,
    counts,
    cumulative_profile,
    median_lag,
    profile,
    reader_lags,
)
from posterity.results.loss_stats import (
    angles,
    effective_horizon,
    hidden_shares,
    horizon_curve,
    loss_matrix,
    loss_parts,
    loss_shares,
    loss_shares_by_position,
    parameter_shares,
)
from posterity.results.price_stats import prices, window_prices
from posterity.results.ratios import confidence, existing_heads, has_reader_axis, mean_and_error, ratio, uncertainty
from posterity.results.reach import reach
from posterity.results.sink_stats import attention_first, first_attention, first_position, first_share
from posterity.results.uniform_attention import uniform_attention
from posterity.results.weight_stats import adapter_shares, weight_shares
from posterity.results.window_stats import HEAVY as HEAVY
from posterity.results.window_stats import balance, heavy_windows, window_norms

__all__ = [
    "adapter_shares",
    "angles",
    "attention_first",
    "attention_mean",
    "attention_profile",
    "balance",
    "confidence",
    "counts",
    "cumulative_profile",
    "effective_horizon",
    "existing_heads",
    "first_attention",
    "first_position",
    "first_share",
    "group_shares",
    "has_reader_axis",
    "heavy_windows",
    "hidden_shares",
    "horizon_curve",
    "loss_matrix",
    "loss_parts",
    "loss_shares",
    "loss_shares_by_position",
    "mean_and_error",
    "median_lag",
    "parameter_shares",
    "prices",
    "profile",
    "ratio",
    "reach",
    "reader_lags",
    "shares",
    "uncertainty",
    "uniform_attention",
    "weak_heads",
    "weight_shares",
    "window_norms",
    "window_prices",
]


def __dir__() -> list[str]:
    """List the public functions, for tab completion."""
    return __all__
