"""Compared runs as a page: the table of arms, and the gap by position."""

import math

import numpy as np
import xarray as xr
from markupsafe import Markup

from posterity.reporting.comparison_table import cells, told
from posterity.reporting.html import asset, escaped_json, page_environment, plotly_script, policy, shown
from posterity.results.comparison_schema import gaps


def render(compared: xr.Dataset) -> str:
    """The page as one string of HTML; `compared` as `posterity.training.compare.compare` gives it."""
    found, units = gaps(compared), str(compared.loss.attrs["units"])
    arms = [
        dict(zip(("name", "seeds", "loss", "gap"), cells(found.sel(arm=arm)), strict=True)) for arm in found.arm.values
    ]
    others = found.isel(arm=slice(1, None))
    rows = [
        (int(position), [told(*pair, "+") for pair in zip(gap, error, strict=True)])
        for position, gap, error in zip(
            found.position.values, others.gap_by_position.values.T, others.gap_by_position_error.values.T, strict=True
        )
    ]
    data = {
        "units": shown(units),
        "arms": [
            {"name": shown(str(arm)), "gap": _plain(gap), "error": _plain(error)}
            for arm, gap, error in zip(
                others.arm.values, others.gap_by_position.values, others.gap_by_position_error.values, strict=True
            )
        ],
    }
    scripts = [plotly_script(), asset("comparison.js")]
    return page_environment().get_template("comparison.html.j2").render(
        data=compared.attrs["data"], steps=compared.attrs["steps"], documents=compared.sizes["document"],
        positions=compared.sizes["position"], units=units, arms=arms, rows=rows,
        runs=list(zip(*(compared[name].values.tolist() for name in ("folder", "arm", "seed")), strict=True)),
        style=Markup(asset("style.css")), scripts=[Markup(code) for code in scripts], policy=policy(scripts),
        json=Markup(escaped_json(data)),
    )  # fmt: skip


def _plain(values: np.ndarray) -> list[float | None]:
    return [None if not math.isfinite(value) else float(value) for value in values]
