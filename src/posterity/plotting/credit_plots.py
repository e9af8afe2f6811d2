"""Plots of the credit: by head, by lag, and at the first positions."""

import xarray as xr
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from posterity.axes import STREAMS, WRITTEN
from posterity.palette import DIVERGING, EMPTY, SHARE_TICKS, STREAM
from posterity.plotting.canvas import (
    ATTENTION,
    BASELINE,
    COUNTED,
    axes_to_draw,
    check_choice,
    choose_readers,
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
from posterity.results.formatting import first_positions_text, percent
from posterity.results.ratios import require_lags
from posterity.results.schema import RESULT
from posterity.results.steps import latest_step


def plot_heads(
    result: xr.Dataset, ax: Axes | None = None, *, stream: str = "value", reader_of: str | None = None
) -> Axes:
    """Draw the self share of every head as a map: heads across, layers upwards (`stats.shares`).

    Grey: credit too small or too uncertain (`stats.weak_heads`). Blank: a head that the layer lacks. The scale of
    colours is that of the report's map; a mark on it is the share that counting edges alone would give.

    Args:
        result: A result of `posterity.measure`.
        ax: Axes to draw on.
        stream: "query", "key" or "value".
        reader_of: "all", "first" or "rest": edges by their key. By default "rest", where the result tells them apart.

    Raises:
        InputError: What came is no result; an unknown stream; a result that does not tell first keys apart.
    """
    result = latest_step(RESULT.check(result))
    check_choice("stream", stream, STREAMS)
    reader_of, words = choose_readers(result, reader_of)
    shares = stats.shares(result, ("layer", "head"), reader_of).sel(side="self", stream=stream)
    weak = stats.weak_heads(result, reader_of).sel(stream=stream) | (shares.error > stats.MAX_ERROR)
    with axes_to_draw(ax, min(4.5, max(2.2, 1 + 0.1 * result.sizes["layer"]))) as axes:
        grid = {"edgecolors": "white", "linewidth": 0.3}
        grey = xr.ones_like(shares.share).where(weak & stats.existing_heads(result))
        draw_cells(axes, grey, cmap=colour_map([(0, EMPTY), (1, EMPTY)]), **grid)
        cells = draw_cells(axes, shares.share.where(~weak), cmap=colour_map(DIVERGING), norm=share_scale(), **grid)
        counted = float(stats.counts(result, (), reader_of).isel(lag=0))
        draw_colour_bar(axes, cells, f"self share of the {stream} credit", sorted(SHARE_TICKS), counted)
        show_whole_numbers(axes.xaxis, axes.yaxis)
        axes.set(xlabel=f"head{words}", ylabel="layer")
        handles: list[Artist] = [Line2D([], [], label=f"edges, counted: {percent(counted)}", **BASELINE)]
        if grey.notnull().any():
            handles.append(Patch(color=EMPTY, label="too small or too uncertain"))
        draw_legend(axes, 1, handles=handles)
    return axes


def plot_lags(result: xr.Dataset, ax: Axes | None = None, *, reader_of: str | None = None) -> Axes:
    """Draw the share of the credit within a lag, for each stream (`stats.cumulative_profile`).

    Beside it the share of the edges, which is what counting predicts, and that of the attention weights. Thin lines
    mark 50 and 90 %.

    Args:
        result: A result of `posterity.measure`.
        ax: Axes to draw on.
        reader_of: "all", "first" or "rest": edges by their key. By default "rest", where the result tells them apart.

    Raises:
        InputError: What came is no result, or does not tell first keys apart.
    """
    result = latest_step(RESULT.check(result))
    reader_of, words = choose_readers(result, reader_of)
    require_lags(result)
    profile, windows = stats.cumulative_profile(result, (), reader_of), result.sizes["document"]
    with axes_to_draw(ax, 2.5) as axes:
        for level in (0.5, 0.9):
            draw_level(axes, level)
        lag = profile.lag_end.values
        for stream, colour in STREAM.items():
            credit = profile.sel(stream=stream)
            draw_line(axes, lag, credit.share, credit.error, windows, colour, f"{stream} credit")
        axes.plot(lag, profile.attention, label="attention", **ATTENTION)
        axes.plot(lag, profile.counted, label="edges, counted", **COUNTED)
        show_powers(axes, "x", int(lag[-1]))
        show_percents(axes.yaxis)
        axes.set(xlabel=f"lag (tokens){words}", ylabel="share within this lag")
        draw_legend(axes)
    return axes


def plot_reach(result: xr.Dataset, ax: Axes | None = None, *, stream: str = "value", level: float = 0.9) -> Axes:
    """Draw the lag within which most of each layer's attention, mass and credit lies (`posterity.reach`).

    Attention: what the forward pass reads. Mass: how much gradient passes. Credit: how much of it the edges make in
    the end. Edges into the first positions are left out.

    Args:
        result: A result of `posterity.measure`.
        ax: Axes to draw on.
        stream: "query", "key" or "value".
        level: The share that lies within the lag, between 0 and 1.

    Raises:
        InputError: What came is no result, or was measured without lags or by an earlier version; an unknown stream
            or level.
    """
    result = latest_step(RESULT.check(result))
    check_choice("stream", stream, STREAMS)
    reach, windows = stats.reach(result, ("layer",), (level,)).sel(level=level), result.sizes["document"]
    styles = {
        "attention": ATTENTION,
        f"{stream} mass": {"color": STREAM[stream], "linestyle": (0, (4, 2))},
        f"{stream} credit": {"color": STREAM[stream], "marker": "o"},
    }
    with axes_to_draw(ax, 2.4) as axes:
        for quantity, style in styles.items():
            lags = reach.sel(quantity=quantity)
            draw_line(axes, reach.layer, lags.lag, lags.error, windows, label=quantity, **style)
        show_whole_numbers(axes.xaxis)
        show_powers(axes, "y", int(result.lag_end[-1]))
        _, words = choose_readers(result, "rest")
        axes.set(xlabel=f"layer{words}", ylabel=f"lag of {100 * level:g} % (tokens)")
        draw_legend(axes)
    return axes


def plot_sinks(result: xr.Dataset, ax: Axes | None = None) -> Axes:
    """Draw the share of each layer's credit and attention at the first positions of each document.

    The numbers of `stats.first_share` and `stats.first_attention`; of a result that does not tell these positions
    apart, credit and mean attention weight at position 0 (`stats.first_position` and `stats.attention_first`).

    Args:
        result: A result of `posterity.measure`.
        ax: Axes to draw on.

    Raises:
        InputError: What came is no result.
    """
    result = latest_step(RESULT.check(result))
    if stats.has_reader_axis(result) and result.attrs["sinks"]:
        share, attention, streams = stats.first_share, stats.first_attention, STREAMS
        place, label = first_positions_text(int(result.attrs["sinks"])), "attention"
    else:  # the credit of queries stands there at the position that reads
        share, attention, streams = stats.first_position, stats.attention_first, WRITTEN
        place, label = "position 0", "mean attention weight"
    shares, weights, windows = share(result, ("layer",)), attention(result, ("layer",)), result.sizes["document"]
    with axes_to_draw(ax, 2.3) as axes:
        draw_level(axes, 0)
        for stream in streams:
            credit = shares.sel(stream=stream)
            draw_line(
                axes, shares.layer, credit.share, credit.error, windows, STREAM[stream], f"{stream} credit", marker="o"
            )
        axes.plot(weights.layer, weights, label=label, **ATTENTION)
        show_whole_numbers(axes.xaxis)
        show_percents(axes.yaxis)
        axes.set(xlabel="layer", ylabel=f"share at {place}")
        draw_legend(axes)
    return axes
