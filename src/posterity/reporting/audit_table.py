"""The audit as a table in a terminal, and the words that the table and the page share."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import xarray as xr
from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from posterity.results.audit_schema import AUDIT, FAILS, HOLDS, MIXED, REFUSED, SHARE
from posterity.results.formatting import left_out_text, percent, value_with_error
from posterity.results.netcdf import portable_value

NAME_COLUMNS, NUMBER_COLUMNS = 36, 22  # of a terminal: names of measures; numbers of a model
COLOURS = {HOLDS: "green", FAILS: "red", MIXED: "yellow", REFUSED: "dim"}
EXPECTED = "Expected: what counting or chance predicts. A clause holds or fails where the margin of error says so."
ERRORS = (
    "± is one standard error over windows of text (or prefixes, or segments); over 3 to 7 of them half the 95 % "
    "interval (Student's t), and over 2 no error is worth printing. The margin of error is half the 95 % interval."
)
OLD_ERRORS = "± is one standard error over windows of text, and the margin of error two: an older audit."


@dataclass(frozen=True)
class FigureRow:
    """One figure: name, formula, what is expected, units, and for each model value and baseline in words."""

    name: str
    formula: str
    expected: str
    units: str
    values: tuple[str, ...]
    baselines: tuple[str, ...]

    @property
    def baseline(self) -> str:
        """The baseline of all models in one cell."""
        return " / ".join(dict.fromkeys(self.baselines))


def print_audit(audit: xr.Dataset, console: Console) -> None:
    """Print verdicts, reasons and figures, clause by clause; from 80 columns on."""
    AUDIT.check(audit)
    models = [str(model) for model in audit.model.values]
    if console.width < NAME_COLUMNS + NUMBER_COLUMNS * (len(models) + 1) and len(models) > 1:
        for model in models:  # one below the other
            console.print(Text(model, style="bold"))
            print_audit(audit.sel(model=[model]), console)
        return
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    table.add_column("", overflow="fold", min_width=34)
    for model in models:
        table.add_column(Text(model), justify="right", overflow="fold")
    table.add_column("expected", justify="right", overflow="fold")
    for index, number in enumerate(audit.clause.values):
        verdicts = [str(verdict) for verdict in audit.verdict.values[:, index]]
        title = Text(f"{number} · {audit.name.values[index]}", style="bold")
        table.add_section()
        table.add_row(title, *(Text(verdict, style=f"bold {COLOURS[verdict]}") for verdict in verdicts), "")
        for row in figure_rows(audit, int(number)):
            label = Text(row.name + (f", {row.units}" if row.units else ""))
            table.add_row(Padding(label, (0, 0, 0, 2)), *map(Text, row.values), Text(row.baseline))
    console.print(table)
    console.print()
    for index, number in enumerate(audit.clause.values):
        for model, reason in zip(models, audit.reason.values[:, index], strict=True):
            subject = f" ({model})" if len(models) > 1 else ""
            console.print(Text(f"{number}{subject}: {reason}."))
    console.print(Text(reading_note(audit), style="dim"))


def reading_note(audit: xr.Dataset) -> str:
    """Return what a reader must know to judge the table, and what the windows leave out of the text."""
    left_out = left_out_text({str(name): portable_value(value) for name, value in audit.attrs.items()})
    note = f"{ERRORS if 'windows' in audit else OLD_ERRORS} {EXPECTED}"
    return f"{note} Windows of the context {left_out}." if left_out else note


def figure_rows(audit: xr.Dataset, number: int) -> Iterator[FigureRow]:
    """Yield the figures of one clause."""
    for index in (audit.of_clause.values == number).nonzero()[0]:
        measure = audit.isel(measure=index)
        units = str(measure.units_of.values)
        counts = measure.windows.values if "windows" in measure else np.zeros(measure.sizes["model"])
        figures = zip(measure.figure.values, measure.error.values, counts, strict=True)
        yield FigureRow(
            name=str(measure.measure.values),
            formula=str(measure.formula.values),
            expected=str(measure.expected.values),
            units="" if units in ("1", SHARE) else units,
            values=tuple(_value_cell(*map(float, numbers), units) for numbers in figures),
            baselines=tuple(_baseline_cell(float(baseline), units) for baseline in measure.baseline.values),
        )


def _value_cell(value: float, error: float, windows: float, units: str) -> str:
    """Return a figure with what stands behind its ±: of no number of windows (0 or NaN), the error as it is."""
    counted = {"windows": int(windows)} if windows > 0 else {}
    return percent(value, error, **counted) if units == SHARE else value_with_error(value, error, **counted)


def _baseline_cell(baseline: float, units: str) -> str:
    """Return what counting or chance predicts; "" for nothing."""
    if math.isnan(baseline):
        return ""
    return percent(baseline) if units == SHARE else value_with_error(baseline, empty="")
