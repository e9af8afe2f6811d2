"""Results of one model at several steps of its training, joined along a dimension `step` and split again."""

import os
from collections.abc import Mapping

import xarray as xr

from posterity.errors import InputError
from posterity.results.schema import COORDINATES, RESULT


def join_steps(results: Mapping[int, xr.Dataset]) -> xr.Dataset:
    """Join the results of several training steps along a new first dimension `step` of every variable.

    Args:
        results: By training step.

    Returns:
        One result, steps in order; its attributes are those of the last step.

    Raises:
        InputError: There is none, or they were not measured in the same way.
    """
    if not results:
        raise InputError("expected a result of at least one step; got none")
    steps = sorted(results)
    first = results[steps[0]]
    for step in steps[1:]:
        if dict(results[step].sizes) != dict(first.sizes) or set(results[step].variables) != set(first.variables):
            raise InputError(f"the results of step {steps[0]} and step {step} were not measured in the same way")
    models = list(dict.fromkeys(str(results[step].attrs.get("model", "")) for step in steps))
    attrs = {"units": COORDINATES["step"].units, "long_name": COORDINATES["step"].long_name}
    joined = xr.concat(
        [results[step] for step in steps], xr.DataArray(steps, dims="step", name="step", attrs=attrs),
        data_vars="all", coords="minimal", compat="override", join="override", combine_attrs="override",
    )  # fmt: skip
    joined.attrs = {**results[steps[-1]].attrs, "model": _common_name(models)}
    return RESULT.check(joined)


def split_steps(result: xr.Dataset) -> dict[int, xr.Dataset]:
    """Return the result of every step, without the dimension; a result without steps is that of step 0."""
    if "step" not in result.dims:
        return {0: result}
    return {
        int(step): result.isel(step=index).drop_vars("step").assign_attrs(step=int(step))
        for index, step in enumerate(result.step.values)
    }


def latest_step(result: xr.Dataset) -> xr.Dataset:
    """Return the result of the last step."""
    return list(split_steps(result).values())[-1]


def _common_name(models: list[str]) -> str:
    """Return one name for the models of all steps: the folder that holds them, where they are folders."""
    if len(models) == 1:
        return models[0]
    folder = os.path.commonpath(models) if len({os.path.isabs(name) for name in models}) == 1 else ""
    return folder or ", ".join(models)
