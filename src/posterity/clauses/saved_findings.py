"""The findings of an unfinished audit on disk: one file for each model and clause, written atomically."""

import json
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict

import xarray as xr

from posterity.errors import InputError, first_line
from posterity.measurement.state_folder import FolderLock, check_settings, write_state_file
from posterity.results.audit_schema import Figure, Finding

FILE = "{}-clause-{}.nc"  # number of the model, number of the clause


class SavedFindings:
    """The state folder of an audit; without a folder nothing is saved."""

    def __init__(self, lock: FolderLock, settings: Mapping[str, object]):
        """Use the folder of a lock that is held; `open` acquires it."""
        self._lock, self.folder = lock, lock.folder
        self.settings = json.loads(json.dumps(settings))

    @classmethod
    def open(
        cls, folder: str | os.PathLike[str] | None, settings: Mapping[str, object], rank: int = 0
    ) -> "SavedFindings":
        """Lock the folder for the process of this rank.

        Raises:
            InputError: Another run holds the lock, or the folder cannot be made.
        """
        return cls(FolderLock.acquire(folder, rank), settings)

    def hold_lock(self) -> AbstractContextManager[None]:
        """Hold the lock for the block; on Ctrl-C report where the findings are saved."""
        return self._lock.hold(lambda: "the rows that were finished are kept")

    def load(self, model: int, clause: int) -> Finding | None:
        """Return the finding of an earlier attempt, if there is one.

        Args:
            model: Number of the model among those of the audit.
            clause: Number of the clause.

        Raises:
            InputError: It is of other settings, or damaged.
        """
        if self.folder is None or not (file := self.folder / FILE.format(model, clause)).exists():
            return None
        try:
            with xr.open_datatree(file, engine="h5netcdf", decode_times=False) as tree:
                record = json.loads(tree.attrs["finding"])
                variables = {name: _load_variable(tree[name].to_dataset(), name) for name in record["variables"]}
            figures = tuple(Figure(**figure) for figure in record["figures"])
        except Exception as error:  # a damaged file can fail anywhere inside HDF5, h5netcdf and xarray
            raise InputError(
                f"{file} is no state of an audit ({first_line(error)}): remove {self.folder} to start again"
            ) from error
        check_settings(self.folder, record["settings"], self.settings)
        return Finding(figures, record["verdict"], record["reason"], variables)

    def save(self, model: int, clause: int, finding: Finding) -> None:
        """Write a finding."""
        if self.folder is None:
            return
        record = {
            "settings": self.settings, "verdict": finding.verdict, "reason": finding.reason,
            "figures": [asdict(figure) for figure in finding.figures], "variables": list(finding.variables),
        }  # fmt: skip
        tree = xr.DataTree.from_dict({name: array.to_dataset(name=name) for name, array in finding.variables.items()})
        tree.attrs["finding"] = json.dumps(record)
        with write_state_file(self.folder / FILE.format(model, clause)) as path:
            tree.to_netcdf(path, engine="h5netcdf")


def _load_variable(dataset: xr.Dataset, name: str) -> xr.DataArray:
    """Return a variable in memory; texts as numpy has them."""
    dataset = dataset.load()
    for label, variable in dataset.variables.items():
        dataset[label].encoding = {}
        if variable.dtype.kind == "O":
            dataset[label] = dataset[label].astype(str)
    return dataset[name]
