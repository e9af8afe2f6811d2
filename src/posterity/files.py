"""Results, audits and comparisons as files: one way in, one way out."""

import os
from contextlib import suppress
from pathlib import Path

import xarray as xr

from posterity import result as results
from posterity.audit import outcome


def save(result: xr.Dataset, path: str | os.PathLike[str]) -> Path:
    """Write a result or an audit as compressed netCDF, whole or not at all; returns the path. Raises InputError."""
    return outcome.save(result, path) if outcome.is_audit(result) else results.save(result, path)


def load(path: str | os.PathLike[str]) -> xr.Dataset:
    """Read a result, an audit or a comparison into memory and close the file.

    Raises:
        InputError: It is none, or not whole and sound.
    """
    kind = None
    with suppress(Exception), xr.open_dataset(os.path.realpath(path), engine="h5netcdf", cache=False) as file:
        kind = results.kind(file)
    if kind == "comparison":
        from posterity import comparison

        return comparison.load(os.fspath(path))
    return outcome.load(path) if kind == outcome.KIND else results.load(path)
