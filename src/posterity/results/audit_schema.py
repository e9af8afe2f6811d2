"""The audit as a labelled Dataset, and its file: netCDF, written whole or not at all.

verdict, reason            (model, clause)    holds, fails or mixed; one sentence
figure, error, baseline    (model, measure)   with `of_clause`, `formula`, `expected` and `units_of` of each measure
everything that was measured, in variables with a leading dimension `model`
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import xarray as xr

from posterity.clauses.clause import FAILS, HOLDS, MIXED, REFUSED, Clause, Finding
from posterity.errors import InputError
from posterity.results import netcdf
from posterity.results.schema import kind, plain, writable, write_whole

KIND, KIND_VERSION = "audit", 1
NUMBERS = {"figure": ("model", "measure"), "error": ("model", "measure"), "baseline": ("model", "measure")}
WORDS = {
    "verdict": ("model", "clause"), "reason": ("model", "clause"), "name": ("clause",), "statement": ("clause",),
    "formula": ("measure",), "expected": ("measure",), "units_of": ("measure",),
}  # fmt: skip
LABELS = {"model": "O", "clause": "i", "measure": "O", "of_clause": "i"}


def assemble(
    found: Mapping[str, Mapping[int, Finding]], clauses: Sequence[Clause], attrs: Mapping[str, object]
) -> xr.Dataset:
    """The findings of one or more models, side by side."""
    models = list(found)
    measures: dict[str, tuple[int, str, str, str]] = {}
    for findings in found.values():
        for number, finding in findings.items():
            for one in finding.figures:
                measures.setdefault(one.name, (number, one.formula, one.expected, one.units))
    table = {name: np.full((len(models), len(measures)), np.nan) for name in NUMBERS}
    for row, findings in enumerate(found.values()):
        for finding in findings.values():
            for one in finding.figures:
                at = list(measures).index(one.name)
                table["figure"][row, at], table["error"][row, at] = one.value, one.error
                table["baseline"][row, at] = one.baseline
    numbers, formulas, expected, units = zip(*measures.values(), strict=True)
    words = {
        name: [[plain(getattr(findings[one.number], name)) for one in clauses] for findings in found.values()]
        for name in ("verdict", "reason")
    }
    said = {"formula": formulas, "expected": expected, "units_of": units}
    said |= {name: [getattr(one, name) for one in clauses] for name in ("name", "statement")}
    dataset = xr.Dataset(
        {name: (NUMBERS[name], values) for name, values in table.items()}
        | {name: (WORDS[name], np.array(values, dtype=str)) for name, values in (words | said).items()},
        {
            "model": np.array([plain(one) for one in models], dtype=str),
            "clause": [one.number for one in clauses], "measure": np.array(list(measures), dtype=str),
            "of_clause": ("measure", list(numbers)),
        },
        {name: plain(value) for name, value in attrs.items()} | {"kind": KIND, "kind_version": KIND_VERSION},
    )  # fmt: skip
    for name in dataset.data_vars:
        dataset[name].attrs = {"long_name": str(name)} | ({"units": "1"} if name in NUMBERS else {})
    names = dict.fromkeys(name for findings in found.values() for one in findings.values() for name in one.variables)
    merged = [dataset]
    for name in names:
        parts = [
            next(one.variables[name] for one in findings.values() if name in one.variables).expand_dims(model=[model])
            for model, findings in zip(dataset.model.values, found.values(), strict=True)
            if any(name in one.variables for one in findings.values())
        ]
        whole = parts[0] if len(parts) == 1 else xr.concat(parts, "model", join="outer", combine_attrs="override")
        merged.append(whole.reindex(model=dataset.model).rename(name).to_dataset())
    return xr.merge(merged, join="outer", combine_attrs="override", compat="override")


def is_audit(result: object) -> bool:
    """Whether a Dataset is one of the audit."""
    return isinstance(result, xr.Dataset) and kind(result) == KIND


def check(audit: xr.Dataset) -> xr.Dataset:
    """Return an audit; InputError says what is wrong with it."""
    flaw = _flaw(audit)
    if flaw is not None:
        raise InputError(f"expected an audit as posterity.audit returns it, but {flaw}; pass that Dataset unchanged")
    return audit


def save(audit: xr.Dataset, path: str | os.PathLike[str]) -> Path:
    """Write an audit as compressed netCDF, whole or not at all; returns the path. Raises InputError."""
    target = writable(path)
    write_whole(target, netcdf.packed(check(audit)))
    return Path(path)


def load(path: str | os.PathLike[str]) -> xr.Dataset:
    """Read an audit into memory and close the file. InputError for anything that is not whole and sound."""
    return loaded(netcdf.read(path), path)


def loaded(found: xr.Dataset, path: str | os.PathLike[str]) -> xr.Dataset:
    """The audit that `netcdf.read` found in a file. InputError as `load`."""
    flaw = _flaw(found)
    if flaw is not None:
        raise InputError(f"{path}: expected an audit of posterity, but {flaw}; run `posterity audit` again")
    return found


def _flaw(audit: xr.Dataset) -> str | None:
    if not is_audit(audit):
        return "it is something else"
    if audit.attrs.get("kind_version") != KIND_VERSION:
        return f"its version is {audit.attrs.get('kind_version')!r} and this is posterity for version {KIND_VERSION}"
    for name, dims in {**NUMBERS, **WORDS}.items():
        if name not in audit.variables:
            return f"it has no {name!r}"
        if audit[name].dims != dims:
            return f"{name!r} has the dimensions {audit[name].dims} where {dims} belong"
        if audit[name].dtype.kind not in ("f" if name in NUMBERS else "UO"):
            return f"{name!r} holds {audit[name].dtype}"
    for name, sort in LABELS.items():
        if name not in audit.coords or (audit[name].dtype.kind in "UO") != (sort == "O"):
            return f"its coordinate {name!r} is missing or wrong"
    if not set(audit.verdict.values.ravel().tolist()) <= {HOLDS, FAILS, MIXED, REFUSED}:
        return "a verdict is none of holds, fails, mixed, not measured"
    unknown = [name for name, one in audit.variables.items() if one.dtype.kind not in "fiUO"]
    return f"{unknown[0]!r} holds {audit[unknown[0]].dtype}" if unknown else None
