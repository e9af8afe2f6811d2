"""Datasets as netCDF files: packed with a seal at the end; read only if the file holds what it claims, and no more.

HDF5 can hold more than numbers: links into other files, numbers kept in other files, filters that load code, sizes that
nothing backs, attributes at which its C library crashes. Nothing of the kind is ever written here, so none of it is
read: the form of a file is looked at before xarray and h5netcdf believe it.
"""

import hashlib
import os
from typing import Any

import h5py
import numpy as np
import xarray as xr

from posterity.errors import InputError, readable

SEAL = b"\nposterity sha256 "  # and 64 digits behind what HDF5 reads: whatever happens to the bytes is found
DENSEST = 1032  # to 1: no zlib stream unpacks to more
FILTERS = {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32}
BARE = b"This is a netCDF dimension but not a netCDF variable"  # how netCDF marks a dimension without numbers
WORDS = 64  # in one attribute, read at a time in one variable


def packed(dataset: xr.Dataset) -> bytes:
    """The file of a Dataset: texts made readable, compressed, every chunk with a checksum, the whole with a seal."""
    dataset = _plain(dataset)
    zlib = {"zlib": True, "complevel": 4, "fletcher32": True, "_FillValue": None}
    encoding = {name: zlib for name, one in dataset.variables.items() if one.dtype.kind in "if" and one.ndim}
    data = bytes(dataset.to_netcdf(engine="h5netcdf", encoding=encoding))
    return data + SEAL + hashlib.sha256(data).hexdigest().encode()


def read(path: str | os.PathLike[str]) -> xr.Dataset:
    """Read a file into memory and close it; texts are made readable. Takes at most `DENSEST` times the file's size.

    Raises:
        InputError: There is no such file, or it is damaged, claims what it does not hold, or is something else.
    """
    try:
        found = os.path.isfile(path)
    except ValueError:
        found = False
    if not found:
        reason = "is a folder" if os.path.isdir(path) else "does not exist or is no ordinary file"
        raise InputError(f"{path}: expected a result file of posterity, but it {reason}; check the path")
    try:
        flaw = _flaw(os.path.realpath(path))
        if flaw is None:
            with xr.open_dataset(
                os.path.realpath(path), engine="h5netcdf", decode_times=False, mask_and_scale=False,
                create_default_indexes=False, cache=False,
            ) as file:  # fmt: skip
                return _plain(file.load())
    except Exception as error:  # a damaged file can fail anywhere inside HDF5, h5netcdf and xarray
        flaw = f"it cannot be read: {next(iter(str(error).splitlines()), '')[:200] or type(error).__name__}"
    raise InputError(
        f"{path}: expected a result file of posterity (netCDF), but {flaw}; it is damaged or something else: check the "
        "path, or make it again"
    )


def plain(value: object) -> str | int | float:
    """A value that every file can hold and every terminal can show."""
    if value is None:
        return ""
    if isinstance(value, (bool, int, np.bool_, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(value)
    return readable(str(value))


def _plain(dataset: xr.Dataset) -> xr.Dataset:
    variables = {name: _plain_variable(one) for name, one in dataset.variables.items()}
    coords = {name: variables.pop(name) for name in dataset.coords}
    return xr.Dataset(variables, coords, _plain_attributes(dataset.attrs))


def _plain_variable(one: xr.Variable) -> xr.Variable:
    values = one.values
    if values.dtype.kind in "OU":
        values = np.array([readable(str(text)) for text in values.ravel()], dtype=str).reshape(values.shape)
    return xr.Variable(one.dims, values, _plain_attributes(one.attrs))


def _plain_attributes(attrs: dict[Any, Any]) -> dict[str, Any]:
    return {str(name): plain(value) for name, value in attrs.items()}


# ---- the form of a file


def _flaw(path: str) -> str | None:
    """The first thing wrong with a file, as half a sentence; None if nothing is."""
    if _seal_is_broken(path):
        return "it cannot be read: its bytes are not those that were written"
    size, held = os.path.getsize(path), 0
    with h5py.File(path, "r") as file:
        flaw = _flaw_of_attributes(file)
        for name in file if flaw is None else ():
            if not isinstance(file.get(name, getlink=True), h5py.HardLink):
                return f"{name!r} is a link to something else"
            one = file[name]
            if not isinstance(one, h5py.Dataset):
                return f"{name!r} is no array"
            held += one.id.get_storage_size()
            flaw = _flaw_of_attributes(one) or _flaw_of_array(one, size)
            if flaw is None and held > size:
                flaw = "takes more room than the file has"
            if flaw is not None:
                return f"{name!r} {flaw}"
        return f"it {flaw}" if flaw else None


def _seal_is_broken(path: str) -> bool:
    """Whether there is a seal that is not that of the bytes before it; files of other programs have none."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = max(0, size - len(SEAL) - 64)
        file.seek(start)
        end = file.read()
        at = end.find(SEAL)
        if at < 0:
            return False
        file.seek(0)
        state, left = hashlib.sha256(), start + at
        while left and (some := file.read(min(left, 1 << 20))):
            state.update(some)
            left -= len(some)
        return state.hexdigest().encode() != end[at + len(SEAL) :]


def _flaw_of_attributes(one: Any) -> str | None:
    """Looks at types and sizes only: the C library reads what it takes for references without asking."""
    for index in range(h5py.h5a.get_num_attrs(one.id)):
        attribute = h5py.h5a.open(one.id, index=index)
        kind, name = attribute.get_type(), attribute.name
        simple = kind.get_class() in (h5py.h5t.INTEGER, h5py.h5t.FLOAT, h5py.h5t.STRING)
        if name == b"DIMENSION_LIST":
            simple = kind.get_class() == h5py.h5t.VLEN and kind.get_super().get_class() == h5py.h5t.REFERENCE
            simple = simple and attribute.shape == (len(one.shape),)
        elif name == b"REFERENCE_LIST":
            simple = kind.get_class() == h5py.h5t.COMPOUND
        elif name in (b"CLASS", b"NAME"):
            simple = kind.get_class() == h5py.h5t.STRING and not kind.is_variable_str() and attribute.shape == ()
        elif simple and kind.get_class() == h5py.h5t.STRING:
            simple = int(np.prod(attribute.shape)) <= WORDS
        if not simple or attribute.get_space().get_simple_extent_type() == h5py.h5s.NULL:
            return f"has an attribute {name.decode('utf-8', 'replace')[:80]!r} of a kind that is never written"
    return None


def _flaw_of_array(one: h5py.Dataset, size: int) -> str | None:
    """Whether the numbers are in this file, packed as here, and as many as it says."""
    made = one.id.get_create_plist()
    if one.is_virtual or made.get_external_count():
        return "is kept in another file"
    if not {made.get_filter(index)[0] for index in range(made.get_nfilters())} <= FILTERS:
        return "is packed by a filter that is never used"
    words = h5py.check_string_dtype(one.dtype)
    if one.shape is None or (words is None and one.dtype.kind not in "iuf"):
        return f"holds {one.dtype}"
    if "NAME" in one.attrs and bytes(np.bytes_(one.attrs["NAME"])).startswith(BARE):
        return None
    claimed, held = one.size * one.dtype.itemsize, one.id.get_storage_size()
    whole = held > 0 or not claimed
    if one.chunks is not None:
        wanted = [-(-length // chunk) for length, chunk in zip(one.shape, one.chunks, strict=True)]
        whole = whole and one.id.get_num_chunks() == int(np.prod(wanted, dtype=object))
        whole = whole and all(chunk <= length for length, chunk in zip(one.shape, one.chunks, strict=True))
    if not whole or claimed > (DENSEST * held if made.get_nfilters() else held):
        return f"claims {one.size:,} values that are not in it"
    if words is not None and claimed:
        return _flaw_of_words(one, size)
    return None


def _flaw_of_words(one: h5py.Dataset, size: int) -> str | None:
    """A few signs can stand for many: each text of a variable may point at the same long one."""
    total = longest = 0
    for start in range(0, one.shape[0] if one.shape else 1, WORDS):
        some = one[start : start + WORDS] if one.shape else one[()]
        for text in np.ravel(np.asarray(some, dtype=object)):
            total, longest = total + len(text), max(longest, len(text))
        if total > size or 4 * longest * int(one.size or 0) > 100 * size + (1 << 20):  # as numpy will hold them
            return "claims more text than is in it"
    return None
