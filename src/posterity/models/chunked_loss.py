"""Chunked cross-entropy: run the body once, the LM head per chunk of positions, and allow several backward passes.

Logits are far wider than hidden states, so those of all positions are never held at once. The model runs once up to the
input of its language-model head. What it does from there on (the head, a scale, a soft-cap) it does itself, for a chunk
of positions at a time: its forward pass runs again, and every module that was called before the head returns the output
that it had. The losses of the chunk are sent back to the input of the head, and nothing of it is kept.

A probe finds out whether a model allows that. One that does not has all its logits at once: the same numbers, in more
memory.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map
from transformers import PreTrainedModel

from posterity.models.language_model import input_device, language_model, max_difference, replace_forwards, rounding
from posterity.models.weight_layout import is_sharded
from posterity.ops.precision import working_dtype

# Logits in a chunk: 64 MB in float32, and as much for each of the loss, its gradient and the logits' gradient. The
# default model's chunks are then 341 positions, enough for the products with the head to run at full speed.
CHUNK = 2**24
NO_TARGET = -100  # at a position that predicts nothing
_PROBE = (2, 16)  # windows, tokens
_PROBE_POSITIONS = (1, 5, 16)  # where a chunk of the probe ends
ModuleOutput = tuple[nn.Module, Any]


def token_losses(
    logits: Float[Tensor, "*position vocabulary"], targets: Int[Tensor, "*position"]
) -> Float[Tensor, "*position"]:
    """Return the loss of each target in nats and in the working precision; 0 for a target of -100."""
    logits = logits.to(working_dtype(logits.dtype)).flatten(0, -2)
    losses = nn.functional.cross_entropy(logits, targets.flatten().to(logits.device), reduction="none")
    return losses.view(targets.shape)


def draw_labels(
    logits: Float[Tensor, "*position vocabulary"], draws: Float[Tensor, "*position"], targets: Int[Tensor, "*position"]
) -> Int[Tensor, "*position"]:
    """Draw a label at each position from what the model predicts there: the quantile that `draws`, from 0 to 1, name.

    -100 where `targets` have none.
    """
    running = logits.detach().to(working_dtype(logits.dtype)).softmax(-1).cumsum(-1)
    below = draws.to(running)[..., None] * running[..., -1:]
    labels = torch.searchsorted(running, below, right=True)[..., 0].clamp(max=logits.shape[-1] - 1)
    return labels.masked_fill(targets.to(labels.device) == NO_TARGET, NO_TARGET)


def window_losses(
    model: nn.Module, ids: Tensor, targets: Tensor | None = None, positions: Tensor | None = None
) -> Tensor:
    """Return the sum of the losses of each window, in nats, with its graph; all logits at once.

    `targets` and `positions`: as of `ChunkedLoss.run`.
    """
    ids = ids.to(input_device(language_model(model)))
    targets = _next_tokens(ids) if targets is None else targets
    return token_losses(_logits(model, ids, positions), targets).sum(1)


def _logits(model: nn.Module, ids: Tensor, positions: Tensor | None) -> Tensor:
    return model(input_ids=ids, use_cache=False, **_position_ids(positions, ids)).logits


def _position_ids(positions: Tensor | None, ids: Tensor) -> dict[str, Tensor]:
    """Return the argument of a model that says where its tokens stand; nothing if they are counted from 0."""
    return {} if positions is None else {"position_ids": positions.to(ids.device)}


class ChunkedLoss:
    """The losses of one forward pass, ready for backward passes through the body; the LM head is passed only once."""

    def __init__(self, losses: Tensor, end: Tensor, gradient: Tensor | None, drawn: "ChunkedLoss | None" = None):
        """Keep where backward passes begin: with `gradient` at `end`; None: at a scalar.

        `losses`: of each window. `drawn`: the losses of drawn labels, in the same forward pass.
        """
        self.losses, self._end, self._gradient, self.drawn = losses, end, gradient, drawn

    @classmethod
    def run(
        cls,
        model: nn.Module,
        ids: Tensor,
        head: "LMHead",
        targets: Tensor | None = None,
        positions: Tensor | None = None,
        draws: Tensor | None = None,
    ) -> "ChunkedLoss":
        """Run the model forward, and its head backward.

        The head's own parameters get their gradients here, if they require any: backward passes begin at its input.

        Args:
            model: The head's model or a wrapper around it.
            ids: Token ids, (window, position).
            head: Its head.
            targets: The token that each position has to predict, -100 for none; the next one by default.
            positions: Position ids; those of packed documents start again at 0.
            draws: Numbers from 0 to 1, (window, position), that draw a label for each target: see `draw_labels`.
        """
        ids = ids.to(input_device(head.model))
        body = head.run_body(model, ids, **_position_ids(positions, ids))
        targets = _next_tokens(ids) if targets is None else targets
        if body is None:
            logits = _logits(model, ids, positions)
            losses, drawn = token_losses(logits, targets).sum(1), None
            if draws is not None:
                drawn_losses = token_losses(logits, draw_labels(logits, draws, targets)).sum(1)
                drawn = cls(drawn_losses.detach(), drawn_losses.sum(), None)
            return cls(losses.detach(), losses.sum(), None, drawn)
        hidden, outputs = body
        (losses, gradient), *of_draws = _run_head(head, ids, targets, hidden.detach(), outputs, draws)
        return cls(losses, hidden, gradient, *(cls(losses, hidden, gradient) for losses, gradient in of_draws))

    def backward(self, retain_graph: bool = False) -> None:
        """Run backward from the input of the head (or from the losses) to the embeddings.

        `retain_graph`: another backward pass will follow.
        """
        torch.autograd.backward(self._end, self._gradient, retain_graph=retain_graph)


def _run_head(
    head: "LMHead", ids: Tensor, targets: Tensor, hidden: Tensor, outputs: Sequence[ModuleOutput], draws: Tensor | None
) -> list[tuple[Tensor, Tensor]]:
    """Return the losses of each window, and their gradient at the input of the head; then those of drawn labels."""
    kinds = 1 if draws is None else 2
    gradients = [torch.zeros_like(hidden) for _ in range(kinds)]
    losses = [hidden.new_zeros(targets.shape, dtype=working_dtype(hidden.dtype)) for _ in range(kinds)]
    chunks = _chunks_with_targets(targets, head.chunk_length(len(ids)))  # on the CPU, where targets mostly are
    targets = targets.to(ids.device)
    for chunk in chunks:
        part = hidden[:, chunk].clone().requires_grad_()
        logits, labels = head.logits(part, ids, outputs), [targets[:, chunk]]
        if draws is not None:
            labels.append(draw_labels(logits, draws[:, chunk], targets[:, chunk]))
        for kind in reversed(range(kinds)):
            chunk_losses = token_losses(logits, labels[kind])
            losses[kind][:, chunk] = chunk_losses.detach()
            if kind:  # the head's own parameters get the gradients of the text alone
                (gradients[kind][:, chunk],) = torch.autograd.grad(chunk_losses.sum(), part, retain_graph=True)
        chunk_losses.sum().backward()
        assert part.grad is not None
        gradients[0][:, chunk] = part.grad
    return [(x.sum(1), gradient) for x, gradient in zip(losses, gradients, strict=True)]


def _chunks_with_targets(targets: Int[Tensor, "window position"], length: int) -> list[slice]:
    """Return chunks of positions that begin at the first with a target; those without any target are left out."""
    predicts = (targets != NO_TARGET).any(0).cpu()
    first = int(predicts.int().argmax())
    chunks = [slice(start, start + length) for start in range(first, len(predicts), length)]
    return [chunk for chunk in chunks if predicts[chunk].any()]


def _next_tokens(ids: Tensor) -> Tensor:
    """Return the token that each position has to predict; none at the last."""
    return torch.cat((ids[:, 1:], ids.new_full((len(ids), 1), NO_TARGET)), 1)


class LMHead:
    """The part of a model between the input of its LM head and its logits, run for any chunk of positions.

    `separable` says whether that can be done: the head is called once, on the hidden states of all positions, and the
    logits of a chunk depend on nothing else that was computed before the head.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.module: Any = model.get_output_embeddings()
        self.vocabulary = model.config.get_text_config().vocab_size
        self.separable = False
        self._body: list[nn.Module] = []  # the modules that are called before the head

    @classmethod
    def probe(cls, model: nn.Module) -> "LMHead":
        """Find out by trying, on a few random tokens, whether the head of a model is separable.

        That of a sharded model is not: its weights are there only while the whole model runs.
        """
        head = cls(language_model(model))
        if is_sharded(head.model):
            return head
        with torch.random.fork_rng():
            head.separable = head._separate()
        return head

    def chunk_length(self, windows: int) -> int:
        """Return how many positions of so many windows make a chunk."""
        return max(1, CHUNK // (windows * self.vocabulary))

    def run_body(self, model: nn.Module, ids: Tensor, **options: Tensor) -> tuple[Tensor, list[ModuleOutput]] | None:
        """Run a model up to its head: the head's input with its graph, and the outputs of the modules before it.

        `model` is the head's model or a wrapper around it; `options` are what else it gets. None if the head is not
        separable.
        """
        if not self.separable:
            return None
        trace = _Trace(self.module, self._body, slice(0, 1))
        with trace.record():
            model(input_ids=ids, use_cache=False, **options)
        return None if len(trace.inputs) != 1 else (trace.inputs[0], _detach(trace.before))

    def logits(self, hidden: Tensor, ids: Tensor, outputs: Sequence[ModuleOutput]) -> Tensor:
        """Return the logits of a chunk from its hidden states at the input of the head, (window, position, width)."""
        hook = self.module.register_forward_pre_hook(lambda _module, args: (hidden, *args[1:]))
        try:
            with _return_outputs(outputs):
                return self.model(input_ids=ids, use_cache=False).logits
        finally:
            hook.remove()

    def _separate(self) -> bool:
        """Try chunks: their logits are those of all positions, and the modules before the head get no gradient."""
        ids = torch.randint(self.vocabulary, _PROBE, generator=torch.Generator().manual_seed(0))
        ids = ids.to(input_device(self.model))
        trace = _Trace(self.module, list(self.model.modules()), slice(None))
        with torch.no_grad(), trace.record():
            full = self.model(input_ids=ids, use_cache=False).logits
        if len(trace.inputs) != 1 or trace.inputs[0].shape[:-1] != ids.shape or full.shape[:-1] != ids.shape:
            return False
        self._body, self.vocabulary = [module for module, _ in trace.before], full.shape[-1]
        kinds = {type(x) for x in tree_flatten([output for _, output in trace.before])[0]}
        if not kinds <= {torch.Tensor, nn.Parameter, bool, int, float, str, type(None)}:
            return False
        leaves: list[Tensor] = []
        outputs = tree_map(lambda x: _as_leaf(x, leaves), trace.before)
        try:
            chunks, start = [], 0
            for stop in _PROBE_POSITIONS:
                part = trace.inputs[0][:, start:stop].detach().requires_grad_()
                chunks.append(self.logits(part, ids, outputs))
                start = stop
            chunked = torch.cat(chunks, 1)
            grads = torch.autograd.grad(chunked.sum(), leaves, allow_unused=True)
        except Exception:
            return False  # whatever it was: the model does not allow it
        close = max_difference(chunked, full) <= rounding(full.dtype) * full.abs().max().item()
        return close and all(grad is None for grad in grads)


def _detach(outputs: list[ModuleOutput]) -> list[ModuleOutput]:
    """Return the same outputs without their graphs."""
    return tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, outputs)


def _as_leaf(x: Any, leaves: list[Tensor]) -> Any:
    """Return a tensor as a leaf that requires a gradient, added to `leaves`; anything else as it is."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    leaves.append(x.detach().clone().requires_grad_())
    return leaves[-1]


def _return_outputs(outputs: Sequence[ModuleOutput]) -> contextlib.AbstractContextManager[None]:
    """Let the calls of these modules compute nothing and return what is listed, in order."""
    by_module: dict[nn.Module, list[Any]] = {}
    for module, output in outputs:
        by_module.setdefault(module, []).append(output)
    return replace_forwards({module: _iterate(iter(listed)) for module, listed in by_module.items()})


def _iterate(outputs: Iterator[Any]) -> Callable:
    return lambda *args, **kwargs: next(outputs)


class _Trace:
    """Inputs of the head, and outputs of the modules whose calls ended before it, outermost calls only."""

    def __init__(self, head: nn.Module, modules: list[nn.Module], positions: slice):
        """Trace some modules; `positions`: the part of its input that the head itself gets."""
        self.head, self.modules, self.positions = head, dict.fromkeys([*modules, head]), positions
        self.inputs: list[Tensor] = []
        self.before: list[ModuleOutput] = []
        self._open: list[list[ModuleOutput]] = [[]]

    @contextlib.contextmanager
    def record(self) -> Iterator[None]:
        """Record the calls of the block."""
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
        self.before = [output for outputs in self._open for output in outputs]
        self.inputs.append(args[0])
        return args[0].detach()[:, self.positions], *args[1:]

    def _leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._open.pop()
        self._open[-1].append((module, output))
