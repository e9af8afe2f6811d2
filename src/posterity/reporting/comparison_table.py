"""A comparison of trained runs as a table in a terminal."""

import math

import xarray as xr
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from posterity.errors import readable
from posterity.results.comparison_schema import COMPARISON, VANILLA, gaps


def cells(one: xr.Dataset) -> tuple[str, str, str, str]:
    """What is shown of one arm of `gaps`: its name, seeds, loss and gap; no gap for the plain runs."""
    arm = readable(str(one.arm.values))
    gap = "" if arm == VANILLA else told(float(one.gap), float(one.gap_error), "+")
    return arm, str(int(one.seeds)), told(float(one.loss), float(one.loss_error)), gap


def told(value: float, error: float, sign: str = "") -> str:
    """A number and its standard error, where there is one."""
    value = 0.0 if abs(value) < 5e-5 else value  # no "-0.0000"
    return f"{value:{sign}.4f}" + ("" if math.isnan(error) else f" ± {error:.4f}")


def print_comparison(compared: xr.Dataset, console: Console | None = None) -> None:
    """Print loss and gap of every arm."""
    COMPARISON.check(compared)
    found, units = gaps(compared), compared.loss.attrs["units"]
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for name in ("", "seeds", "held-out loss", "myopia gap"):
        shown.add_column(name, justify="left" if not name else "right", overflow="fold")
    for arm in found.arm.values:
        one = found.sel(arm=arm)
        shown.add_row(*map(Text, cells(one)))
    console = console or Console(highlight=False)
    console.print(shown)
    rows = compared.sizes["document"]
    several = int(found.seeds.max()) > 1
    seeds = "and the seeds" if several else "(one seed: what another would change is not in it)"
    console.print(Text(f"Losses in {units}; ± is one standard error over {rows} held-out rows {seeds}."))
