"""Plots of the credit: by head, by lag, and at the first position."""

import xarray as xr
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from posterity.axes import STREAMS
from posterity.palette import DIVERGING, EMPTY, STREAM
from posterity.plotting.canvas import (
    ATTENTION,
    COUNTED,
    axes_to_draw,
    check_choice,
    colour_map,
    draw_cells,
    draw_colour_bar,
    draw_legend,
    draw_level,
    draw_line,
    share_scale,
    show_percents,
    show_powers,
    show_whole_numbers,
)
from posterity.results import stats
from posterity.results.schema import RESULT
from posterity.results.steps import latest_step

SHARE_TICKS = (0, 0.05, 0.15, 0.3, 0.5, 0.7, 0.85, 1)  # of a scale that spreads both ends


def plot_heads(result: xr.Dataset, ax: Axes | None = None, *, stream: str = "value") -> Axes:
    """Draw the self share of every head as a map: heads across, layers upwards (`stats.shares`).

    Grey: credit too small or too uncertain (`stats.weak_heads`). Blank: a head that the layer lacks.

    Args:
        result: A result of `posterity.measure`.
        ax: Axes to draw on.
        stream: "query", "key" or "value".

    Raises:
        InputError: What came is no result; an unknown stream.
    """
    result = latest_step(RESULT.check(result))
    check_choice("stream", stream, STREAMS)
    share = stats.shares(result, ("layer", "head")).share.sel(side="self", stream=stream)
    weak = stats.weak_heads(result).sel(stream=stream)
    with axes_to_draw(ax, min(4.5, max(2.2, 1 + 0.1 * result.sizes["layer"]))) as axes:
        grid = {"edgecolors": "white", "linewidth": 0.3}
        absent = ~stats.existing_heads(result)
        draw_cells(axes, xr.ones_like(share).where(weak & ~absent), cmap=colour_map([(0, EMPTY), (1, EMPTY)]), **grid)
        cells = draw_cells(axes, share.where(~weak), cmap=colour_map(DIVERGING), norm=share_scale(), **grid)
        draw_colour_bar(axes, cells, f"self share of the {stream} credit", SHARE_TICKS)
        show_whole_numbers(axes.xaxis, axes.yaxis)
        axes.set(xlabel="head", ylabel="layer")
        if (weak & ~absent).any():
            draw_legend(axes, handles=[Patch(color=EMPTY, label="too small or too uncertain")])
    return axes


def plot_lags(result: xr.Dataset, ax: Axes | None = None) -> Axes:
    """Draw the share of the credit within a lag, for each stream (`stats.cumulative_profile`).

    Beside it the share of the edges, which is what counting predicts, and that of the attention weights.

    Args:
        result: A result of `posterity.measure`.
        ax: Axes to draw on.

    Raises:
        InputError: What came is no result.
    """
    result = latest_step(RESULT.check(result))
    profile = stats.cumulative_profile(result)
    with axes_to_draw(ax, 2.4) as axes:
        for level in (0.5, 0.9):
            draw_level(axes, level)
        lag = profile.lag_end.values
        for stream, colour in STREAM.items():
            credit = profile.sel(stream=stream)
            draw_line(axes, lag, credit.share, credit.error, colour, f"{stream} credit")
        axes.plot(lag, profile.attention, label="attention", **ATTENTION)
        axes.plot(lag, profile.counted, label="edges, counted", **COUNTED)
        show_powers(axes, int(lag[-1]))
        show_percents(axes.yaxis)
        axes.set(xlabel="lag (tokens)", ylabel="share within this lag")
        draw_legend(axes)
    return axes


def plot_sinks(result: xr.Dataset, ax: Axes | None = None) -> Axes:
    """Draw the share of each layer's credit at position 0, and the mean attention weight on it.

    The numbers of `stats.first_position` and `stats.attention_first`.

    Args:
        result: A result of `posterity.measure`.
        ax: Axes to draw on.

    Raises:
        InputError: What came is no result.
    """
    result = latest_step(RESULT.check(result))
    shares, attention = stats.first_position(result, ("layer",)), stats.attention_first(result, ("layer",))
    with axes_to_draw(ax, 2.2) as axes:
        draw_level(axes, 0)
        for stream in ("key", "value"):  # the credit of queries is at the position that reads
            credit = shares.sel(stream=stream)
            draw_line(axes, shares.layer, credit.share, credit.error, STREAM[stream], f"{stream} credit", marker="o")
        axes.plot(attention.layer, attention, label="mean attention weight", **ATTENTION)
        show_whole_numbers(axes.xaxis)
        show_percents(axes.yaxis)
        axes.set(xlabel="layer", ylabel="share at position 0")
        draw_legend(axes)
    return axes
