"""The Dataset of an audit: figures, verdicts, and their validation.

`verdict`, `reason` (model, clause): holds, fails, mixed or not measured; one sentence.
`figure`, `error`, `baseline` and `windows` (of the error) (model, measure), each measure with `of_clause`, `formula`,
`expected` and `units_of`.
Every other variable is what a clause measured; it has a leading dimension `model`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import xarray as xr

from posterity.results.kind import Kind, kind_name

KIND, KIND_VERSION = "audit", 1
HOLDS, FAILS, MIXED = "holds", "fails", "mixed"
REFUSED = "not measured"  # the model or the text lacks what the clause needs
NUMERIC_DIMS = dict.fromkeys(("figure", "error", "baseline", "windows"), ("model", "measure"))
OPTIONAL = {"windows"}  # older audits have none
TEXT_DIMS = {
    "verdict": ("model", "clause"), "reason": ("model", "clause"), "name": ("clause",), "statement": ("clause",),
    "formula": ("measure",), "expected": ("measure",), "units_of": ("measure",),
}  # fmt: skip
COORDINATES = {"model": "text", "clause": "int", "measure": "text", "of_clause": "int"}


SHARE = "share"  # the units of a part of a whole, which table and page show in percent


@dataclass(frozen=True)
class Figure:
    """One number of a clause, with its standard error and what chance or counting predicts."""

    name: str
    value: float
    error: float = math.nan
    baseline: float = math.nan
    formula: str = ""
    expected: str = ""  # what the baseline is
    units: str = "1"
    windows: int = 0  # (or prefixes, segments) over which the error is taken; 0 for an error that is of none


@dataclass(frozen=True)
class Finding:
    """The outcome of one clause on one model."""

    figures: Sequence[Figure]
    verdict: str
    reason: str  # one sentence; names layers and heads where the verdict is mixed
    variables: Mapping[str, xr.DataArray] = field(default_factory=dict)  # by names that begin with the clause's prefix


def _flaw(audit: xr.Dataset) -> str | None:
    """Return the first flaw as half a sentence; None if there is none."""
    if kind_name(audit) != KIND:
        return "it is something else"
    if audit.attrs.get("kind_version") != KIND_VERSION:
        return f"its version is {audit.attrs.get('kind_version')!r} and this is posterity for version {KIND_VERSION}"
    for name, dims in {**NUMERIC_DIMS, **TEXT_DIMS}.items():
        if name not in audit.variables:
            if name in OPTIONAL:
                continue
            return f"it has no {name!r}"
        if audit[name].dims != dims:
            return f"{name!r} has the dimensions {audit[name].dims} where {dims} belong"
        if audit[name].dtype.kind not in ("f" if name in NUMERIC_DIMS else "UO"):
            return f"{name!r} holds {audit[name].dtype}"
    for name, kind in COORDINATES.items():
        if name not in audit.coords or (audit[name].dtype.kind in "UO") != (kind == "text"):
            return f"its coordinate {name!r} is missing or wrong"
    if not set(audit.verdict.values.ravel().tolist()) <= {HOLDS, FAILS, MIXED, REFUSED}:
        return "a verdict is none of holds, fails, mixed, not measured"
    unknown = [name for name, variable in audit.variables.items() if variable.dtype.kind not in "fiUO"]
    return f"{unknown[0]!r} holds {audit[unknown[0]].dtype}" if unknown else None


AUDIT = Kind(
    name=KIND,
    expected="an audit as posterity.audit returns it",
    advice="pass that Dataset unchanged",
    expected_file="an audit of posterity",
    file_advice="run `posterity audit` again",
    find_flaw=_flaw,
)
