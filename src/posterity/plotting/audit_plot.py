"""Plot of an audit: its figures beside what counting or chance predicts."""

import textwrap
from dataclasses import dataclass

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter

from posterity.errors import InputError
from posterity.palette import COUNT, SERIES
from posterity.plotting.canvas import axes_to_draw, draw_legend, plain_text
from posterity.results.audit_schema import AUDIT

MARKERS = "os^Dv<"  # of the models, one for each colour of the palette
LABEL_COLUMNS, TITLE_COLUMNS = 28, 38  # characters of a line beside the axes and in them
LINE, EDGE = 0.115, 0.9  # inches


def plot_audit(audit: xr.Dataset, ax: Axes | None = None, *, clause: int | None = None, units: str = "1") -> Axes:
    """Draw the figures of an audit that have the same units, with their standard errors and baselines.

    Shares and ratios (units of 1) stand on an axis that is linear from -1 to 1 and logarithmic beyond. A figure that is
    not known has no mark.

    Args:
        audit: What `posterity.audit` returned.
        ax: Axes to draw on.
        clause: Number of a clause; None for all.
        units: Units of the figures, such as "1" or "nats per token".

    Raises:
        InputError: What came is no audit; there is no figure of this clause in these units.
    """
    measures = _select(AUDIT.check(audit), clause, units)
    rows = _rows(measures)
    y = np.array([row.place for row in rows if not row.is_title])
    with axes_to_draw(ax, EDGE + LINE * (rows[-1].place + 1)) as axes:
        models = [str(model) for model in measures.model.values]
        for index, model in enumerate(models):
            figures = measures.isel(model=index)
            places = y + 0.6 * ((index + 1) / (len(models) + 1) - 0.5)
            axes.plot(figures.baseline, places, linestyle="none", marker="|", markersize=7, color=COUNT,
                      label="" if index else "counting or chance")  # fmt: skip
            axes.errorbar(
                figures.figure, places, xerr=figures.error, linestyle="none", elinewidth=1, marker=MARKERS[index % 6],
                color=SERIES[index % 6], label=_wrap(model, LABEL_COLUMNS),
            )  # fmt: skip
        axes.set_yticks(y, [row.label for row in rows if not row.is_title], fontsize=6)
        for row in (row for row in rows if row.is_title):
            axes.annotate(row.label, (0.01, row.place), xycoords=("axes fraction", "data"), fontsize=6,
                          fontweight="bold", va="center")  # fmt: skip
        axes.set_ylim(rows[-1].place + 1, -1)
        if units == "1":
            axes.set_xscale("symlog", linthresh=1, linscale=1.5)
            axes.xaxis.set_major_locator(FixedLocator([-100, -10, -1, 0, 1, 10, 100, 1000]))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("-", "−")))
            axes.xaxis.set_minor_locator(FixedLocator([-0.5, 0.5]))
        axes.margins(x=0.08)
        axes.grid(axis="x", linewidth=0.3)
        axes.set_xlabel("shares and ratios (units of 1)" if units == "1" else units)
        draw_legend(axes, 1)
    return axes


def _select(audit: xr.Dataset, clause: int | None, units: str) -> xr.Dataset:
    """Return the measures of a clause, or of all, in these units."""
    numbers = [int(number) for number in audit.clause.values]
    if clause is not None and clause not in numbers:
        raise InputError(
            f"clause expects one of those that were measured, {', '.join(map(str, numbers))}; got {clause!r}"
        )
    measures = audit if clause is None else audit.isel(measure=(audit.of_clause == clause).values)
    selection = measures.isel(measure=(measures.units_of == units).values)
    if not selection.sizes["measure"]:
        known = ", ".join(map(repr, dict.fromkeys(map(str, measures.units_of.values)))) or "none at all"
        raise InputError(f"units expects those of a figure: {known}; got {units!r}")
    return selection


@dataclass(frozen=True)
class _Row:
    """A line of the plot: the title of a clause, or the label of a measure; its place counts lines of text."""

    label: str
    place: float
    is_title: bool


def _rows(measures: xr.Dataset) -> list[_Row]:
    """Return a title above the measures of each clause, and a row for every measure in order."""
    rows: list[_Row] = []
    end, clause = 0.0, None
    for measure, number in zip(measures.measure.values, measures.of_clause.values, strict=True):
        if number != clause:
            clause = number
            entry = measures.sel(clause=number)
            verdicts = " / ".join(dict.fromkeys(map(str, entry.verdict.values)))
            title = _wrap(f"{number} · {entry.name.values}: {verdicts}", TITLE_COLUMNS)
            lines = title.count("\n") + 1.2
            rows.append(_Row(title, end + lines / 2, True))
            end += lines
        label = _wrap(str(measure), LABEL_COLUMNS)
        lines = max(label.count("\n") + 1, 1.2 * len(measures.model) ** 0.5)
        rows.append(_Row(label, end + lines / 2 - 0.5, False))
        end += lines
    return rows


def _wrap(text: str, columns: int) -> str:
    return "\n".join(textwrap.wrap(plain_text(text), columns))
