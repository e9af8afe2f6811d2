"""Trained runs side by side on the same held-out rows: the myopia gap, by position.

The gap of a run is its held-out loss minus that of the plain run (horizon "full") of the same seed: same first weights,
same batches, same rows to judge by. What the horizon cost, in nats a position (or in Huber loss, for sines).
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
from posterity.models.transformers_logging import quiet
from posterity.ops.attention import working
from posterity.progress import progress_bar
from posterity.results.comparison_schema import KIND, VANILLA
from posterity.training.data import Data, prepare
from posterity.training.run import FILE
from posterity.training.settings import Settings
from posterity.training.tasks import Regressor

ARM = ("horizon", "cut", "streams", "layers")  # what may differ between runs that are compared, with the seed
BATCH = 16


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
