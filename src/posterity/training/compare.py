"""Trained runs side by side on the same held-out rows: the myopia gap, by position.

The gap of a run is its held-out loss minus that of the plain run (horizon "full") of the same seed: same first weights,
same batches, same rows to judge by. What the horizon cost, in nats a position (or in Huber loss, for sines).
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from posterity.errors import InputError, readable
from posterity.measurement.measure import progress_bar
from posterity.models.transformers_logging import quiet
from posterity.ops.attention import working
from posterity.results import netcdf
from posterity.results.schema import writable, write_whole
from posterity.training.data import Data, prepare
from posterity.training.run import FILE
from posterity.training.settings import Settings
from posterity.training.tasks import Regressor

ARM = ("horizon", "cut", "streams", "layers")  # what may differ between runs that are compared, with the seed
BATCH = 16
KIND = "comparison"
VANILLA = "vanilla"  # the arm of the plain runs
FORM = {  # dimensions and kinds of numbers
    "loss": (("run", "document", "position"), "f"), "folder": (("run",), "UO"), "arm": (("run",), "UO"),
    "seed": (("run",), "iu"), "document": (("document",), "iu"), "position": (("position",), "iu"),
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, settings and digest of its data."""

    folder: Path
    settings: Settings
    digest: str

    @property
    def arm(self) -> str:
        """The horizon in words; its streams and layers if it is not in force everywhere."""
        one = self.settings
        if one.horizon == "full":
            return VANILLA
        streams = "" if set(one.streams) == {"key", "value"} else f", {one.streams[0]}s only"
        layers = "" if one.layers is None else f", layers {' '.join(map(str, one.layers))}"
        return f"{one.horizon}, cut at {'k and v' if one.cut == 'kv' else 'hidden'}{streams}{layers}"


def read_run(folder: str | Path) -> Run:
    """Read what a run was.

    Raises:
        InputError: The folder is not that of a finished run.
    """
    path = Path(folder)
    try:
        known = json.loads((path / FILE).read_text())
        names = {one.name for one in fields(Settings)}
        given: dict[str, Any] = {
            name: tuple(x) if isinstance(x, list) else x for name, x in known.items() if name in names
        }
        run = Run(path, Settings(**given), known["data_digest"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{path}: expected the folder of a run of `posterity train`, but its {FILE} cannot be read ({error}); "
            "check the path"
        ) from error
    if not (path / "metrics.json").exists():
        raise InputError(f"{path}: the run is not finished; go on with it by the same `posterity train` command")
    return run


def load_run(run: Run) -> tuple[PreTrainedModel, Data]:
    """The trained model and its rows.

    Raises:
        InputError: The text is not the one it was trained on.
    """
    tokenizer = None
    if run.settings.task_name is None:
        tokenizer = AutoTokenizer.from_pretrained(run.folder)
    kind: Any = Regressor if run.settings.task_name == "sines" else AutoModelForCausalLM
    data = prepare(run.settings, tokenizer)
    if data.digest != run.digest:
        raise InputError(
            f"{run.folder}: the data {run.settings.data} are not those of the run: they have changed since"
        )
    with quiet():
        return kind.from_pretrained(run.folder).eval(), data


def position_losses(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """Loss of every position, (row, position), float64, without the last position of tokens, which has none."""
    output: Any = model(input_ids=inputs, use_cache=False)
    logits = output.logits.to(working(output.logits.dtype))
    if isinstance(model, Regressor):
        return nn.functional.huber_loss(logits.squeeze(-1), labels, reduction="none").double()
    return nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none").double()


def compare(folders: Sequence[str | Path], *, progress: bool = True) -> xr.Dataset:
    """Held-out losses of finished runs on the same rows.

    Returns:
        `loss` (run, document, position), and for each run its `folder`, `arm` and `seed`.

    Raises:
        InputError: No finished runs; runs that differ in more than horizon and seed; an arm without its plain run.
    """
    runs = [read_run(folder) for folder in folders]
    if len(runs) < 2:
        raise InputError(f"compare expects at least two runs; got {len(runs)}")
    for one in fields(Settings):
        found = {str(getattr(run.settings, one.name)) for run in runs}
        if one.name not in (*ARM, "seed") and len(found) > 1:
            raise InputError(
                f"runs that are compared differ in {', '.join(ARM)} and seed only; here {one.name} is "
                f"{' and '.join(sorted(found))}"
            )
    named = [(run.arm, run.settings.seed) for run in runs]
    plain = {seed for arm, seed in named if arm == VANILLA}
    for arm, seed in named:
        if named.count((arm, seed)) > 1:
            raise InputError(f"expected each run once; {arm} with seed {seed} came twice")
        if seed not in plain:
            raise InputError(f"expected a run with horizon full and seed {seed} beside that with {arm}: train it too")
    losses, held_out = [], None
    with progress_bar(len(runs), progress, "comparing", "runs") as advance:
        for run in runs:
            model, data = load_run(run)
            if held_out is not None and not all(map(torch.equal, held_out, data.held_out)):
                raise InputError(f"{run.folder} was held to other rows than {runs[0].folder}: nothing to compare")
            held_out = data.held_out
            with torch.no_grad():
                parts = zip(*(rows.split(BATCH) for rows in held_out), strict=True)
                losses.append(torch.cat([position_losses(model, *part) for part in parts]).numpy())
            advance(1, held_out[0][..., 0].numel() if held_out[0].dim() == 3 else held_out[0].numel())
    array = np.stack(losses)
    units = "Huber loss" if runs[0].settings.task_name == "sines" else "nats"
    return xr.Dataset(
        {"loss": (("run", "document", "position"), array, {"units": units, "long_name": "held-out loss"})},
        {
            "folder": ("run", [str(run.folder) for run in runs]), "arm": ("run", [arm for arm, _ in named]),
            "seed": ("run", [seed for _, seed in named]), "document": np.arange(array.shape[1]),
            "position": np.arange(array.shape[2]),
        },
        {"kind": KIND, "data": " ".join(runs[0].settings.data), "steps": runs[0].settings.steps},
    )  # fmt: skip


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


def save(compared: xr.Dataset, path: str | os.PathLike[str]) -> Path:
    """Write a comparison as compressed netCDF, whole or not at all; returns the path. Raises InputError."""
    target = writable(path)
    write_whole(target, netcdf.packed(check(compared)))
    return Path(path)


def load(path: str | os.PathLike[str]) -> xr.Dataset:
    """Read a comparison into memory and close the file. InputError for anything else."""
    return loaded(netcdf.read(path), path)


def loaded(found: xr.Dataset, path: str | os.PathLike[str]) -> xr.Dataset:
    """The comparison that `netcdf.read` found in a file. InputError as `load`."""
    flaw = _flaw(found)
    if flaw is not None:
        raise InputError(
            f"{path}: expected a comparison of `posterity compare`, but it is damaged ({flaw}); compare again"
        )
    return found


def check(compared: xr.Dataset) -> xr.Dataset:
    """Return a comparison; InputError says what is wrong with it."""
    flaw = _flaw(compared)
    if flaw is not None:
        raise InputError(
            f"expected a comparison as posterity.training.compare.compare returns it, but {flaw}; compare again"
        )
    return compared


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


def page(compared: xr.Dataset, path: str | Path) -> None:
    """Write a comparison as a page, whole or not at all. Raises InputError."""
    from posterity.reporting.comparison_page import render

    target = writable(path)
    write_whole(target, render(check(compared)).encode())


def cells(one: xr.Dataset) -> tuple[str, str, str, str]:
    """What is shown of one arm of `gaps`: its name, seeds, loss and gap; no gap for the plain runs."""
    arm = readable(str(one.arm.values))
    gap = "" if arm == VANILLA else told(float(one.gap), float(one.gap_error), "+")
    return arm, str(int(one.seeds)), told(float(one.loss), float(one.loss_error)), gap


def told(value: float, error: float, sign: str = "") -> str:
    """A number and its standard error, where there is one."""
    value = 0.0 if abs(value) < 5e-5 else value  # no "-0.0000"
    return f"{value:{sign}.4f}" + ("" if math.isnan(error) else f" ± {error:.4f}")


def table(compared: xr.Dataset, console: Console | None = None) -> None:
    """Print loss and gap of every arm."""
    check(compared)
    found, units = gaps(compared), compared.loss.attrs["units"]
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for name in ("", "seeds", "held-out loss", "myopia gap"):
        shown.add_column(name, justify="left" if not name else "right", overflow="fold")
    for arm in found.arm.values:
        one = found.sel(arm=arm)
        shown.add_row(*map(Text, cells(one)))
    console = console or Console(highlight=False)
    console.print(shown)
    rows = compared.sizes["document"]
    several = int(found.seeds.max()) > 1
    seeds = "and the seeds" if several else "(one seed: what another would change is not in it)"
    console.print(Text(f"Losses in {units}; ± is one standard error over {rows} held-out rows {seeds}."))
