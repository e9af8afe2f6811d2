"""The audit as a labelled Dataset, and its file: netCDF, written whole or not at all.

verdict, reason            (model, clause)    holds, fails or mixed; one sentence
figure, error, baseline    (model, measure)   with `of_clause`, `formula`, `expected` and `units_of` of each measure
everything that was measured, in variables with a leading dimension `model`
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import xarray as xr

from posterity.results.kind import Kind, kind_name

KIND, KIND_VERSION = "audit", 1
NUMBERS = {"figure": ("model", "measure"), "error": ("model", "measure"), "baseline": ("model", "measure")}
WORDS = {
    "verdict": ("model", "clause"), "reason": ("model", "clause"), "name": ("clause",), "statement": ("clause",),
    "formula": ("measure",), "expected": ("measure",), "units_of": ("measure",),
}  # fmt: skip
LABELS = {"model": "O", "clause": "i", "measure": "O", "of_clause": "i"}


def _flaw(audit: xr.Dataset) -> str | None:
    if kind_name(audit) != KIND:
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


HOLDS, FAILS, MIXED = "holds", "fails", "mixed"


REFUSED = "not measured"  # what the row needs, this model or text has not


@dataclass(frozen=True)
class Figure:
    """One number of a row, with its standard error and what chance or counting predicts."""

    name: str
    value: float
    error: float = math.nan
    baseline: float = math.nan
    formula: str = ""
    expected: str = ""  # what the baseline is
    units: str = "1"


@dataclass(frozen=True)
class Finding:
    """What one row found on one model."""

    figures: Sequence[Figure]
    verdict: str
    reason: str  # one sentence; in which layers and heads, where the verdict is mixed
    variables: Mapping[str, xr.DataArray] = field(default_factory=dict)  # with units and long_name; names of the row


AUDIT = Kind(
    name=KIND,
    expected="an audit as posterity.audit returns it",
    advice="pass that Dataset unchanged",
    expected_file="an audit of posterity",
    file_advice="run `posterity audit` again",
    find_flaw=_flaw,
)
