"""Futures of a text: continuations drawn from the model, and how each pulls on the keys and values that wait for it.

All tokens of a prefix but the last are read once and cached. The last one is read again at the head of every
continuation c_1 .. c_C, so that one pass over [last, c_1 .. c_{C-1}] gives log p(c_1 .. c_C). In that pass the cached
keys and values of every layer, as its attention gets them, are leaves, with a copy for each continuation: one backward
pass gives every continuation's gradient. All entries are held: the gradient at one is what the tokens behind the cache
make of it, not what later tokens of the cache do.
"""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, PreTrainedModel

from posterity.errors import InputError
from posterity.models.attach import refuse_other_paths, watching
from posterity.models.language_model import differ, first_device, rounding
from posterity.models.watch import Attending, Layer
from posterity.ops.attention import working

Pull = tuple[Tensor, Tensor]  # gradients at the keys and at the values of one layer


@dataclass(frozen=True, eq=False)
class Prefix:
    """A text that was read: its token ids (at least 2), and the cache of all but the last."""

    ids: Tensor
    cache: DynamicCache

    @property
    def length(self) -> int:
        """Cached positions."""
        return len(self.ids) - 1

    def rows(self, number: int) -> DynamicCache:
        """A cache of one's own for so many continuations."""
        cache = deepcopy(self.cache)
        cache.batch_repeat_interleave(number)
        return cache


def read(model: PreTrainedModel, ids: Tensor) -> Prefix:
    """Read a prefix, (position,), and make sure that what is cached is all that its future gets from it.

    Raises:
        InputError: The model's positions also communicate outside attention, or it does not take such a cache.
    """
    with watching(model) as watch, torch.no_grad():
        refuse_other_paths(watch, "the pull of futures on cached keys and values")
        cache = DynamicCache()  # keeps all positions, also behind a sliding window: the mask hides them
        try:
            model(input_ids=ids[None, :-1].to(first_device(model)), past_key_values=cache, use_cache=True)
            prefix = Prefix(ids, cache)
            prefix.rows(1)
        except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
            raise InputError(
                f"{type(model).__name__} does not take a plain cache of keys and values: {error}"
            ) from error
    return prefix


def sample(model: PreTrainedModel, prefix: Prefix, number: int, length: int, generator: torch.Generator) -> Tensor:
    """Draw continuations from the model as it is (temperature 1, whole vocabulary): token ids (number, length)."""
    ids, drawn, cache = prefix.ids[-1:].expand(number, 1), [], prefix.rows(number)
    with watching(model), torch.no_grad():
        for _ in range(length):
            logits = model(input_ids=ids.to(first_device(model)), past_key_values=cache, use_cache=True).logits[:, -1]
            chances = torch.softmax(logits.to(working(logits.dtype)), -1).cpu()
            ids = torch.multinomial(chances, 1, generator=generator)
            drawn.append(ids)
    return torch.cat(drawn, 1)


def pulls(model: PreTrainedModel, prefix: Prefix, continuations: Tensor) -> list[Pull]:
    """Gradient of every continuation's log-likelihood (nats, summed over its tokens) at every cached key and value.

    Args:
        model: In evaluation mode; the gradients of its parameters are left alone.
        prefix: What was read.
        continuations: Token ids, (continuation, token).

    Returns:
        For each attention layer the gradients at keys and at values, (continuation, group, position, dim).
    """
    with torch.enable_grad():
        logits, held = _logits(model, prefix, continuations)
        logits = logits.to(working(logits.dtype)).flatten(0, 1)
        likelihood = -cross_entropy(logits, continuations.flatten().to(logits.device), reduction="sum")
        grads = torch.autograd.grad(likelihood, [leaf for pair in held for leaf in pair])
    return list(zip(grads[::2], grads[1::2], strict=True))


def verify(model: PreTrainedModel, prefix: Prefix, continuation: Tensor) -> None:
    """Raise InputError unless a continuation's logits with the held cache are those of one uncached pass."""
    ids = torch.cat((prefix.ids, continuation[:-1]))[None].to(first_device(model))
    with watching(model), torch.no_grad():
        right = model(input_ids=ids, use_cache=False).logits[:, prefix.length :]
        logits, _ = _logits(model, prefix, continuation[None])
    tolerance = rounding(right.dtype) * right.abs().max().item()
    if not (off := differ(logits, right)) <= tolerance:  # not finite is wrong too
        raise InputError(
            f"{type(model).__name__}: with a cache of keys and values its logits move by {off:.1e} (at most "
            f"{tolerance:.1e} is rounding), so that what the future reads is not what was cached"
        )


def _logits(model: PreTrainedModel, prefix: Prefix, continuations: Tensor) -> tuple[Tensor, list[Pull]]:
    """Logits of every continuation's tokens, and the leaves in the order of the layers."""
    held: list[Pull] = []
    rows, new = continuations.shape

    def hold(layer: Layer, given: Attending) -> Tensor:
        if given.key.shape[2] != prefix.length + new:
            raise InputError(f"{layer} reads {given.key.shape[2]} keys; expected {prefix.length + new}, cached and new")
        streams = given.key, given.value
        key, value = (x[:, :, : prefix.length].detach().clone().requires_grad_() for x in streams)
        held.append((key, value))
        key, value = (torch.cat((x, y[:, :, prefix.length :]), 2) for x, y in zip(held[-1], streams, strict=True))
        return replace(given, key=key, value=value).output()

    ids = torch.cat((prefix.ids[-1:].expand(rows, 1), continuations[:, :-1]), 1).to(first_device(model))
    with watching(model) as watch, watch.replacing(hold):
        logits = model(input_ids=ids, past_key_values=prefix.rows(rows), use_cache=True).logits
    return logits, held


def recurring(
    documents: list[Tensor], length: int, future: int, most: int, draws: int, generator: torch.Generator
) -> list[tuple[Tensor, Tensor]]:
    """The n-grams of a text that have the most different futures, each future counted once: copies of text are none.

    Occurrences of one n-gram stand apart by its length and that of a future, and n-grams that overlap with a chosen one
    are left out, so that no piece of text counts twice. Among equals, and of more than `draws` futures, chance decides.

    Returns:
        At most `most` pairs: the n-gram, (length,), and two or more futures, (occurrence, future).
    """
    found: list[tuple[Tensor, Tensor]] = []
    text, starts = _joined(documents, length + future)
    taken = np.zeros(len(text), dtype=bool)
    for group in _groups(text, starts, length, future, generator):
        kept = [group[0]]
        for start in group[1:]:
            if start >= kept[-1] + length + future:
                kept.append(start)
        spans = np.add.outer(kept, np.arange(length))
        if len(kept) < 2 or taken[spans].any():
            continue
        taken[spans] = True
        chosen = [kept[at] for at in torch.randperm(len(kept), generator=generator)[:draws].tolist()]
        futures = np.stack([text[start + length : start + length + future] for start in chosen])
        found.append((torch.from_numpy(text[kept[0] : kept[0] + length].copy()), torch.from_numpy(futures)))
        if len(found) == most:
            break
    return found


def _joined(documents: list[Tensor], span: int) -> tuple[np.ndarray, np.ndarray]:
    """All tokens in a row, and where `span` of them begin that lie in one document."""
    ends = np.cumsum([len(one) for one in documents])
    starts = [np.arange(end - len(one), end - span + 1) for one, end in zip(documents, ends, strict=True)]
    return torch.cat(documents).numpy(), np.concatenate(starts)


def _groups(
    text: np.ndarray, starts: np.ndarray, length: int, future: int, generator: torch.Generator
) -> Iterator[np.ndarray]:
    """Where n-grams stand that have several futures: the first place of each future, in order; most futures first."""
    if not len(starts):
        return
    spans = np.lib.stride_tricks.sliding_window_view(text, length + future)[starts]
    starts = starts[np.sort(np.unique(spans, axis=0, return_index=True)[1])]
    ngrams = np.lib.stride_tricks.sliding_window_view(text, length)[starts]
    _, number, counts = np.unique(ngrams, axis=0, return_inverse=True, return_counts=True)
    order = np.argsort(number, kind="stable")
    begins = np.concatenate(([0], np.cumsum(counts)))
    several = np.flatnonzero(counts > 1)
    several = several[torch.randperm(len(several), generator=generator).numpy()]
    for at in several[np.argsort(-counts[several], kind="stable")]:
        yield starts[order[begins[at] : begins[at + 1]]]
