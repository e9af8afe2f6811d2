"""The projections inside an attention module: matrices of its own, adapters beside them, packed weights.

An adapter (peft) stands around the projection that it adapts, which it calls `base_layer`. What counts as the weight of
an adapted projection is the *effective* matrix, that of the model with the adapter merged.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

DENSE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_MASKS = (torch.bool, torch.int64)  # of buffers that are no weights: masks and positions


@dataclass(frozen=True)
class ProjectionSet:
    """All projections inside one attention module."""

    dense: dict[str, Tensor] = field(default_factory=dict)  # weights and biases by name; norms and vectors left out
    adapters: dict[str, Tensor] = field(default_factory=dict)  # all parameters of adapters, by name
    # Modules whose matrix is reached by a zero matrix added to it: the module that is called, and the one with the
    # matrix inside it. Adapted projections, and those whose weights are elsewhere until they are called.
    replaceable: dict[nn.Module, nn.Module] = field(default_factory=dict)
    packed: dict[nn.Module, str] = field(default_factory=dict)  # those whose weights get no gradient: their kind

    @property
    def parameters(self) -> list[Tensor]:
        """All weights that have a gradient."""
        matrices = [x for module in self.replaceable.values() for x in module.parameters(recurse=False)]
        return [*self.dense.values(), *self.adapters.values(), *matrices]


def find_projections(module: nn.Module) -> ProjectionSet:
    """Return the projections inside an attention module; a parameter that stands in several places is named once."""
    projections = ProjectionSet()
    inside: list[str] = []  # prefixes of adapted projections
    for prefix, child in module.named_modules():
        if any(prefix.startswith(outer) for outer in inside):
            continue
        base = base_projection(child)
        if base is not child:
            inside.append(f"{prefix}.")
            of_base = {id(x) for x in base.parameters()}
            adapters = ((name, x) for name, x in child.named_parameters() if id(x) not in of_base)
            _add_new(projections.adapters, prefix, dict(adapters))
        parameters = dict(base.named_parameters(recurse=False))
        matrices = [x for x in parameters.values() if x.dim() > 1]
        buffers = [x for x in base.buffers(recurse=False) if x.dim() > 1 and x.dtype not in _MASKS]
        packed = [x for x in (matrices or buffers) if is_packed(x)]
        if packed:
            projections.packed[child] = packing_kind(base, packed[0])
        elif base is not child or any(x.is_meta for x in matrices):
            if _is_linear(base):
                projections.replaceable[child] = base
            elif matrices:
                projections.packed[child] = type(base).__name__
        elif matrices:
            _add_new(projections.dense, prefix, parameters)
    return projections


def base_projection(module: nn.Module) -> nn.Module:
    """Return the projection inside an adapted one; any other module as it is."""
    while isinstance(base := getattr(module, "base_layer", None), nn.Module):
        module = base
    return module


def is_packed(x: Tensor) -> bool:
    """Return whether a parameter has its numbers in a packed form, to which autograd sends no gradient."""
    if x.dtype not in DENSE:
        return True
    if not is_traceable_wrapper_subclass(x) or isinstance(x, DTensor) or x.dim() != 2:
        return False
    try:  # a class of tensors that packs may still give gradients as if it did not
        with torch.enable_grad():
            probe = torch.zeros(1, 1, x.shape[1], dtype=x.dtype, device=x.device)
            return not torch.nn.functional.linear(probe, x.detach().requires_grad_()).requires_grad
    except Exception:  # whatever its class does not do
        return True


def packing_kind(module: nn.Module, packed: Tensor) -> str:
    """Return what packs the weights of a module: its class, or that of the tensor in a plain one."""
    return type(packed if type(module) is nn.Linear else module).__name__


def plain_tensors(x: Tensor) -> list[Tensor]:
    """Return the tensors that hold the numbers of a tensor: those inside a wrapper, or itself."""
    if not is_traceable_wrapper_subclass(x) or isinstance(x, DTensor):
        return [x]
    names, _ = x.__tensor_flatten__()
    return [plain for name in names for plain in plain_tensors(getattr(x, name))]


def add_zero_matrix(x: Tensor, base: nn.Module, leaves: tuple[Tensor, ...]) -> Tensor:
    """Return what a zero matrix (and bias) beside a linear module adds to its output."""
    weight, *bias = leaves
    if hasattr(base, "nf"):  # transformers' Conv1D: (in, out)
        weight = weight.T
    return torch.nn.functional.linear(x, weight, *bias)


def zero_leaves(x: Tensor, base: nn.Module) -> tuple[Tensor, ...]:
    """Return zeros of the shapes of a linear module's weight and bias, to be differentiated by."""
    shapes = [p.shape for p in (base.weight, base.bias) if isinstance(p, Tensor)]
    return tuple(torch.zeros(shape, dtype=x.dtype, device=x.device).requires_grad_() for shape in shapes)


def _is_linear(module: nn.Module) -> bool:
    """Return whether a module multiplies by its weight: torch's Linear, or transformers' Conv1D."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 2 and (isinstance(module, nn.Linear) or hasattr(module, "nf"))


def _add_new(names: dict[str, Tensor], prefix: str, parameters: Mapping[str, Tensor]) -> None:
    """Add parameters under their full names, those that have no name yet."""
    named = {id(x) for x in names.values()}
    names |= {f"{prefix}.{name}".lstrip("."): x for name, x in parameters.items() if id(x) not in named}
