"""A comparison of trained runs as a table in a terminal."""

import xarray as xr
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from posterity.errors import readable
from posterity.results.comparison_schema import COMPARISON, VANILLA, myopia_gaps
from posterity.results.formatting import fixed_with_error


def arm_cells(arm: xr.Dataset) -> tuple[str, str, str, str]:
    """Return name, seeds, loss and gap of one arm of `myopia_gaps`; no gap for the plain runs."""
    name = readable(str(arm.arm.values))
    gap = "" if name == VANILLA else fixed_with_error(float(arm.gap), float(arm.gap_error), "+")
    return name, str(int(arm.seeds)), fixed_with_error(float(arm.loss), float(arm.loss_error)), gap


def print_comparison(compared: xr.Dataset, console: Console) -> None:
    """Print loss and gap of every arm."""
    gaps, units = myopia_gaps(COMPARISON.check(compared)), compared.loss.attrs["units"]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for name in ("", "seeds", "held-out loss", "myopia gap"):
        table.add_column(name, justify="left" if not name else "right", overflow="fold")
    for arm in gaps.arm.values:
        table.add_row(*map(Text, arm_cells(gaps.sel(arm=arm))))
    console.print(table)
    console.print(Text(f"Losses in {units}; ± is {gap_error_words(gaps, compared.sizes['document'])}."))


def gap_error_words(gaps: xr.Dataset, rows: int) -> str:
    """Return what the errors of `myopia_gaps` are over, in words; `rows` held-out rows."""
    several = int(gaps.seeds.max()) > 1
    seeds = "and the seeds" if several else "(one seed: what another would change is not in it)"
    return f"one standard error over {rows} held-out rows {seeds}"
