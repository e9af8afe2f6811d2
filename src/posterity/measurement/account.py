"""The account of a model: within the block every backward pass enters a ledger."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from posterity.axes import SIDES, STREAMS
from posterity.decomposition.bins import EXACT_LAGS, Bins
from posterity.decomposition.credit import EXACT_POSITIONS
from posterity.decomposition.first_keys import SINKS
from posterity.errors import InputError
from posterity.measurement.ledger import Ledger
from posterity.measurement.price_account import TEXT
from posterity.models.attach import watch_model
from posterity.models.watch import Watch

_NUMBERS_BY_POSITION = 900_000  # of a result, exact: 7 MB


@contextlib.contextmanager
def account(
    model: nn.Module,
    lags: str = "octaves",
    weights: bool = True,
    sinks: int = SINKS,
    positions: int | None = None,
    prices: bool = False,
) -> Iterator[Ledger]:
    """Account for any forward and backward passes of your own.

    Every backward pass counts the rows of its batch as new documents. Padding is honoured where the model is
    told of it (a 2D `attention_mask`): padding is no reader, and positions count from a row's first real token. (With
    padding on the left, transformers' own loss lets the last padding token predict the first real one: set its label to
    -100.) Packed documents share one row of positions. The weights of attention are never returned here
    (`output_attentions`).

    What runs backward between two forward passes of the model enters as a whole or not at all: where a gradient is not
    finite, as in a step that a GradScaler skips, it is left out, logged as a warning, and counted in the result's
    attribute `left_out_passes`.

    Args:
        model: A causal language model of transformers (or a wrapper around one); restored on exit.
        lags: "octaves" (exact up to 15, then a quarter octave each), "all", or "self" (self and other only, no sweep:
            mass and attention of the others are NaN).
        weights: Whether to split the gradients of W_Q, W_K and W_V too.
        sinks: The edges into so many first keys of each document (attention sinks) are told apart from all others.
        positions: Positions below this are exact; beyond, four bins an octave. None for 512, or fewer in models of more
            than 300 heads, whose files would grow beyond all use.
        prices: Whether to price cached keys and values, and windows, by the losses that are sent back. They have to be
            sums over the tokens, in nats: prices grow with the square of a factor.

    Raises:
        InputError: The model cannot be measured, with the reason.
    """
    with open_ledger(model, lags, weights, sinks, positions, TEXT if prices else None, atomic=True) as ledger:
        hook = ledger.watch.model.register_forward_pre_hook(lambda *_: ledger.settle())
        try:
            yield ledger
        finally:
            hook.remove()


@contextlib.contextmanager
def open_ledger(
    model: nn.Module,
    lags: str,
    weights: bool,
    sinks: int,
    positions: int | None,
    prices: str | None = None,
    atomic: bool = False,
) -> Iterator[Ledger]:
    """Account for the backward passes of the block.

    Args:
        model, lags, weights, sinks, positions: As in `account`.
        prices: As in `measure`.
        atomic: Let a backward pass enter as a whole or not at all, and leave it out if a gradient is not finite, which
            is an error otherwise. That takes the memory of a second ledger during a pass.
    """
    Bins.of(lags, 2)
    if sinks < 0 or (positions is not None and positions < 1):
        raise InputError(f"expected sinks of at least 0 and positions of at least 1; got {sinks} and {positions}")
    with watch_model(model) as watch:
        positions = _exact_positions(watch) if positions is None else positions
        ledger = Ledger(model, watch, lags, weights, sinks, positions, prices, atomic)
        record = watch.record_projections() if weights else contextlib.nullcontext()
        with watch.report_to(ledger.observe), record:
            yield ledger


def _exact_positions(watch: Watch) -> int:
    """Return how many positions are exact by default: a power of two that `credit_by_position` has room for."""
    config: Any = watch.model.config
    heads = getattr(config.get_text_config(), "num_attention_heads", 1)
    largest = max(heads) if isinstance(heads, Sequence) else heads
    numbers = len(watch.layers) * largest * len(STREAMS) * len(SIDES)
    return min(EXACT_POSITIONS, max(EXACT_LAGS, 2 ** int(math.log2(max(1.0, _NUMBERS_BY_POSITION / numbers)))))
