"""Save and load the kinds of Dataset (result, audit, comparison, eviction, features) as netCDF files."""

import os
from pathlib import Path

import xarray as xr

from posterity.atomic_files import check_output_path, write_atomically
from posterity.errors import InputError
from posterity.results.audit_schema import AUDIT
from posterity.results.comparison_schema import COMPARISON
from posterity.results.eviction_schema import EVICTION
from posterity.results.feature_schema import FEATURES
from posterity.results.kind import Kind, kind_name
from posterity.results.netcdf import pack, read_netcdf
from posterity.results.schema import RESULT

KINDS: dict[str, Kind] = {kind.name: kind for kind in (RESULT, AUDIT, COMPARISON, EVICTION, FEATURES)}


def save(dataset: xr.Dataset, path: str | os.PathLike[str]) -> Path:
    """Write a Dataset of any of the kinds as compressed netCDF: the whole file, or none of it.

    Args:
        dataset: What `posterity.measure`, `audit`, `compare` or `evict` returned.
        path: The file, whose name ends in .nc; replaced if it exists.

    Returns:
        The path.

    Raises:
        InputError: The Dataset is none of the four, or not a valid one; the file cannot be written, or ends otherwise.
    """
    kind = KINDS.get(kind_name(dataset), RESULT)
    target = check_output_path(path, "result")
    write_atomically(target, pack(kind.check(dataset)))
    return Path(path)


def load(path: str | os.PathLike[str]) -> xr.Dataset:
    """Read a result, an audit, a comparison, an eviction or features into memory and close the file.

    Args:
        path: A file that `save` or the command line wrote.

    Returns:
        The Dataset as it was saved. `posterity.table` gives its numbers as tidy tables, `posterity.plot` as figures.

    Raises:
        InputError: The file does not exist, holds none of the four, or is damaged.
    """
    dataset = read_netcdf(path)
    name = kind_name(dataset)
    if name not in KINDS:
        raise InputError(
            f"{path}: expected a result, an audit, a comparison, an eviction or features of posterity; it is of kind "
            f"{name!r}"
        )
    return KINDS[name].check_file(dataset, path)
