"""The common interface of the three kinds of Dataset: result, audit and comparison."""

import os
from collections.abc import Callable
from dataclasses import dataclass

import xarray as xr

from posterity.errors import InputError
from posterity.results.netcdf import plain


@dataclass(frozen=True)
class Kind:
    """One kind of Dataset: how it names itself, what can be wrong with it, and how an error message speaks of it."""

    name: str  # attrs["kind"]; empty for a result
    expected: str  # in a program
    advice: str
    expected_file: str  # on disk
    file_advice: str
    find_flaw: Callable[[xr.Dataset], str | None]  # the first flaw as half a sentence
    restore: Callable[[xr.Dataset], xr.Dataset] = lambda dataset: dataset  # what a file does not keep

    def check(self, dataset: object) -> xr.Dataset:
        """Return the Dataset unchanged; raise InputError if it has a flaw."""
        flaw = self.find_flaw(dataset) if isinstance(dataset, xr.Dataset) else f"{type(dataset).__name__} came"
        if flaw is not None:
            raise InputError(f"expected {self.expected}, but {flaw}; {self.advice}")
        assert isinstance(dataset, xr.Dataset)
        return dataset

    def check_file(self, dataset: xr.Dataset, path: str | os.PathLike[str]) -> xr.Dataset:
        """Return the Dataset of a file, restored; raise InputError if it has a flaw."""
        flaw = self.find_flaw(dataset)
        if flaw is not None:
            raise InputError(f"{path}: expected {self.expected_file}, but {flaw}; {self.file_advice}")
        return self.restore(dataset)


def kind_name(dataset: object) -> str:
    """Return the name of a Dataset's kind by its own account; empty for a result."""
    return str(plain(getattr(dataset, "attrs", {}).get("kind")))
