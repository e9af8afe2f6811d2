"""score(): how much of the gradient of a document's keys and values comes from far away."""

import os
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pandas as pd
import torch
import xarray as xr
from torch import Tensor

from posterity._version import __version__
from posterity.decomposition.accumulator import Accumulator
from posterity.decomposition.first_keys import SINKS
from posterity.errors import InputError
from posterity.inputs.arguments import open_model, split_arguments
from posterity.inputs.named_documents import open_files
from posterity.inputs.windows import Window, read_whole_documents, token_digest
from posterity.measurement.account import open_ledger
from posterity.measurement.distributed import Processes
from posterity.measurement.ledger import Ledger
from posterity.measurement.measure import check_tokens, measure_batch
from posterity.measurement.run_state import RunState, fingerprint
from posterity.measurement.window_batch import WindowBatch
from posterity.models.chunked_loss import LMHead
from posterity.models.context_length import check_context
from posterity.models.language_model import freeze_parameters, language_model, max_tokens, seed_rng
from posterity.progress import progress_bar

BEYOND = (1024, 4096, 16384)  # tokens
CONTEXT = 32768  # tokens of a document that are measured together, at most, unless said
WRITTEN = ("key", "value")


def score(
    model: Any = "default",
    tokenizer: Any = None,
    documents: Any = None,
    *,
    context: int | None = None,
    limit: int | None = None,
    beyond: Sequence[int] = BEYOND,
    losses: bool = True,
    seed: int = 0,
    progress: bool = True,
    state: str | os.PathLike[str] | None = None,
) -> pd.DataFrame:
    """Score documents by the distance of the queries and losses that the gradient of their keys and values comes from.

    Edges into the first four positions (attention sinks) are left aside: every long document would have them.

    Args:
        model: As in `posterity.measure`.
        tokenizer: As in `posterity.measure`.
        documents: As in `posterity.measure`; each is measured by itself, from its beginning.
        context: The most tokens that are measured together; a longer document is cut, its rest left out. None for what
            the model reads by its config, 32,768 at most.
        limit: The largest number of documents; None means all.
        beyond: Distances in tokens, powers of two that grow.
        losses: Whether to score by the distance of the losses too (one more backward pass for each distance).
        seed: For models that draw random numbers even in evaluation mode.
        progress: Whether to show a progress bar on stderr.
        state: A folder that keeps what has been measured; where it holds some, the run goes on from there.

    Returns:
        A row for each document: `document` (its name), `tokens` measured and `tokens_left_out`, `loss` in nats per
        token; for keys and for values `key_norm` (squared norm of the gradient over edges that count, in nats^2), and
        for each distance D `key_credit_beyond_D`, the share of it that arrives over edges of lag D and more, and
        `key_losses_beyond_D`, the share that is lost when a loss at distance d counts (1 - 1/D)^d. NaN where the norm
        is not positive.

    Raises:
        InputError: The model or the input cannot be measured, with the reason and what to do.
    """
    distances = _check_distances(beyond)
    tokenizer, documents = split_arguments(tokenizer, documents)
    documents = open_files(documents)
    loaded = open_model(model, tokenizer)
    inner = language_model(loaded.model)
    context = min(CONTEXT, max_tokens(inner)) if context is None else context
    rows = read_whole_documents(documents, loaded.tokenizer, context, limit)
    windows = [window for _, parts, _ in rows for window in parts]
    check_context(inner, max(window.size for window in windows))
    check_tokens(inner, windows)
    settings = {
        "version": __version__, "kind": "scores", "dtype": str(inner.dtype), "context": context, "beyond": distances,
        "losses": losses, "seed": seed, "text": token_digest(windows),
        "model": "" if state is None else fingerprint(inner),
    }  # fmt: skip
    run_state = RunState.open(state, settings, Processes())
    remaining, sums = run_state.remaining_windows(len(rows)), Accumulator()
    with (
        run_state.hold_lock(len(remaining)),
        freeze_parameters(inner),
        seed_rng(seed),
        open_ledger(loaded.model, "octaves", weights=False, sinks=SINKS, positions=1) as ledger,
    ):
        if losses:
            ledger.split_losses(False, distances, False)
        head = LMHead.probe(inner)
        run_state.start(sums)
        with ledger.observe_forward(), progress_bar(len(remaining), progress, "scoring") as advance:
            for number in remaining:
                torch.manual_seed(seed + number)
                parts = rows[number][1]
                sums.append_rows(
                    (None, "scores"), [_score_document(parts, loaded.model, head, ledger, distances, seed)]
                )
                run_state.add_windows(sums, [number])
                advance(1, sum(window.size for window in parts))
        run_state.finish(sums)
    scores = torch.stack(sums.rows[None, "scores"]).numpy()
    frame = pd.DataFrame(scores, columns=["loss", *_columns(distances, losses)])
    frame.insert(0, "document", [name for name, _, _ in rows])
    frame.insert(1, "tokens", [sum(window.size - window.added for window in parts) for _, parts, _ in rows])
    frame.insert(2, "tokens_left_out", [left_out for _, _, left_out in rows])
    return frame


def _check_distances(beyond: Sequence[int]) -> tuple[int, ...]:
    distances = tuple(int(x) for x in beyond)
    powers = all(x >= 16 and x & (x - 1) == 0 for x in distances)
    if not distances or not powers or any(left >= right for left, right in pairwise(distances)):
        raise InputError(f"beyond expects powers of two from 16 on that grow, such as 1024, 4096; got {beyond!r}")
    return distances


def _columns(distances: Sequence[int], losses: bool) -> list[str]:
    """Return the names of `_shares`, in order."""
    names = []
    for stream in WRITTEN:
        names += [f"{stream}_norm", *(f"{stream}_credit_beyond_{distance}" for distance in distances)]
        names += [f"{stream}_losses_beyond_{distance}" for distance in distances] if losses else []
    return names


def _score_document(
    windows: Sequence[Window], model: Any, head: LMHead, ledger: Ledger, distances: Sequence[int], seed: int
) -> Tensor:
    """Measure a document by itself: its loss, then what `_columns` names."""
    for window in windows:
        measure_batch(WindowBatch.of([window]), model, head, ledger, seed)
    result = ledger.result()
    loss = float((result.loss * result.tokens).sum() / result.tokens.sum())
    ledger.clear()
    return torch.tensor([loss, *_shares(result, distances)], dtype=torch.float64)


def _shares(result: xr.Dataset, distances: Sequence[int]) -> list[float]:
    profile = result.profile_by_document.sel(reader_of="rest").sum(["document", "layer"])
    numbers = []
    for stream in WRITTEN:
        credit = profile.sel(stream=stream)
        norm = float(credit.sum())
        parts = [float(credit.where(credit.lag >= distance, 0).sum()) for distance in distances]
        if "horizon_by_document" in result:
            remaining = result.horizon_by_document.sel(reader_of="rest", stream=stream).sum(
                ["document", "layer", "head"]
            )
            parts += [norm - float(x) for x in remaining]
        numbers += [norm, *(part / norm if norm > 0 else float("nan") for part in parts)]
    return numbers
