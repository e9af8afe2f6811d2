"""Gradient checkpointing of a watched model: a layer runs again when a backward pass reaches it.

Between the passes a window then holds the input of every layer, and of every attention call its output and log-sum-exp,
so that attention, whose time is quadratic, does not run again; all other activations are those of one layer at a time.
The graph is the one of the first run, so that hooks, horizons and several backward passes stay what they are, and the
numbers are the same bits where the device computes the same bits twice (Chen et al. 2016, arXiv 1604.06174).

transformers' own checkpointing works in training mode only. A few random tokens show whether the layers of a model can
run again: its gradients must not change.
"""

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from posterity.errors import InputError, first_line
from posterity.models.chunked_loss import window_losses
from posterity.models.language_model import enclosing_layer, language_model, max_difference, replace_forwards, rounding
from posterity.models.watch import Layer, Watch
from posterity.ops.attention import Backward, OutputTape
from posterity.ops.horizon_rules import Full

_PROBE = (1, 16)  # windows, tokens
_PROBE_PASSES = 2  # backward passes over one forward pass, as the loss split makes them


@contextlib.contextmanager
def checkpoint_layers(watch: Watch) -> Iterator[None]:
    """Within the block, forward passes that are recorded keep no more than their layers' inputs and attention outputs.

    Raises:
        InputError: The layers of the model cannot run again, with the reason.
    """
    expected = _gradients(watch)
    forwards = {layer: _checkpointed(watch, layer) for layer in checkpointed_layers(watch)}
    with replace_forwards(forwards):
        try:
            gradients = _gradients(watch)
        except Exception as error:  # whatever it was: the model does not allow it
            raise _refusal(watch, first_line(error, typed=not isinstance(error, InputError))) from error
        if not _are_close(expected, gradients):
            raise _refusal(watch, "run again, they give other gradients")
        yield


def checkpointed_layers(watch: Watch) -> list[nn.Module]:
    """Return the modules that run again: the layers around attention, and those in one list with them."""
    layers: dict[nn.Module, None] = {}
    for name in watch.names.values():
        layers |= dict.fromkeys(_siblings(watch.model, name))
    inside = {part for layer in layers for part in layer.modules() if part is not layer}
    return [layer for layer in layers if layer not in inside]


def _siblings(model: nn.Module, name: str) -> list[nn.Module]:
    """Return the list of layers in which an attention module stands; without a list, the layer around it alone."""
    path = name.split(".")
    for depth in range(len(path) - 1, 0, -1):
        parent = model.get_submodule(".".join(path[:depth]))
        if isinstance(parent, nn.ModuleList):
            return list(parent)
    return [enclosing_layer(model, name)]


def _checkpointed(watch: Watch, layer: nn.Module) -> Callable[..., Any]:
    """Return the layer's forward() with checkpointing."""
    forward = layer.forward
    modules = [module for module in layer.modules() if module in watch.names]

    @torch.compiler.disable
    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        tape = OutputTape()

        def run_on_tape(*args: Any, **kwargs: Any) -> Any:
            tape.rewind()
            release_free_memory()
            with watch.run_checkpointed(tape, modules):
                return forward(*args, **kwargs)

        return checkpoint(run_on_tape, *args, use_reentrant=False, **kwargs)

    return run


def release_free_memory() -> None:
    """Give freed memory back to the system, where the C library is glibc.

    Else the activations of one layer after the other lie between what is kept, and the process grows by the holes.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # TypeError: Windows has no library of the program
        ctypes.CDLL(None).malloc_trim(0)


def _gradients(watch: Watch) -> list[tuple[Layer, Tensor]]:
    """Return the gradients of queries, keys and values of a few random tokens, twice over one forward pass."""
    model = language_model(watch.model)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, _PROBE, generator=torch.Generator().manual_seed(0))
    gradients: list[tuple[Layer, Tensor]] = []

    def observe(layer: Layer, back: Backward, projections: object) -> None:
        gradients.extend((layer, x) for x in (back.grad_query, back.grad_key, back.grad_value))

    with torch.random.fork_rng(), watch.override_rules((Full(), Full()), observe):
        torch.manual_seed(0)
        loss = window_losses(model, ids).sum()
        for _ in range(_PROBE_PASSES):
            loss.backward(retain_graph=True)
    model.zero_grad()
    return gradients


def _are_close(expected: list[tuple[Layer, Tensor]], gradients: list[tuple[Layer, Tensor]]) -> bool:
    """Return whether the same layers have the same gradients to rounding, in the same order."""
    return [layer for layer, _ in expected] == [layer for layer, _ in gradients] and all(
        max_difference(x, y) <= rounding(x.dtype) * x.abs().max().item()
        for (_, x), (_, y) in zip(expected, gradients, strict=True)
    )


def _refusal(watch: Watch, reason: str) -> InputError:
    return InputError(
        f"the layers of {type(watch.model).__name__} cannot run again in the backward pass: {reason}: measure without "
        "checkpoint=True (--checkpoint)"
    )
