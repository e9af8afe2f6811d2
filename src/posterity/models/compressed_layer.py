"""The cache of one layer when pairs are dropped: a list of pairs for each key/value head, and attention over it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from posterity.errors import InputError
from posterity.models.interception import AttentionCall
from posterity.models.observed_attention import observe_prompt, visible_keys
from posterity.models.price_heads import PriceHead

QUERIES = 256  # whose scores are computed at once


@dataclass(eq=False)
class KeptPairs:
    """The cached pairs of one key/value head for one text, with room for more."""

    pairs: Float[Tensor, "room width"]  # key and value side by side
    count: int
    index: Int[Tensor, " kept"]  # of the pairs that the last eviction left: tokens before each, padding too
    newborn: Float[Tensor, " kept"]  # what `PriceHead.newborn` said of them

    @classmethod
    def of(cls, pairs: Tensor, index: Tensor, newborn: Tensor, room: int) -> "KeptPairs":
        """Keep these pairs, with room for more."""
        store = pairs.new_empty(len(pairs) + room, pairs.shape[1])
        store[: len(pairs)] = pairs
        return cls(store, len(pairs), index, newborn)

    def append(self, pairs: Float[Tensor, "position width"], room: int) -> None:
        """Add pairs behind the others."""
        stop = self.count + len(pairs)
        if stop > len(self.pairs):
            store = self.pairs.new_empty(stop + room, self.pairs.shape[1])
            store[: self.count] = self.pairs[: self.count]
            self.pairs = store
        self.pairs[self.count : stop] = pairs
        self.count = stop

    def clone(self) -> "KeptPairs":
        """Return a copy that can grow by itself."""
        return KeptPairs(self.pairs.clone(), self.count, self.index, self.newborn)

    @property
    def nbytes(self) -> int:
        """Memory in bytes."""
        return sum(x.untyped_storage().nbytes() for x in (self.pairs, self.index, self.newborn))


class CompressedLayer(CacheLayerMixin):
    """The cache of one layer: transformers' own until pairs are dropped, then lists of pairs head by head."""

    is_croppable = False

    def __init__(self, own: DynamicLayer, head: PriceHead, interval: int):
        """Wrap the layer of the model's own cache."""
        super().__init__()
        self.own, self.head, self.interval = own, head, interval
        self.is_sliding = own.is_sliding
        self.length = 0  # tokens that the layer has seen, padding too
        self.heads: list[list[KeptPairs]] | None = None  # by text and key/value head
        self.newborn: list[Tensor] = []  # of pairs since the last eviction: (text, group, position)
        self.starts = 0  # index of the first of them
        self.oldest: list[list[int]] = []  # smallest index of the pairs of each head
        self.key_width = 0
        self.answers_next = False  # whether the next attention call of the module is over pairs that are in lists
        self.observes_next = False  # whether it is of a pass that adds to this cache

    @property
    def device(self) -> torch.device:
        """Where the layer runs."""
        return self.newborn[0].device if self.newborn else torch.device("cpu")

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Initialize the model's own layer."""
        self.own.lazy_initialization(key_states, value_states)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add keys and values, (text, group, position, width); return all, or the new ones where pairs were dropped."""
        self.is_initialized = True
        self.key_width = key_states.shape[-1]
        self.length += key_states.shape[-2]
        if self.heads is None:
            return self.own.update(key_states, value_states, *args, **kwargs)
        new = torch.cat((key_states, value_states), -1).detach()
        for groups, row in zip(self.heads, new, strict=True):
            for kept, pairs in zip(groups, row, strict=True):
                kept.append(pairs, self.interval)
        self.answers_next = True
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of keys that a mask is made for, and the index of the first."""
        return (self.length + query_length, 0) if self.heads is not None else self.own.get_mask_sizes(query_length)

    def get_seq_length(self) -> int:
        """Return the tokens that the layer has seen; not those that it keeps."""
        return self.length

    def get_max_length(self) -> int:
        """Return that of the model's own layer."""
        return self.own.get_max_length()

    def reset(self) -> None:
        """Forget everything."""
        self.own.reset()
        self.length, self.heads, self.newborn, self.starts, self.oldest = 0, None, [], 0, []
        self.answers_next = self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let each text continue another one (beam search)."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some texts, in this order."""
        self.newborn = [x[indices.to(x.device)] for x in self.newborn]
        if self.heads is None:
            self.own.batch_select_indices(indices.to(self.device))
            return
        rows = indices.tolist() if indices.dtype != torch.bool else indices.nonzero()[:, 0].tolist()
        self.heads = [[kept.clone() for kept in self.heads[row]] for row in rows]
        self.oldest = [self.oldest[row] for row in rows]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each text."""
        texts = len(self.newborn[0]) if self.heads is None else len(self.heads)
        self.batch_select_indices(torch.arange(texts).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: a pair that was dropped does not come back."""
        raise InputError("a compressed cache cannot be cropped, which assisted decoding does: generate without it")

    def candidates(self, row: int) -> list[tuple[Tensor, Tensor]]:
        """Return index and newborn price of the pairs of each head of a text."""
        new = torch.cat([x[row] for x in self.newborn], -1)
        indices = torch.arange(self.starts, self.length, device=new.device, dtype=torch.int32)
        if self.heads is None:
            length = self._own_pairs()[0].shape[-2]  # of a sliding layer the latest only
            return [(indices[-length:], x[-length:]) for x in new]
        return [
            (torch.cat((kept.index, indices)), torch.cat((kept.newborn, x)))
            for kept, x in zip(self.heads[row], new, strict=True)
        ]

    def log_prices(self, row: int, horizon: int) -> list[Float[Tensor, " pair"]]:
        """Return the logarithms of the prices of the pairs of each head of a text, for each of the next queries."""
        return [
            self.head.log_prices(group, newborn, self.length - index, horizon)
            for group, (index, newborn) in enumerate(self.candidates(row))
        ]

    def observe(self, call: AttentionCall, padding: Int[Tensor, " text"]) -> None:
        """Correct the prices of the prompt's pairs by the attention that its last queries pay to them.

        Args:
            call: Of the layer; nothing is corrected unless it is over a whole prompt.
            padding: Tokens in front of each text.
        """
        length, prompt = call.query.shape[2], self.observes_next and self.heads is None
        self.observes_next = False
        if not prompt or length != self.length or self.head.observed is None:
            return
        device = call.query.device
        for row, left in enumerate(padding.tolist()):
            visible = visible_keys(length, self.head.window, device, left)
            positions = torch.arange(-left, length - left, device=device).clamp(min=0)
            newborn = self.newborn[-1][row]
            for group, logs in enumerate(newborn):
                features = observe_prompt(call, row, group, visible)
                observed = self.head.add_observation(group, logs, features, positions)
                newborn[group] = torch.where(logs.isneginf(), logs, observed)  # padding

    def keep(self, masks: Sequence[Sequence[Bool[Tensor, " pair"]]]) -> None:
        """Drop the pairs that the masks, by text and head, do not keep."""
        heads = []
        for row, row_masks in enumerate(masks):
            heads.append([])
            for group, (mask, (index, newborn)) in enumerate(zip(row_masks, self.candidates(row), strict=True)):
                rest = KeptPairs.of(self._pairs(row, group)[mask], index[mask], newborn[mask], self.interval)
                heads[-1].append(rest)
                if self.heads is not None:
                    self.heads[row][group] = rest  # the others' memory is free at once
        self.heads = heads
        self.oldest = [[int(kept.index[0]) if kept.count else self.length for kept in groups] for groups in heads]
        self.own.reset()
        self.newborn, self.starts = [], self.length

    def attend(self, call: AttentionCall) -> Float[Tensor, "text head query width"]:
        """Return the output of attention over the pairs that are kept."""
        assert self.heads is not None
        self.answers_next = False
        output, members = call.zero_output(), call.query.shape[1] // len(self.heads[0])
        for row, groups in enumerate(self.heads):
            for group in range(len(groups)):
                heads = slice(group * members, (group + 1) * members)
                for start in range(0, call.query.shape[2], QUERIES):
                    queries = slice(start, min(start + QUERIES, call.query.shape[2]))
                    output[row, heads, queries] = self._attend(call, row, group, heads, queries)
        return output

    def _attend(
        self, call: AttentionCall, row: int, group: int, heads: slice, queries: slice
    ) -> Float[Tensor, "head query width"]:
        assert self.heads is not None
        kept = self.heads[row][group]
        pairs = kept.pairs[: kept.count]
        visible = self._visible(kept, self.oldest[row][group], call.query.shape[2], queries)
        weight = call.weights(row, heads, queries, pairs[:, : self.key_width], visible).to(pairs.dtype)
        return (weight.flatten(0, 1) @ pairs[:, self.key_width :]).unflatten(0, weight.shape[:2])

    def _visible(self, kept: KeptPairs, oldest: int, new: int, queries: slice) -> Tensor | None:
        """Return which of the pairs of a head some of the newest queries see, (query, pair); None: all."""
        window, last = self.head.window, self.length - 1
        beyond = window is not None and last - oldest >= window
        if new == 1 and not beyond:
            return None
        recent = torch.arange(self.starts, self.length, device=kept.index.device, dtype=kept.index.dtype)
        index = torch.cat((kept.index, recent))
        query = torch.arange(self.length - new + queries.start, self.length - new + queries.stop, device=index.device)
        lag = query[:, None] - index
        return lag >= 0 if window is None else (lag >= 0) & (lag < window)

    def _pairs(self, row: int, group: int) -> Float[Tensor, "pair width"]:
        if self.heads is not None:
            kept = self.heads[row][group]
            return kept.pairs[: kept.count]
        return torch.cat([x[row, group] for x in self._own_pairs()], -1)

    def _own_pairs(self) -> tuple[Tensor, Tensor]:
        keys, values = self.own.keys, self.own.values
        assert keys is not None
        assert values is not None
        return keys, values

    @property
    def pairs_kept(self) -> list[int]:
        """Pairs by text, over all heads."""
        if self.heads is not None:
            return [sum(kept.count for kept in groups) for groups in self.heads]
        keys = self.own.keys
        return [] if keys is None else [keys.shape[1] * keys.shape[2]] * len(keys)

    @property
    def nbytes(self) -> int:
        """Memory in bytes, of prices too."""
        own = [x for x in (self.own.keys, self.own.values) if x is not None]
        lists = sum(kept.nbytes for groups in self.heads or () for kept in groups)
        return lists + sum(x.untyped_storage().nbytes() for x in (*own, *self.newborn))
