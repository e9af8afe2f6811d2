"""A clause of the audit: a statement, a measurement with a baseline and a verdict, and charts.

Every clause is one function from a `Subject` to a `Finding`, and one from the audit's Dataset to its charts.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import xarray as xr
from torch import Tensor

from posterity.clauses.drawing import Chart, View
from posterity.clauses.subject import Subject
from posterity.results.audit_schema import FAILS, HOLDS, MIXED, Finding
from posterity.results.formatting import list_parts
from posterity.results.stats import confidence


@dataclass(frozen=True)
class Clause:
    """One clause of the audit."""

    number: int
    name: str
    statement: str
    prefix: str  # of the names of its variables in the audit
    measure: Callable[[Subject], Finding]  # names variables without the prefix
    draw: Callable[[View], list[Chart]]
    cost: int = 1  # time on the default model, relative to the cheapest clauses
    reads_ledger: bool = False  # is computed from `Subject.ledger`, so that one process should measure all such clauses

    def find(self, subject: Subject) -> Finding:
        """Measure the clause, and put its prefix before the names of its variables."""
        finding = self.measure(subject)
        variables = {f"{self.prefix}_{name}": variable for name, variable in finding.variables.items()}
        return replace(finding, variables=variables)


def margin_of_error(error: Any, windows: int) -> np.ndarray:
    """Return how far a value must be from another to differ from it; 0 where there is no error.

    Args:
        error: Standard errors.
        windows: How many windows (prefixes, segments) they are taken over: half the 95 % interval by Student's t. 0 or
            1 for an error that is of none: two standard errors.
    """
    error = np.asarray(error, dtype=float)
    return np.nan_to_num(confidence(error, windows) if windows > 1 else 2 * error)


def judge(
    value: Any, margin: Any, threshold: float = 0.5, *, above: bool = True, noun: str = "layer"
) -> tuple[str, str, int]:
    """Judge a claim part by part: which parts confirm it beyond the margin of error, and which contradict it.

    Args:
        value: The measure of each part (layer, or layer and head); a NaN part neither confirms nor contradicts.
        margin: How far from the threshold a value says something (`margin_of_error`); 0: the value alone decides.
        threshold: The claim is a value above it, or below it.
        above: Which of the two.
        noun: What a part is called.

    Returns:
        The verdict (holds where no part contradicts and most confirm, fails where no part confirms and most
        contradict, else mixed), the parts that contradict in words, and how many parts confirm.
    """
    value = np.asarray(value, dtype=float)
    distance = (value - threshold) * (1 if above else -1)
    significant = np.abs(distance) > np.asarray(margin, dtype=float)
    finite = np.isfinite(value)
    confirming, contradicting = finite & significant & (distance > 0), finite & significant & (distance <= 0)
    if not contradicting.any() and 2 * confirming.sum() > finite.sum():
        verdict = HOLDS
    elif not confirming.any() and 2 * contradicting.sum() > finite.sum():
        verdict = FAILS
    else:
        verdict = MIXED
    return verdict, list_parts(contradicting, noun), int(confirming.sum())


def common_verdict(verdicts: Collection[str]) -> str:
    """Return the verdict that all agree on, else mixed."""
    return next(iter(verdicts)) if len(set(verdicts)) == 1 else MIXED


def labelled_array(
    dims: str | Sequence[str], values: Any, long_name: str, units: str = "1", **coords: Any
) -> xr.DataArray:
    """Label values as a variable of a finding; dimensions without a coordinate are numbered from 0."""
    dims = dims.split() if isinstance(dims, str) else list(dims)
    values = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, dtype=float)
    numbers = {dim: np.arange(size) for dim, size in zip(dims, values.shape, strict=True)}
    return xr.DataArray(values, {**numbers, **coords}, dims, attrs={"long_name": long_name, "units": units})


def with_long_name(values: xr.DataArray, long_name: str, units: str = "1") -> xr.DataArray:
    """Set name and units, and drop all coordinates but those of the dimensions."""
    return values.reset_coords(drop=True).assign_attrs(long_name=long_name, units=units)
