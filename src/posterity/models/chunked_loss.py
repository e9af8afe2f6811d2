"""One forward pass; its losses, a chunk of positions at a time; sent back once or several times.

Logits are far wider than hidden states, so those of all positions are never held at once. The model runs once up to the
input of its language-model head. What it does from there on (the head, a scale, a soft-cap) it does itself, for a chunk
of positions at a time: its forward pass runs again, and every module that was called before the head answers what it
had answered. The losses of the chunk are sent back to the input of the head, and nothing of it is kept.

A probe finds out whether a model allows that. One that does not has all its logits at once: the same numbers, in more
memory.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from posterity.models.language_model import differ, first_device, language_model, rounding
from posterity.ops.attention import working

# Logits in a chunk: 64 MB in float32, and as much for each of the loss, its gradient and the logits' gradient. The
# default model's chunks are then 341 positions, enough for the products with the head to run at full speed.
CHUNK = 2**24
_PROBE = (2, 16)  # windows, tokens
_PROBE_POSITIONS = (1, 5, 16)  # where a chunk of the probe ends
Call = tuple[nn.Module, Any]  # a module and what it answered


def run(model: nn.Module, ids: Tensor) -> Tensor:
    """Sum of the losses of each window, in nats, with its graph; all logits at once."""
    ids = ids.to(first_device(language_model(model)))
    return _losses(model(input_ids=ids, use_cache=False).logits, _targets(ids)).sum(1)


class Sending:
    """The losses of one forward pass, sent back as often as wanted; the language-model head is passed only once."""

    def __init__(self, model: nn.Module, ids: Tensor, head: "Head"):
        """Run the model; `losses` are those of each window.

        The head's own parameters get their gradients here, if they want any: the later passes begin at its input.
        """
        ids = ids.to(first_device(head.model))
        passed = head.passed(model, ids)
        if passed is None:
            losses = run(model, ids)
            self.losses, self._end, self._gradient = losses.detach(), losses.sum(), None
            return
        self._end, answers = passed
        self.losses, self._gradient = _by_chunks(head, ids, self._end.detach(), answers)

    def backward(self, again: bool = False) -> None:
        """From the input of the head (or from the losses) to the embeddings; `again`: another one will follow."""
        torch.autograd.backward(self._end, self._gradient, retain_graph=again)


def _by_chunks(head: "Head", ids: Tensor, hidden: Tensor, answers: list[Call]) -> tuple[Tensor, Tensor]:
    """The losses of each window, and their gradient at the input of the head."""
    targets, gradient = _targets(ids), torch.empty_like(hidden)
    losses = []
    for start in range(0, ids.shape[1], step := head.step(len(ids))):
        chunk = slice(start, start + step)
        part = hidden[:, chunk].clone().requires_grad_()
        each = _losses(head.logits(part, ids, answers), targets[:, chunk])
        each.sum().backward()
        assert part.grad is not None
        gradient[:, chunk] = part.grad
        losses.append(each.detach())
    return torch.cat(losses, 1).sum(1), gradient


def _targets(ids: Tensor) -> Tensor:
    """The token that each position has to predict; none at the last."""
    return torch.cat((ids[:, 1:], ids.new_full((len(ids), 1), -100)), 1)


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """The loss of every position, in nats and in the working precision."""
    logits, targets = logits.to(working(logits.dtype)).flatten(0, 1), targets.to(logits.device)
    return nn.functional.cross_entropy(logits, targets.flatten(), reduction="none").view(targets.shape)


class Head:
    """What a model does between the input of its language-model head and its logits, for any part of the positions."""

    def __init__(self, model: nn.Module):
        """Find out by trying, on a few random tokens; `apart` says whether it can be done.

        It can if the head is called once, on the hidden states of all positions, and if the logits of a part of them
        depend on nothing else that was computed before the head.
        """
        self.model = language_model(model)
        self.module: Any = self.model.get_output_embeddings()
        self.vocabulary = self.model.config.get_text_config().vocab_size
        self._before: list[nn.Module] = []
        with torch.random.fork_rng():
            self.apart = self._probe()

    def step(self, windows: int) -> int:
        """Positions in a chunk of so many windows."""
        return max(1, CHUNK // (windows * self.vocabulary))

    def passed(self, model: nn.Module, ids: Tensor) -> tuple[Tensor, list[Call]] | None:
        """Run a model up to its head: the head's input with its graph, and what the modules before it answered.

        `model` is the head's model or a wrapper around it. None if the head cannot be passed apart.
        """
        if not self.apart:
            return None
        calls = _Calls(self.module, self._before, slice(0, 1))
        with calls.noted():
            model(input_ids=ids, use_cache=False)
        return None if len(calls.inputs) != 1 else (calls.inputs[0], _detached(calls.before))

    def logits(self, hidden: Tensor, ids: Tensor, answers: list[Call]) -> Tensor:
        """The logits of some positions from the hidden states at the input of the head, (window, position, width)."""
        hook = self.module.register_forward_pre_hook(lambda _module, args: (hidden, *args[1:]))
        try:
            with _answering(answers):
                return self.model(input_ids=ids, use_cache=False).logits
        finally:
            hook.remove()

    def _probe(self) -> bool:
        ids = torch.randint(self.vocabulary, _PROBE, generator=torch.Generator().manual_seed(0))
        ids = ids.to(first_device(self.model))
        calls = _Calls(self.module, list(self.model.modules()), slice(None))
        with torch.no_grad(), calls.noted():
            whole = self.model(input_ids=ids, use_cache=False).logits
        if len(calls.inputs) != 1 or calls.inputs[0].shape[:-1] != ids.shape or whole.shape[:-1] != ids.shape:
            return False
        self._before, self.vocabulary = [module for module, _ in calls.before], whole.shape[-1]
        kinds = {type(x) for x in tree_flatten([answer for _, answer in calls.before])[0]}
        if not kinds <= {torch.Tensor, nn.Parameter, bool, int, float, str, type(None)}:
            return False
        watched: list[Tensor] = []
        answers = tree_map(lambda x: _watched(x, watched), calls.before)
        try:
            parts, start = [], 0
            for stop in _PROBE_POSITIONS:
                part = calls.inputs[0][:, start:stop].detach().requires_grad_()
                parts.append(self.logits(part, ids, answers))
                start = stop
            found = torch.cat(parts, 1)
            reached = torch.autograd.grad(found.sum(), watched, allow_unused=True)
        except Exception:
            return False  # whatever it was: the model does not allow it
        close = differ(found, whole) <= rounding(whole.dtype) * whole.abs().max().item()
        return close and all(grad is None for grad in reached)


def _detached(calls: list[Call]) -> list[Call]:
    """The same answers without their graphs."""
    return tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, calls)


def _watched(x: Any, found: list[Tensor]) -> Any:
    """A tensor that wants a gradient, noted."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    found.append(x.detach().clone().requires_grad_())
    return found[-1]


@contextlib.contextmanager
def _answering(calls: list[Call]) -> Iterator[None]:
    """Inside, modules do not run: their calls give what is listed, in order."""
    answers: dict[nn.Module, list[Any]] = {}
    for module, answer in calls:
        answers.setdefault(module, []).append(answer)
    before = {module: vars(module).get("forward") for module in answers}
    try:
        for module, given in answers.items():
            module.forward = _answer(iter(given))
        yield
    finally:
        for module, forward in before.items():
            del module.forward
            if forward is not None:
                module.forward = forward


def _answer(given: Iterator[Any]) -> Callable:
    return lambda *args, **kwargs: next(given)


class _Calls:
    """Notes the inputs of the head, and the calls that ended before it, those inside another such call left out."""

    def __init__(self, head: nn.Module, modules: list[nn.Module], given: slice):
        """Watch some modules; the head gets a part of its positions only."""
        self.head, self.modules, self.given = head, dict.fromkeys([*modules, head]), given
        self.inputs: list[Tensor] = []
        self.before: list[Call] = []
        self._open: list[list[Call]] = [[]]

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Inside, calls are noted."""
        hooks = [module.register_forward_pre_hook(self._enter) for module in self.modules]
        hooks += [module.register_forward_hook(self._leave) for module in self.modules]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _enter(self, module: nn.Module, args: tuple) -> tuple | None:
        self._open.append([])
        if module is not self.head or not args:
            return None
        self.before = [call for calls in self._open for call in calls]
        self.inputs.append(args[0])
        return args[0].detach()[:, self.given], *args[1:]

    def _leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._open.pop()
        self._open[-1].append((module, output))
