"""A key/value cache of transformers that drops the pairs whose predicted price is lowest, and frees their memory.

The prompt runs as it does without: the model's own attention over its own cache. After it, and while tokens are
generated, the cheapest pairs of all layers and heads are dropped together, so that each head keeps another number of
them. Such a cache has no rectangle of keys any more: attention over it is computed head by head.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from posterity.errors import InputError, NotFiniteError
from posterity.models.attach import first_calls
from posterity.models.compressed_layer import CompressedLayer
from posterity.models.interception import AttentionCall, intercept
from posterity.models.interface import switch_attention
from posterity.models.language_model import (
    evaluation_mode,
    input_device,
    language_model,
    max_difference,
    rounding,
)
from posterity.models.masks import FOLDED, WINDOWS
from posterity.models.observed_attention import can_observe, observe_attention
from posterity.models.permanent_limits import attention_modules
from posterity.models.price_heads import PriceHead, module_input
from posterity.models.probe import Check, check

INTERVAL = 64  # tokens between two evictions
Calibration = Callable[[Tensor], Tensor]
_PROBE = (8, 1, 4)  # tokens of the passes that are tried


class CompressedCache(Cache):
    """A cache that holds a share of its pairs, or all but those whose prices sum up to a number of nats.

    Attributes:
        keep: The share; None for a budget in nats.
        nats: What dropped pairs may cost, in nats per token by their prices; None for a share.
        spent: What they cost so far, by text.
    """

    layers: list[CompressedLayer]

    def __init__(
        self,
        layers: list[CompressedLayer],
        horizon: int,
        keep: float | None,
        nats: float | None,
        calibrate: Calibration,
        leave_own_attention: Callable[[], None],
    ):
        """Start empty. `leave_own_attention` is called before the first pair is dropped."""
        super().__init__(layers=[*layers])
        self.horizon, self.keep, self.nats, self.calibrate = horizon, keep, nats, calibrate
        self.padding: Tensor | None = None  # tokens in front of each text
        self.spent: Tensor | None = None
        self._leave_own_attention = leave_own_attention

    @property
    def length(self) -> int:
        """Tokens that the model has seen, padding too."""
        return self.layers[0].length

    @property
    def pairs_seen(self) -> list[int]:
        """Pairs that the model's own cache would hold, by text."""
        padding = [0] if self.padding is None else self.padding.tolist()
        return [
            sum(
                layer.head.groups
                * min(self.length - left, self.length if layer.head.window is None else layer.head.window - 1)
                for layer in self.layers
            )
            for left in padding
        ]

    @property
    def pairs_kept(self) -> list[int]:
        """Pairs that are held, by text."""
        return [sum(counts) for counts in zip(*(layer.pairs_kept for layer in self.layers), strict=True)]

    @property
    def nbytes(self) -> int:
        """Memory in bytes: keys, values and prices."""
        return sum(layer.nbytes for layer in self.layers)

    def reset(self) -> None:
        """Forget everything, for another text."""
        super().reset()
        self.padding = self.spent = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let each text continue another one (beam search)."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some texts, in this order."""
        super().batch_select_indices(indices)
        self._select(indices.cpu())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each text."""
        super().batch_repeat_interleave(repeats)
        if self.padding is not None:
            self._select(torch.arange(len(self.padding)).repeat_interleave(repeats))

    def _select(self, rows: Tensor) -> None:
        if self.padding is not None and self.spent is not None:
            self.padding, self.spent = self.padding[rows], self.spent[rows]

    def begin(self, texts: int, new: int, attention_mask: Tensor | None) -> None:
        """Note the padding in front of the texts, before a forward pass over `new` tokens.

        Raises:
            InputError: Padding behind a token; another number of texts than before.
        """
        if attention_mask is not None and attention_mask.dim() == 2:
            mask = attention_mask[:, -(self.length + new) :].bool().cpu()
            padding = (~mask).sum(1)
            if not mask.int().diff(dim=1).ge(0).all() or (self.length and not mask[:, self.length :].all()):
                raise InputError(
                    "a compressed cache takes padding in front of the prompt only: set padding_side='left'"
                )
        else:
            padding = torch.zeros(texts, dtype=torch.long) if self.padding is None else self.padding
        if self.padding is None:
            self.padding, self.spent = padding, torch.zeros(texts, dtype=torch.float64)
        if texts != len(self.padding):
            raise InputError(f"expected {len(self.padding)} texts, as before; got {texts}: use a new cache, or reset()")

    def observe(self, layer: CompressedLayer, hidden: Float[Tensor, "text position width"]) -> None:
        """Predict prices of the pairs that are about to come, from their layer's input."""
        assert self.padding is not None
        if layer.head.weight.device != hidden.device:
            layer.head = layer.head.to(hidden.device)
        index = torch.arange(layer.length, layer.length + hidden.shape[1], device=hidden.device)
        positions = index - self.padding.to(hidden.device)[:, None]
        newborn = layer.head.newborn(hidden.detach(), positions.clamp(min=0))
        layer.newborn.append(newborn.masked_fill((positions < 0)[:, None], -torch.inf))
        layer.observes_next = True

    def evict_if_due(self) -> None:
        """Drop the cheapest pairs if this has not been done for a while."""
        layer = self.layers[0]
        due = layer.heads is None or layer.length - layer.starts >= layer.interval
        if due and (self.nats if self.keep is None else self.keep < 1):
            self.evict()

    def log_prices(self, row: int) -> list[Float[Tensor, " pair"]]:
        """Return what is predicted of the pairs of a text for each of the next queries, by layer and key/value head."""
        return [x for layer in self.layers for x in layer.log_prices(row, self.horizon)]

    def evict(self, force: bool = False) -> None:
        """Drop the cheapest pairs of all layers and heads, for each text by itself.

        `force`: leave the model's own cache even where nothing is dropped.
        """
        assert self.spent is not None
        masks, spent = [], []
        for row, seen in enumerate(self.pairs_seen):
            logs = self.log_prices(row)
            pooled = torch.cat([x.to(logs[0].device) for x in logs])
            if pooled.isnan().any():
                raise NotFiniteError("the prices that are predicted from the hidden states")
            mask, cost = self._choose(pooled, seen, float(self.spent[row]))
            masks.append(mask.split([len(x) for x in logs]))
            spent.append(cost)
        if force or self.layers[0].heads is not None or not all(bool(part.all()) for row in masks for part in row):
            self.spent = self.spent + torch.tensor(spent, dtype=torch.float64)
            self.drop(masks)

    def drop(self, masks: Sequence[Sequence[Bool[Tensor, " pair"]]]) -> None:
        """Drop the pairs that masks do not keep, by text, and by key/value head of all layers in order."""
        if self.layers[0].heads is None:
            self._leave_own_attention()
        start = 0
        for layer in self.layers:
            stop = start + layer.head.groups
            layer.keep([[mask.to(layer.device) for mask in row[start:stop]] for row in masks])
            start = stop

    def snapshot(self) -> Callable[[], None]:
        """Return what puts the cache back into the state that it has now, before any pair was dropped."""
        states = [(layer, layer.own.keys, layer.own.values, layer.length, [*layer.newborn]) for layer in self.layers]
        lengths = [getattr(layer.own, "cumulative_length", None) for layer in self.layers]

        def restore() -> None:
            for (layer, keys, values, length, newborn), cumulative in zip(states, lengths, strict=True):
                layer.reset()
                assert keys is not None
                assert values is not None
                layer.own.lazy_initialization(keys, values)
                layer.own.keys, layer.own.values = keys, values
                layer.length, layer.newborn, layer.is_initialized = length, [*newborn], True
                if cumulative is not None:
                    layer.own.cumulative_length = cumulative

        return restore

    def _choose(self, logs: Float[Tensor, " pair"], seen: int, spent: float) -> tuple[Bool[Tensor, " pair"], float]:
        """Return which pairs of a text to keep, and what the others cost in nats per token."""
        visible = logs > -torch.inf
        prices = self.calibrate(logs.double()).exp()
        if self.keep is not None:
            number = min(int(visible.sum()), max(1, math.floor(self.keep * seen)))
            mask = torch.zeros_like(visible)
            mask[logs.topk(number).indices] = True
            mask &= visible
        else:
            assert self.nats is not None
            ascending = prices.sort()
            dropped = ascending.values.cumsum(0) <= self.nats - spent
            mask = torch.ones_like(visible)
            mask[ascending.indices[dropped]] = False
            mask &= visible
        return mask, float(prices[~mask].sum())


@dataclass(frozen=True)
class _Lists:
    """Interceptor that answers attention calls over pairs that are in lists, by module."""

    layers: dict[nn.Module, CompressedLayer]

    def attend(self, call: AttentionCall) -> Tensor:
        """Return the output over the lists, if they have just got the new pairs; else that of plain attention."""
        layer = self.layers.get(call.module)
        return layer.attend(call) if layer is not None and layer.answers_next else call.output()


@contextlib.contextmanager
def open_cache(
    model: nn.Module,
    heads: Sequence[PriceHead],
    horizon: int,
    keep: float | None = None,
    nats: float | None = None,
    interval: int = INTERVAL,
    calibrate: Calibration = lambda logs: logs,
) -> Iterator[CompressedCache]:
    """Watch a model for the length of the block, and give a cache that is compressed while it is used with the model.

    Args:
        model: A causal language model of transformers; restored on exit.
        heads: What predicts prices, by number of the attention layer.
        horizon: Queries that the prices are for.
        keep: Share of the pairs that is kept; or
        nats: What dropped pairs may cost, in nats per token by their prices.
        interval: Tokens between two evictions.
        calibrate: Makes logarithms of prices in nats of predicted ones; it grows.

    Raises:
        InputError: The model has no cache of plain keys and values; its attention over lists of pairs gives other
            logits than its own.
    """
    inner = language_model(model)
    result = check(inner)
    _try_lists(inner, result, heads)
    with attach_cache(inner, result, heads, horizon, keep, nats, interval, calibrate) as cache:
        yield cache


@contextlib.contextmanager
def attach_cache(
    model: PreTrainedModel,
    result: Check,
    heads: Sequence[PriceHead],
    horizon: int = 1,
    keep: float | None = 1.0,
    nats: float | None = None,
    interval: int = INTERVAL,
    calibrate: Calibration = lambda logs: logs,
) -> Iterator[CompressedCache]:
    """Do what `open_cache` does, without trying the model. `result`: what `check` says of it."""
    modules, own = attention_modules(model, result), own_layers(model, result)
    layers = [
        CompressedLayer(own[module.layer_idx], head, interval) for module, head in zip(modules, heads, strict=True)
    ]
    by_module = dict(zip(modules, layers, strict=True))
    with contextlib.ExitStack() as stack:

        def leave_own_attention() -> None:
            if not switched:
                stack.enter_context(switch_attention(model, result.name))
                stack.enter_context(intercept(modules, _Lists(by_module)))
                switched.append(True)

        switched: list[bool] = []
        cache = CompressedCache(layers, horizon, keep, nats, calibrate, leave_own_attention)

        def observe(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if any(value is cache for value in (*args, *kwargs.values())):
                cache.observe(by_module[module], module_input(args, kwargs))

        def observe_call(call: AttentionCall) -> None:
            if cache.padding is not None:
                by_module[call.module].observe(call, cache.padding)

        def begin(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if kwargs.get("past_key_values") is cache:
                ids = kwargs.get("input_ids", args[0] if args else None)
                shape = ids.shape if ids is not None else kwargs["inputs_embeds"].shape
                cache.begin(shape[0], shape[1], kwargs.get("attention_mask"))

        def evict(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            if kwargs.get("past_key_values") is cache:
                cache.evict_if_due()

        stack.callback(cache.reset)
        implementation = model.config.get_text_config(decoder=True)._attn_implementation or "eager"
        if any(head.observed is not None for head in heads) and can_observe(modules, implementation):
            stack.enter_context(observe_attention(modules, implementation, observe_call))
        hooks = [module.register_forward_pre_hook(observe, with_kwargs=True) for module in modules]
        hooks.append(model.register_forward_pre_hook(begin, with_kwargs=True))
        hooks.append(model.register_forward_hook(evict, with_kwargs=True))
        for hook in hooks:
            stack.callback(hook.remove)
        yield cache


def own_layers(model: PreTrainedModel, result: Check | None = None) -> list[DynamicLayer]:
    """Return the layers of an empty cache of the model's own, by `layer_idx`. `result`: as in `attention_modules`.

    Raises:
        InputError: They hold something else than keys and values of a layer, or are read by other layers too.
    """
    modules = attention_modules(model, result)
    config = model.config.get_text_config(decoder=True)
    if getattr(config, FOLDED, None) or getattr(config, WINDOWS, None):
        raise InputError(
            "the cache of a model with folded heads or local layers of ours is not compressed: load the plain model"
        )
    layers: list[Any] = DynamicCache(config=model.config).layers
    plain = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
    chunked = "chunked_attention" in (getattr(config, "layer_types", None) or ())
    shared = getattr(config, "num_kv_shared_layers", 0)
    if not plain or chunked or shared or [module.layer_idx for module in modules] != [*range(len(layers))]:
        raise _refusal(model)
    return layers


def _refusal(model: PreTrainedModel) -> InputError:
    return InputError(
        "expected a cache with the keys and values of every layer by itself, whole or in a sliding window; that of "
        f"{type(model).__name__} is another: it cannot be compressed"
    )


def cache_windows(model: PreTrainedModel) -> list[int | None]:
    """Return how many tokens a query of each layer sees by the model's own cache; None for all.

    Raises:
        InputError: The cache cannot be compressed.
    """
    layers, modules = own_layers(model), attention_modules(model)
    cache, ids = DynamicCache(config=model.config), torch.zeros(1, 2, dtype=torch.long, device=input_device(model))
    with evaluation_mode(model), torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    calls = {call.module: call.key for _, call in first_calls(model)}
    for module in modules:
        keys = cache.layers[module.layer_idx].keys
        if keys is None or keys.shape != calls[module].shape:
            raise _refusal(model)
    return [getattr(layer, "sliding_window", None) for layer in layers]


@torch.no_grad()
def _try_lists(model: PreTrainedModel, result: Check, heads: Sequence[PriceHead]) -> None:
    """Raise InputError unless attention over lists of all pairs gives the logits of the model without a cache."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (1, sum(_PROBE)), generator=torch.Generator().manual_seed(0))
    ids, start, parts = ids.to(input_device(model)), 0, []
    with evaluation_mode(model), attach_cache(model, result, heads) as cache:
        expected = model(input_ids=ids, use_cache=False).logits
        for length in _PROBE:
            parts.append(model(input_ids=ids[:, start : start + length], past_key_values=cache, use_cache=True).logits)
            if cache.length != start + length:
                raise InputError(
                    f"{type(model).__name__} does not use the cache that it is given: it cannot be compressed"
                )
            if start == 0:
                cache.evict(force=True)
            start += length
    if max_difference(torch.cat(parts, 1), expected) > rounding(expected.dtype) * expected.abs().max().item():
        raise InputError(
            f"{type(model).__name__} has other logits with a cache that is split by heads: it cannot be compressed"
        )
