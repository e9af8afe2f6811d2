"""The residual stream in front of every layer of a forward pass, and its gradients in chosen backward passes."""

import contextlib
from collections.abc import Callable, Iterator

from torch import Tensor, nn

from posterity.models.language_model import enclosing_layer
from posterity.models.watch import Layer, Watch


class LayerInputs:
    """Keeps the input of each layer and its gradients by part.

    A layer's input is that of the module around its attention module: the residual stream in front of the norm.

    Attributes:
        tensors: The inputs of the latest forward pass within `hook`, with their graph.
        grads: Of each part of the gradient that `collect` names, the gradient of each input.
    """

    def __init__(self, model: nn.Module, watch: Watch):
        """Start empty."""
        self.watch = watch
        self.modules = {layer: enclosing_layer(model, layer.name) for layer in watch.layers}
        self.tensors: dict[Layer, Tensor] = {}
        self.grads: dict[str, dict[Layer, Tensor]] = {}
        self._part: str | None = None  # of the gradient, in the present backward pass

    @contextlib.contextmanager
    def hook(self) -> Iterator[None]:
        """Within the block, forward passes hook the inputs of the layers, so that `collect` gets their gradients."""
        hooks = [
            module.register_forward_pre_hook(self._hook_input(layer), with_kwargs=True)
            for layer, module in self.modules.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextlib.contextmanager
    def collect(self, part: str | None) -> Iterator[None]:
        """Within the block, a backward pass gives this part of the gradient, such as "total"; None for none."""
        self._part = part
        try:
            yield
        finally:
            self._part = None

    def clear(self) -> None:
        """Forget the forward pass and its gradients."""
        self.tensors.clear()
        self.grads.clear()

    def _hook_input(self, layer: Layer) -> Callable:
        def hook(_module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point()), None)
            if x is None or x.dim() != 3 or not x.requires_grad or not self.watch.is_next(layer):
                return

            def keep(grad: Tensor) -> None:
                if self._part is not None:
                    self.grads.setdefault(self._part, {})[layer] = grad.clone()  # a leaf adds later passes to it

            self.tensors[layer] = x
            x.register_hook(keep)

        return hook
