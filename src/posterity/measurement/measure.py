"""The instrument: a model and texts in, a labelled result out. One forward and one backward pass per window."""

import contextlib
import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import xarray as xr
from rich.console import Console
from torch import nn
from transformers import PreTrainedModel

from posterity._version import __version__
from posterity.errors import InputError
from posterity.inputs import windows as corpus
from posterity.measurement.account import Ledger, account
from posterity.measurement.distributed import Processes
from posterity.measurement.estimate import estimate
from posterity.measurement.loss_split import Payers
from posterity.measurement.run_state import State, fingerprint
from posterity.models.chunked_loss import Head, Sending
from posterity.models.language_model import frozen, language_model, seeded
from posterity.progress import progress_bar


def measure(
    model: nn.Module,
    tokenizer: Any,
    documents: Any,
    *,
    context: int = 512,
    limit: int | None = None,
    lags: str = "octaves",
    weights: bool = True,
    losses: bool = False,
    horizons: Sequence[int] = (),
    parameters: bool = False,
    batch: int = 1,
    progress: bool = True,
    seed: int = 0,
    attrs: Mapping[str, object] | None = None,
    state: str | os.PathLike[str] | None = None,
    processes: Processes | None = None,
) -> xr.Dataset:
    """Measure where the gradients of queries, keys and values come from, on windows of text.

    The loss of a window is the sum over its positions of the negative log-likelihood of the next token, in nats; the
    last position has none. The model runs in evaluation mode with frozen parameters and is restored afterwards.

    Args:
        model: A causal language model of transformers.
        tokenizer: Its tokenizer; None if `documents` are token ids.
        documents: str, token ids, a list of either, or pairs (name, document); see `posterity.inputs.windows.windows`.
        context: Tokens in a window.
        limit: The largest number of windows; None means all.
        lags: "octaves" (exact up to 15, then a quarter octave each), "all", or "self" (self and other only, no sweep:
            mass and attention of the others are NaN).
        weights: Whether to split the gradients of W_Q, W_K and W_V.
        losses: Whether to find out who pays for keys and values: the own loss or later ones (one more backward pass).
        horizons: Whole numbers h that grow, from 1 on: the credit that remains when losses at distance d count
            (1 - 1/h)^d (one more backward pass for each h).
        parameters: Whether to split the gradient of every module's parameters by own and later losses too; implies
            `losses`, takes a batch of 1 and three times the memory of the parameters.
        batch: Windows in one pass.
        progress: Whether to show an estimate and a progress bar on stderr.
        seed: For models that draw random numbers even in evaluation mode.
        attrs: Provenance to add to the result.
        state: A folder that keeps what has been measured; where it holds some, the run goes on from there. It stays
            when the run is done.
        processes: `posterity.Processes.join()` in each process that torchrun started: they share the windows
            and all return the same result. `documents` are read by the first of them only.

    Returns:
        The result; dims and units in `posterity.results.schema.SCHEMA`.

    Raises:
        InputError: The model or the input cannot be measured, with the reason and what to do.
    """
    if batch < 1:
        raise InputError(f"expected a batch of at least 1; got {batch}")
    if parameters and batch > 1:
        raise InputError(f"parameters=True takes one window at a time; got a batch of {batch}: set batch=1 (--batch 1)")
    horizons = _growing(horizons)
    inner = language_model(model)
    check_context(inner, context)
    processes = processes or Processes()
    windows = processes.agreed(lambda: corpus.windows(documents, tokenizer, context, limit))
    check_tokens(inner, windows)
    settings = {
        "version": __version__, "dtype": str(inner.dtype), "context": context, "documents": len(windows),
        "lags": lags, "weights": weights, "losses": losses, "horizons": horizons, "parameters": parameters,
        "batch": batch, "seed": seed, "text": corpus.digest(windows),
        "model": "" if state is None else fingerprint(inner),
    }  # fmt: skip
    run_state = State(state, settings, processes)
    todo = processes.share(run_state.left(len(windows)))
    shown = progress and processes.first and bool(todo)
    asked = losses or parameters or bool(horizons)
    with (
        run_state.kept(len(todo)),
        frozen(inner, parameters),
        seeded(seed),
        account(model, lags, weights) as ledger,
        contextlib.ExitStack() as stack,
    ):
        payers = Payers(model, ledger.watch, losses, horizons, parameters, ledger.sums) if asked else None
        head = Head(model)
        if shown:
            passes = 0 if payers is None else len(payers.passes)
            line = estimate(inner, windows[0].ids, len(todo), batch, weights, head, passes)
            Console(stderr=True).print(line)
            ledger.clear()
        if payers is not None:
            stack.enter_context(payers.watching())
        run_state.start(ledger.sums)
        doing = "measuring" if processes.count == 1 else f"measuring, process 1 of {processes.count}"
        with progress_bar(len(todo), shown, doing) as advance:
            for start in range(0, len(todo), batch):
                numbers = todo[start : start + batch]
                torch.manual_seed(seed + numbers[0])  # the same, however the windows are shared out
                _measure([windows[number] for number in numbers], model, head, payers, ledger)
                run_state.add(ledger.sums, numbers)
                advance(len(numbers), len(numbers) * context)
        run_state.finish(ledger.sums)
        texts = [window.text for window in windows]
        tokens = len(windows) * context
        known = {
            "tokens": tokens,
            "text_digest": settings["text"],
            "text_name": "; ".join(dict.fromkeys(texts)),
            "seed": seed,
            "processes": processes.count,
            "command": "posterity.measure",
            "seconds": round(run_state.seconds, 3),
            "tokens_per_second": round(tokens / run_state.seconds, 1),
        }
        return processes.agreed(lambda: ledger.result(texts, payers, **known | dict(attrs or {})))


def _measure(some: list[corpus.Window], model: nn.Module, head: Head, payers: Payers | None, ledger: Ledger) -> None:
    """Measure the windows of one batch."""
    names = [f"{window.text} #{window.index}" for window in some]
    ledger.place = f" in window {', '.join(names)}"
    ids = torch.stack([window.ids for window in some])
    sending = Sending(model, ids, head)
    for loss, name in zip(sending.losses, names, strict=True):
        if not loss.isfinite():
            raise InputError(f"the loss of window {name} is not finite: check the model, or use float32")
    length = ids.shape[1] - 1
    ledger.sums.note("loss", sending.losses.cpu().double() / length)
    ledger.sums.note("tokens", torch.full((len(some),), length))
    if payers is None:
        sending.backward()
    else:
        payers.send(sending, ledger.place)


def _growing(horizons: Sequence[int]) -> tuple[int, ...]:
    """The horizons, if they are whole numbers from 1 on that grow."""
    found = (horizons,) if isinstance(horizons, int) else tuple(horizons)
    whole = all(isinstance(h, (int, np.integer)) and not isinstance(h, bool) and h >= 1 for h in found)
    if not whole or any(one >= two for one, two in pairwise(found)):
        raise InputError(f"horizons expects whole numbers from 1 on that grow, such as 1, 2, 4, 8; got {horizons!r}")
    return tuple(int(h) for h in found)


def check_context(model: PreTrainedModel, context: int) -> None:
    """Raise InputError if the model cannot read so many tokens."""
    config = model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    if isinstance(longest, int) and context > longest > 0:
        raise InputError(f"the model reads at most {longest} tokens; got a context of {context}: lower it (--context)")


def check_tokens(model: PreTrainedModel, windows: list[corpus.Window]) -> None:
    """Raise InputError for a token that the model does not know."""
    known = model.config.get_text_config().vocab_size
    for window in windows:
        if (largest := int(window.ids.max())) >= known:
            raise InputError(
                f"the model knows tokens 0 to {known - 1}; got {largest} in window {window.text} #{window.index}: "
                "is it the model's own tokenizer?"
            )
