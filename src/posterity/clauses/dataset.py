"""The findings of an audit as one labelled Dataset."""

from collections.abc import Mapping, Sequence

import numpy as np
import xarray as xr

from posterity.clauses.clause import Clause
from posterity.results.audit_schema import KIND, KIND_VERSION, NUMBERS, WORDS, Finding
from posterity.results.schema import plain


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
