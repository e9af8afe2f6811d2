"""Paths between positions outside attention: state spaces, convolutions, linear attention, token shifts, recurrence.

They are found by measurement, with every attention output zero, not by a list of names.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from posterity.models.language_model import max_difference, rounding
from posterity.models.recorder import Recorder


def find_other_paths(
    model: PreTrainedModel, recorder: Recorder, ids: Tensor, other_first: Tensor, tolerance: float
) -> tuple[str, ...]:
    """Return the modules that mix positions when every attention output is zero.

    Four ways to see it: when the first token changes, logits after it move, or queries, keys or values do (a
    convolution before attention), or the bias that later queries add to their scores does; or these logits have a
    gradient at its embedding.

    Args:
        model: With its attention silenced.
        recorder: What silences it.
        ids: Tokens, (1, position).
        other_first: The same with another first token.
        tolerance: How far logits may differ by rounding.
    """
    logits, streams, biases = [], [], []
    for row in (ids, other_first):
        recorder.streams, recorder.biases = [], {}
        with torch.no_grad():
            logits.append(model(input_ids=row, use_cache=False).logits[:, 1:])
        streams.append(recorder.streams)
        biases.append(recorder.biases)
    names = [name for name, bias in biases[0].items() if _move([bias], [biases[1][name]])]
    modules = tuple(f"the bias of the scores of {module}" for module in _one_of_each_class(model, names))
    if _move(*streams) or max_difference(*logits) > tolerance or _has_gradient(model, ids):
        return _mixing_modules(model, ids, other_first) or modules or ("a module that could not be named",)
    return modules


def _has_gradient(model: PreTrainedModel, ids: Tensor) -> bool:
    """Return whether logits after the first token have a gradient at its embedding."""
    embeddings: list[Tensor] = []

    def start_graph(_module: nn.Module, _args: tuple, output: Tensor) -> Tensor:
        embeddings.append(output.detach().requires_grad_())
        return embeddings[-1].clone()  # some models scale it in place

    hook = model.get_input_embeddings().register_forward_hook(start_graph)
    try:
        with torch.enable_grad():
            later = model(input_ids=ids, use_cache=False).logits[:, 1:].float()
            weights = torch.linspace(-1, 1, later.shape[-1], device=later.device)
            grads = torch.autograd.grad((later * weights).sum(), embeddings, allow_unused=True) if embeddings else ()
    finally:
        hook.remove()
    return any(grad is not None and bool((grad[:, 0] != 0).any()) for grad in grads)


def _mixing_modules(model: PreTrainedModel, ids: Tensor, other_first: Tensor) -> tuple[str, ...]:
    """Name the innermost modules whose later outputs move though their later inputs do not: one of each class."""
    flow, other = (_flow(model, row) for row in (ids, other_first))
    names = [
        name
        for name, (inputs, outputs) in flow.items()
        if name in other and inputs and _move(outputs, other[name][1]) and not _move(inputs, other[name][0])
    ]
    innermost = [name for name in names if not any(inside.startswith(f"{name}.") for inside in names)]
    return _one_of_each_class(model, innermost)


def _one_of_each_class(model: PreTrainedModel, names: list[str]) -> tuple[str, ...]:
    """Describe the first module of each class, "Class (name)"."""
    by_class = {type(model.get_submodule(name)).__name__: name for name in reversed(names)}
    return tuple(f"{kind} ({name})" for kind, name in reversed(by_class.items()))


def _flow(model: PreTrainedModel, row: Tensor) -> dict[str, tuple[list[Tensor], list[Tensor]]]:
    """Return inputs and outputs of the first call of every module, the first position left out."""
    flow: dict[str, tuple[list[Tensor], list[Tensor]]] = {}

    def later(values: Any) -> list[Tensor]:
        tensors = [x for x in tree_leaves(values) if isinstance(x, Tensor) and x.is_floating_point() and x.dim() >= 3]
        return [x[:, 1:].detach().float() for x in tensors if x.shape[1] == row.shape[1]]

    def recorder(name: str) -> Callable:
        def record(_module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            flow.setdefault(name, (later((args, kwargs)), later(output)))

        return record

    hooks = [module.register_forward_hook(recorder(name), with_kwargs=True) for name, module in model.named_modules()]
    try:
        with torch.no_grad():
            model(input_ids=row, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return flow


def _move(before: list[Tensor], after: list[Tensor]) -> bool:
    """Return whether any differs by more than rounding (a token that takes another expert moves others by that)."""
    pairs = [(x, y) for x, y in zip(before, after, strict=False) if x.shape == y.shape and x.numel()]
    return any(max_difference(x, y) > rounding(x.dtype) * x.abs().max().item() for x, y in pairs)
