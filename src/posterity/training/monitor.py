"""A Trainer callback that measures a fixed probe during training and logs its shares."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from transformers import Trainer, TrainerCallback

from posterity.atomic_files import check_output_path
from posterity.errors import InputError
from posterity.inputs.documents import Tokens
from posterity.measurement.measure import measure
from posterity.models.attach import watch_model
from posterity.models.language_model import language_model
from posterity.models.weight_layout import is_sharded
from posterity.reporting.report import report
from posterity.results import stats
from posterity.results.files import load, save
from posterity.results.schema import RESULT
from posterity.results.steps import join_steps, split_steps
from posterity.training.probe_windows import probe_corpus

HORIZONS = (1, 4, 16, 64, 256)  # tokens


class Monitor(TrainerCallback):
    """A callback that measures a fixed probe while a Trainer trains, and logs scalars through the Trainer.

    Use it in `callbacks=[Monitor()]` of any Trainer of transformers. Weights, gradients and random numbers of the
    training do not change. The probe is always measured without a horizon.

    Args:
        every: Optimizer steps between measurements; the first is before the first step, one more after the last.
        documents: The probe: token ids (2-D, or a list of rows), or texts. By default the Trainer's evaluation rows;
            without these, its training rows. Labels of -100 have no loss there, as in training.
        tokenizer: For texts; the Trainer's `processing_class` by default.
        context: Tokens of a window; 128 by default, and fewer where rows of token ids are shorter.
        limit: The largest number of windows of the probe.
        horizons: Of the horizon curve, in tokens, for the effective horizon; those not shorter than the windows are
            left out.
        layers: Whether to log every layer too, and not only the model with the smallest and the largest layer.
        output: A result file to write at the end, with a dimension `step`; a page of the same name (.html) beside it.

    Raises:
        InputError: As `posterity.measure`; the Trainer has no rows of tokens or text and there are no documents.
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
        layers: bool = False,
        output: str | Path | None = None,
    ):
        """Check all that needs no Trainer."""
        if not isinstance(every, int) or every < 1:
            raise InputError(f"Monitor expects to measure every 1 steps or more; got {every}")
        self.every, self.output = every, None if output is None else Path(output)
        if self.output is not None:
            check_output_path(self.output, "result")
        self.documents, self.tokenizer, self.context, self.limit = documents, tokenizer, context, limit
        self.horizons, self.layers = tuple(horizons), layers
        self.results: dict[int, xr.Dataset] = {}
        self.trainer: Trainer | None = None

    def attach(self, trainer: Trainer) -> "Monitor":
        """Become a callback of this Trainer, and cut the probe into windows. Returns itself.

        Only a Trainer that is none of transformers' needs it: others are recognized when training begins.
        """
        tokenizer = self.tokenizer or trainer.processing_class
        corpus = probe_corpus(trainer, self.documents, tokenizer, self.context, self.limit)
        self.probe = [(window.text, Tokens(window.ids, [], window.answers)) for window in corpus.windows]
        self._coverage, self.trainer = corpus.coverage, trainer
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure before the first step; when training resumes, read the earlier measurements from the output."""
        if self.trainer is None:
            self.attach(_calling_trainer())
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
        context = len(self.probe[0][1].ids)
        horizons = tuple(h for h in self.horizons if h < context)
        with watch_model(inner) as watch, watch.suspend_cuts():
            result = measure(
                inner, None, self.probe, context=context, limit=None, losses=not watch.uncut_paths,
                horizons=() if watch.uncut_paths else horizons, progress=False, attrs=self._coverage.attrs(),
            )  # fmt: skip
        if not is_first:
            return
        self.results[step] = result
        control = self.trainer.control
        pending = control.should_log  # `log` clears it, while the loss of this step is still to be logged
        self.trainer.log(scalars(result, self.layers))
        control.should_log = pending


def _calling_trainer() -> Trainer:
    """Return the Trainer that runs this callback: it passes callbacks no reference to itself, and it alone can log.

    Raises:
        InputError: No Trainer of transformers is among the callers.
    """
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer):
            return caller
        frame = frame.f_back
    raise InputError("Monitor expects a Trainer of transformers; another one runs it: call monitor.attach(trainer)")


def scalars(result: xr.Dataset, layers: bool = False) -> dict[str, float]:
    """Return shares and effective horizons by log name, those of the model and their extremes over its layers.

    Args:
        result: A measurement.
        layers: Whether to return the numbers of every layer too.

    Returns:
        Names such as `posterity/key_self_share`, `posterity/key_self_share_min`, `posterity/key_self_share_max`, and
        `posterity/layer03/key_self_share`; units 1, and tokens for horizons; no NaN. `hidden_own_later_cosine`: of the
        gradients that own and later losses send to the inputs of the layers.
    """
    logs: dict[str, float] = {}
    for name, model, by_layer in _log_arrays(result):
        (dim,) = model.dims
        for label in model[dim].values:
            key, row = f"{label}_{name}", by_layer.sel({dim: label}).transpose("layer")
            logs[f"posterity/{key}"] = float(model.sel({dim: label}))
            known = row.values[~np.isnan(row.values)]
            if known.size:
                logs |= {f"posterity/{key}_min": float(known.min()), f"posterity/{key}_max": float(known.max())}
            if layers:
                logs |= {f"posterity/layer{layer:02d}/{key}": float(x) for layer, x in enumerate(row.values)}
    return {name: value for name, value in logs.items() if np.isfinite(value)}


def _log_arrays(result: xr.Dataset) -> Iterator[tuple[str, xr.DataArray, xr.DataArray]]:
    """Yield the name of each quantity, its values for the model, and those by layer."""
    model, layer = (), ("layer",)

    def both(values: Callable[[tuple[str, ...]], xr.DataArray]) -> tuple[xr.DataArray, xr.DataArray]:
        return values(model), values(layer)

    yield "self_share", *both(lambda by: stats.shares(result, by).share.sel(side="self"))
    if stats.has_reader_axis(result):
        yield "first_share", *both(lambda by: stats.first_share(result, by).share)
    if "weight_mean" in result:
        yield "weight_self_share", *both(lambda by: stats.weight_shares(result, by).share)
    if "loss_credit" in result:
        yield "own_share", *both(lambda by: stats.loss_shares(result, by).share.sel(part="own"))
        yield "later_share", *both(lambda by: 1 - stats.loss_shares(result, by).share.sel(part="own"))
    if "hidden_by_document" in result:
        angles = np.cos(np.radians(stats.angles(result))).expand_dims(gradient=["hidden"])
        yield "own_later_cosine", angles.hidden, angles.layer_hidden
    if "horizon_by_document" in result:
        yield "effective_horizon", *both(lambda by: stats.effective_horizon(result, by))
