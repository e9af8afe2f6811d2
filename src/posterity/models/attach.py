"""The watch over a model's attention, for the length of a `with`."""

import contextlib
from collections.abc import Iterator

from torch import nn

from posterity.errors import InputError
from posterity.models.interface import switched
from posterity.models.language_model import language_model
from posterity.models.probe import check
from posterity.models.watch import Observer, Watch, watches


@contextlib.contextmanager
def watched(model: nn.Module, observe: Observer) -> Iterator[Watch]:
    """Inside, every attention layer of the model runs on the operator and reports its backward passes to `observe`.

    The forward pass is the model's own to rounding (verified on entry); the model is restored on exit, errors included.

    Raises:
        InputError: The model cannot be measured, with the reason.
    """
    with watching(model) as watch, watch.reporting(observe):
        yield watch


@contextlib.contextmanager
def watching(model: nn.Module) -> Iterator[Watch]:
    """The watch over a model, new or that of an outer `with`."""
    inner = language_model(model)
    outer = next((watches[module] for module in inner.modules() if module in watches), None)
    if isinstance(outer, Watch):
        yield outer
        return
    found = check(inner)
    if not found.ok:
        raise InputError(f"this model {found}")
    watch = Watch(inner, found.layers, found.leaks, found.entries)
    watch.right_only = found.right_only
    with watch.installed(), switched(inner, found.name):
        yield watch


def refuse_other_paths(watch: Watch, what: str) -> None:
    """Raise InputError if losses reach keys and values by paths that attention does not see."""
    if watch.other_paths:
        raise InputError(
            f"{what} needs every path between positions to go through attention, but {', '.join(watch.other_paths)} "
            "carries information between them too; only the ledger by lag is exact for this model"
        )
