"""The common interface of the kinds of Dataset (result, audit, comparison, ...): validation and its messages."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import xarray as xr

from posterity.errors import InputError
from posterity.results.netcdf import portable_value


@dataclass(frozen=True)
class Kind:
    """One kind of Dataset: its name, its validation, and the words of its error messages."""

    name: str  # attrs["kind"]; empty for a result
    expected: str  # names the kind in an error about a Dataset in memory
    advice: str
    expected_file: str  # names the kind in an error about a file
    file_advice: str
    find_flaw: Callable[[xr.Dataset], str | None]  # the first flaw as half a sentence, or None
    upgrade: Callable[[xr.Dataset], xr.Dataset] = lambda dataset: dataset  # from the schema of an older file
    restore: Callable[[xr.Dataset], xr.Dataset] = lambda dataset: dataset  # adds what a file does not keep

    def check(self, dataset: object) -> xr.Dataset:
        """Return the Dataset unchanged; raise InputError unless it is a valid one of this kind."""
        flaw = self.find_flaw(dataset) if isinstance(dataset, xr.Dataset) else f"{type(dataset).__name__} came"
        if flaw is not None:
            raise InputError(f"expected {self.expected}, but {flaw}; {self.advice}")
        assert isinstance(dataset, xr.Dataset)
        return dataset

    def check_file(self, dataset: xr.Dataset, path: str | os.PathLike[str]) -> xr.Dataset:
        """Return the Dataset that was read from a file, restored; raise InputError unless it is a valid one."""
        dataset = self.upgrade(dataset)
        flaw = self.find_flaw(dataset)
        if flaw is not None:
            raise InputError(f"{path}: expected {self.expected_file}, but {flaw}; {self.file_advice}")
        return self.restore(dataset)


def find_variable_flaw(dataset: xr.Dataset, variables: Mapping[str, tuple[tuple[str, ...], str]]) -> str | None:
    """Return as half a sentence that a variable is missing or of another form, or that there is no entry; None if not.

    `variables`: dimensions, and kinds of numpy's dtypes, by name.
    """
    for name, (dims, dtypes) in variables.items():
        if name not in dataset.variables:
            return f"it has no {name!r}"
        variable = dataset[name]
        if variable.dims != dims or variable.dtype.kind not in dtypes:
            return f"{name!r} is {variable.dtype} by {', '.join(map(str, variable.dims)) or 'nothing'}"
    return "it holds nothing" if 0 in dataset.sizes.values() else None


def kind_name(dataset: object) -> str:
    """Return the kind that a Dataset names in its attributes; empty for a result."""
    return str(portable_value(getattr(dataset, "attrs", {}).get("kind")))
