"""The subject of an audit: a model, texts, and the plan of how much of them is measured."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
import xarray as xr
from torch import Tensor
from transformers import PreTrainedModel

from posterity.errors import InputError
from posterity.inputs.windows import cut_windows
from posterity.measurement.measure import check_tokens, measure
from posterity.models.context_length import check_context
from posterity.progress import progress_bar


@dataclass(frozen=True)
class Plan:
    """How much is measured: the defaults of `posterity audit`. `quick()` is a quarter of it or less."""

    context: int = 512  # tokens of a window, for the rows that read gradients
    limit: int = 4  # windows of it
    contexts: tuple[int, ...] = (64, 128, 256, 512, 1024)  # row 5
    span: int = 4096  # tokens of text, the same for every context of row 5
    short: int = 64  # tokens of a window, for rows 6 and 8, in which every head takes passes of its own
    pass_tokens: int = 256  # tokens of text for each of these passes
    positions: int = 4  # of each window, for what single positions are worth
    share: float = 0.25  # of the positions of a window, replaced together for what a head writes
    fold: float = 0.01  # nats per token that folded heads may cost, row 8
    prefixes: int = 6  # rows 9 and 10
    prefix: int = 64  # tokens
    future: int = 32  # tokens of a continuation
    draws: int = 8  # continuations of a prefix, pasts of a text
    seed: int = 0

    def __post_init__(self):
        """Check the numbers."""
        for name in ("limit", "pass_tokens", "positions", "prefixes", "future"):
            if getattr(self, name) < 1:
                raise InputError(f"expected {name} of at least 1; got {getattr(self, name)}")
        for name in ("context", "short", "prefix", "draws"):
            if getattr(self, name) < 2:
                raise InputError(f"expected {name} of at least 2; got {getattr(self, name)}")
        if not isinstance(self.contexts, tuple):
            raise InputError(f"contexts expects several lengths, such as (64, 128); got {self.contexts!r}")
        grow = all(shorter < longer for shorter, longer in pairwise(self.contexts))
        if len(self.contexts) < 2 or self.contexts[0] < 2 or not grow:
            raise InputError(f"contexts expects two or more lengths that grow, such as 64,128; got {self.contexts}")
        if self.span < self.contexts[-1]:
            raise InputError(f"expected a span of at least the longest context, {self.contexts[-1]}; got {self.span}")
        if self.fold < 0 or not 0 < self.share <= 1:
            raise InputError(f"expected fold of at least 0 and a share from 0 to 1; got {self.fold} and {self.share}")

    def fit_to(self, max_tokens: int, fixed: Collection[str]) -> "Plan":
        """Shrink every length that is not in `fixed` until a model that reads at most `max_tokens` can take it.

        Raises:
            InputError: A field in `fixed` does not fit.
        """
        contexts = tuple(context for context in self.contexts if context <= max_tokens)
        contexts = contexts if len(contexts) > 1 else (max(2, max_tokens // 4), max(3, max_tokens // 2), max_tokens)
        lengths = {
            "context": min(self.context, max_tokens), "contexts": contexts, "short": min(self.short, max_tokens),
            "prefix": min(self.prefix, max_tokens - max_tokens // 3), "future": min(self.future, max_tokens // 3),
        }  # fmt: skip
        if self.prefix + self.future <= max_tokens:
            lengths |= {"prefix": self.prefix, "future": self.future}
        for name, length in lengths.items():
            if name in fixed and getattr(self, name) != length:
                raise InputError(
                    f"the model reads at most {max_tokens} tokens; got {name} {getattr(self, name)}: lower it"
                )
        span = max(self.span, contexts[-1]) if "span" not in fixed else self.span
        return replace(self, **lengths, span=span)

    def longest(self, fixed: Collection[str]) -> int:
        """Return the longest input that the fields in `fixed` ask for; 0 for none."""
        lengths = {
            "context": self.context, "contexts": self.contexts[-1], "short": self.short,
            "prefix": self.prefix + self.future, "future": self.prefix + self.future,
        }  # fmt: skip
        return max((length for name, length in lengths.items() if name in fixed), default=0)

    @classmethod
    def quick(cls) -> "Plan":
        """Return the plan of a first look."""
        return cls(
            context=256, limit=2, contexts=(64, 128, 256), span=768, short=24, pass_tokens=48, positions=2, prefixes=3,
            draws=4,
        )  # fmt: skip


@dataclass
class Subject:
    """What a clause is measured on: a model, texts, and a plan. Measurements that clauses share are made once."""

    model: PreTrainedModel
    tokenizer: Any
    documents: list[Any]
    plan: Plan
    show_progress: bool = False

    @cached_property
    def ledger(self) -> xr.Dataset:
        """Result of `posterity.measure` at the plan's context."""
        return self.measure(self.plan.context, self.plan.limit, "octaves")

    def measure(self, context: int, limit: int, lags: str, batch: int = 1) -> xr.Dataset:
        """Return the result of `posterity.measure` on the first windows."""
        return measure(
            self.model, self.tokenizer, self.documents, context=context, limit=limit, lags=lags, batch=batch,
            progress=False, seed=self.plan.seed,
        )  # fmt: skip

    def windows(self, context: int, limit: int | None) -> list[Tensor]:
        """Return the token ids of the first windows of a length."""
        return [window.ids for window in cut_windows(self.documents, self.tokenizer, context, limit)]

    def all_windows(self, context: int) -> list[Tensor]:
        """Return the token ids of all windows of a length.

        Raises:
            InputError: The model cannot read so many tokens, or does not know one of them.
        """
        check_context(self.model, context)
        windows = cut_windows(self.documents, self.tokenizer, context)
        check_tokens(self.model, windows)
        return [window.ids for window in windows]

    def generator(self, number: int) -> torch.Generator:
        """Return the random number generator of one clause."""
        return torch.Generator().manual_seed(1000 * self.plan.seed + number)

    @contextmanager
    def progress(self, total: int, activity: str, unit: str = "passes") -> Iterator[Callable[[int, int], None]]:
        """Show a progress bar; `advance(units, tokens)` moves it."""
        with progress_bar(total, self.show_progress, activity, unit) as advance:
            yield advance


def spread_indices(size: int, number: int, generator: torch.Generator) -> list[int]:
    """Return indices spread over 0 to `size` - 1: one at random from each of `number` equal parts, or all if fewer."""
    if size <= number:
        return list(range(size))
    offsets = torch.rand(number, generator=generator, dtype=torch.float64).tolist()
    edges = [size * part // number for part in range(number + 1)]
    return [low + int(u * (high - low)) for u, low, high in zip(offsets, edges[:-1], edges[1:], strict=True)]
