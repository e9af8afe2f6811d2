"""Assemble the findings of an audit as one labelled Dataset."""

from collections.abc import Mapping, Sequence

import numpy as np
import xarray as xr

from posterity.clauses.clause import Clause
from posterity.results.audit_schema import KIND, KIND_VERSION, NUMERIC_DIMS, TEXT_DIMS, Figure, Finding
from posterity.results.netcdf import portable_value

Findings = Mapping[str, Mapping[int, Finding]]  # by model, then by the number of the clause


def assemble(findings: Findings, clauses: Sequence[Clause], attrs: Mapping[str, object]) -> xr.Dataset:
    """Return the findings of one or more models, side by side, as posterity.results.audit_schema describes them.

    Args:
        findings: Every model's finding of every clause.
        clauses: In the order in which they are shown.
        attrs: Provenance.
    """
    dataset = xr.Dataset(
        _numbers(findings) | _texts(findings, clauses),
        _coordinates(findings, clauses),
        {name: portable_value(value) for name, value in attrs.items()} | {"kind": KIND, "kind_version": KIND_VERSION},
    )
    for name in dataset.data_vars:
        dataset[name].attrs = {"long_name": str(name)} | ({"units": "1"} if name in NUMERIC_DIMS else {})
    datasets = [dataset, *_measured_variables(findings, dataset.model)]
    return xr.merge(datasets, join="outer", combine_attrs="override", compat="override")


def _measures(findings: Findings) -> dict[str, tuple[int, Figure]]:
    """Return every measure once, by name: the number of its clause, and the figure of the first model that has it."""
    measures: dict[str, tuple[int, Figure]] = {}
    for by_clause in findings.values():
        for number, finding in by_clause.items():
            for figure in finding.figures:
                measures.setdefault(figure.name, (number, figure))
    return measures


def _numbers(findings: Findings) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    """Return figure, error, baseline and windows, (model, measure); NaN where a model lacks a measure."""
    columns = {name: column for column, name in enumerate(_measures(findings))}
    table: dict[str, np.ndarray] = {str(name): np.full((len(findings), len(columns)), np.nan) for name in NUMERIC_DIMS}
    for row, by_clause in enumerate(findings.values()):
        for finding in by_clause.values():
            for figure in finding.figures:
                place = row, columns[figure.name]
                table["figure"][place], table["error"][place] = figure.value, figure.error
                table["baseline"][place], table["windows"][place] = figure.baseline, figure.windows
    return {name: (dims, table[name]) for name, dims in NUMERIC_DIMS.items()}


def _texts(findings: Findings, clauses: Sequence[Clause]) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    """Return verdicts and reasons, (model, clause), and what describes the measures and the clauses."""
    figures = [figure for _, figure in _measures(findings).values()]
    texts = {
        name: [
            [portable_value(getattr(by_clause[clause.number], name)) for clause in clauses]
            for by_clause in findings.values()
        ]
        for name in ("verdict", "reason")
    }
    texts |= {
        "formula": [figure.formula for figure in figures],
        "expected": [figure.expected for figure in figures],
        "units_of": [figure.units for figure in figures],
        "name": [clause.name for clause in clauses],
        "statement": [clause.statement for clause in clauses],
    }
    return {name: (TEXT_DIMS[name], np.array(values, dtype=str)) for name, values in texts.items()}


def _coordinates(findings: Findings, clauses: Sequence[Clause]) -> dict[str, object]:
    measures = _measures(findings)
    return {
        "model": np.array([portable_value(model) for model in findings], dtype=str),
        "clause": [clause.number for clause in clauses],
        "measure": np.array(list(measures), dtype=str),
        "of_clause": ("measure", [number for number, _ in measures.values()]),
    }


def _measured_variables(findings: Findings, models: xr.DataArray) -> list[xr.Dataset]:
    """Return everything that the clauses measured, with a leading dimension `model`; NaN where a model lacks it."""
    variables = [
        {name: array for finding in by_clause.values() for name, array in finding.variables.items()}
        for by_clause in findings.values()
    ]
    names = dict.fromkeys(name for by_name in variables for name in by_name)
    datasets = []
    for name in names:
        parts = [
            by_name[name].expand_dims(model=[model])
            for model, by_name in zip(models.values, variables, strict=True)
            if name in by_name
        ]
        array = parts[0] if len(parts) == 1 else xr.concat(parts, "model", join="outer", combine_attrs="override")
        datasets.append(array.reindex(model=models).rename(name).to_dataset())
    return datasets
