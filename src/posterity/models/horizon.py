"""Horizons on a model: limit which losses shape keys and values, in any passes of your own."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from posterity.errors import InputError
from posterity.models.attach import refuse_uncut_paths, watch_model
from posterity.models.watch import Cut, Layer, Watch
from posterity.ops.horizon_rules import Rule, discount_rate, factors_by_lag


@contextlib.contextmanager
def horizon(
    model: nn.Module,
    rule: Rule,
    cut: str = "kv",
    streams: Sequence[str] = ("key", "value"),
    layers: Sequence[int] | None = None,
) -> Iterator[None]:
    """Limit which later losses may shape keys and values, in any forward and backward passes of your own.

    The forward pass is untouched. Both passes must be inside the `with`. Horizons nest with each other where they do
    not contradict, and with `posterity.account`, which then counts what the horizon lets through.

    Args:
        model: A causal language model of transformers (or a wrapper around one); restored on exit.
        rule: `Full()`, `Myopic()`, `Discount(rate)`, `EdgeWindow(lags)`, or your own with a method `factor(lag)`.
        cut: "kv": the gradient at the key and value itself is cut, so that W_K and W_V learn only from what remains.
            "hidden": W_K and W_V keep all terms, but what is cut does not flow on into the hidden state that the
            attention module reads (Wu, Morris and Levine 2024, arXiv 2404.00859).
        streams: "key", "value" or both.
        layers: Numbers of attention layers, from 0; negative ones count from the end. All by default.

    Raises:
        InputError: A wrong argument; a model that cannot be measured, or whose positions also communicate where no
            horizon holds (where one does: another rule than rate^lag, `layers`, one stream or cut="hidden"); a horizon
            that contradicts an outer one; no forward pass with gradients inside the `with`.
    """
    factors_by_lag(rule, 2, torch.empty(0))
    if cut not in ("kv", "hidden"):
        raise InputError(f'cut expects "kv" or "hidden"; got {cut!r}')
    names = [streams] if isinstance(streams, str) else list(streams)
    if not names or not set(names) <= {"key", "value"}:
        raise InputError(f'streams expects "key", "value" or both; got {streams!r}')
    with watch_model(model) as watch:
        refuse_uncut_paths(watch, "a horizon")
        inner = Cut(rule, cut, frozenset(names), _select_layers(watch.layers, layers))
        if watch.other_paths:
            _check_states(inner, watch)
        for outer in watch.cuts:
            if (
                outer.streams & inner.streams
                and outer.layers & inner.layers
                and (outer.rule, outer.kind) != (rule, cut)
            ):
                raise InputError(
                    f"this horizon ({rule}, cut={cut!r}) contradicts the one around it ({outer.rule}, "
                    f"cut={outer.kind!r}) for the same streams and layers: leave that `with` first, or choose others"
                )
        watch.cuts.append(inner)
        try:
            with watch.discount_states():
                yield
        finally:
            watch.cuts.remove(inner)
            inner.active = False
        if not inner.calls:
            raise InputError(
                "a horizon changes gradients, but no forward pass with gradients came inside its `with`: call the "
                "model inside it, without torch.no_grad(), and let its parameters or inputs require gradients"
            )


def _check_states(cut: Cut, watch: Watch) -> None:
    """Raise InputError unless a horizon can hold outside attention too, where positions communicate."""
    discount_rate(cut.rule)
    if cut.kind != "kv" or len(cut.streams) < 2 or cut.layers != frozenset(watch.layers):
        raise InputError(
            f"{', '.join(watch.other_paths)} carries information between positions beside attention: a horizon on this "
            'model expects cut="kv", keys and values, and all layers'
        )


def _select_layers(layers: tuple[Layer, ...], numbers: Sequence[int] | None) -> frozenset[Layer]:
    """Return the layers of these numbers, all by default."""
    if numbers is None:
        return frozenset(layers)
    indices = [numbers] if isinstance(numbers, int) else list(numbers)
    for index in indices:
        if not isinstance(index, int) or isinstance(index, bool) or not -len(layers) <= index < len(layers):
            raise InputError(
                f"layers expects numbers from 0 to {len(layers) - 1}, or from the end with -1; got {index!r}"
            )
    if not indices:
        raise InputError("layers expects at least one number; got none: leave it out for all layers")
    return frozenset(layers[index] for index in indices)
