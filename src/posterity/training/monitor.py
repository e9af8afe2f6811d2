"""A Trainer that watches whom its keys and values are written for while it trains."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from transformers import Trainer, TrainerCallback

from posterity.atomic_files import writable
from posterity.errors import InputError
from posterity.inputs import windows as corpus
from posterity.measurement.measure import measure
from posterity.models.attach import watching
from posterity.models.language_model import language_model
from posterity.reporting.report import report
from posterity.results import stats as derived
from posterity.results import steps
from posterity.results.files import load, save
from posterity.results.schema import RESULT

HORIZONS = (1, 4, 16, 64, 256)
CONTEXT = 128  # tokens of a window of text


class Monitor(TrainerCallback):
    """Measures a fixed probe while a Trainer trains, and logs scalars through the Trainer.

    `posterity.Trainer(..., callbacks=[Monitor(...)])`, or `Monitor(...).attach(trainer)` for any other Trainer: a
    callback alone cannot reach the loggers. Weights, gradients and random numbers of the training are left as they are.

    Args:
        every: Steps between measurements; the first is before the first step.
        documents: The probe: token ids (2-D, or a list of rows), or texts; the embedded text if nothing is given.
        tokenizer: For texts; the Trainer's `processing_class` if nothing is given.
        context: Tokens of a window; the length of the rows of 2-D ids, else 128.
        limit: Windows of the probe at most.
        horizons: Of the horizon curve, for the effective horizon; those longer than the probe are left out.
        output: A result file to write at the end, with a dimension `step`; a page of the same name (.html) beside it.

    Raises:
        InputError: As `posterity.measure`; a Trainer that this was not attached to.
    """

    def __init__(
        self,
        every: int = 100,
        documents: Any = None,
        *,
        tokenizer: Any = None,
        context: int | None = None,
        limit: int = 2,
        horizons: Iterable[int] = HORIZONS,
        output: str | Path | None = None,
    ):
        """Check what can be checked without the Trainer."""
        if not isinstance(every, int) or every < 1:
            raise InputError(f"Monitor expects to measure every 1 steps or more; got {every}")
        if isinstance(documents, torch.Tensor) and documents.dim() == 2 and context is None:
            context = documents.shape[1]
        self.every, self.output = every, None if output is None else Path(output)
        if self.output is not None:
            writable(self.output)
        self.documents = [corpus.default_text()] if documents is None else documents
        self.tokenizer, self.context, self.limit, self.horizons = tokenizer, context or CONTEXT, limit, tuple(horizons)
        self.measured: dict[int, xr.Dataset] = {}
        self.trainer: Trainer | None = None

    def attach(self, trainer: Trainer) -> "Monitor":
        """Be a callback of this Trainer, cut the probe into windows, and log through the Trainer."""
        windows = corpus.windows(self.documents, self.tokenizer or trainer.processing_class, self.context, self.limit)
        self.probe = torch.stack([window.ids for window in windows])
        self.trainer = trainer
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure before the first step; where an interrupted training goes on, read what was measured before."""
        if self.trainer is None:
            raise InputError(
                "Monitor was given to a Trainer as a callback only, which reaches no logger: call "
                "monitor.attach(trainer), or use posterity.Trainer"
            )
        if self.output is not None and state.global_step and self.output.exists():
            before = steps.by_step(RESULT.check(load(self.output)))
            self.measured = {step: one for step, one in before.items() if step <= state.global_step}
        if state.global_step % self.every == 0:  # an interrupted training may go on in between
            self._measure(state.global_step, kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure every few steps, and after the last."""
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._measure(state.global_step, kwargs["model"])
        self._write(control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before a checkpoint, write what was measured, so that an interrupted training loses nothing."""
        self._write(control)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write result and page."""
        if self.output is not None and self.measured:
            save(self.result(), self.output)
            report(self.result(), self.output.with_suffix(".html"))

    def _write(self, control: Any) -> None:
        if control.should_save and self.output is not None and self.measured:
            save(self.result(), self.output)

    def result(self) -> xr.Dataset:
        """All measurements, along `step`.

        Raises:
            InputError: There is none yet.
        """
        return steps.over_steps(self.measured)

    def _measure(self, step: int, model: Any) -> None:
        assert self.trainer is not None
        if not self.trainer.is_world_process_zero() or step in self.measured:
            return
        horizons = tuple(h for h in self.horizons if h < self.context)
        inner = language_model(model)
        with watching(inner) as watch, watch.without_cuts():
            found = measure(
                inner, None, self.probe, context=self.probe.shape[1], losses=not watch.other_paths,
                horizons=() if watch.other_paths else horizons, progress=False,
            )  # fmt: skip
        self.measured[step] = found
        control = self.trainer.control
        due = control.should_log  # which `log` takes as done, while the loss of this step is still to be logged
        self.trainer.log(scalars(found))
        control.should_log = due


def scalars(found: xr.Dataset) -> dict[str, float]:
    """A result in a few numbers by name, such as `posterity/layer03/key_self_share`; what is not known is left out."""
    named: dict[str, float] = {}

    def add(name: str, values: xr.DataArray, by: str) -> None:
        for label in values[by].values:
            for layer in values.layer.values if "layer" in values.dims else [None]:
                place = "" if layer is None else f"layer{layer:02d}/"
                one = values.sel({by: label}) if layer is None else values.sel({by: label, "layer": layer})
                if np.isfinite(one):
                    named[f"posterity/{place}{label}_{name}"] = float(one)

    for by in ((), ("layer",)):
        add("self_share", derived.shares(found, by).share.sel(side="self"), "stream")
        if "weight_mean" in found:
            add("weight_self_share", derived.weights(found, by).share, "stream")
        if "loss_credit" in found:
            paid = derived.who_pays(found, by).share
            add("own_share", paid.sel(part="own"), "written")
            add("later_share", 1 - paid.sel(part="own"), "written")
        if "horizon_by_document" in found:
            add("effective_horizon", derived.effective_horizon(found, by), "stream")
    return named
