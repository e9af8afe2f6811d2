"""Masks and biases that a model of transformers hands its attention, as edges and a bias of the scores.

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

EXPLICIT = "posterity_written"  # the operator's name for models that compute with their mask: it is written out, N x N
# Entries of a config (`permanent_limits`), by `layer_idx`: heads that pass their own value on; windows of local layers.
FOLDED, WINDOWS = "posterity_folded", "posterity_windows"
# Tensors that models pass on to every attention function; what they say is in the mask or in queries and keys already.
HARMLESS = {
    "position_ids", "cache_position", "position_embeddings", "cu_seq_lens_q", "cu_seq_lens_k", "num_items_in_batch",
    "token_type_ids", "mm_token_type_ids", "labels",
}  # fmt: skip


class _ExplicitMasks(threading.local):
    """The masks that this thread wrote out last, and the padding in the latest.

    Between making a mask and attending under it transformers passes on the tensor alone, which a model may change: so
    this is no interceptor of a module, but a note that the mask function leaves for the attention function.
    """

    def __init__(self):
        self.masks: list[weakref.ref[Tensor]] = []
        self.padding: Tensor | None = None


_explicit_masks = _ExplicitMasks()


def edges_and_bias(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Any,
    is_causal: bool | None,
    options: Mapping[str, Any],
) -> tuple[Mask, Tensor | None]:
    """Return the edges of an attention call, and what is added to its scores.

    Args:
        module: The attention module.
        query: Its queries, (batch, head, query, dim).
        key: Its keys, (batch, group, key, dim).
        attention_mask: What it hands over as its mask.
        is_causal: Whether it says that it attends to the past only, if it says so.
        options: What else it hands over.

    Raises:
        InputError: Its edges or its scores depend on something that the operator does not know.
    """
    mask, bias = _mask_and_bias(module, attention_mask, is_causal)
    used = {"position_bias", "indices"}
    if (position_bias := options.get("position_bias")) is not None:
        bias = position_bias if bias is None else bias + position_bias
    if (keys := options.get("indices")) is not None:  # sparse attention: the keys that an indexer has chosen
        mask = mask.select_keys(keys[:, None], query.shape[1])
    size = getattr(getattr(module, "indexer", None), "block_size", None)
    if size is not None and (blocks := options.get("block_indices")) is not None:
        used.add("block_indices")
        mask = mask.select_keys(blocks, query.shape[1], size)
        if query.shape[2] == key.shape[2] and mask.has_blind_query(query.shape[2], key.shape[2], query.device):
            raise InputError(
                f"{type(module).__name__} chooses no key for some tokens that their document holds: packed documents "
                "are not measured in this model"
            )
    unknown = [name for name, x in options.items() if isinstance(x, Tensor) and name not in HARMLESS | used]
    if unknown:
        raise InputError(f"it hands {', '.join(unknown)} to its attention, which the operator does not know")
    window = window_of_layer(module)
    return mask if window is None else mask.limit_window(window), bias


def self_only_heads(module: nn.Module) -> list[int]:
    """Return the heads of an attention module that see only themselves, by the config of a folded model."""
    return _config_entry(module, FOLDED) or []


def window_of_layer(module: nn.Module) -> int | None:
    """Return the tokens that a query of an attention module sees, by the config of a model with local layers."""
    return _config_entry(module, WINDOWS)


def _config_entry(module: nn.Module, name: str) -> Any:
    """Return what the config of an attention module says of it under this name; None for nothing."""
    by_index = getattr(getattr(module, "config", None), name, None)
    return by_index.get(str(getattr(module, "layer_idx", None))) if by_index else None


def _mask_and_bias(module: nn.Module, attention_mask: Any, is_causal: bool | None) -> tuple[Mask, Tensor | None]:
    """Return the mask that a model hands over (ours, nothing, or a 4D tensor), and the bias that a tensor adds."""
    if isinstance(attention_mask, Mask):
        return attention_mask, None
    if attention_mask is None:
        if not (is_causal if is_causal is not None else getattr(module, "is_causal", True)):
            raise InputError(f"{type(module).__name__} attends in both directions; only causal attention is measured")
        return Mask(), None
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 4:
        raise InputError(f"its attention mask is a {type(attention_mask).__name__} the operator does not know")
    allowed, bias = attention_mask, None
    if attention_mask.dtype != torch.bool:
        allowed = attention_mask > torch.finfo(attention_mask.dtype).min / 2
        bias = attention_mask.masked_fill(~allowed, 0)
        if not bias.requires_grad and not bias.any():
            bias = None
    if allowed.shape[1] > 1 and (allowed == allowed[:, :1]).all():
        allowed = allowed[:, :1]
    mask = _tensor_mask(allowed)
    if getattr(getattr(module, "config", None), "_attn_implementation", None) == EXPLICIT:
        mask = _with_original(module, attention_mask, mask)
    return mask, bias


def _tensor_mask(allowed: Tensor, padding: Tensor | None = None) -> Mask:
    """Return the mask of an N x N tensor of bools, (batch, head, query, key)."""
    documents, heads = (torch.arange(n, device=allowed.device) for n in allowed.shape[:2])
    length, first = allowed.shape[2], allowed.shape[3] - allowed.shape[2]

    def rule(query: Tensor, key: Tensor) -> Tensor:
        row = (query - first).clamp(max=length - 1)
        return allowed[documents[:, None, None, None], heads[:, None, None], row, key]

    return Mask(rule, padding)


def _with_original(module: nn.Module, attention_mask: Tensor, mask: Mask) -> Mask:
    """Return the mask with the padding that it was written out with; it counts the edges that it had then."""
    if in_backward():
        raise InputError(
            f"{type(module).__name__} computes with its mask, which gradient checkpointing does not bring back: "
            "call model.gradient_checkpointing_disable()"
        )
    originals = [
        x for x in (ref() for ref in _explicit_masks.masks) if x is not None and x.shape[2:] == attention_mask.shape[2:]
    ]
    padding = _explicit_masks.padding
    if padding is not None and padding.shape != (len(attention_mask), attention_mask.shape[3]):
        padding = None
    mask = Mask(mask.allowed, padding)
    if originals and not any(_is_same(x, attention_mask) for x in originals):
        latest = originals[-1].to(attention_mask.device)
        mask.count_edges_of(_tensor_mask(latest > torch.finfo(latest.dtype).min / 2, mask.padding))
    return mask


def _is_same(original: Tensor, mask: Tensor) -> bool:
    return original is mask or (original.shape == mask.shape and original.equal(mask.to(original.device)))


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
    """Mask function of transformers' interface: returns the rule itself instead of an N x N tensor."""
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


def explicit_mask(attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    """Mask function for models that compute with their mask: transformers' own for eager attention, N x N."""
    padding = None if attention_mask is None or attention_mask.all() else attention_mask.bool()
    mask = eager_mask(attention_mask=attention_mask, **kwargs)
    _explicit_masks.padding = padding
    _explicit_masks.masks = [*_explicit_masks.masks[-3:], weakref.ref(mask)]
    return mask


def _pairwise(mask_function: Callable, documents: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Apply a rule that takes single indices only to all documents and pairs."""
    query, key = torch.broadcast_tensors(query, key)
    pairs = torch.vmap(lambda q, k, b: mask_function(b, b.new_zeros(()), q, k), in_dims=(0, 0, None))
    with TransformGetItemToIndex():
        edges = torch.vmap(pairs, in_dims=(None, None, 0))(query.flatten(), key.flatten(), documents)
    return edges.view(len(documents), 1, *query.shape)


def in_backward() -> bool:
    """Return whether a backward pass is running; it calls modules only under gradient checkpointing."""
    return torch._C._current_graph_task_id() != -1
