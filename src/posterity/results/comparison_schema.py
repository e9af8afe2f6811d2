"""The Dataset of compared runs: loss and myopia gap of every arm, and validation.

`loss` (run, document, position), with `folder`, `arm` and `seed` (run). An arm is a horizon that runs were trained
under, over one or more seeds; the plain runs are the arm "vanilla".
"""

import math

import numpy as np
import xarray as xr

from posterity.results.kind import Kind, find_variable_flaw

KIND = "comparison"
VANILLA = "vanilla"  # the arm of the plain runs
DIMS_AND_DTYPES = {  # dimensions, and kinds of numpy's dtypes
    "loss": (("run", "document", "position"), "f"), "folder": (("run",), "UO"), "arm": (("run",), "UO"),
    "seed": (("run",), "iu"), "document": (("document",), "iu"), "position": (("position",), "iu"),
}  # fmt: skip


def myopia_gaps(comparison: xr.Dataset) -> xr.Dataset:
    """Return loss and myopia gap of every arm, over the seeds it was trained with.

    The gap of a run is its held-out loss minus that of the plain run of the same seed.

    Returns:
        `loss`, `gap`: dims (arm); `gap_by_position`: dims (arm, position); in the units of the comparison's loss.
        Each with an `_error`: the root of the sum of two squared standard errors, over documents (of the mean over
        seeds) and over seeds (of the mean over documents; left out with one seed).
        `seeds`: number of seeds, dims (arm).
    """
    arms = list(dict.fromkeys([VANILLA, *map(str, comparison.arm.values)]))
    means: dict[str, list] = {name: [] for name in ("loss", "gap", "gap_by_position")}
    errors: dict[str, list] = {name: [] for name in means}
    seeds = []
    plain_losses = {
        int(seed): comparison.loss[index].values for index, seed in enumerate(comparison.seed.values)
        if str(comparison.arm.values[index]) == VANILLA
    }  # fmt: skip
    for arm in arms:
        runs = [index for index, name in enumerate(comparison.arm.values) if str(name) == arm]
        loss = comparison.loss.values[runs]  # seed, document, position
        gap = loss - np.stack([plain_losses[int(comparison.seed.values[index])] for index in runs])
        seeds.append(len(runs))
        for name, values in (("loss", loss.mean(2)), ("gap", gap.mean(2)), ("gap_by_position", gap)):
            means[name].append(values.mean((0, 1)))
            errors[name].append(_error(values))
    variables = {name: (("arm", "position")[: np.ndim(means[name])], np.stack(means[name])) for name in means}
    variables |= {f"{name}_error": (variables[name][0], np.stack(errors[name])) for name in means}
    coords = {"arm": arms, "position": comparison.position.values}
    return xr.Dataset({**variables, "seeds": ("arm", seeds)}, coords, comparison.attrs)


def _error(values: np.ndarray) -> np.ndarray:
    """Return the standard error of the mean over seeds and documents (the first two axes)."""
    total = np.zeros(values.shape[2:])
    for axis in (0, 1):
        means, number = values.mean(1 - axis), values.shape[axis]
        if number > 1:
            total = total + means.var(0, ddof=1) / number
    return np.sqrt(total) if max(values.shape[:2]) > 1 else total * math.nan


def _flaw(comparison: xr.Dataset) -> str | None:
    """Return the first flaw as half a sentence; None if there is none."""
    if (flaw := find_variable_flaw(comparison, DIMS_AND_DTYPES)) is not None:
        return flaw
    missing = {"data", "steps"} - set(comparison.attrs) or {"units"} - set(comparison.loss.attrs)
    if missing:
        return f"it does not say its {min(missing)}"
    if np.isinf(comparison.loss.values).any():
        return "a loss is infinite"
    runs = [(str(arm), int(seed)) for arm, seed in zip(comparison.arm.values, comparison.seed.values, strict=True)]
    plain_seeds = {seed for arm, seed in runs if arm == VANILLA}
    if len(set(runs)) < len(runs) or not {seed for _, seed in runs} <= plain_seeds:
        return "not every run has one plain run of its seed beside it"
    return None


COMPARISON = Kind(
    name=KIND,
    expected="a comparison as posterity.compare returns it",
    advice="compare again",
    expected_file="a comparison of `posterity compare`",
    file_advice="it is damaged: compare again",
    find_flaw=_flaw,
)
