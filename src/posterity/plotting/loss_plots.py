"""Plots of own and later losses: by layer, under a horizon, and loss by loss for one text."""

import xarray as xr
from matplotlib.axes import Axes
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import FixedLocator, FuncFormatter

from posterity.axes import STREAMS, WRITTEN
from posterity.errors import InputError
from posterity.palette import LATE, OTHER, SELF, SEQUENTIAL, STREAM
from posterity.plotting.canvas import (
    axes_to_draw,
    check_choice,
    choose_readers,
    colour_map,
    draw_cells,
    draw_colour_bar,
    draw_legend,
    draw_level,
    draw_line,
    plain_text,
    show_percents,
    show_whole_numbers,
)
from posterity.results import stats
from posterity.results.schema import RESULT
from posterity.results.steps import latest_step

PARTS = {  # of the credit by losses: label, colour, marker
    "own": ("own loss", SELF, "o"),
    "self later": ("later, self edge", LATE, "s"),
    "future": ("later, future edges", OTHER, "^"),
}
MOST_TOKENS = 48  # that stand beside the axes; more would overlap


def plot_losses(
    result: xr.Dataset, ax: Axes | None = None, *, written: str = "value", reader_of: str | None = None
) -> Axes:
    """Draw which part of each layer's credit comes from the own loss and from later losses (`stats.loss_shares`).

    Args:
        result: A result of `posterity.measure` with `losses=True`.
        ax: Axes to draw on.
        written: "key" or "value".
        reader_of: "all", "first" or "rest": keys and values by their position. By default "rest", without the first
            positions, where the result tells them apart.

    Raises:
        InputError: What came is no result, has no split by losses, or does not tell first positions apart; an unknown
            stream.
    """
    result = latest_step(RESULT.check(result))
    check_choice("written", written, WRITTEN)
    reader_of, words = choose_readers(result, reader_of)
    shares, windows = stats.loss_shares(result, ("layer",), reader_of).sel(written=written), result.sizes["document"]
    with axes_to_draw(ax, 2.2) as axes:
        draw_level(axes, 0)
        for part, (label, colour, marker) in PARTS.items():
            share = shares.sel(part=part)
            draw_line(axes, shares.layer, share.share, share.error, windows, colour, label, marker=marker)
        show_whole_numbers(axes.xaxis)
        show_percents(axes.yaxis)
        axes.set(xlabel=f"layer{words}", ylabel=f"share of the {written} credit")
        draw_legend(axes)
    return axes


def plot_horizon(result: xr.Dataset, ax: Axes | None = None, *, reader_of: str | None = None) -> Axes:
    """Draw the credit that remains when later losses are discounted, for each stream (`stats.horizon_curve`).

    Args:
        result: A result of `posterity.measure` with `horizons`.
        ax: Axes to draw on.
        reader_of: "all", "first" or "rest": edges by their key. By default "rest", where the result tells them apart.

    Raises:
        InputError: What came is no result, has no horizons, or does not tell first keys apart.
    """
    result = latest_step(RESULT.check(result))
    reader_of, words = choose_readers(result, reader_of)
    curve, windows = stats.horizon_curve(result, (), reader_of), result.sizes["document"]
    with axes_to_draw(ax, 2.2) as axes:
        draw_level(axes, 0.5)
        for stream, marker in zip(STREAMS, "os^", strict=True):
            share = curve.sel(stream=stream)
            draw_line(axes, curve.horizon, share.share, share.error, windows, STREAM[stream], stream, marker=marker)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(curve.horizon.values))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: f"{tokens:,.0f}"))
        show_percents(axes.yaxis)
        axes.set(xlabel=f"horizon (tokens){words}", ylabel="share of the credit that remains")
        draw_legend(axes, 3)
    return axes


def plot_matrix(
    result: xr.Dataset, ax: Axes | None = None, *, written: str = "value", layer: int | None = None
) -> Axes:
    """Draw which loss shapes which position: the share of each loss in the credit of each key or value.

    The numbers of `stats.loss_matrix`. Blank: a loss before the position, and positions whose parts cancel.

    Args:
        result: A result of `posterity.inspect`.
        ax: Axes to draw on.
        written: "key" or "value".
        layer: A layer; None for all together.

    Raises:
        InputError: What came is no result of `inspect`; an unknown stream or layer.
    """
    result = latest_step(RESULT.check(result))
    check_choice("written", written, WRITTEN)
    matrix = stats.loss_matrix(result, () if layer is None else ("layer",)).sel(written=written)
    if layer is not None:
        if layer not in matrix.layer.values:
            raise InputError(f"layer expects a number from 0 to {result.sizes['layer'] - 1}; got {layer!r}")
        matrix = matrix.sel(layer=layer)
    with axes_to_draw(ax, 3.0) as axes:
        cells = draw_cells(axes, matrix, cmap=colour_map(SEQUENTIAL), vmin=0, vmax=1, edgecolors="face", linewidth=0.1)
        place = "" if layer is None else f" in layer {layer}"
        draw_colour_bar(axes, cells, f"share of the {written}'s credit{place}")
        axes.set(xlabel=f"position of the {written}", ylabel="position of the loss", aspect="equal")
        if len(matrix.token) <= MOST_TOKENS:
            _show_tokens(axes, [str(token) for token in matrix.token.values])
        else:
            show_whole_numbers(axes.xaxis, axes.yaxis)
    return axes


def _show_tokens(ax: Axes, tokens: list[str]) -> None:
    """Put the tokens beside both axes; the position stands for a token that the font cannot show."""
    font = get_font(findfont(FontProperties()))

    def label(position: int, token: str) -> str:
        shown = token.replace(" ", "·")
        known = token and all(font.get_char_index(ord(char)) for char in shown)
        return plain_text(shown) if known else str(position)

    labels = [label(position, token) for position, token in enumerate(tokens)]
    size = min(6, 150 / len(tokens))
    ax.set_xticks(range(len(tokens)), labels, rotation=90, fontsize=size)
    ax.set_yticks(range(len(tokens)), labels, fontsize=size)
