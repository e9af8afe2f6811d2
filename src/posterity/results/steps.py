"""One model at several steps of its training: its checkpoints, and their results along a dimension `step`."""

import contextlib
import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import xarray as xr

from posterity.errors import InputError
from posterity.results import schema as results

_ATTRS = {"units": results.COORDINATES["step"].units, "long_name": results.COORDINATES["step"].long_name}


def checkpoints(names: Sequence[str]) -> tuple[dict[int, str], list[str]]:
    """The checkpoints of one training at the head of `names`, by step, and the names after them.

    Several folders with a model each, such as `run/checkpoint-*`; or one folder that holds checkpoints and no model of
    its own. None for anything else.

    Raises:
        InputError: A folder does not say its step, or two say the same.
    """
    folders = list(itertools.takewhile(_holds_model, (Path(os.path.expanduser(name)) for name in names)))
    used = len(folders)
    if used == 0 and names:
        folders, used = [one for one in Path(os.path.expanduser(names[0])).glob("checkpoint-*") if _holds_model(one)], 1
    elif used == 1:
        folders = []
    found: dict[int, str] = {}
    for folder in folders:
        step = _step(folder)
        if step in found:
            raise InputError(
                f"expected checkpoints of one training; {found[step]} and {folder} are both of step {step}"
            )
        found[step] = str(folder)
    return dict(sorted(found.items())), list(names[used if found else 0 :])


def _holds_model(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _step(folder: Path) -> int:
    """The training step of a checkpoint, by the Trainer's own state or else by the number its name ends with."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return int(json.loads((folder / "trainer_state.json").read_text())["global_step"])
    number = re.search(r"(\d+)$", folder.name)
    if number is None:
        raise InputError(f"expected checkpoints of one training, each with its step; {folder} does not say its step")
    return int(number[1])


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
    return results.check(joined)


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
