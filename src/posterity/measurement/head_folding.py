"""Fold heads, so that they look only at themselves, as long as the loss stays within a budget.

A folded head passes the own value of each position on: its softmax over one edge is 1, its queries and keys are not
used, and with the output projection it is a linear layer (`posterity.as_linear`).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from jaxtyping import Float64, Int64
from torch import Tensor, nn

from posterity.decomposition.accumulator import stack_layers
from posterity.decomposition.first_keys import FirstKeys
from posterity.decomposition.prices import pass_prices
from posterity.decomposition.sweep import Scratch
from posterity.errors import InputError
from posterity.inputs.arguments import open_model, split_arguments
from posterity.inputs.named_documents import name_texts, open_files
from posterity.inputs.windows import read_corpus, token_digest
from posterity.measurement.window_batch import uniform_draws
from posterity.models.attach import watch_model
from posterity.models.chunked_loss import ChunkedLoss, LMHead, window_losses
from posterity.models.folded_heads import HeadIndex, fold_heads, foldable_head_counts, heads_by_layer
from posterity.models.language_model import freeze_parameters, language_model
from posterity.models.watch import Layer
from posterity.ops.attention import Backward
from posterity.ops.horizon_rules import Full
from posterity.progress import progress_bar

Windows = Sequence[Int64[Tensor, " position"]]


@dataclass(frozen=True)
class LossChange:
    """Mean loss of a token in nats before and after folding, and the change with its standard error over windows."""

    before: float
    after: float
    change: float
    error: float  # NaN for one window

    @classmethod
    def of(cls, before: Float64[Tensor, " window"], after: Float64[Tensor, " window"]) -> "LossChange":
        """Compare the mean losses of windows of equal length."""
        change = after - before
        error = float(change.std()) / math.sqrt(len(change)) if len(change) > 1 else math.nan
        return cls(float(before.mean()), float(after.mean()), float(change.mean()), error)

    def __str__(self) -> str:
        """Both losses and the change, in one line."""
        error = "" if math.isnan(self.error) else f" ± {self.error:.4f}"
        return f"{self.before:.4f} -> {self.after:.4f} nats per token ({self.change:+.4f}{error})"

    def record(self) -> dict[str, float | None]:
        """Return the numbers for JSON, which has no NaN."""
        return asdict(self) | {"error": None if math.isnan(self.error) else self.error}


@dataclass(frozen=True, eq=False)
class HeadCosts:
    """What folding each head alone costs, in nats per token; NaN where a layer has fewer heads."""

    cost: Float64[Tensor, "layer head"]
    error: Float64[Tensor, "layer head"]  # standard error over windows

    @classmethod
    def of(cls, by_window: Sequence[Float64[Tensor, "layer head"]]) -> "HeadCosts":
        """Average over windows."""
        stacked = torch.stack([*by_window])
        number = len(stacked)
        error = stacked.std(0) / math.sqrt(number) if number > 1 else torch.full_like(stacked[0], math.nan)
        return cls(stacked.mean(0), error)

    @property
    def order(self) -> list[HeadIndex]:
        """All heads, the cheapest first: by cost and one standard error, lest luck on a few windows comes first."""
        cautious = self.cost + self.error.nan_to_num(0)
        heads = [(layer, head) for layer, head in self.cost.isfinite().nonzero().tolist()]
        return sorted(heads, key=lambda head: (float(cautious[head]), head))


@dataclass(frozen=True, eq=False)
class FoldedHeads:
    """The heads to fold, and the loss that costs on the windows that decided their number and on others."""

    heads: tuple[HeadIndex, ...]  # the cheapest first
    budget: float
    selection: LossChange  # on the windows that decided how many heads
    held_out: LossChange  # on windows that decided nothing
    prices: HeadCosts  # predicted, of each head alone
    joint: dict[int, float]  # change of the loss by the number of folded heads, where it was measured
    text_digest: str  # of all windows
    windows: Windows = field(repr=False, default=())  # those of `selection`
    left_out: str = ""  # which part of the documents is in no window, in words

    @property
    def by_layer(self) -> dict[int, list[int]]:
        """The folded heads of each layer that has some."""
        return heads_by_layer(self.heads)

    @property
    def exceeds_budget(self) -> bool:
        """Whether the loss on the held-out windows grows by more than the budget."""
        return self.held_out.change > self.budget

    def __str__(self) -> str:
        """How many heads are folded in which layers, and what that costs, in lines."""
        lines = [f"{len(self.heads)} of {len(self.prices.order)} heads look only at themselves"]
        lines += [f"  layer {layer}: heads {', '.join(map(str, heads))}" for layer, heads in self.by_layer.items()]
        lines.append(f"loss on the windows that chose how many: {self.selection}")
        lines.append(f"loss on held-out windows: {self.held_out}")
        if self.exceeds_budget:
            lines.append(
                f"there it is more than the budget of {self.budget:g}: on little text heads seem cheaper than they "
                "are; give more of it (--limit, --context)"
            )
        return "\n".join([*lines, self.left_out] if self.left_out else lines)

    def record(self) -> dict[str, Any]:
        """Return what the folder of the folded model holds beside the heads."""
        losses = {"chosen": self.selection.record(), "held_out": self.held_out.record()}
        return {"budget": self.budget, "losses": losses, "text_digest": self.text_digest}

    def verify(self, model: nn.Module) -> float:
        """Return the mean loss of a folded model that was loaded again, on the windows of `selection`.

        Raises:
            InputError: It is not what was measured before the model was written.
        """
        loss = float(mean_losses(model, self.windows).mean())
        half = language_model(model).dtype in (torch.float16, torch.bfloat16)
        tolerance = 1e-2 if half else 64 * torch.finfo(torch.float32).eps
        if not abs(loss - self.selection.after) <= tolerance * abs(loss):
            raise InputError(
                f"expected the folded model to have the loss that was measured, {self.selection.after:.6f} nats per "
                f"token, after it was written and loaded again; got {loss:.6f}: do not use it"
            )
        return loss


def fold(
    model: Any = "default",
    tokenizer: Any = None,
    documents: Any = None,
    *,
    budget: float = 0.01,
    context: int = 128,
    limit: int = 4,
    seed: int = 0,
    progress: bool = True,
) -> FoldedHeads:
    """Find heads whose attention can be replaced by a linear map while the mean loss grows by a budget at most.

    Every head is priced first: what a window of one token would cost it, to second order, with labels that the model
    draws; one forward and one backward pass for each window (docs/method.md, Prices). In the order of these prices, as
    many as possible are then folded together, by bisection: their joint cost is measured, not summed, on windows of its
    own. Where it does not grow with every head, a longer prefix of the order might hold too. The loss on the held-out
    windows, which decided nothing, is the one to trust. The model is not changed.

    Args:
        model: As in `posterity.measure`: a model, or the name of one.
        tokenizer: As in `posterity.measure`.
        documents: As in `posterity.measure`.
        budget: Nats per token, on the windows that decide how many heads.
        context: Tokens of a window.
        limit: Windows on which every head is priced, at most a third of the text's; twice as many again decide how
            many heads, and twice as many again are held out, if the text has them.
        seed: Of the drawn labels.
        progress: Whether to show a progress bar on stderr.

    Raises:
        InputError: Fewer than three windows; a negative budget; a model that cannot be measured, or has sinks.
    """
    if not budget >= 0:
        raise InputError(f"expected a budget of at least 0 nats per token; got {budget}")
    tokenizer, documents = split_arguments(tokenizer, documents)
    documents = open_files(documents)
    loaded = open_model(model, tokenizer)
    inner, tokenizer = language_model(loaded.model), loaded.tokenizer
    corpus = read_corpus(name_texts(documents), tokenizer, context, 5 * limit)
    windows = corpus.windows
    if len(windows) < 3:
        raise InputError(
            f"fold expects three windows of {context} tokens at least (to price heads, choose how many, judge); "
            f"got {len(windows)}: give a longer text, or lower `context` (--context)"
        )
    pricing, selection, held_out = split_windows([window.ids for window in windows], limit)
    with watch_model(inner) as watch:
        if watch.replacement is not None:
            raise InputError("expected a model whose attention is its own; got one inside a `with`: fold it outside")
        foldable_head_counts(inner)
        with progress_bar(len(pricing), progress, "pricing") as advance:
            prices = price_heads(inner, pricing, seed, advance)
        losses = PrefixLosses(inner, selection, prices.order)
        number = largest_within_budget(losses.change, len(prices.order), budget)
        heads = tuple(prices.order[:number])
        held_out_change = LossChange.of(mean_losses(inner, held_out), mean_losses(inner, held_out, heads))
    selection_change = LossChange.of(losses.before, losses.after(number))
    return FoldedHeads(
        heads, budget, selection_change, held_out_change, prices, losses.joint, token_digest(windows), selection,
        str(corpus.coverage),
    )  # fmt: skip


def split_windows(windows: Windows, limit: int) -> tuple[Windows, Windows, Windows]:
    """Split windows into those that price every head, those that decide how many, and those that are held out."""
    pricing = max(1, min(limit, len(windows) // 3))
    selection = pricing + (len(windows) - pricing + 1) // 2
    return windows[:pricing], windows[pricing:selection], windows[selection:]


def price_heads(
    model: nn.Module, windows: Windows, seed: int = 0, advance: Callable[[int, int], None] | None = None
) -> HeadCosts:
    """Predict what it costs when one head alone is folded, for every head: the price of a window of one token."""
    inner = language_model(model)
    head, scratch, by_window = LMHead.probe(inner), Scratch(), []
    with watch_model(inner) as watch, freeze_parameters(inner):
        for ids in windows:
            prices: dict[Layer, Tensor] = {}

            def observe(
                layer: Layer, back: Backward, projections: object, prices: dict[Layer, Tensor] = prices
            ) -> None:
                prices[layer] = pass_prices(back, FirstKeys.of(back, 0), scratch=scratch).windows[0, :, 0].cpu()

            loss = ChunkedLoss.run(inner, ids[None], head, draws=uniform_draws(ids, seed)[None])
            assert loss.drawn is not None
            with watch.override_rules((Full(), Full()), observe):
                loss.drawn.backward()
            by_window.append(stack_layers([prices[layer] for layer in watch.layers], 0) / (len(ids) - 1))
            if advance is not None:
                advance(1, len(ids))
    return HeadCosts.of(by_window)


def mean_losses(model: nn.Module, windows: Windows, heads: Iterable[HeadIndex] = ()) -> Float64[Tensor, " window"]:
    """Return the mean loss of a token in every window, in nats, with these heads folded."""
    inner, heads = language_model(model), list(heads)
    with fold_heads(inner, heads) if heads else watch_model(inner), freeze_parameters(inner), torch.no_grad():
        return torch.stack([window_losses(inner, ids[None])[0].double().cpu() / (len(ids) - 1) for ids in windows])


class PrefixLosses:
    """The losses with the first heads of an order folded together, measured once for each number of heads."""

    def __init__(self, model: nn.Module, windows: Windows, order: Sequence[HeadIndex]):
        """Measure the model as it is; `after` measures it folded."""
        self.model, self.windows, self.order = model, windows, order
        self.before = mean_losses(model, windows)
        self._after = {0: self.before}

    def after(self, number: int) -> Float64[Tensor, " window"]:
        """Return the mean loss of every window with so many heads folded."""
        if number not in self._after:
            self._after[number] = mean_losses(self.model, self.windows, self.order[:number])
        return self._after[number]

    def change(self, number: int) -> float:
        """Return how much the mean loss grows with so many heads folded."""
        return float((self.after(number) - self.before).mean())

    @property
    def joint(self) -> dict[int, float]:
        """The changes measured so far, by the number of heads."""
        return {number: self.change(number) for number in sorted(self._after)}


def largest_within_budget(cost: Callable[[int], float], count: int, budget: float) -> int:
    """Return the largest number of heads within the budget, by bisection; its own cost was measured, not inferred."""
    within, beyond = 0, count + 1
    while beyond - within > 1:
        middle = (within + beyond) // 2
        if cost(middle) <= budget:
            within = middle
        else:
            beyond = middle
    return within
