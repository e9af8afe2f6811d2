"""A Trainer callback that measures a fixed probe during training and logs its shares."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from transformers import Trainer, TrainerCallback

from posterity.atomic_files import check_output_path
from posterity.errors import InputError
from posterity.inputs.documents import default_text
from posterity.inputs.windows import read_corpus
from posterity.measurement.measure import measure
from posterity.models.attach import watch_model
from posterity.models.language_model import language_model
from posterity.models.weight_layout import is_sharded
from posterity.reporting.report import report
from posterity.results import stats
from posterity.results.files import load, save
from posterity.results.schema import RESULT
from posterity.results.steps import join_steps, split_steps

HORIZONS = (1, 4, 16, 64, 256)  # tokens
CONTEXT = 128  # tokens of a window of text


class Monitor(TrainerCallback):
    """A callback that measures a fixed probe while a Trainer trains, and logs scalars through the Trainer.

    Use it as `posterity.Trainer(..., callbacks=[Monitor(...)])`, or as `Monitor(...).attach(trainer)` with any other
    Trainer of transformers: a callback alone cannot reach the loggers. Weights, gradients and random numbers of the
    training do not change. The probe is always measured without a horizon.

    Args:
        every: Optimizer steps between measurements; the first is before the first step, one more after the last.
        documents: The probe: token ids (2-D, or a list of rows), or texts; the embedded text by default.
        tokenizer: For texts; the Trainer's `processing_class` by default.
        context: Tokens of a window; by default the length of the rows of 2-D ids, else 128.
        limit: The largest number of windows of the probe.
        horizons: Of the horizon curve, in tokens, for the effective horizon; those not shorter than `context` are left
            out.
        output: A result file to write at the end, with a dimension `step`; a page of the same name (.html) beside it.

    Raises:
        InputError: As `posterity.measure`; training begins and no Trainer is attached.
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
        """Check all that needs no Trainer."""
        if not isinstance(every, int) or every < 1:
            raise InputError(f"Monitor expects to measure every 1 steps or more; got {every}")
        if isinstance(documents, torch.Tensor) and documents.dim() == 2 and context is None:
            context = documents.shape[1]
        self.every, self.output = every, None if output is None else Path(output)
        if self.output is not None:
            check_output_path(self.output)
        self.documents = [default_text()] if documents is None else documents
        self.tokenizer, self.context, self.limit, self.horizons = tokenizer, context or CONTEXT, limit, tuple(horizons)
        self.results: dict[int, xr.Dataset] = {}
        self.trainer: Trainer | None = None

    def attach(self, trainer: Trainer) -> "Monitor":
        """Become a callback of this Trainer: cut the probe into windows, log through the Trainer. Returns itself."""
        tokenizer = self.tokenizer or trainer.processing_class
        corpus = read_corpus(self.documents, tokenizer, self.context, self.limit)
        self.probe, self._coverage = torch.stack([window.ids for window in corpus.windows]), corpus.coverage
        self.trainer = trainer
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure before the first step; when training resumes, read the earlier measurements from the output."""
        if self.trainer is None:
            raise InputError(
                "Monitor was given to a Trainer as a callback only, which reaches no logger: call "
                "monitor.attach(trainer), or use posterity.Trainer"
            )
        if self.output is not None and state.global_step and self.output.exists():
            before = split_steps(RESULT.check(load(self.output)))
            self.results = {step: result for step, result in before.items() if step <= state.global_step}
        if state.global_step % self.every == 0:  # training may resume in between
            self._measure(state.global_step, kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure every `every` steps, and after the last."""
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._measure(state.global_step, kwargs["model"])
        self._write(control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the measurements before a checkpoint, so that an interrupted training loses none."""
        self._write(control)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the result and its page."""
        if self.output is not None and self.results:
            save(self.result(), self.output)
            report(self.result(), self.output.with_suffix(".html"))

    def _write(self, control: Any) -> None:
        if control.should_save and self.output is not None and self.results:
            save(self.result(), self.output)

    def result(self) -> xr.Dataset:
        """Join all measurements along `step`.

        Raises:
            InputError: There is none yet.
        """
        return join_steps(self.results)

    def _measure(self, step: int, model: Any) -> None:
        """Measure in the first process alone; in all of them, each pass together, if each holds a part of the model."""
        assert self.trainer is not None
        inner, is_first = language_model(model), self.trainer.is_world_process_zero()
        if not is_sharded(inner) and (not is_first or step in self.results):
            return
        horizons = tuple(h for h in self.horizons if h < self.context)
        with watch_model(inner) as watch, watch.suspend_cuts():
            result = measure(
                inner, None, self.probe, context=self.probe.shape[1], limit=None, losses=not watch.uncut_paths,
                horizons=() if watch.uncut_paths else horizons, progress=False, attrs=self._coverage.attrs(),
            )  # fmt: skip
        if not is_first:
            return
        self.results[step] = result
        control = self.trainer.control
        pending = control.should_log  # `log` clears it, while the loss of this step is still to be logged
        self.trainer.log(scalars(result))
        control.should_log = pending


def scalars(result: xr.Dataset) -> dict[str, float]:
    """Return shares and effective horizons by log name, such as `posterity/layer03/key_self_share`; none is NaN."""
    logs: dict[str, float] = {}

    def add(name: str, values: xr.DataArray, dim: str) -> None:
        for label in values[dim].values:
            for layer in values.layer.values if "layer" in values.dims else [None]:
                prefix = "" if layer is None else f"layer{layer:02d}/"
                value = values.sel({dim: label}) if layer is None else values.sel({dim: label, "layer": layer})
                if np.isfinite(value):
                    logs[f"posterity/{prefix}{label}_{name}"] = float(value)

    for by in ((), ("layer",)):
        add("self_share", stats.shares(result, by).share.sel(side="self"), "stream")
        if "weight_mean" in result:
            add("weight_self_share", stats.weight_shares(result, by).share, "stream")
        if "loss_credit" in result:
            own = stats.loss_shares(result, by).share.sel(part="own")
            add("own_share", own, "written")
            add("later_share", 1 - own, "written")
        if "horizon_by_document" in result:
            add("effective_horizon", stats.effective_horizon(result, by), "stream")
    return logs
