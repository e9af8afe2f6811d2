"""Write a Dataset as netCDF with a trailing SHA-256; validate the HDF5 structure of a file before opening it.

Threat model: a result file may come from anyone. HDF5 can hold more than arrays: links into other files, arrays stored
in other files, filters that load code, sizes that nothing backs, attributes at which its C library crashes. None of
this is ever written here, so none of it is read: the structure of a file is checked before xarray and h5netcdf open it.
"""

import hashlib
import os
from typing import Any

import h5py
import numpy as np
import xarray as xr

from posterity.errors import InputError, first_line, readable

SEAL = b"\nposterity sha256 "  # and 64 hex digits, after what HDF5 reads: any change of the bytes is found
MAX_COMPRESSION = 1032  # to 1: no zlib stream unpacks to more
FILTERS = {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32}
BARE_DIMENSION = b"This is a netCDF dimension but not a netCDF variable"  # netCDF's mark of a dimension without values
MAX_TEXTS = 64  # in one attribute; read at a time from one variable


def pack(dataset: xr.Dataset) -> bytes:
    """Return the bytes of a Dataset's file: compressed netCDF with a checksum for each chunk, and the seal.

    Control characters in texts and attributes are replaced first (`posterity.errors.readable`).
    """
    dataset = _portable(dataset)
    zlib = {"zlib": True, "complevel": 4, "fletcher32": True, "_FillValue": None}
    encoding = {name: zlib for name, array in dataset.variables.items() if array.dtype.kind in "if" and array.ndim}
    data = bytes(dataset.to_netcdf(engine="h5netcdf", encoding=encoding))
    return data + SEAL + hashlib.sha256(data).hexdigest().encode()


def read_netcdf(path: str | os.PathLike[str]) -> xr.Dataset:
    """Read a file into memory and close it; texts are made readable.

    Takes at most `MAX_COMPRESSION` times the file's size.

    Raises:
        InputError: There is no such file, or it is damaged, claims values that it does not hold, or is no netCDF.
    """
    try:
        is_file = os.path.isfile(path)
    except ValueError:  # a null character
        is_file = False
    if not is_file:
        reason = "is a folder" if os.path.isdir(path) else "does not exist or is no ordinary file"
        raise InputError(f"{path}: expected a result file of posterity, but it {reason}; check the path")
    try:
        flaw = _flaw(os.path.realpath(path))
        if flaw is None:
            with xr.open_dataset(
                os.path.realpath(path), engine="h5netcdf", decode_times=False, mask_and_scale=False,
                create_default_indexes=False, cache=False,
            ) as file:  # fmt: skip
                return _portable(file.load())
    except Exception as error:  # a damaged file can fail anywhere inside HDF5, h5netcdf and xarray
        flaw = f"it cannot be read: {first_line(error)[:200]}"
    raise InputError(
        f"{path}: expected a result file of posterity (netCDF), but {flaw}; it is damaged or something else: check the "
        "path, or make it again"
    )


def portable_value(value: object) -> str | int | float:
    """Return a value as one that every file can hold and every terminal can show; None becomes ""."""
    if value is None:
        return ""
    if isinstance(value, (bool, int, np.bool_, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(value)
    return readable(str(value))


def _portable(dataset: xr.Dataset) -> xr.Dataset:
    variables = {name: _portable_variable(variable) for name, variable in dataset.variables.items()}
    coords = {name: variables.pop(name) for name in dataset.coords}
    return xr.Dataset(variables, coords, _portable_attributes(dataset.attrs))


def _portable_variable(variable: xr.Variable) -> xr.Variable:
    values = variable.values
    if values.dtype.kind in "OU":
        values = np.array([readable(str(text)) for text in values.ravel()], dtype=str).reshape(values.shape)
    return xr.Variable(variable.dims, values, _portable_attributes(variable.attrs))


def _portable_attributes(attrs: dict[Any, Any]) -> dict[str, Any]:
    return {str(name): portable_value(value) for name, value in attrs.items()}


# ---- the structure of a file


def _flaw(path: str) -> str | None:
    """Return the first flaw of a file as half a sentence; None if there is none."""
    if _has_broken_seal(path):
        return "it cannot be read: its bytes are not those that were written"
    file_size, stored = os.path.getsize(path), 0
    with h5py.File(path, "r") as file:
        flaw = _flaw_of_attributes(file)
        for name in file if flaw is None else ():
            if not isinstance(file.get(name, getlink=True), h5py.HardLink):
                return f"{name!r} is a link to something else"
            array = file[name]
            if not isinstance(array, h5py.Dataset):
                return f"{name!r} is no array"
            stored += array.id.get_storage_size()
            flaw = _flaw_of_attributes(array) or _flaw_of_array(array, file_size)
            if flaw is None and stored > file_size:
                flaw = "takes more room than the file has"
            if flaw is not None:
                return f"{name!r} {flaw}"
        return f"it {flaw}" if flaw else None


def _has_broken_seal(path: str) -> bool:
    """Compare the seal with the bytes before it; files of other programs have no seal, so none that is broken."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = max(0, size - len(SEAL) - 64)
        file.seek(start)
        tail = file.read()
        offset = tail.find(SEAL)
        if offset < 0:
            return False
        file.seek(0)
        digest, remaining = hashlib.sha256(), start + offset
        while remaining and (block := file.read(min(remaining, 1 << 20))):
            digest.update(block)
            remaining -= len(block)
        return digest.hexdigest().encode() != tail[offset + len(SEAL) :]


def _flaw_of_attributes(node: Any) -> str | None:
    """Check the types and sizes of attributes, not their values: the C library reads references without checks."""
    for index in range(h5py.h5a.get_num_attrs(node.id)):
        attribute = h5py.h5a.open(node.id, index=index)
        kind, name = attribute.get_type(), attribute.name
        simple = kind.get_class() in (h5py.h5t.INTEGER, h5py.h5t.FLOAT, h5py.h5t.STRING)
        if name == b"DIMENSION_LIST":
            simple = kind.get_class() == h5py.h5t.VLEN and kind.get_super().get_class() == h5py.h5t.REFERENCE
            simple = simple and attribute.shape == (len(node.shape),)
        elif name == b"REFERENCE_LIST":
            simple = kind.get_class() == h5py.h5t.COMPOUND
        elif name in (b"CLASS", b"NAME"):
            simple = kind.get_class() == h5py.h5t.STRING and not kind.is_variable_str() and attribute.shape == ()
        elif simple and kind.get_class() == h5py.h5t.STRING:
            simple = int(np.prod(attribute.shape)) <= MAX_TEXTS
        if not simple or attribute.get_space().get_simple_extent_type() == h5py.h5s.NULL:
            return f"has an attribute {name.decode('utf-8', 'replace')[:80]!r} of a kind that is never written"
    return None


def _flaw_of_array(array: h5py.Dataset, file_size: int) -> str | None:
    """Check that an array's values are in this file, compressed as `pack` does it, and as many as its shape says."""
    creation = array.id.get_create_plist()
    if array.is_virtual or creation.get_external_count():
        return "is kept in another file"
    if not {creation.get_filter(index)[0] for index in range(creation.get_nfilters())} <= FILTERS:
        return "is packed by a filter that is never used"
    text_type = h5py.check_string_dtype(array.dtype)
    if array.shape is None or (text_type is None and array.dtype.kind not in "iuf"):
        return f"holds {array.dtype}"
    if "NAME" in array.attrs and bytes(np.bytes_(array.attrs["NAME"])).startswith(BARE_DIMENSION):
        return None
    claimed, stored = array.size * array.dtype.itemsize, array.id.get_storage_size()
    complete = stored > 0 or not claimed
    if array.chunks is not None:
        chunks = [-(-length // chunk) for length, chunk in zip(array.shape, array.chunks, strict=True)]
        complete = complete and array.id.get_num_chunks() == int(np.prod(chunks, dtype=object))
        complete = complete and all(chunk <= length for length, chunk in zip(array.shape, array.chunks, strict=True))
    if not complete or claimed > (MAX_COMPRESSION * stored if creation.get_nfilters() else stored):
        return f"claims {array.size:,} values that are not in it"
    if text_type is not None and claimed:
        return _flaw_of_texts(array, file_size)
    return None


def _flaw_of_texts(array: h5py.Dataset, file_size: int) -> str | None:
    """Check the size of an array of texts once read: all of its elements may point at the same long text."""
    total = longest = 0
    for start in range(0, array.shape[0] if array.shape else 1, MAX_TEXTS):
        block = array[start : start + MAX_TEXTS] if array.shape else array[()]
        for text in np.ravel(np.asarray(block, dtype=object)):
            total, longest = total + len(text), max(longest, len(text))
        # numpy holds four bytes a character, and every text as long as the longest
        if total > file_size or 4 * longest * int(array.size or 0) > 100 * file_size + (1 << 20):
            return "claims more text than is in it"
    return None
