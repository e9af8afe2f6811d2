"""Results, audits and comparisons as files: one way in, one way out."""

import os
from pathlib import Path

import xarray as xr

from posterity.errors import InputError
from posterity.results import audit_schema as outcome
from posterity.results import netcdf
from posterity.results import schema as results


def save(result: xr.Dataset, path: str | os.PathLike[str]) -> Path:
    """Write a result, an audit or a comparison as netCDF, whole or not at all; returns the path. Raises InputError."""
    if results.kind(result) == "comparison":
        from posterity.training import compare as comparison

        return comparison.save(result, path)
    return outcome.save(result, path) if outcome.is_audit(result) else results.save(result, path)


def load(path: str | os.PathLike[str]) -> xr.Dataset:
    """Read a result, an audit or a comparison into memory and close the file.

    Raises:
        InputError: It is none, or not whole and sound.
    """
    found = netcdf.read(path)
    kind = results.kind(found)
    if kind == "comparison":
        from posterity.training import compare as comparison

        return comparison.loaded(found, path)
    if kind not in ("", outcome.KIND):
        raise InputError(f"{path}: expected a result, an audit or a comparison of posterity; it is of kind {kind!r}")
    return outcome.loaded(found, path) if kind else results.loaded(found, path)
