"""The five numbers that a page begins with, each with what it means."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import xarray as xr

from posterity.axes import WRITTEN
from posterity.reporting.reach_chart import has_lags
from posterity.reporting.result_words import sink_number
from posterity.results import stats
from posterity.results.formatting import first_positions_text, percent, tokens_text

FIVE = 5


@dataclass(frozen=True)
class KeyNumber:
    """A number as text, with its label and one sentence on its meaning."""

    label: str
    value: str
    meaning: str


def key_numbers(result: xr.Dataset, reader_of: str) -> list[KeyNumber]:
    """Return the numbers in the order in which people ask, of the edges that `reader_of` names (see `stats`).

    Fewer of a result without lags.
    """
    lengths = list(_lengths(result, reader_of))
    later, own = _later_shares(result, reader_of), _own_share(result, reader_of)
    return [*later, *lengths[:1], _first_share(result), *own, *lengths[1:]][:FIVE]


def _later_shares(result: xr.Dataset, reader_of: str) -> Iterator[KeyNumber]:
    shares = stats.shares(result, (), reader_of).sel(side="other")
    counted = percent(1 - float(stats.counts(result, (), reader_of).isel(lag=0)))
    for stream in reversed(WRITTEN):
        yield KeyNumber(
            f"{stream}s: from later positions", _percent(result, shares.sel(stream=stream)),
            f"of their credit arrives over edges from later queries; by counting edges alone, {counted}",
        )  # fmt: skip


def _lengths(result: xr.Dataset, reader_of: str) -> Iterator[KeyNumber]:
    median = float(stats.median_lag(stats.profile(result, (), reader_of).share).sel(stream="value"))
    if math.isnan(median):
        return
    counted = float(stats.median_lag(stats.counts(result, (), reader_of)))
    baseline = "" if math.isnan(counted) else f"; by counting edges alone, {tokens_text(counted)}"
    yield KeyNumber("values: half within", tokens_text(median), f"the median lag of their credit{baseline}")
    if has_lags(result) and reader_of != "first":
        reach = stats.reach(result, (), (0.9,), reader_of).sel(quantity="value credit", level=0.9)
        yield KeyNumber("values: nine tenths within", tokens_text(float(reach.lag)), "the lag that holds 90 % of it")


def _first_share(result: xr.Dataset) -> KeyNumber:
    sinks = sink_number(result)
    first = stats.first_share(result) if sinks else stats.first_position(result)
    attention = percent(float(stats.attention_first(result)))
    return KeyNumber(
        f"values: at {first_positions_text(sinks or 1)}", _percent(result, first.sel(stream="value")),
        f"of all their credit: a sink, if it is much. The very first key gets {attention} of the attention",
    )  # fmt: skip


def _own_share(result: xr.Dataset, reader_of: str) -> Iterator[KeyNumber]:
    if "loss_credit" in result:
        own = stats.loss_shares(result, (), reader_of).sel(written="value", part="own")
        yield KeyNumber(
            "values: paid by the own loss", _percent(result, own),
            "of their credit is sent by the loss at the same position, the rest by losses at later tokens",
        )  # fmt: skip


def _percent(result: xr.Dataset, share: xr.Dataset) -> str:
    return percent(float(share.share), float(share.error), result.sizes["document"])
