"""Which heads may look only at themselves, and what that costs: heads are folded while the loss stays in a budget.

A folded head passes the own value of each position on: its softmax over one edge is 1, its queries and keys are not
used, and with the output projection it is a linear layer (linear.py).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from jaxtyping import Float64, Int64
from torch import Tensor, nn

from posterity.errors import InputError
from posterity.inputs import windows as corpus
from posterity.models.attach import watching
from posterity.models.chunked_loss import run
from posterity.models.folded_heads import Head, folding, head_counts, heads_by_layer
from posterity.models.language_model import frozen, language_model
from posterity.progress import progress_bar

Windows = Sequence[Int64[Tensor, " position"]]


@dataclass(frozen=True)
class Losses:
    """Mean loss of a token in nats, before and after; the change has a standard error over windows."""

    before: float
    after: float
    change: float
    error: float  # NaN for one window

    @classmethod
    def of(cls, before: Float64[Tensor, " window"], after: Float64[Tensor, " window"]) -> "Losses":
        """Of windows of the same length."""
        change = after - before
        error = float(change.std()) / math.sqrt(len(change)) if len(change) > 1 else math.nan
        return cls(float(before.mean()), float(after.mean()), float(change.mean()), error)


@dataclass(frozen=True, eq=False)
class Costs:
    """What each head alone costs when it is folded, in nats per token; NaN where a layer has fewer heads."""

    cost: Float64[Tensor, "layer head"]
    error: Float64[Tensor, "layer head"]  # standard error over windows

    @property
    def order(self) -> list[Head]:
        """All heads, the cheapest first: by cost and one standard error, lest luck on a few windows comes first."""
        cautious = self.cost + self.error.nan_to_num(0)
        known = [(float(cautious[at]), at) for at in map(tuple, self.cost.isfinite().nonzero().tolist())]
        return [at for _, at in sorted(known)]


@dataclass(frozen=True, eq=False)
class Folded:
    """What was folded, and what it costs on the windows that chose it and on others."""

    heads: tuple[Head, ...]  # the cheapest first
    budget: float
    chosen: Losses  # on the windows that chose how many heads
    held_out: Losses  # on windows that chose nothing
    costs: Costs
    joint: dict[int, float]  # change of the loss by the number of folded heads, where it was measured
    text_digest: str  # of all windows
    windows: Windows = field(repr=False, default=())  # those of `chosen`

    @property
    def by_layer(self) -> dict[int, list[int]]:
        """The folded heads of each layer that has some."""
        return heads_by_layer(self.heads)

    def __str__(self) -> str:
        """How many heads are folded in which layers, and what that costs, in lines."""
        lines = [f"{len(self.heads)} of {len(self.costs.order)} heads look only at themselves"]
        lines += [f"  layer {n}: heads {', '.join(map(str, some))}" for n, some in self.by_layer.items()]
        for where, one in (("on the windows that chose how many", self.chosen), ("on held-out windows", self.held_out)):
            error = "" if math.isnan(one.error) else f" ± {one.error:.4f}"
            lines.append(f"loss {where}: {one.before:.4f} -> {one.after:.4f} nats per token ({one.change:+.4f}{error})")
        if self.held_out.change > self.budget:
            lines.append(
                f"there it is more than the budget of {self.budget:g}: on little text heads seem cheaper than they "
                "are; give more of it (--documents, --context)"
            )
        return "\n".join(lines)

    def record(self) -> dict[str, Any]:
        """What is kept beside the heads in the folder of the folded model."""
        losses = {"chosen": asdict(self.chosen), "held_out": asdict(self.held_out)}
        for one in losses.values():
            one["error"] = None if math.isnan(one["error"]) else one["error"]  # JSON has no NaN
        return {"budget": self.budget, "losses": losses, "text_digest": self.text_digest}

    def verify(self, model: nn.Module) -> float:
        """The mean loss of a folded model that was loaded again, on the windows of `chosen`.

        Raises:
            InputError: It is not what was measured before the model was written.
        """
        loss = float(mean_losses(model, self.windows).mean())
        half = language_model(model).dtype in (torch.float16, torch.bfloat16)
        tolerance = 1e-2 if half else 64 * torch.finfo(torch.float32).eps
        if not abs(loss - self.chosen.after) <= tolerance * abs(loss):
            raise InputError(
                f"expected the folded model to have the loss that was measured, {self.chosen.after:.6f} nats per "
                f"token, after it was written and loaded again; got {loss:.6f}: do not use it"
            )
        return loss


def fold(
    model: nn.Module,
    tokenizer: Any,
    documents: Any,
    *,
    budget: float = 0.01,
    context: int = 128,
    limit: int = 4,
    batch: int = 8,
    progress: bool = True,
) -> Folded:
    """Find heads that may look only at themselves while the mean loss grows by a budget at most.

    Every head is folded alone first. In the order of what that costs, as many as possible are then folded together,
    by bisection: their joint cost is measured, not summed, on windows of its own. Where it does not grow with every
    head, a longer prefix of the order might hold too. The loss on the held-out windows, which chose nothing, is the one
    to trust. The model is not changed.

    Args:
        model: A causal language model of transformers.
        tokenizer: Its tokenizer; None if `documents` are token ids.
        documents: As in `posterity.measure`.
        budget: Nats per token, on the windows that choose how many.
        context: Tokens of a window.
        limit: Windows on which every head is tried, at most a third of the text's; twice as many again choose how many
            heads, and twice as many again are held out, if the text has them.
        batch: Heads that are tried at once.
        progress: Whether to show a progress bar on stderr.

    Raises:
        InputError: Fewer than three windows; a negative budget; a model that cannot be measured, or has sinks.
    """
    if not budget >= 0:
        raise InputError(f"expected a budget of at least 0 nats per token; got {budget}")
    inner = language_model(model)
    found = corpus.windows(documents, tokenizer, context, 5 * limit)
    if len(found) < 3:
        raise InputError(
            f"fold expects three windows of {context} tokens at least (to price heads, choose how many, judge); "
            f"got {len(found)}: give a longer text, or lower the context (--context)"
        )
    priced, choosing, others = parts([one.ids for one in found], limit)
    with watching(inner) as watch:
        if watch.replacement is not None:
            raise InputError("expected a model whose attention is its own; got one inside a `with`: fold it outside")
        total = (1 + sum(head_counts(inner))) * len(priced)  # and the model as it is
        with progress_bar(total, progress, "folding", "heads") as advance:
            costs = head_costs(inner, priced, batch=batch, advance=advance)
        trial = Trial(inner, choosing, costs.order)
        number = longest(trial, len(costs.order), budget)
        heads = tuple(costs.order[:number])
        held_out = Losses.of(mean_losses(inner, others), mean_losses(inner, others, heads))
    chosen = Losses.of(trial.before, trial.after(number))
    return Folded(heads, budget, chosen, held_out, costs, trial.joint, corpus.digest(found), choosing)


def parts(windows: Windows, limit: int) -> tuple[Windows, Windows, Windows]:
    """Windows that price every head, that choose how many, and that are held out."""
    first = max(1, min(limit, len(windows) // 3))
    second = first + (len(windows) - first + 1) // 2
    return windows[:first], windows[first:second], windows[second:]


def head_costs(
    model: nn.Module, windows: Windows, *, batch: int = 8, advance: Callable[[int, int], None] | None = None
) -> Costs:
    """How much the mean loss grows when one head alone is folded, for every head."""
    from posterity.models.patching import SELF_ONLY, Patch, patched_losses  # the audit's package imports this module

    counts = head_counts(model)
    heads = [(layer, head) for layer, number in enumerate(counts) for head in range(number)]
    patches = [None, *(Patch(SELF_ONLY, layer, head) for layer, head in heads)]
    changes = []
    for ids in windows:
        losses = patched_losses(language_model(model), ids, patches, batch=batch, advance=advance)
        changes.append(losses[1:].mean(1) - losses[0].mean())
    change = torch.stack(changes)
    error = change.std(0) / math.sqrt(len(change)) if len(change) > 1 else torch.full_like(change[0], math.nan)
    table = torch.full((2, len(counts), max(counts)), math.nan, dtype=torch.float64)
    layers, numbers = torch.tensor(heads).unbind(1)
    table[:, layers, numbers] = torch.stack((change.mean(0), error))
    return Costs(*table)


def mean_losses(model: nn.Module, windows: Windows, heads: Iterable[Head] = ()) -> Float64[Tensor, " window"]:
    """Mean loss of a token in every window, in nats, with these heads folded."""
    inner, heads = language_model(model), list(heads)
    with folding(inner, heads) if heads else watching(inner), frozen(inner), torch.no_grad():
        return torch.stack([run(inner, ids[None])[0].double().cpu() / (len(ids) - 1) for ids in windows])


class Trial:
    """The loss with the first heads of an order folded together, measured once for each number of them."""

    def __init__(self, model: nn.Module, windows: Windows, order: Sequence[Head]):
        self.model, self.windows, self.order = model, windows, order
        self.before = mean_losses(model, windows)
        self._after = {0: self.before}

    def after(self, number: int) -> Float64[Tensor, " window"]:
        """Mean loss of every window with so many heads folded."""
        if number not in self._after:
            self._after[number] = mean_losses(self.model, self.windows, self.order[:number])
        return self._after[number]

    def __call__(self, number: int) -> float:
        """How much the mean loss grows."""
        return float((self.after(number) - self.before).mean())

    @property
    def joint(self) -> dict[int, float]:
        """What was measured, by the number of heads."""
        return {number: self(number) for number in sorted(self._after)}


def longest(cost: Callable[[int], float], count: int, budget: float) -> int:
    """The largest number of heads within the budget, by bisection; its own cost was measured, not inferred."""
    within, beyond = 0, count + 1
    while beyond - within > 1:
        middle = (within + beyond) // 2
        if cost(middle) <= budget:
            within = middle
        else:
            beyond = middle
    return within
