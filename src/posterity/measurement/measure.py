"""The instrument: a model and texts in, a labelled result out. One forward and one backward pass per window."""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import xarray as xr
from rich.console import Console
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from posterity._version import __version__
from posterity.decomposition.accumulator import Accumulator
from posterity.decomposition.first_keys import SINKS
from posterity.errors import InputError, NotFiniteError
from posterity.inputs.arguments import open_model, split_arguments
from posterity.inputs.named_documents import open_files
from posterity.inputs.windows import Window, read_corpus, token_digest
from posterity.measurement.account import open_ledger
from posterity.measurement.distributed import Processes
from posterity.measurement.estimate import estimate
from posterity.measurement.ledger import Ledger
from posterity.measurement.price_account import SAMPLES, check_prices
from posterity.measurement.run_state import RunState, fingerprint
from posterity.measurement.window_batch import WindowBatch, equal_lengths
from posterity.models.checkpointing import checkpoint_layers
from posterity.models.chunked_loss import ChunkedLoss, LMHead
from posterity.models.context_length import check_context
from posterity.models.language_model import freeze_parameters, language_model, max_tokens, seed_rng
from posterity.models.packed_rows import refuse_shared_rows
from posterity.models.weight_layout import is_first_process, is_sharded
from posterity.progress import progress_bar

CONTEXT, LIMIT = 512, 16  # tokens of a window, and windows, unless said
ANSWERS = "the answers only"
SOME_ANSWERS = "the answers only, in conversations; every token of the other texts"


def measure(
    model: Any = "default",
    tokenizer: Any = None,
    documents: Any = None,
    *,
    context: int = CONTEXT,
    limit: int | None = LIMIT,
    pack: bool = False,
    lags: str = "octaves",
    weights: bool = True,
    losses: bool = False,
    horizons: Sequence[int] = (),
    parameters: bool = False,
    sinks: int = SINKS,
    positions: int | None = None,
    prices: str | None = None,
    batch: int = 1,
    checkpoint: bool = False,
    progress: bool = True,
    seed: int = 0,
    attrs: Mapping[str, object] | None = None,
    state: str | os.PathLike[str] | None = None,
    processes: Processes | None = None,
) -> xr.Dataset:
    """Measure where the gradients of queries, keys and values come from, on windows of text.

    The loss of a window is the sum over its positions of the negative log-likelihood of the next token, in nats; the
    last position has none. In conversations, and in prompts with a completion, only the tokens of the answers have a
    loss; the keys and values of all others are measured too. The model runs in evaluation mode with frozen parameters
    and is restored afterwards.

    `measure("gpt2", "my.txt")` is `posterity measure gpt2 my.txt`: the same windows, the same numbers.

    Args:
        model: A causal language model of transformers; or the name of one as on the command line (hub id, folder,
            .gguf file, "default"), or what `posterity.load_model` returns, which bring their tokenizer.
        tokenizer: Its tokenizer. It may be left out, and the documents come second, where the model brings it or the
            documents are token ids.
        documents: A str, token ids, rows of a data set (`text`; `messages`, or `prompt` and `completion`;
            `input_ids`), a list of these, pairs (name, document), or a mapping of labels to any of them. A
            `pathlib.Path`, or a str that names a file that exists, is read as the command line reads it. None: the
            default text of the command line. What they leave out is counted in the result's attributes.
        context: Tokens in a window.
        limit: The largest number of windows; None means all.
        pack: Whether to measure documents shorter than a window too, several in one window, where they do not see each
            other; their positions are counted from each one's first token.
        lags: "octaves" (exact up to 15, then a quarter octave each), "all", or "self" (self and other only, no sweep:
            mass and attention of the others are NaN).
        weights: Whether to split the gradients of W_Q, W_K and W_V.
        losses: Whether to find out who pays for keys and values: the own loss or later ones (one more backward pass).
        horizons: Whole numbers h that grow, from 1 on: the credit that remains when losses at distance d count
            (1 - 1/h)^d (one more backward pass for each h).
        parameters: Whether to split the gradient of every module's parameters by own and later losses too; implies
            `losses`, takes a batch of 1 and three times the memory of the parameters.
        sinks: The edges into so many first keys of each window (attention sinks) are told apart from all others, along
            the axis `reader_of`.
        positions: Positions below this are exact; beyond, four bins an octave. None for 512, or fewer in models of more
            than 300 heads, whose files would grow beyond all use.
        prices: What cached keys and values are worth to later tokens, and windows to their layers, in nats: "text", by
            the losses of the text, or "samples", by those of labels that the model draws (one more backward pass).
        batch: Windows in one pass.
        checkpoint: Whether layers run again in the backward pass (gradient checkpointing): a window then holds the
            inputs of its layers and the outputs of attention, and no other activations. The numbers are the same.
        progress: Whether to show an estimate and a progress bar on stderr.
        seed: For models that draw random numbers even in evaluation mode.
        attrs: Provenance to add to the result.
        state: A folder that keeps what has been measured; where it holds some, the run goes on from there. It stays
            when the run is done.
        processes: `posterity.Processes.join()` in each process that torchrun started: they share the windows
            and all return the same result. `documents` are read by the first of them only. So do those of a model that
            `torch.distributed.fsdp.fully_shard` has split; without `processes` they run each window together.

    Returns:
        The result; dims and units in `posterity.results.schema.SCHEMA`.

    Raises:
        InputError: The model or the input cannot be measured, with the reason and what to do.
    """
    _check_batch(batch, parameters)
    horizons, prices = _check_horizons(horizons), check_prices(prices)
    tokenizer, documents = split_arguments(tokenizer, documents)
    documents = open_files(documents)
    loaded = open_model(model, tokenizer)
    model, tokenizer = loaded.model, loaded.tokenizer
    inner = language_model(model)
    model = model.module if isinstance(model, DistributedDataParallel) else model  # which waits for other processes
    processes = processes or Processes()
    sharded = is_sharded(inner)
    if sharded:
        _check_sharded(processes, state, parameters, checkpoint, pack)
    check_context(inner, context)
    corpus = processes.broadcast(
        lambda: read_corpus(documents, tokenizer, context, limit, pack=pack, conversations=True)
    )
    windows = corpus.windows
    check_tokens(inner, windows)
    settings = {
        "version": __version__, "dtype": str(inner.dtype), "context": context, "pack": pack, "documents": len(windows),
        "lags": lags, "sinks": sinks, "positions": positions, "weights": weights, "losses": losses,
        "horizons": horizons, "parameters": parameters, "prices": prices, "batch": batch, "seed": seed,
        "text": token_digest(windows), "model": "" if state is None else fingerprint(inner),
    }  # fmt: skip
    run_state = RunState.open(state, settings, processes)
    unmeasured = run_state.remaining_windows(len(windows))
    remaining = processes.share(unmeasured)
    show_progress = progress and processes.is_first and bool(remaining) and is_first_process()
    activity = "measuring" if processes.count == 1 else f"measuring, process 1 of {processes.count}"
    with (
        run_state.hold_lock(len(remaining)),
        freeze_parameters(inner, parameters),
        seed_rng(seed),
        open_ledger(model, lags, weights, sinks, positions, prices) as ledger,
        checkpoint_layers(ledger.watch) if checkpoint else contextlib.nullcontext(),
    ):
        if losses or parameters or horizons:
            ledger.split_losses(losses, horizons, parameters)
        head = LMHead.probe(model)
        if any(window.lengths for window in windows):
            refuse_shared_rows(inner, head, context, ledger.watch.other_paths)
        if show_progress and not sharded:  # its trial passes are of one process
            longest = max(windows, key=lambda window: window.size)
            _print_estimate(inner, longest, len(remaining), batch, head, ledger, checkpoint)
        run_state.start(ledger.sums)
        with ledger.observe_forward(), progress_bar(len(remaining), show_progress, activity) as advance:
            for start in range(0, len(remaining), batch):
                numbers = remaining[start : start + batch]
                torch.manual_seed(seed + numbers[0])  # the same, however the windows are shared out
                for window_batch in equal_lengths([windows[number] for number in numbers]):
                    measure_batch(window_batch, model, head, ledger, seed)
                run_state.add_windows(ledger.sums, numbers)
                advance(len(numbers), sum(windows[number].size for number in numbers))
            if sharded and len(remaining[::batch]) < len(unmeasured[:: processes.count * batch]):
                _join_uncounted_pass(windows[0], model, head, ledger, seed)
        run_state.finish(ledger.sums)
        texts = [window.text for window in windows]
        limit = max_tokens(inner)
        beyond = {"context_of_config": limit} if context > limit else {}
        run_attrs = _run_attrs(windows, settings, run_state) | beyond | corpus.coverage.attrs()
        run_attrs |= loaded.attrs | dict(attrs or {})
        return processes.broadcast(lambda: ledger.result(texts, **run_attrs))


def measure_batch(batch: WindowBatch, model: nn.Module, head: LMHead, ledger: Ledger, seed: int) -> None:
    """Run the model on the windows of one batch, and enter their losses and gradients in the ledger."""
    draws = batch.draws(seed) if ledger.prices == SAMPLES else None
    loss = ChunkedLoss.run(model, batch.ids, head, batch.targets, batch.positions, draws)
    for window, window_loss in zip(batch.windows, loss.losses, strict=True):
        if not window_loss.isfinite():
            raise NotFiniteError(f"the loss of window {_window_name(window)}")
    ledger.sums.append_rows((None, "loss"), loss.losses.cpu().double() / batch.predictions)
    ledger.sums.append_rows((None, "tokens"), batch.predictions)
    with name_windows(batch.windows):
        ledger.backward(loss, batch.spans)


def _join_uncounted_pass(window: Window, model: nn.Module, head: LMHead, ledger: Ledger, seed: int) -> None:
    """Run one pass that is not counted, so that the others, which have a window more, can gather the weights."""
    counted = Accumulator()
    counted.merge(ledger.sums)
    measure_batch(WindowBatch.of([window]), model, head, ledger, seed)
    ledger.sums.clear()
    ledger.sums.merge(counted)


@contextlib.contextmanager
def name_windows(windows: Sequence[Window]) -> Iterator[None]:
    """Within the block, an error about a gradient that is not finite names these windows too."""
    try:
        yield
    except NotFiniteError as error:
        raise NotFiniteError(error.quantity, f" in window {', '.join(map(_window_name, windows))}") from error


def _window_name(window: Window) -> str:
    return f"{window.text} #{window.index}"


def _print_estimate(
    model: PreTrainedModel,
    window: Window,
    windows: int,
    batch: int,
    head: LMHead,
    ledger: Ledger,
    checkpoint: bool,
) -> None:
    """Print the memory and time that so many windows like this one take, found by trial passes; clear the ledger."""
    with name_windows([window]), ledger.observe_forward():
        Console(stderr=True).print(estimate(model, window.ids, windows, batch, head, ledger, checkpoint))


def _run_attrs(windows: Sequence[Window], settings: Mapping[str, object], run_state: RunState) -> dict[str, object]:
    """Return the provenance that the run adds to that of the model and the ledger."""
    tokens = sum(window.size for window in windows)
    packing = {"packed": "documents in one window do not see each other"} if settings["pack"] else {}
    with_answers = sum(window.answers is not None for window in windows)
    answers = {"loss_on": ANSWERS if with_answers == len(windows) else SOME_ANSWERS} if with_answers else {}
    return {
        "tokens": tokens,
        "text_digest": settings["text"],
        "text_name": "; ".join(dict.fromkeys(window.text for window in windows)),
        **packing,
        **answers,
        "seed": settings["seed"],
        "processes": run_state.processes.count,
        "command": "posterity.measure",
        "seconds": round(run_state.seconds, 3),
        "tokens_per_second": round(tokens / run_state.seconds, 1),
    }


def _check_batch(batch: int, parameters: bool) -> None:
    if batch < 1:
        raise InputError(f"expected a batch of at least 1; got {batch}")
    if parameters and batch > 1:
        raise InputError(f"parameters=True takes one window at a time; got a batch of {batch}: set batch=1 (--batch 1)")


def _check_sharded(processes: Processes, state: object, parameters: bool, checkpoint: bool, pack: bool) -> None:
    """Raise InputError for what a model does not allow whose weights the processes gather for each pass (FSDP2)."""
    if parameters:
        raise InputError(
            "parameters=True expects the gradients of whole parameters; each process holds a part of them (FSDP2), "
            "reduced by a rule of its own: leave it out, or measure the model unsharded"
        )
    if checkpoint:
        raise InputError(
            "checkpoint=True expects weights that are there whenever a layer runs again; the processes gather those of "
            "this model for each pass (FSDP2): leave it out"
        )
    if state is not None:
        raise InputError(
            "state expects a model that each process holds whole; this one is sharded (FSDP2): leave it out"
        )
    if pack and processes.count > 1:
        raise InputError(
            "processes expects windows of one length where they gather the weights for each pass together (FSDP2); "
            "pack=True makes others: leave one of the two out"
        )


def _check_horizons(horizons: int | Sequence[int]) -> tuple[int, ...]:
    """Return the horizons as a tuple, or raise InputError unless they are growing whole numbers from 1 on."""
    values = (horizons,) if isinstance(horizons, int) else tuple(horizons)
    positive = all(isinstance(h, (int, np.integer)) and not isinstance(h, bool) and h >= 1 for h in values)
    if not positive or any(left >= right for left, right in pairwise(values)):
        raise InputError(f"horizons expects whole numbers from 1 on that grow, such as 1, 2, 4, 8; got {horizons!r}")
    return tuple(int(h) for h in values)


def check_tokens(model: PreTrainedModel, windows: Sequence[Window]) -> None:
    """Raise InputError for a token that is not in the model's vocabulary."""
    vocabulary = model.config.get_text_config().vocab_size
    for window in windows:
        if (largest := int(window.ids.max())) >= vocabulary:
            raise InputError(
                f"the model knows tokens 0 to {vocabulary - 1}; got {largest} in window {_window_name(window)}: "
                "is it the model's own tokenizer?"
            )
