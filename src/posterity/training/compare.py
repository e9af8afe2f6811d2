"""Held-out losses of finished runs on the same rows, from which the myopia gap follows.

The gap of a run is its held-out loss minus that of the vanilla run (horizon "full") of the same seed, which has the
same initial weights, batches and held-out rows: the cost of the horizon, in nats per position (Huber loss for sines).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from posterity.errors import InputError
from posterity.models.chunked_loss import token_losses
from posterity.models.transformers_logging import silence_transformers
from posterity.ops.precision import working_dtype
from posterity.progress import progress_bar
from posterity.results.comparison_schema import KIND, VANILLA
from posterity.training.data import Data, prepare_data
from posterity.training.run import METRICS_FILE, RUN_FILE
from posterity.training.settings import Settings
from posterity.training.tasks import Regressor

ARM_SETTINGS = ("horizon", "cut", "streams", "layers")  # with the seed, all that may differ between compared runs
BATCH = 16  # held-out rows of one forward pass


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, settings and digest of its data."""

    folder: Path
    settings: Settings
    digest: str

    @property
    def arm(self) -> str:
        """The horizon in words, with its streams and layers if it is not in force everywhere."""
        settings = self.settings
        if settings.horizon == "full":
            return VANILLA
        cut = "k and v" if settings.cut == "kv" else "hidden"
        streams = "" if set(settings.streams) == {"key", "value"} else f", {settings.streams[0]}s only"
        layers = "" if settings.layers is None else f", layers {' '.join(map(str, settings.layers))}"
        return f"{settings.horizon}, cut at {cut}{streams}{layers}"


def read_run(folder: str | Path) -> Run:
    """Read the settings of a finished run.

    Raises:
        InputError: The folder is not that of a finished run.
    """
    path = Path(folder)
    try:
        record = json.loads((path / RUN_FILE).read_text())
        names = {setting.name for setting in fields(Settings)}
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in record.items() if name in names
        }
        run = Run(path, Settings(**values), record["data_digest"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{path}: expected the folder of a run of `posterity train`, but its {RUN_FILE} cannot be read ({error}); "
            "check the path"
        ) from error
    if not (path / METRICS_FILE).exists():
        raise InputError(f"{path}: the run is not finished; go on with it by the same `posterity train` command")
    return run


def load_run(run: Run) -> tuple[PreTrainedModel, Data]:
    """Load the trained model, in evaluation mode, and the rows of its run.

    Raises:
        InputError: The text is not the one it was trained on.
    """
    tokenizer = None
    if run.settings.task_name is None:
        tokenizer = AutoTokenizer.from_pretrained(run.folder)
    kind: Any = Regressor if run.settings.task_name == "sines" else AutoModelForCausalLM
    data = prepare_data(run.settings, tokenizer)
    if data.digest != run.digest:
        raise InputError(
            f"{run.folder}: the data {run.settings.data} are not those of the run: they have changed since"
        )
    with silence_transformers():
        return kind.from_pretrained(run.folder).eval(), data


def position_losses(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of every position, (row, position), float64; the last position of tokens has none."""
    output: Any = model(input_ids=inputs, use_cache=False)
    if isinstance(model, Regressor):
        predictions = output.logits.to(working_dtype(output.logits.dtype)).squeeze(-1)
        return nn.functional.huber_loss(predictions, labels, reduction="none").double()
    return token_losses(output.logits[:, :-1], labels[:, 1:]).double()


def compare(folders: Sequence[str | Path], *, progress: bool = True) -> xr.Dataset:
    """Compare finished runs of `posterity train` by their losses on the same held-out rows.

    `posterity.summary` prints the loss and the myopia gap of every arm, with standard errors over rows and seeds;
    `posterity.report` draws the gap by position; `posterity.save` keeps the comparison.

    Args:
        folders: The folders of two runs or more. They may differ in horizon, cut, streams, layers and seed only, and
            every seed needs a run with horizon full.
        progress: Show a progress bar on standard error.

    Returns:
        A Dataset with `loss` (run, document, position): the held-out loss in nats per token, of N - 1 positions for
        rows of N tokens (for the task sines: Huber loss, of all N positions), float64. Coordinates of every run:
        `folder`, `arm` (its horizon in words; "vanilla" for full) and `seed`. A document is a held-out row. Attributes:
        `data`, the name of the training data, and `steps`, the number of optimizer steps.

    Raises:
        InputError: Fewer than two runs; a folder without a finished run; runs that differ in another setting; an arm
            and seed that comes twice, or has no vanilla run of its seed; data that have changed since the training;
            runs with different held-out rows.
    """
    runs = [read_run(folder) for folder in folders]
    _check_comparable(runs)
    losses, held_out = [], None
    with progress_bar(len(runs), progress, "comparing", "runs") as advance:
        for run in runs:
            model, data = load_run(run)
            if held_out is not None and not all(map(torch.equal, held_out, data.held_out)):
                raise InputError(f"{run.folder} was held to other rows than {runs[0].folder}: nothing to compare")
            held_out = data.held_out
            with torch.no_grad():
                batches = zip(*(rows.split(BATCH) for rows in held_out), strict=True)
                losses.append(torch.cat([position_losses(model, *batch) for batch in batches]).numpy())
            advance(1, held_out[0][..., 0].numel() if held_out[0].dim() == 3 else held_out[0].numel())
    return _comparison(runs, np.stack(losses))


def _check_comparable(runs: list[Run]) -> None:
    """Raise InputError unless the runs differ in arm and seed only, each with the vanilla run of its seed."""
    if len(runs) < 2:
        raise InputError(f"compare expects at least two runs; got {len(runs)}")
    for name in (setting.name for setting in fields(Settings)):
        values = {str(getattr(run.settings, name)) for run in runs}
        if name not in (*ARM_SETTINGS, "seed") and len(values) > 1:
            raise InputError(
                f"runs that are compared differ in {', '.join(ARM_SETTINGS)} and seed only; here {name} is "
                f"{' and '.join(sorted(values))}"
            )
    pairs = [(run.arm, run.settings.seed) for run in runs]
    vanilla_seeds = {seed for arm, seed in pairs if arm == VANILLA}
    for arm, seed in pairs:
        if pairs.count((arm, seed)) > 1:
            raise InputError(f"expected each run once; {arm} with seed {seed} came twice")
        if seed not in vanilla_seeds:
            raise InputError(f"expected a run with horizon full and seed {seed} beside that with {arm}: train it too")


def _comparison(runs: list[Run], losses: np.ndarray) -> xr.Dataset:
    """Label the losses, (run, document, position)."""
    settings = runs[0].settings
    units = "Huber loss" if settings.task_name == "sines" else "nats"
    return xr.Dataset(
        {"loss": (("run", "document", "position"), losses, {"units": units, "long_name": "held-out loss"})},
        {
            "folder": ("run", [str(run.folder) for run in runs]), "arm": ("run", [run.arm for run in runs]),
            "seed": ("run", [run.settings.seed for run in runs]), "document": np.arange(losses.shape[1]),
            "position": np.arange(losses.shape[2]),
        },
        {"kind": KIND, "data": " ".join(settings.data), "steps": settings.steps},
    )  # fmt: skip
