"""Pictures of a clause: the audit of one model as charts read it, and the traces that they are made of."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xarray as xr


@dataclass(frozen=True)
class Chart:
    """A picture as plotly wants it: traces and layout as plain lists and numbers, None where nothing is known."""

    title: str
    text: str
    traces: list[dict[str, Any]]
    x: str = ""
    y: str = ""
    layout: dict[str, Any] = field(default_factory=dict)


class View(Mapping[str, xr.DataArray]):
    """The audit of one model, as charts read it: `audit["look_back_share"]` or `audit.look_back_share`.

    What other rows or models have and this variable has not (a layer, a lag) is left out.
    """

    def __init__(self, audit: xr.Dataset, model: str):
        """Look at one model of an audit."""
        self._audit = audit.sel(model=model, drop=True)

    def __getitem__(self, name: str) -> xr.DataArray:
        found = self._audit[name]
        for dim in found.dims:
            if found.dtype.kind == "f":
                found = found.dropna(dim, how="all")
        return found.transpose(*self._audit[name].dims)

    def __getattr__(self, name: str) -> xr.DataArray:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __iter__(self) -> Iterator[str]:
        """Names of variables that hold something for this model."""
        return (
            str(name) for name, one in self._audit.data_vars.items() if one.dtype.kind != "f" or one.notnull().any()
        )

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return name in set(self)


def plain(values: Any) -> list[float | None]:
    """Numbers for a chart."""
    return [float(x) if math.isfinite(x) else None for x in np.asarray(values, dtype=float).ravel()]


def line(name: str, x: Any, y: Any, error: Any = None, **style: Any) -> dict[str, Any]:
    """A trace of points joined by a line, with error bars where errors are given."""
    trace: dict[str, Any] = {
        "type": "scatter", "mode": "lines+markers", "name": name, "x": list(np.asarray(x).tolist()), "y": plain(y),
    }  # fmt: skip
    if error is not None:
        trace["error_y"] = {"type": "data", "array": plain(error), "thickness": 1}
    return trace | style


def grid(values: Any, name: str = "", **style: Any) -> dict[str, Any]:
    """A map of layers (down) and heads (across)."""
    rows = [plain(row) for row in np.asarray(values, dtype=float)]
    return {"type": "heatmap", "z": rows, "name": name, "hoverongaps": False, **style}
