"""What a model of transformers hands its attention beside queries, keys and values, as edges and a bias of the scores.

transformers makes a mask by the function that is registered for it. Ours gives the rule instead of an N x N tensor; a
model that computes with its mask gets the tensor.
"""

import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
from transformers.masking_utils import causal_mask_function, eager_mask

from posterity.errors import InputError
from posterity.ops.mask import Mask

WRITTEN = "posterity_written"  # the operator's name for models that compute with their mask: it is written out, N x N
# Tensors that models pass on to every attention function; what they say is in the mask or in queries and keys already.
HARMLESS = {
    "position_ids", "cache_position", "position_embeddings", "cu_seq_lens_q", "cu_seq_lens_k", "num_items_in_batch",
    "token_type_ids", "mm_token_type_ids", "labels",
}  # fmt: skip
_last = threading.local()  # the masks that were written out last, and the padding in them


def edges_and_bias(
    module: nn.Module, query: Tensor, key: Tensor, given: Any, is_causal: bool | None, more: Mapping[str, Any]
) -> tuple[Mask, Tensor | None]:
    """The edges of an attention call, and what is added to its scores; `more`: what else attention was handed.

    Raises:
        InputError: Its edges or its scores depend on something that the operator does not know.
    """
    mask, bias = as_mask(module, given, is_causal)
    known = {"position_bias", "indices"}
    if (position_bias := more.get("position_bias")) is not None:
        bias = position_bias if bias is None else bias + position_bias
    if (keys := more.get("indices")) is not None:  # sparse attention: the keys that an indexer has chosen
        mask = mask.among(keys[:, None], query.shape[1])
    size = getattr(getattr(module, "indexer", None), "block_size", None)
    if size is not None and (blocks := more.get("block_indices")) is not None:
        known.add("block_indices")
        mask = mask.among(blocks, query.shape[1], size)
        if query.shape[2] == key.shape[2] and mask.blind(query.shape[2], key.shape[2], query.device):
            raise InputError(
                f"{type(module).__name__} chooses no key for some tokens that their document holds: packed documents "
                "are not measured in this model"
            )
    unknown = [name for name, x in more.items() if isinstance(x, Tensor) and name not in HARMLESS | known]
    if unknown:
        raise InputError(f"it hands {', '.join(unknown)} to its attention, which the operator does not know")
    return mask, bias


def as_mask(module: nn.Module, given: Any, is_causal: bool | None) -> tuple[Mask, Tensor | None]:
    """What a model hands over as its mask: ours, nothing, or a 4D tensor; and the bias that such a tensor adds."""
    if isinstance(given, Mask):
        return given, None
    if given is None:
        if not (is_causal if is_causal is not None else getattr(module, "is_causal", True)):
            raise InputError(f"{type(module).__name__} attends in both directions; only causal attention is measured")
        return Mask(), None
    if not isinstance(given, Tensor) or given.dim() != 4:
        raise InputError(f"its attention mask is a {type(given).__name__} the operator does not know")
    allowed, bias = given, None
    if given.dtype != torch.bool:
        allowed = given > torch.finfo(given.dtype).min / 2
        bias = given.masked_fill(~allowed, 0)
        if not bias.requires_grad and not bias.any():
            bias = None
    if allowed.shape[1] > 1 and (allowed == allowed[:, :1]).all():
        allowed = allowed[:, :1]
    mask = _mask_of(allowed)
    if getattr(getattr(module, "config", None), "_attn_implementation", None) == WRITTEN:
        mask = _as_written(module, given, mask)
    return mask, bias


def _mask_of(allowed: Tensor, padding: Tensor | None = None) -> Mask:
    """The mask of an N x N tensor of bools, (batch, head, query, key)."""
    documents, heads = (torch.arange(n, device=allowed.device) for n in allowed.shape[:2])
    length, first = allowed.shape[2], allowed.shape[3] - allowed.shape[2]

    def rule(query: Tensor, key: Tensor) -> Tensor:
        at = (query - first).clamp(max=length - 1)
        return allowed[documents[:, None, None, None], heads[:, None, None], at, key]

    return Mask(rule, padding)


def _as_written(module: nn.Module, given: Tensor, mask: Mask) -> Mask:
    """The same mask with the padding that it was written out with; it counts the edges that it had then."""
    if in_backward():
        raise InputError(
            f"{type(module).__name__} computes with its mask, which gradient checkpointing does not bring back: "
            "call model.gradient_checkpointing_disable()"
        )
    written = [
        x for x in (ref() for ref in getattr(_last, "written", [])) if x is not None and x.shape[2:] == given.shape[2:]
    ]
    padding = _last.padding
    mask = Mask(
        mask.allowed, padding if padding is not None and padding.shape == (len(given), given.shape[3]) else None
    )
    if written and not any(x is given or (x.shape == given.shape and x.equal(given.to(x.device))) for x in written):
        before = written[-1].to(given.device)
        mask.counting(_mask_of(before > torch.finfo(before.dtype).min / 2, mask.padding))
    return mask


@torch.compiler.disable
def mask_function(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs,
) -> Mask:
    """The mask function of transformers' interface: the rule itself instead of an N x N tensor."""
    padding = None
    if attention_mask is not None:
        padding = attention_mask[:, kv_offset : kv_offset + kv_length]
        padding = None if padding.all() else padding
    first = kv_length - q_length  # what the operator takes as the position of query 0
    aligned = isinstance(q_offset, int) and q_offset == first + kv_offset
    if mask_function is causal_mask_function and aligned:
        return Mask(padding=padding)
    documents = torch.arange(batch_size, device=device)

    def allowed(query: Tensor, key: Tensor) -> Tensor:
        query, key = query - first + q_offset, key + kv_offset
        if use_vmap:
            edges = _pairwise(mask_function, documents, query, key)
        else:
            edges = mask_function(documents[:, None, None, None], documents[:1, None, None, None], query, key)
        return edges if padding is None else edges & padding[documents[:, None, None, None], key - kv_offset]

    return Mask(allowed, padding)


def written_mask(attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    """The mask function for models that compute with their mask: transformers' own for eager attention."""
    _last.padding = None if attention_mask is None or attention_mask.all() else attention_mask.bool()
    written = eager_mask(attention_mask=attention_mask, **kwargs)
    _last.written = [*getattr(_last, "written", [])[-3:], weakref.ref(written)]
    return written


def _pairwise(mask_function: Callable, documents: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """A rule that takes single indices only, for all documents and pairs."""
    query, key = torch.broadcast_tensors(query, key)
    pairs = torch.vmap(lambda q, k, b: mask_function(b, b.new_zeros(()), q, k), in_dims=(0, 0, None))
    with TransformGetItemToIndex():
        edges = torch.vmap(pairs, in_dims=(None, None, 0))(query.flatten(), key.flatten(), documents)
    return edges.view(len(documents), 1, *query.shape)


def in_backward() -> bool:
    """Whether a backward pass is running, which calls modules only under gradient checkpointing."""
    return torch._C._current_graph_task_id() != -1
