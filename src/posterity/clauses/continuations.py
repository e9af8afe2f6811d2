"""Continuations of a cached prefix: drawn from the model, and their gradients at the cached keys and values.

All tokens of a prefix but the last are read once and cached. The last one is read again at the head of every
continuation c_1 .. c_C, so that one pass over [last, c_1 .. c_{C-1}] gives log p(c_1 .. c_C). In that pass the cached
keys and values of every layer, as its attention gets them, are leaves, with a copy for each continuation: one backward
pass gives every continuation's gradient. All entries are held constant: the gradient at one is what the tokens behind
the cache make of it, not what later tokens of the cache do.
"""

from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from posterity.errors import InputError
from posterity.models.attach import refuse_other_paths, watch_model
from posterity.models.chunked_loss import token_losses
from posterity.models.interception import AttentionCall
from posterity.models.language_model import input_device, max_difference, rounding
from posterity.models.watch import Layer
from posterity.ops.precision import working_dtype

Pull = tuple[Tensor, Tensor]  # gradients at the keys and at the values of one layer


@dataclass(frozen=True, eq=False)
class Prefix:
    """A text that the model has read: its token ids (at least 2), and the cache of all but the last."""

    ids: Tensor
    cache: DynamicCache

    @property
    def length(self) -> int:
        """Cached positions."""
        return len(self.ids) - 1

    def copy_cache(self, rows: int) -> DynamicCache:
        """Copy the cache once for each of so many continuations."""
        cache = deepcopy(self.cache)
        cache.batch_repeat_interleave(rows)
        return cache


def read_prefix(model: PreTrainedModel, ids: Tensor) -> Prefix:
    """Read a prefix, (position,), and check that its future gets nothing from it but what is cached.

    Raises:
        InputError: The model's positions also communicate outside attention, or it does not take such a cache.
    """
    with watch_model(model) as watch, torch.no_grad():
        refuse_other_paths(watch, "the pull of futures on cached keys and values")
        cache = DynamicCache()  # keeps all positions, also behind a sliding window: the mask hides them
        try:
            model(input_ids=ids[None, :-1].to(input_device(model)), past_key_values=cache, use_cache=True)
            prefix = Prefix(ids, cache)
            prefix.copy_cache(1)
        except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
            raise InputError(
                f"{type(model).__name__} does not take a plain cache of keys and values: {error}"
            ) from error
    return prefix


def sample_continuations(
    model: PreTrainedModel, prefix: Prefix, number: int, length: int, generator: torch.Generator
) -> Tensor:
    """Draw continuations from the model as it is (temperature 1, whole vocabulary): token ids (number, length)."""
    ids, tokens, cache = prefix.ids[-1:].expand(number, 1), [], prefix.copy_cache(number)
    with watch_model(model), torch.no_grad():
        for _ in range(length):
            logits = model(input_ids=ids.to(input_device(model)), past_key_values=cache, use_cache=True).logits[:, -1]
            probabilities = torch.softmax(logits.to(working_dtype(logits.dtype)), -1).cpu()
            ids = torch.multinomial(probabilities, 1, generator=generator)
            tokens.append(ids)
    return torch.cat(tokens, 1)


def pulls(model: PreTrainedModel, prefix: Prefix, continuations: Tensor) -> list[Pull]:
    """Return the gradient of every continuation's log-likelihood at every cached key and value.

    Args:
        model: In evaluation mode; the gradients of its parameters are left alone.
        prefix: What is cached.
        continuations: Token ids, (continuation, token).

    Returns:
        For each attention layer the gradients at keys and at values, (continuation, group, position, dim), of the
        log-likelihood in nats, summed over tokens.
    """
    with torch.enable_grad():
        logits, leaves = _logits(model, prefix, continuations)
        likelihood = -token_losses(logits, continuations).sum()
        grads = torch.autograd.grad(likelihood, [leaf for pair in leaves for leaf in pair])
    return list(zip(grads[::2], grads[1::2], strict=True))


def verify_cache(model: PreTrainedModel, prefix: Prefix, continuation: Tensor) -> None:
    """Raise InputError unless a continuation's logits with the cache are those of one uncached pass."""
    ids = torch.cat((prefix.ids, continuation[:-1]))[None].to(input_device(model))
    with watch_model(model), torch.no_grad():
        uncached = model(input_ids=ids, use_cache=False).logits[:, prefix.length :]
        logits, _ = _logits(model, prefix, continuation[None])
    tolerance = rounding(uncached.dtype) * uncached.abs().max().item()
    if not (off := max_difference(logits, uncached)) <= tolerance:  # not finite is wrong too
        raise InputError(
            f"{type(model).__name__}: with a cache of keys and values its logits move by {off:.1e} (at most "
            f"{tolerance:.1e} is rounding), so that what the future reads is not what was cached"
        )


def _logits(model: PreTrainedModel, prefix: Prefix, continuations: Tensor) -> tuple[Tensor, list[Pull]]:
    """Return the logits of every continuation's tokens, and the leaves (keys and values) in the order of the layers."""
    leaves: list[Pull] = []
    rows, length = continuations.shape
    expected = prefix.length + length

    def detach_cache(layer: Layer, call: AttentionCall) -> Tensor:
        if call.key.shape[2] != expected:
            raise InputError(f"{layer} reads {call.key.shape[2]} keys; expected {expected}, cached and new")
        streams = call.key, call.value
        key, value = (x[:, :, : prefix.length].detach().clone().requires_grad_() for x in streams)
        leaves.append((key, value))
        key, value = (torch.cat((x, y[:, :, prefix.length :]), 2) for x, y in zip((key, value), streams, strict=True))
        return replace(call, key=key, value=value).output()

    ids = torch.cat((prefix.ids[-1:].expand(rows, 1), continuations[:, :-1]), 1).to(input_device(model))
    with watch_model(model) as watch, watch.replace_outputs(detach_cache):
        logits = model(input_ids=ids, past_key_values=prefix.copy_cache(rows), use_cache=True).logits
    return logits, leaves
