"""The findings of an audit so far, on disk: one file for each model and clause, written whole or not at all."""

import json
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict

import xarray as xr

from posterity.errors import InputError
from posterity.measurement.run_state import Held, check_settings, written
from posterity.results.audit_schema import Figure, Finding

FILE = "{}-clause-{}.nc"  # number of the model, number of the clause


class Kept:
    """The folder of an audit that may be stopped at any moment; without a folder nothing is kept."""

    def __init__(self, folder: str | os.PathLike[str] | None, settings: Mapping[str, object], rank: int = 0):
        """Hold the folder.

        Raises:
            InputError: Another run does, or it cannot be made.
        """
        self._held = Held(folder, rank)
        self.folder, self.settings = self._held.folder, json.loads(json.dumps(settings))

    def kept(self) -> AbstractContextManager[None]:
        """Inside, an interruption says where the rows are kept; then the folder is free."""
        return self._held.working(lambda: "the rows that were finished are kept")

    def get(self, model: int, clause: int) -> Finding | None:
        """What an earlier attempt found.

        Raises:
            InputError: It is of other settings, or damaged.
        """
        if self.folder is None or not (file := self.folder / FILE.format(model, clause)).exists():
            return None
        try:
            with xr.open_datatree(file, engine="h5netcdf", decode_times=False) as tree:
                known = json.loads(tree.attrs["finding"])
                variables = {name: _loaded(tree[name].to_dataset(), name) for name in known["variables"]}
            figures = tuple(Figure(**one) for one in known["figures"])
        except Exception as error:  # a damaged file can fail anywhere inside HDF5, h5netcdf and xarray
            reason = next(iter(str(error).splitlines()), "")
            raise InputError(
                f"{file} is no state of an audit ({reason}): remove {self.folder} to start again"
            ) from error
        check_settings(self.folder, known["settings"], self.settings)
        return Finding(figures, known["verdict"], known["reason"], variables)

    def put(self, model: int, clause: int, finding: Finding) -> None:
        """Keep what was found."""
        if self.folder is None:
            return
        known = {
            "settings": self.settings, "verdict": finding.verdict, "reason": finding.reason,
            "figures": [asdict(one) for one in finding.figures], "variables": list(finding.variables),
        }  # fmt: skip
        tree = xr.DataTree.from_dict({name: one.to_dataset(name=name) for name, one in finding.variables.items()})
        tree.attrs["finding"] = json.dumps(known)
        with written(self.folder / FILE.format(model, clause)) as part:
            tree.to_netcdf(part, engine="h5netcdf")


def _loaded(dataset: xr.Dataset, name: str) -> xr.DataArray:
    """A variable in memory; texts as numpy has them."""
    found = dataset.load()
    for label, one in found.variables.items():
        found[label].encoding = {}
        if one.dtype.kind == "O":
            found[label] = found[label].astype(str)
    return found[name]
