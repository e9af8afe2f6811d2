"""Gradients of the hidden states at the input of each layer, split by own and later losses."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from posterity.decomposition.accumulator import Accumulator
from posterity.decomposition.bins import Bins
from posterity.decomposition.credit import check_finite, restart_positions
from posterity.decomposition.first_keys import Spans
from posterity.models.language_model import enclosing_layer
from posterity.models.watch import Layer, Watch
from posterity.ops.precision import working_dtype


class HiddenGradients:
    """Collects the total gradient of each layer's input and the part of the own losses; sums their terms.

    A layer's input is that of the module around its attention module: the residual stream in front of the norm.
    """

    def __init__(self, model: nn.Module, watch: Watch, sums: Accumulator, positions: int):
        """Start empty; accumulate into `sums`; `positions` below this are exact."""
        self.watch, self.sums, self.positions = watch, sums, positions
        self._modules = {layer: enclosing_layer(model, layer.name) for layer in watch.layers}
        self._grads: dict[str, dict[Layer, Tensor]] = {"total": {}, "own": {}}
        self._part: str | None = None  # of the gradient, in the present backward pass

    @contextlib.contextmanager
    def hook_inputs(self) -> Iterator[None]:
        """Within the block, forward passes hook the inputs of the layers, so that `collect` gets their gradients."""
        hooks = [
            module.register_forward_pre_hook(self._hook_input(layer), with_kwargs=True)
            for layer, module in self._modules.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextlib.contextmanager
    def collect(self, part: str | None) -> Iterator[None]:
        """Within the block, a backward pass gives this part of the gradient: "total", "own", or None for neither."""
        self._part = part
        try:
            yield
        finally:
            self._part = None

    def add(self, windows: int, positions: int, spans: Spans | None = None) -> None:
        """Accumulate |own|², |later|² and their inner product by position; NaN for a layer without a gradient.

        `spans`: of the documents packed into each window, whose positions start again.
        """
        rows = []
        for layer in self.watch.layers:
            total, own = (self._grads[part].get(layer) for part in ("total", "own"))
            if total is None or own is None:
                rows.append(torch.full((windows, 3, positions), torch.nan, dtype=torch.float64))
                continue
            total, own = (x.to(working_dtype(x.dtype)) for x in (total, own))
            later = total - own
            terms = [(x * y).sum(-1) for x, y in ((own, own), (later, later), (own, later))]
            row = torch.stack(terms, 1).double()
            rows.append(check_finite(row, f"the gradient of the hidden states of layer {layer}").cpu())
        by_position = torch.stack(rows, 1)  # window, layer, term, position
        if spans is not None:
            by_position = restart_positions(by_position, spans)
        bins = Bins.of_positions(self.positions, positions)
        self.sums.add((None, "hidden"), bins.sum(by_position.sum(0)))
        self.sums.append_rows((None, "hidden"), by_position.sum(-1))
        for grads in self._grads.values():
            grads.clear()

    def _hook_input(self, layer: Layer) -> Callable:
        def hook(_module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point()), None)
            if x is None or x.dim() != 3 or not x.requires_grad or not self.watch.is_next(layer):
                return

            def keep(grad: Tensor) -> None:
                if self._part is not None:
                    self._grads[self._part][layer] = grad.clone()  # a leaf adds later passes to it

            x.register_hook(keep)

        return hook
