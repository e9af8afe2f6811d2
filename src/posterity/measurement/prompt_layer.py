"""What a layer computed on a prompt, for the scores that rank its cached keys and values."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from posterity.errors import InputError
from posterity.models.interception import AttentionCall, intercept
from posterity.models.observed_attention import recorded_attention
from posterity.models.price_heads import reader_share
from posterity.ops.attention import Backward

ROWS = 256  # of queries whose attention is computed at once


@dataclass(eq=False)
class PromptLayer:
    """What one layer computed on the first tokens of a window, and what came after them.

    Attributes:
        number: Of the attention layer.
        window_number: Of the window of text.
        length: Tokens of the prompt.
        back: The layer's attention over the whole window, with the gradient of its losses.
        inputs: Arguments of the attention module.
        hidden: Its input: (position, width).
        price: Measured prices of the pairs for all later queries.
        window: Tokens that a query of the layer sees; None for all.
    """

    number: int
    window_number: int
    length: int
    back: Backward
    module: nn.Module
    inputs: tuple[tuple, dict[str, Any]]
    hidden: Float[Tensor, "position width"]
    price: Float[Tensor, "group key"]
    window: int | None

    @property
    def key(self) -> Float[Tensor, "group key dim"]:
        """Keys of the prompt."""
        return self.back.key[0, :, : self.length]

    @property
    def value(self) -> Float[Tensor, "group key dim_v"]:
        """Values of the prompt."""
        return self.back.value[0, :, : self.length]

    @property
    def visible(self) -> Bool[Tensor, "key"]:
        """Which keys of the prompt the query after it sees."""
        ages = self.length - torch.arange(self.length, device=self.key.device)
        return reader_share(ages.float(), 1, self.window) > 0

    def attention(self, rows: slice) -> Float[Tensor, "head query key"]:
        """Return the attention of some queries on the prompt's keys."""
        return recorded_attention(self.back, rows, self.length)

    def by_group(self, heads: Float[Tensor, "head *rest"]) -> Float[Tensor, "group member *rest"]:
        """Sort query heads by the key/value head that they read."""
        return heads.unflatten(0, (self.back.key.shape[1], -1))

    @cached_property
    def received(self) -> Float[Tensor, "head key"]:
        """The sum of the attention that the prompt's queries pay to each of its keys."""
        return self._sum_attention(0, self.length)

    @cached_property
    def future(self) -> Float[Tensor, "head key"]:
        """The sum of the attention that later queries pay to the prompt's keys."""
        return self._sum_attention(self.length, self.back.query.shape[2])

    def _sum_attention(self, start: int, stop: int) -> Tensor:
        total: Any = 0.0
        for first in range(start, stop, ROWS):
            total = total + self.attention(slice(first, min(first + ROWS, stop))).sum(1)
        return total


def unrotated_query(
    prompt: PromptLayer, future: int
) -> tuple[Float[Tensor, "head position dim"], Callable[[Tensor], Tensor]]:
    """Return queries before rotary embedding, and the mean rotation over the positions after the prompt."""
    rotary = getattr(sys.modules.get(type(prompt.module).__module__), "apply_rotary_pos_emb", None)
    embeddings = prompt.inputs[1].get("position_embeddings")
    if rotary is None or not isinstance(embeddings, tuple) or len(embeddings) != 2:
        raise InputError(
            f"Expected Attention needs rotary embeddings that {type(prompt.module).__name__} gets with its input; it "
            "has none: choose other scorers"
        )
    cosine, sine = embeddings
    reader = _Reader()
    _run_module(prompt, reader, position_embeddings=(torch.ones_like(cosine), torch.zeros_like(sine)))
    assert reader.query is not None
    coming = slice(prompt.length, min(prompt.length + future, cosine.shape[1]))
    means = [x[:, coming].float().mean(1, keepdim=True) for x in (cosine, sine)]

    def rotate(query: Tensor) -> Tensor:
        return rotary(query[None], query[None], *means)[0][0]

    return reader.query[0], rotate


def output_norm(prompt: PromptLayer) -> Float[Tensor, "group key"]:
    """Return the L1 norm of each value behind the output projection, mean over the query heads of its group."""
    zero, norms = _run_module(prompt, _Reader()), []  # with the bias of the projection
    for head in range(prompt.back.query.shape[1]):
        output = _run_module(prompt, _Reader(head)) - zero
        norms.append(output[: prompt.length].float().norm(p=1, dim=-1))
    return prompt.by_group(torch.stack(norms)).mean(1)


@dataclass(eq=False)
class _Reader:
    """Interceptor that takes the query of a call, and answers with the values of one query head, or with nothing."""

    head: int | None = None
    query: Tensor | None = None

    def attend(self, call: AttentionCall) -> Tensor:
        """Return each position's own value in one head, zero in the others."""
        self.query, output = call.query, call.zero_output()
        if self.head is not None:
            output[:, self.head] = call.value[:, self.head * call.value.shape[1] // call.query.shape[1]]
        return output


def _run_module(prompt: PromptLayer, reader: _Reader, **changes: Any) -> Float[Tensor, "position width"]:
    """Run the attention module of a layer again, its attention answered by a reader; return its output."""
    args, kwargs = prompt.inputs
    with intercept([prompt.module], reader, this_thread=True), torch.no_grad():
        output = prompt.module(*args, **(kwargs | changes))
    return (output[0] if isinstance(output, tuple) else output)[0]
