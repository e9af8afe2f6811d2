"""Paths between positions outside attention: state spaces, convolutions, linear attention, token shifts, recurrence.

Found by measurement, with attention cut everywhere, not by a list of names.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from posterity.models.language_model import differ, rounding
from posterity.models.watch import Recorder


def find_leaks(
    model: PreTrainedModel, recorder: Recorder, ids: Tensor, first: Tensor, tolerance: float
) -> tuple[str, ...]:
    """Name what carries information between positions although attention passes nothing on; empty if nothing does.

    Four ways to see it: when the first token changes, logits after it move, or queries, keys or values do (a
    convolution before attention), or the bias that later queries add to their scores does; or these logits have a
    gradient at its embedding.

    Args:
        model: With its attention cut.
        recorder: What cuts it.
        ids: Tokens, (1, position).
        first: The same with another first token.
        tolerance: How far logits may differ by rounding.
    """
    logits, streams, biases = [], [], []
    for row in (ids, first):
        recorder.later, recorder.biases = [], {}
        with torch.no_grad():
            logits.append(model(input_ids=row, use_cache=False).logits[:, 1:])
        streams.append(recorder.later)
        biases.append(recorder.biases)
    names = [name for name, bias in biases[0].items() if _moved([bias], [biases[1][name]])]
    moved = tuple(f"the bias of the scores of {one}" for one in _one_of_each_class(model, names))
    if _moved(*streams) or differ(*logits) > tolerance or _reached(model, ids):
        return _leaking(model, ids, first) or moved or ("a module that could not be named",)
    return moved


def _reached(model: PreTrainedModel, ids: Tensor) -> bool:
    """Whether logits after the first token have a gradient at its embedding."""
    embedded: list[Tensor] = []

    def note(_module: nn.Module, _args: tuple, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1].clone()  # some models scale it in place

    hook = model.get_input_embeddings().register_forward_hook(note)
    try:
        with torch.enable_grad():
            later = model(input_ids=ids, use_cache=False).logits[:, 1:].float()
            weights = torch.linspace(-1, 1, later.shape[-1], device=later.device)
            grads = torch.autograd.grad((later * weights).sum(), embedded, allow_unused=True) if embedded else ()
    finally:
        hook.remove()
    return any(grad is not None and bool((grad[:, 0] != 0).any()) for grad in grads)


def _leaking(model: PreTrainedModel, ids: Tensor, first: Tensor) -> tuple[str, ...]:
    """The innermost modules whose later outputs move though their later inputs do not: one of each class."""
    one, two = (_flow(model, row) for row in (ids, first))
    names = [
        name
        for name, (inputs, outputs) in one.items()
        if name in two and inputs and _moved(outputs, two[name][1]) and not _moved(inputs, two[name][0])
    ]
    innermost = [name for name in names if not any(other.startswith(f"{name}.") for other in names)]
    return _one_of_each_class(model, innermost)


def _one_of_each_class(model: PreTrainedModel, names: list[str]) -> tuple[str, ...]:
    kinds = {type(model.get_submodule(name)).__name__: name for name in reversed(names)}
    return tuple(f"{kind} ({name})" for kind, name in reversed(kinds.items()))


def _flow(model: PreTrainedModel, row: Tensor) -> dict[str, tuple[list[Tensor], list[Tensor]]]:
    """What goes into and comes out of every module, the first position left out."""
    seen: dict[str, tuple[list[Tensor], list[Tensor]]] = {}

    def later(values: Any) -> list[Tensor]:
        tensors = [x for x in tree_leaves(values) if isinstance(x, Tensor) and x.is_floating_point() and x.dim() >= 3]
        return [x[:, 1:].detach().float() for x in tensors if x.shape[1] == row.shape[1]]

    def note(name: str) -> Callable:
        def noted(_module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            seen.setdefault(name, (later((args, kwargs)), later(output)))

        return noted

    hooks = [module.register_forward_hook(note(name), with_kwargs=True) for name, module in model.named_modules()]
    try:
        with torch.no_grad():
            model(input_ids=row, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _moved(one: list[Tensor], two: list[Tensor]) -> bool:
    """Whether any differs by more than rounding: experts see products of another size when a token goes elsewhere."""
    pairs = [(x, y) for x, y in zip(one, two, strict=False) if x.shape == y.shape and x.numel()]
    return any(differ(x, y) > rounding(x.dtype) * x.abs().max().item() for x, y in pairs)
