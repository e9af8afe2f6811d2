"""The five numbers that a page begins with, each with what it means."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import xarray as xr

from posterity.axes import WRITTEN
from posterity.results import stats
from posterity.results.formatting import percent, tokens_text


@dataclass(frozen=True)
class KeyNumber:
    """A number as text, with its label and one sentence on its meaning."""

    label: str
    value: str
    meaning: str


def key_numbers(result: xr.Dataset) -> list[KeyNumber]:
    """Return the numbers in the order in which people ask."""
    return [*_later_shares(result), *_lengths(result), _first_share(result), *_own_share(result)][:5]


def _later_shares(result: xr.Dataset) -> Iterator[KeyNumber]:
    shares = stats.shares(result).sel(side="other")
    counted = percent(1 - float(stats.counts(result).isel(lag=0)))
    for stream in reversed(WRITTEN):
        share = shares.sel(stream=stream)
        yield KeyNumber(
            f"{stream}s, from later positions", percent(float(share.share), float(share.error)),
            f"of the gradient of the {stream}s arrives from queries at later positions; if every edge brought the "
            f"same, {counted} would",
        )  # fmt: skip


def _lengths(result: xr.Dataset) -> Iterator[KeyNumber]:
    median = float(stats.median_lag(stats.profile(result).share).sel(stream="value"))
    counted = float(stats.median_lag(stats.counts(result)))
    baseline = "" if math.isnan(counted) else f"; by counting edges, {tokens_text(counted)}"
    yield KeyNumber(
        "half of it within", tokens_text(median), f"of distance: the median lag of the values' credit{baseline}"
    )


def _first_share(result: xr.Dataset) -> KeyNumber:
    first = stats.first_position(result).sel(stream="value")
    attention = percent(float(stats.attention_first(result)))
    return KeyNumber(
        "at the first position", percent(float(first.share), float(first.error)),
        f"of the values' credit lies there, a sink if it is much; it gets {attention} of the attention",
    )  # fmt: skip


def _own_share(result: xr.Dataset) -> Iterator[KeyNumber]:
    if "loss_credit" in result:
        own = stats.loss_shares(result).sel(written="value", part="own")
        yield KeyNumber(
            "paid by the own loss", percent(float(own.share), float(own.error)),
            "of the values' credit is sent by the loss at the same position; the rest by losses at later tokens",
        )  # fmt: skip
