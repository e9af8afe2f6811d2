"""The Dataset of compared runs: its check, and losses and gaps of every arm."""

import math

import numpy as np
import xarray as xr

from posterity.results.kind import Kind

KIND = "comparison"


VANILLA = "vanilla"  # the arm of the plain runs


FORM = {  # dimensions and kinds of numbers
    "loss": (("run", "document", "position"), "f"), "folder": (("run",), "UO"), "arm": (("run",), "UO"),
    "seed": (("run",), "iu"), "document": (("document",), "iu"), "position": (("position",), "iu"),
}  # fmt: skip


def gaps(compared: xr.Dataset) -> xr.Dataset:
    """Loss and myopia gap of every arm, over the seeds it was trained with.

    `loss` (arm), `gap` (arm), `gap_by_position` (arm, position); each with an `_error`: the root of the sum of two
    squared standard errors, over documents (of the mean over seeds) and over seeds (of the mean over documents; left
    out with one seed). `seeds` (arm).
    """
    arms = list(dict.fromkeys([VANILLA, *map(str, compared.arm.values)]))
    rows: dict[str, list] = {name: [] for name in ("loss", "gap", "gap_by_position")}
    errors: dict[str, list] = {name: [] for name in rows}
    seeds = []
    plain = {int(seed): compared.loss[at].values for at, seed in enumerate(compared.seed.values)
             if str(compared.arm.values[at]) == VANILLA}  # fmt: skip
    for arm in arms:
        at = [index for index, other in enumerate(compared.arm.values) if str(other) == arm]
        loss = compared.loss.values[at]  # seed, document, position
        gap = loss - np.stack([plain[int(compared.seed.values[index])] for index in at])
        seeds.append(len(at))
        for name, values in (("loss", loss.mean(2)), ("gap", gap.mean(2)), ("gap_by_position", gap)):
            rows[name].append(values.mean((0, 1)))
            errors[name].append(_error(values))
    found = {name: (("arm", "position")[: np.ndim(rows[name])], np.stack(rows[name])) for name in rows}
    found |= {f"{name}_error": (found[name][0], np.stack(errors[name])) for name in rows}
    return xr.Dataset(
        {**found, "seeds": ("arm", seeds)}, {"arm": arms, "position": compared.position.values}, compared.attrs
    )


def _error(values: np.ndarray) -> np.ndarray:
    """Standard error of the mean over seeds and documents (the first two axes)."""
    total = np.zeros(values.shape[2:])
    for axis in (0, 1):
        means, number = values.mean(1 - axis), values.shape[axis]
        if number > 1:
            total = total + means.var(0, ddof=1) / number
    return np.sqrt(total) if max(values.shape[:2]) > 1 else total * math.nan


def _flaw(compared: xr.Dataset) -> str | None:
    """The first thing wrong, as half a sentence; None if nothing is."""
    for name, (dims, kinds) in FORM.items():
        if name not in compared.variables:
            return f"it has no {name!r}"
        if compared[name].dims != dims or compared[name].dtype.kind not in kinds:
            return f"{name!r} is {compared[name].dtype} by {', '.join(map(str, compared[name].dims)) or 'nothing'}"
    if 0 in compared.sizes.values():
        return "it holds nothing"
    missing = {"data", "steps"} - set(compared.attrs) or {"units"} - set(compared.loss.attrs)
    if missing:
        return f"it does not say its {min(missing)}"
    if np.isinf(compared.loss.values).any():
        return "a loss is infinite"
    runs = [(str(arm), int(seed)) for arm, seed in zip(compared.arm.values, compared.seed.values, strict=True)]
    plain = {seed for arm, seed in runs if arm == VANILLA}
    if len(set(runs)) < len(runs) or not {seed for _, seed in runs} <= plain:
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
