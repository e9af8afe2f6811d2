"""One model at several steps of its training: its checkpoints, and their results along a dimension `step`."""

import os
from collections.abc import Mapping

import xarray as xr

from posterity.errors import InputError
from posterity.results import schema as results

_ATTRS = {"units": results.COORDINATES["step"].units, "long_name": results.COORDINATES["step"].long_name}


def over_steps(measured: Mapping[int, xr.Dataset]) -> xr.Dataset:
    """Results of one model at several steps of its training, along a new dimension `step` of every variable.

    Raises:
        InputError: There is none, or they were not measured in the same way.
    """
    if not measured:
        raise InputError("expected a result of at least one step; got none")
    steps = sorted(measured)
    first = measured[steps[0]]
    for step in steps[1:]:
        if dict(measured[step].sizes) != dict(first.sizes) or set(measured[step].variables) != set(first.variables):
            raise InputError(f"the results of step {steps[0]} and step {step} were not measured in the same way")
    names = list(dict.fromkeys(str(measured[step].attrs.get("model", "")) for step in steps))
    joined = xr.concat(
        [measured[step] for step in steps], xr.DataArray(steps, dims="step", name="step", attrs=_ATTRS),
        data_vars="all", coords="minimal", compat="override", join="override", combine_attrs="override",
    )  # fmt: skip
    joined.attrs = {**measured[steps[-1]].attrs, "model": _common(names)}
    return results.RESULT.check(joined)


def _common(names: list[str]) -> str:
    """One name for the models of all steps: the folder that holds them, where they are folders."""
    if len(names) == 1:
        return names[0]
    folder = os.path.commonpath(names) if len({os.path.isabs(name) for name in names}) == 1 else ""
    return folder or ", ".join(names)


def by_step(result: xr.Dataset) -> dict[int, xr.Dataset]:
    """The result of every step; one without steps is that of step 0."""
    if "step" not in result.dims:
        return {0: result}
    return {
        int(step): result.isel(step=index).drop_vars("step").assign_attrs(step=int(step))
        for index, step in enumerate(result.step.values)
    }


def latest(result: xr.Dataset) -> xr.Dataset:
    """The result of the last step."""
    return list(by_step(result).values())[-1]
