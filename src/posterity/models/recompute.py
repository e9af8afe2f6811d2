"""An attention module run once more, up to its attention call: what it projects, as a function of its weights."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from posterity.decomposition.weight_gradients import Projections, projection_parameters
from posterity.errors import InputError
from posterity.models.language_model import differ, rounding
from posterity.ops.attention import Backward

_WITHOUT = "measure without the weights (weights=False, --no-weights)"
_replay = threading.local()


def capturing(module: nn.Module) -> "_Capture | None":
    """What takes the attention call of a module that is run once more; None if it is not."""
    capture = getattr(_replay, "capture", None)
    return capture if capture is not None and capture.module is module else None


class Replay:
    """Runs an attention module once more up to its attention call: what it projects, as a function of its weights."""

    def __init__(self, module: nn.Module, args: tuple, kwargs: dict, call: int):
        self.module, self.args, self.kwargs, self.call = module, args, kwargs, call
        device = next((x.device.type for x in module.parameters()), "cpu")
        self.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))

    def project(self, back: Backward, document: int) -> Projections:
        """Query, key and value of one document of the batch, as a function of fresh leaves for the module's weights.

        Raises:
            InputError: The module did not make the same queries, keys and values again.
        """
        batch = len(back.query)

        def one(x: Any) -> Any:
            return x[document, None] if isinstance(x, Tensor) and x.dim() and len(x) == batch > 1 else x

        args, kwargs = self._inputs(one)
        leaves = {name: weight.detach().requires_grad_() for name, weight in projection_parameters(self.module).items()}
        named = {f"module.{name}": leaf for name, leaf in leaves.items()}
        device, dtype, enabled = self.autocast
        with torch.autocast(device, dtype, enabled):
            streams, mask = self._captured(
                lambda: torch.func.functional_call(_Bare(self.module), named, args, kwargs),
                [x[document, None] for x in (back.query, back.key, back.value)],
                f"its weights' gradient cannot be split: {_WITHOUT}",
            )
        if _share(streams, mask, list(leaves.values())):
            raise InputError(
                f"{type(self.module).__name__} makes the bias of its scores with the weights of its queries, keys or "
                f"values too, so that their gradient cannot be split: {_WITHOUT}"
            )
        return Projections(streams, list(leaves.values()))

    def _inputs(self, change: Callable[[Any], Any] = lambda x: x) -> tuple[tuple, dict]:
        """The module's inputs again, in containers that it may write to."""
        return tree_map(change, (self.args, self.kwargs))

    def detached(self, streams: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Key and value as a function of the module's own weights, but not of its input.

        Raises:
            InputError: The module did not make the same queries, keys and values again, or got them from another.
        """
        args, kwargs = self._inputs()
        given = {x.data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        (_, key, value), _ = self._captured(
            lambda: _Bare(self.module)(*args, **kwargs), streams, 'use a horizon with cut="kv"'
        )
        if key.data_ptr() in given:
            raise InputError(
                f"{type(self.module).__name__} reads keys and values that another layer made, so that W_K and W_V "
                'cannot keep what is cut from the hidden state: use a horizon with cut="kv"'
            )
        return key, value

    def _captured(
        self, run: Callable[[], Any], streams: Sequence[Tensor], advice: str
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Any]:
        """Query, key and value that `run` hands to attention, which must be those of the forward pass; and its mask."""
        capture = _Capture(self.module, self.call)
        _replay.capture = capture
        try:
            run()
        except (_Captured, TypeError):  # TypeError: called without its input
            pass
        finally:
            _replay.capture = None
        if capture.streams is None or not _same(capture.streams, streams):
            raise InputError(
                f"{type(self.module).__name__} does not make the same queries, keys and values when run again, so "
                f"{advice}"
            )
        return capture.streams, capture.mask


def _share(streams: Sequence[Tensor], mask: Any, leaves: Sequence[Tensor]) -> bool:
    """Whether a mask with a gradient and the streams depend on the same leaves."""
    if not isinstance(mask, Tensor) or not mask.requires_grad:
        return False
    reached = []
    for some in ([x for x in streams if x.requires_grad], [mask]):
        total = torch.stack([x.sum() for x in some]).sum()
        reached.append(torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True))
    return any(one is not None and other is not None for one, other in zip(*reached, strict=True))


def _same(made: Sequence[Tensor], given: Sequence[Tensor]) -> bool:
    if any(x.shape != y.shape for x, y in zip(made, given, strict=True)):
        return False
    error = max(differ(x, y) / (y.abs().max().item() or 1) for x, y in zip(made, given, strict=True))
    return error < rounding(given[0].dtype)


class _Bare(nn.Module):
    """A module without its hooks."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module.forward(*args, **kwargs)


class _Capture:
    """Stops a replay at the wanted attention call and keeps what it got."""

    def __init__(self, module: nn.Module, call: int):
        self.module, self.left = module, call
        self.streams: tuple[Tensor, Tensor, Tensor] | None = None
        self.mask: Any = None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
        if self.left == 0:
            self.streams, self.mask = (query, key, value), mask
            raise _Captured
        self.left -= 1
        return value.new_zeros(len(query), query.shape[2], query.shape[1], value.shape[3])


class _Captured(Exception):
    """Ends a replay."""
