"""One attention call of a model, and the registry of who answers it.

transformers calls one registered function for every attention module (see `interface`). That function describes the
call as an `AttentionCall` and hands it to the interceptor in force for the module: a `Watch` while a model is measured,
a `Recorder` while it is probed, a recomputation of the module's projections, or the self-only attention of `linear`.
"""

import contextlib
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from posterity.models.masks import edges_and_bias, self_only_heads
from posterity.ops.attention import attention
from posterity.ops.mask import Mask


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """The arguments of one attention call; keys and values have one head per group of query heads."""

    module: nn.Module
    query: Tensor  # (batch, head, query, dim)
    key: Tensor  # (batch, group, key, dim)
    value: Tensor  # (batch, group, key, dim_v)
    scale: float
    softcap: float | None
    sinks: Tensor | None  # (head,) or (batch, head, query)
    attention_mask: Any  # as the module hands it over
    is_causal: bool | None
    options: Mapping[str, Any]  # all that the module hands over beside these

    @cached_property
    def edges(self) -> tuple[Mask, Tensor | None]:
        """The mask, and the bias of the scores; computed when first used, as a recomputation must not fail on a mask.

        Raises:
            InputError: Edges or scores depend on something that the operator does not know.
        """
        mask, bias = edges_and_bias(
            self.module, self.query, self.key, self.attention_mask, self.is_causal, self.options
        )
        if heads := self_only_heads(self.module):
            mask = mask.restrict_to_self(heads, self.query.shape[1])
        return mask, bias

    @property
    def mask(self) -> Mask:
        """Which pairs are edges."""
        return self.edges[0]

    @property
    def bias(self) -> Tensor | None:
        """What is added to the scores, (#batch, #head, #query, #key)."""
        return self.edges[1]

    def output(self) -> Tensor:
        """Return the output of plain attention: (batch, head, query, dim_v)."""
        mask, bias = self.edges
        return attention(
            self.query, self.key, self.value, self.scale, mask=mask, softcap=self.softcap, sinks=self.sinks, bias=bias
        )

    def weights(
        self, row: int, heads: slice, queries: slice, key: Float[Tensor, "key dim"], visible: Tensor | None = None
    ) -> Float[Tensor, "head query key"]:
        """Return the attention of queries of a text to keys that their heads share, in float32 at least.

        Args:
            row: The text.
            heads: Query heads.
            queries: Of the call.
            key: Those of the call or others.
            visible: Which keys each query sees, (query, key); None: all. A query that sees none has weights of NaN.
        """
        query = self.query[row, heads, queries]
        scores = (query.flatten(0, 1) @ key.mT).unflatten(0, query.shape[:2])
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * self.scale
        if self.softcap:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if visible is not None:
            scores = scores.masked_fill(~visible, -torch.inf)  # whatever stands at padding
        if self.sinks is not None:  # (head,) or (text, head, query)
            sinks = self.sinks[heads, None] if self.sinks.dim() == 1 else self.sinks[row, heads, queries]
            scores = torch.cat((scores, sinks.to(scores.dtype)[..., None].expand(*query.shape[:2], 1)), -1)
        return scores.softmax(-1)[..., : len(key)]

    def zero_output(self) -> Tensor:
        """Return an output of zeros: (batch, head, query, dim_v)."""
        return self.value.new_zeros(*self.query.shape[:3], self.value.shape[3])


class Interceptor(Protocol):
    """Answers attention calls in place of plain attention."""

    def attend(self, call: AttentionCall) -> Tensor:
        """Return the output of a call: (batch, head, query, dim_v)."""
        ...


@dataclass(frozen=True, eq=False)
class _Interception:
    interceptor: Interceptor
    thread: int | None  # the only thread that it holds in; None: all


# By module, the outermost first. An entry stays, empty, until its module is gone: so no two threads race to remove it.
interceptions: "WeakKeyDictionary[nn.Module, list[_Interception]]" = WeakKeyDictionary()


def interceptor_of(module: nn.Module) -> Interceptor | None:
    """Return the innermost interceptor in force for a module in this thread."""
    thread = threading.get_ident()
    for interception in reversed(tuple(interceptions.get(module, ()))):
        if interception.thread in (None, thread):
            return interception.interceptor
    return None


@contextlib.contextmanager
def intercept(modules: Iterable[nn.Module], interceptor: Interceptor, this_thread: bool = False) -> Iterator[None]:
    """Let `interceptor` answer the attention calls of some modules; the innermost `with` wins.

    It holds in all threads, since autograd runs backward passes, and what gradient checkpointing computes again in
    them, in threads of its own. `this_thread` limits it to the thread that enters the `with`.
    """
    interception = _Interception(interceptor, threading.get_ident() if this_thread else None)
    entries = [interceptions.setdefault(module, []) for module in dict.fromkeys(modules)]
    try:
        for entry in entries:
            entry.append(interception)
        yield
    finally:
        for entry in entries:
            if interception in entry:
                entry.remove(interception)
