"""The watch over a model's attention, for the length of a `with`."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from posterity.errors import InputError
from posterity.models.interception import AttentionCall, interceptor_of
from posterity.models.interface import switch_attention
from posterity.models.language_model import freeze_parameters, input_device, language_model
from posterity.models.probe import check
from posterity.models.watch import Layer, Observer, Watch


@contextlib.contextmanager
def observe_model(model: nn.Module, observe: Observer) -> Iterator[Watch]:
    """Run every attention layer of the model on the operator, and report its backward passes to `observe`.

    The forward pass is the model's own to rounding (verified on entry); the model is restored on exit, errors included.

    Raises:
        InputError: The model cannot be measured, with the reason.
    """
    with watch_model(model) as watch, watch.report_to(observe):
        yield watch


@contextlib.contextmanager
def watch_model(model: nn.Module) -> Iterator[Watch]:
    """Watch a model for the length of the block; inside another such `with` the watch is that one's.

    Raises:
        InputError: The model cannot be measured, with the reason.
    """
    inner = language_model(model)
    outer = next((x for x in map(interceptor_of, inner.modules()) if x is not None), None)
    if isinstance(outer, Watch):
        yield outer
        return
    result = check(inner)
    if not result.ok:
        raise InputError(f"this model {result}")
    watch = Watch(inner, result.layers, result.other_paths, result.entries)
    watch.right_only, watch.wrong_gradients = result.right_only, result.wrong_gradients
    watch.uncut_paths = result.uncut_paths
    with watch.install(), switch_attention(inner, result.name):
        yield watch


def first_calls(model: nn.Module) -> list[tuple[Layer, AttentionCall]]:
    """Return the attention calls of one forward pass over two tokens, in order."""
    inner, calls = language_model(model), []
    ids = torch.zeros(1, 2, dtype=torch.long, device=input_device(inner))

    def note(layer: Layer, call: AttentionCall) -> Tensor | None:
        calls.append((layer, call))

    with watch_model(inner) as watch, watch.replace_outputs(note), freeze_parameters(inner), torch.no_grad():
        inner(input_ids=ids, use_cache=False)
    return calls


def head_counts(model: nn.Module) -> list[int]:
    """Return the number of query heads of every attention layer.

    Raises:
        InputError: The model cannot be measured, with the reason.
    """
    return [call.query.shape[1] for _, call in first_calls(model)]


def refuse_other_paths(watch: Watch, what: str) -> None:
    """Raise InputError if losses reach keys and values by paths that attention does not see."""
    if watch.other_paths:
        raise InputError(
            f"{what} needs every path between positions to go through attention, but {', '.join(watch.other_paths)} "
            "carries information between them too; only the ledger by lag is exact for this model"
        )


def require_whole_gradient(watch: Watch) -> None:
    """Raise InputError unless own and later losses can be told apart: every path can be cut, and no horizon is on."""
    refuse_uncut_paths(watch, "to say who pays")
    if watch.cuts:
        raise InputError("who pays is a question to the whole gradient: leave the `with` of the horizon first")


def refuse_uncut_paths(watch: Watch, what: str) -> None:
    """Raise InputError if losses reach keys and values by paths that neither attention nor a horizon on states sees."""
    if watch.uncut_paths:
        refuse_other_paths(watch, what)
