"""Rules of masks, as FlexAttention's `mask_mod` but for batch and head: from positions to which pairs are edges."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from posterity.ops.heads import repeat_heads

# (query, key) that broadcast to (rows, columns) -> bools that broadcast to (batch, head, rows, columns)
MaskMod = Callable[[Int[Tensor, "rows 1"], Int[Tensor, "1 columns"]], Bool[Tensor, "..."]]


def padding_mask_mod(padding: Bool[Tensor, "batch position"]) -> MaskMod:
    """Return the causal rule under which padding is no key."""
    documents = torch.arange(len(padding), device=padding.device)[:, None, None, None]
    return lambda query, key: (key <= query) & padding[documents, key]


def self_only_mask_mod(
    allowed: MaskMod | None, heads: tuple[int, ...], head_count: int, query: Tensor, key: Tensor
) -> Tensor:
    """Limit these heads, of `head_count`, to the self edge: the rule of `Mask.restrict_to_self`."""
    free = torch.ones(head_count, 1, 1, dtype=torch.bool, device=query.device)
    free[list(heads)] = False
    edges = key <= query if allowed is None else allowed(query, key)
    return edges & (free | (query == key))


def window_mask_mod(
    allowed: MaskMod | None,
    window: int,
    sinks: int,
    starts: Int[Tensor, " batch"] | None,
    query: Tensor,
    key: Tensor,
) -> Tensor:
    """Limit queries to a window and the first keys: the rule of `Mask.limit_window`."""
    edges = key <= query if allowed is None else allowed(query, key)
    near = query - key < window
    if sinks == 0:
        return edges & near
    ends = sinks if starts is None else starts[:, None, None, None] + sinks
    return edges & (near | (key < ends))


def selected_keys_mask_mod(
    allowed: MaskMod | None,
    selection: Int[Tensor, "batch group query number"],
    heads: int,
    size: int,
    query: Int[Tensor, "rows 1"],
    key: Int[Tensor, "#rows columns"],
) -> Bool[Tensor, "batch head rows columns"]:
    """Limit queries to selected keys: the rule of `Mask.select_keys`.

    One row of flags for each query of a block, never all of them.
    """
    edges = key <= query if allowed is None else allowed(query, key)
    numbers = selection[:, :, query.flatten()].long()
    flags = torch.zeros(*numbers.shape[:3], int(max(key.max(), key.new_tensor(0))) // size + 2, dtype=torch.bool)
    flags = flags.to(numbers.device)
    unused = flags.shape[-1] - 1
    flags = flags.scatter(-1, numbers.where((numbers >= 0) & (numbers < unused), unused), True)
    rows = torch.arange(len(query), device=numbers.device)[:, None]
    selected = flags[:, :, rows, key // size]
    return edges & (selected if len(selected[0]) == 1 else repeat_heads(selected, heads))
