"""What all plots share: figures of a column's width, lines with bands of their errors, maps of cells."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import FuncNorm, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, PercentFormatter

from posterity.errors import InputError
from posterity.palette import AXIS, COUNT, INK, Scale, share_at_place, share_place
from posterity.results.formatting import first_positions_text
from posterity.results.stats import has_reader_axis, uncertainty

COLUMN = 3.3  # inches: the width of one column of a paper
STYLE: dict[Any, Any] = {
    "font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7,
    "legend.fontsize": 7, "legend.frameon": False, "legend.handlelength": 2.2, "axes.linewidth": 0.6,
    "xtick.major.width": 0.6, "ytick.major.width": 0.6, "lines.linewidth": 1.2, "lines.markersize": 3,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": INK, "axes.labelcolor": INK,
    "text.color": INK, "xtick.color": INK, "ytick.color": INK,
}  # fmt: skip
FILES: dict[Any, Any] = {
    "pdf.fonttype": 42,
    "ps.fonttype": 42,
    "svg.fonttype": "none",
    "savefig.dpi": 300,
}  # text stays text


class ColumnFigure(Figure):
    """A figure whose files hold text as text, in fonts that publishers take (TrueType, not Type 3)."""

    def savefig(self, *args: Any, **options: Any) -> None:
        """Save the figure as matplotlib does; `FILES` stands in place of its settings."""
        with rc_context(FILES):
            super().savefig(*args, **options)


@contextmanager
def axes_to_draw(ax: Axes | None, height: float) -> Iterator[Axes]:
    """Yield the axes of the caller, or those of a new figure of a column's width and this height in inches."""
    if ax is not None:
        if not isinstance(ax, Axes):
            raise InputError(f"ax expects axes of matplotlib, such as plt.gca(); got {type(ax).__name__}")
        yield ax
        return
    with rc_context(STYLE):
        figure = plt.figure(FigureClass=ColumnFigure, figsize=(COLUMN, height), layout="constrained")
        try:
            yield figure.subplots()
        except BaseException:
            plt.close(figure)
            raise


def check_choice(name: str, label: str, labels: Collection[str]) -> None:
    """Raise InputError unless an argument is one of the labels."""
    if label not in labels:
        raise InputError(f"{name} expects {' or '.join(map(repr, labels))}; got {label!r}")


def choose_readers(result: xr.Dataset, reader_of: str | None) -> tuple[str, str]:
    """Return which edges are drawn, by their key, and a second line for the label of x that says so.

    None means those without the first positions (attention sinks), where the result tells them apart.
    """
    if reader_of is None:
        reader_of = "rest" if has_reader_axis(result) else "all"
    first = first_positions_text(int(result.attrs.get("sinks", 0)))
    words = {"first": f"\n{first} alone", "rest": f"\nwithout {first}"} if first else {}
    return reader_of, words.get(reader_of, "")


def plain_text(text: str) -> str:
    """Return text that matplotlib shows as it is: dollars enclose no mathematics."""
    return text.replace("$", r"\$")


def draw_line(
    ax: Axes, x: Any, value: xr.DataArray, error: xr.DataArray, windows: int, color: str, label: str, **style: Any
) -> None:
    """Draw a line, and on both sides a band of its uncertainty over so many windows (`stats.uncertainty`)."""
    ax.plot(x, value, color=color, label=label, **style)
    half = uncertainty(error, windows)
    if half.notnull().any():
        ax.fill_between(x, value - half, value + half, color=color, alpha=0.2, linewidth=0)


def draw_cells(ax: Axes, values: xr.DataArray, **style: Any) -> Any:
    """Draw a matrix as cells around whole numbers, its first dimension upwards; nothing where a value is NaN."""
    height, width = values.shape
    edges = np.arange(width + 1) - 0.5, np.arange(height + 1) - 0.5
    ax.set(xlim=edges[0][[0, -1]], ylim=edges[1][[0, -1]])
    return ax.pcolormesh(*edges, np.ma.masked_invalid(values.values), **style)


def colour_map(scale: Scale) -> LinearSegmentedColormap:
    """Return the colours of the palette as a map of matplotlib."""
    return LinearSegmentedColormap.from_list("posterity", scale)


def draw_colour_bar(
    ax: Axes, cells: Any, label: str, ticks: Sequence[float] | None = None, baseline: float | None = None
) -> None:
    """Draw the colours of shares beside the axes, with a mark at a baseline."""
    place = ax.inset_axes((1.04, 0, 0.05, 1))  # as high as the axes, whatever their aspect
    bar = ax.figure.colorbar(cells, cax=place, format=_percents(), ticks=ticks)
    bar.set_label(label)
    bar.outline.set_linewidth(0.6)
    bar.ax.minorticks_off()
    if baseline is not None:
        bar.ax.plot([0], [baseline], clip_on=False, **BASELINE)


def share_scale() -> FuncNorm:
    """Return the scale of colours for shares from 0 to 1 (`palette.share_place`), which has room for small ones."""
    return FuncNorm((share_place, share_at_place), vmin=0, vmax=1)


def _percents() -> PercentFormatter:
    return PercentFormatter(1, decimals=0, symbol=" %")


def show_percents(axis: Any) -> None:
    """Show the shares along an axis in percent."""
    axis.set_major_formatter(_percents())


def show_whole_numbers(*axes: Any) -> None:
    """Put ticks at whole numbers alone."""
    for axis in axes:
        axis.set_major_locator(MaxNLocator(integer=True))


def show_powers(ax: Axes, name: str, last: int) -> None:
    """Make an axis a scale of tokens from 0 to `last`: 0 and 1 apart, then a step for each doubling."""
    getattr(ax, f"set_{name}scale")("symlog", base=2, linthresh=1, linscale=0.5)
    axis, steps = getattr(ax, f"{name}axis"), max(1, last.bit_length() // 6)
    axis.set_major_locator(FixedLocator([0, *(2**power for power in range(0, last.bit_length(), steps))]))
    axis.set_major_formatter(FuncFormatter(lambda tokens, _: f"{tokens:,.0f}"))
    axis.set_minor_locator(FixedLocator([]))
    getattr(ax, f"set_{name}lim")(-0.1, last * 1.05)


def draw_legend(ax: Axes, columns: int = 2, **handles: Any) -> None:
    """Draw the legend above the axes, where it hides nothing."""
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, columnspacing=1.2, ncols=columns, **handles)


def draw_level(ax: Axes, level: float, **style: Any) -> None:
    """Draw a thin line at a level of y."""
    ax.axhline(level, color=AXIS, linewidth=0.6, zorder=0, **style)


COUNTED = {"color": COUNT, "linestyle": (0, (4, 2))}  # what counting edges alone predicts
ATTENTION = {"color": INK, "linestyle": (0, (1, 1.5))}
BASELINE: dict[str, Any] = {"color": COUNT, "marker": ">", "markersize": 5, "linestyle": "none"}  # on a bar of colours
