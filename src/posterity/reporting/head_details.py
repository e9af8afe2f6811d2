"""One head at a time: its numbers, and its shares up to each lag, of every head for the reader of a page to choose."""

import base64
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from posterity.axes import STREAMS, WRITTEN
from posterity.palette import ATTENTION, SERIES
from posterity.reporting.bins import bin_middles
from posterity.reporting.panel_grid import Panel, PanelGrid
from posterity.reporting.result_group import NamedResult, ResultGroup
from posterity.reporting.result_table import LOSS_PARTS, credit_portions
from posterity.reporting.result_words import sink_number
from posterity.reporting.traces import BEHIND, PERCENT, line, log_axis
from posterity.results import stats
from posterity.results.formatting import first_positions_text, json_numbers
from posterity.results.ratios import has_fine_lags

UNKNOWN_I2 = -(2**15)
VERY_MANY = 2048  # heads from which on a page has fewer points of their curves, to stay small
CURVES = {"attention": (ATTENTION, "dot"), "query": (SERIES[3], "solid"), "key": (SERIES[2], "solid"),
          "value": (SERIES[5], "solid")}  # fmt: skip


def draw_head(group: ResultGroup) -> PanelGrid:
    """Draw the shares of one head up to each lag; a page puts in those of the head that is chosen."""
    title = "One head: its credit up to each lag"
    ends = [int(member.result.lag_end[-1]) for member in group.members if has_fine_lags(member.result)]
    if not ends:
        return PanelGrid(title, [], height=0)
    traces = [
        line(name, [0.0], [math.nan], colour, dash, hover="lag %{customdata[0]}: %{customdata[1]}",
             **(BEHIND if name == "attention" else {"mode": "lines+markers", "marker": {"size": 4.5}}))
        for name, (colour, dash) in CURVES.items()
    ]  # fmt: skip
    x = log_axis(max(ends), "self", "lag (tokens; log scale of lag + 1)")
    y = {"title": "share up to this lag", **PERCENT}
    return PanelGrid(title, [Panel("", traces, x, y)], height=240, columns=1)


def head_details(group: ResultGroup) -> list[dict[str, Any]]:
    """Return the numbers of all heads of each result, as `heads.js` reads them.

    `curves` are shares up to the last lag of each octave (`lags`, at `x` of the figure), of attention and of the three
    streams; `rows` are numbers with their errors, of the streams at the indices `streams`, with the name of the map
    whose labels show them; `weak` is 1 for the streams of a head that `stats.weak_heads` names. All are packed: (layer,
    head, number).
    """
    return [_describe(member, "" if group.single else member.name, group.readers) for member in group.members]


def _describe(member: NamedResult, title: str, readers: Sequence[str]) -> dict[str, Any]:
    result = member.result
    ends = _octave_ends(result)
    last = result.lag_end.values[ends]
    weak = stats.weak_heads(result, readers[0])
    share = stats.shares(result, ("layer", "head"), readers[0]).share.sel(side="self", stream="value")
    strong = share.where(~weak.sel(stream="value")).fillna(-math.inf).values
    begin = np.unravel_index(int(strong.argmax()), strong.shape)
    missing = ~stats.existing_heads(result).values
    return {
        "title": title,
        "layers": result.sizes["layer"],
        "heads": result.sizes["head"],
        "begin": [int(index) for index in begin],
        "marks": np.where(missing, ": no such head", "").tolist(),
        "lags": ["0" if lag == 0 else f"0–{lag}" for lag in last.tolist()],
        "x": json_numbers(bin_middles(last, last), 6),
        "curves": {reader_of: _pack(_curves(result, ends, reader_of), "i2") for reader_of in readers},
        "rows": _rows(member, readers),
        "weak": {
            reader_of: _pack((stats.weak_heads(result, reader_of) & stats.existing_heads(result)).values, "u1")
            for reader_of in readers
        },
    }


def _octave_ends(result: xr.Dataset) -> np.ndarray:
    """Return the bins of lags that end an octave of lag + 1, every second one for very many heads, and the last bin.

    Lag 0 alone where no other is known.
    """
    if not has_fine_lags(result):
        return np.array([0])
    octave = np.floor(np.log2(result.lag.values + 1))
    step = 2 if result.sizes["layer"] * result.sizes["head"] > VERY_MANY else 1
    return np.append(np.flatnonzero(np.diff(octave))[::step], len(octave) - 1)


def _curves(result: xr.Dataset, ends: np.ndarray, reader_of: str) -> np.ndarray:
    """Return the shares up to each of the lags: (layer, head, 4, lag)."""
    by = ("layer", "head")
    attention = stats.attention_profile(result, by, reader_of).transpose(*by, "lag").values
    credit = stats.profile(result, by, reader_of).share.transpose(*by, "stream", "lag").values
    return np.concatenate([attention[:, :, None], credit], 2).cumsum(-1)[..., ends]


def _rows(member: NamedResult, readers: Sequence[str]) -> list[dict[str, Any]]:
    by, result = ("layer", "head"), member.result
    shares = {reader_of: stats.shares(result, by, reader_of).sel(side="self") for reader_of in readers}
    sinks = sink_number(result)
    first = stats.first_share(result, by) if sinks else stats.first_position(result, by)
    attention = stats.attention_first(result, by).expand_dims(stream=list(WRITTEN))
    portions = {reader_of: xr.Dataset({"share": credit_portions(result, reader_of)}) for reader_of in readers}
    rows = [
        _row(member, "self share", shares) | {"figure": "map"},
        _row(member, "credit (1: an equal part of its layer's)", portions) | {"figure": "map", "decimals": 2},
        _row(member, f"share of {first_positions_text(sinks or 1)}", {"all": first}),
        _row(member, "attention weight on the first key", {"all": xr.Dataset({"share": attention})}),
    ]
    if "loss_credit" in result:
        losses = {reader_of: stats.loss_shares(result, by, reader_of) for reader_of in readers}
        for part, words in LOSS_PARTS.items():
            parts = {reader_of: share.sel(part=part).rename(written="stream") for reader_of, share in losses.items()}
            rows.append(_row(member, words, parts))
    if "horizon_by_document" in result:
        lengths = {reader_of: stats.effective_horizon(result, by, reader_of) for reader_of in readers}
        row = _row(member, "effective horizon", {name: xr.Dataset({"share": x}) for name, x in lengths.items()})
        rows.append(row | {"figure": "head_horizons", "ends": [int(result.horizon[0]), int(result.horizon[-1])]})
    return rows


def _row(member: NamedResult, label: str, shares: Mapping[str, xr.Dataset]) -> dict[str, Any]:
    """Pack a row of numbers, and of their errors where they are known, by the edges that they are of."""
    values, streams = {}, []
    for reader_of, share in shares.items():
        streams = [STREAMS.index(stream) for stream in share.stream.values]
        arrays = [share.share, *([member.uncertainty(share.error)] if "error" in share else [])]
        numbers = [array.transpose("layer", "head", "stream").values for array in arrays]
        values[reader_of] = _pack(np.concatenate(numbers, -1), "f4")
    return {"label": label, "streams": streams, "values": values}


def _pack(values: np.ndarray, kind: str) -> dict[str, Any]:
    """Pack numbers (layer, head, ...) as base64.

    As "f4", single precision; as "i2", ten-thousandths up to 3.2, NaN as `UNKNOWN_I2`; or as "u1", 0 and 1.
    """
    if kind == "i2":
        values = np.where(np.isnan(values), UNKNOWN_I2, np.round(values.clip(-3.2, 3.2) * 1e4))
    packed = np.ascontiguousarray(values, dtype=f"<{kind}")
    return {"kind": kind, "numbers": math.prod(values.shape[2:]), "data": base64.b64encode(packed.tobytes()).decode()}
