"""Packed weights: whether gradients pass through the projections that compute with them."""

import warnings

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from posterity.decomposition.projections import is_packed, packing_kind
from posterity.errors import InputError


def check_backward(model: PreTrainedModel, ids: Tensor) -> None:
    """Send a gradient back through the model, and see that it passes every module with packed weights.

    Some kernels for packed weights have no backward pass: what they return has no graph, or its gradient is lost.

    Raises:
        InputError: It does not pass, with the module.
    """
    modules = _packed_modules(model)
    flows = {name: _Flow(kind) for name, (_, kind) in modules.items()}
    hooks = []
    for name, (module, _) in modules.items():
        hooks += [module.register_forward_pre_hook(flows[name].enter), module.register_forward_hook(flows[name].leave)]
    if not hooks:
        return
    hooks.append(model.get_input_embeddings().register_forward_hook(lambda _m, _a, x: x.detach().requires_grad_() * 1))
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*an autograd kernel was not registered")
            logits = model(input_ids=ids, use_cache=False).logits
            if logits.requires_grad:
                (logits.float() * torch.linspace(-1, 1, logits.shape[-1], device=logits.device)).sum().backward()
    finally:
        for hook in hooks:
            hook.remove()
    for name, flow in flows.items():
        if flow.is_blocked:
            raise InputError(
                f"no gradient passes through {name}: the kernel for its packed weights ({flow.kind}) has no backward "
                "pass; load the model without quantisation, or with that of the weights alone"
            )


def packing_kinds(model: nn.Module) -> list[str]:
    """Return what packs the weights of a model."""
    return sorted({kind for _, kind in _packed_modules(model).values()})


def _packed_modules(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Return the modules with packed weights of their own, and what packs them, by name."""
    modules = {}
    for name, module in model.named_modules():
        packed = [x for x in module.parameters(recurse=False) if x.dim() > 1 and is_packed(x)]
        if packed:
            modules[name] = module, packing_kind(module, packed[0])
    return modules


class _Flow:
    """The gradients at output and input of one module."""

    def __init__(self, kind: str):
        """Note nothing yet."""
        self.kind = kind
        self.without_graph = self.came = self.passed = False

    @property
    def is_blocked(self) -> bool:
        """Whether a gradient came in and none went out."""
        return self.without_graph or (self.came and not self.passed)

    def enter(self, _module: nn.Module, args: tuple) -> tuple | None:
        """Watch the gradient of the input, as far as this module sends it."""
        if not args or not args[0].requires_grad:
            return None
        x = args[0].view_as(args[0])
        x.register_hook(self._pass)
        return x, *args[1:]

    def leave(self, _module: nn.Module, args: tuple, output: Tensor) -> None:
        """Watch the gradient of the output."""
        if not args or not args[0].requires_grad:
            return
        if output.requires_grad:
            output.register_hook(self._come)
        else:
            self.without_graph = True

    def _pass(self, grad: Tensor) -> None:
        self.passed = self.passed or bool(grad.any())

    def _come(self, grad: Tensor) -> None:
        self.came = self.came or bool(grad.any())
