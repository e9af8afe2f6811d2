"""The audit as a table in a terminal, and the words that the table and the page share."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import xarray as xr
from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from posterity.results.audit_schema import AUDIT, FAILS, HOLDS, MIXED, REFUSED
from posterity.results.formatting import UNKNOWN

NAMES, NUMBERS = 36, 22  # columns of a terminal: names of measures; numbers of a model
COLOURS = {HOLDS: "green", FAILS: "red", MIXED: "yellow", REFUSED: "dim"}


@dataclass(frozen=True)
class Row:
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


def print_audit(audit: xr.Dataset, console: Console | None = None) -> None:
    """Print verdicts, reasons and figures, clause by clause; from 80 columns on."""
    AUDIT.check(audit)
    console = console or Console(highlight=False)
    models = [str(one) for one in audit.model.values]
    if console.width < NAMES + NUMBERS * (len(models) + 1) and len(models) > 1:  # one below the other instead
        for model in models:
            console.print(Text(model, style="bold"))
            print_audit(audit.sel(model=[model]), console)
        return
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    shown.add_column("", overflow="fold", min_width=34)
    for model in models:
        shown.add_column(Text(model), justify="right", overflow="fold")
    shown.add_column("expected", justify="right", overflow="fold")
    for at, number in enumerate(audit.clause.values):
        verdicts = [str(one) for one in audit.verdict.values[:, at]]
        title = Text(f"{number} · {audit.name.values[at]}", style="bold")
        shown.add_section()
        shown.add_row(title, *(Text(one, style=f"bold {COLOURS[one]}") for one in verdicts), "")
        for row in rows(audit, int(number)):
            label = Text(row.name + (f", {row.units}" if row.units else ""))
            shown.add_row(Padding(label, (0, 0, 0, 2)), *map(Text, row.values), Text(row.baseline))
    console.print(shown)
    console.print()
    for at, number in enumerate(audit.clause.values):
        for model, reason in zip(models, audit.reason.values[:, at], strict=True):
            whose = f" ({model})" if len(models) > 1 else ""
            console.print(Text(f"{number}{whose}: {reason}."))
    console.print(Text(NOTE, style="dim"))


NOTE = (
    "± is one standard error over windows of text. Expected: what counting or chance predicts. A clause holds or fails "
    "where two standard errors say so; docs/audit.md explains every row."
)


def rows(audit: xr.Dataset, number: int) -> Iterator[Row]:
    """The figures of one clause."""
    for at in (audit.of_clause.values == number).nonzero()[0]:
        one = audit.isel(measure=at)
        units = "" if str(one.units_of.values) == "1" else str(one.units_of.values)
        values = tuple(told(float(v), float(e)) for v, e in zip(one.figure.values, one.error.values, strict=True))
        baselines = tuple(told(float(b), empty="") for b in one.baseline.values)
        yield Row(str(one.measure.values), str(one.formula.values), str(one.expected.values), units, values, baselines)


def told(value: float, error: float = math.nan, empty: str = UNKNOWN) -> str:
    """A number with as many digits as its error allows, four significant ones without; "0.123 ± 0.004"."""
    if not math.isfinite(value):
        return empty
    if error == 0:
        return f"{told(value)} ± 0"
    if not math.isfinite(error) or error < 0:
        return f"{value:.2e}" if value and not 1e-3 <= abs(value) < 1e5 else f"{value:.4g}"
    digits = max(0, 1 - math.floor(math.log10(error)))
    if digits > 6 or abs(value) >= 1e6:
        return f"{value:.2e} ± {error:.1e}"
    return f"{value:.{digits}f} ± {error:.{digits}f}"
