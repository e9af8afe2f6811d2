"""Results, audits and comparisons as netCDF files: one way out, one way in."""

import os
from pathlib import Path

import xarray as xr

from posterity.atomic_files import writable, write_whole
from posterity.errors import InputError
from posterity.results import netcdf
from posterity.results.audit_schema import AUDIT
from posterity.results.comparison_schema import COMPARISON
from posterity.results.kind import Kind, kind_name
from posterity.results.schema import RESULT

KINDS: dict[str, Kind] = {kind.name: kind for kind in (RESULT, AUDIT, COMPARISON)}


def save(dataset: xr.Dataset, path: str | os.PathLike[str]) -> Path:
    """Write a result, an audit or a comparison as compressed netCDF, whole or not at all.

    Returns:
        The path.

    Raises:
        InputError: The Dataset is of no kind, or has a flaw; the file cannot be written.
    """
    kind = KINDS.get(kind_name(dataset), RESULT)
    target = writable(path)
    write_whole(target, netcdf.packed(kind.check(dataset)))
    return Path(path)


def load(path: str | os.PathLike[str]) -> xr.Dataset:
    """Read a result, an audit or a comparison into memory and close the file.

    Raises:
        InputError: The file holds none of them, or is damaged.
    """
    dataset = netcdf.read(path)
    name = kind_name(dataset)
    if name not in KINDS:
        raise InputError(f"{path}: expected a result, an audit or a comparison of posterity; it is of kind {name!r}")
    return KINDS[name].check_file(dataset, path)
