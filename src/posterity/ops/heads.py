"""Grouped-query attention: query heads that share the key and value head of their group."""

from jaxtyping import Float, Shaped
from torch import Tensor


def repeat_heads(shared: Shaped[Tensor, "batch group *rest"], heads: int) -> Shaped[Tensor, "batch head *rest"]:
    """Give each query head its own copy of what its group shares."""
    return shared.repeat_interleave(heads // shared.shape[1], 1)


def sum_heads(per_head: Float[Tensor, "batch head key dim"], groups: int) -> Float[Tensor, "batch group key dim"]:
    """Add the parts of the query heads of each group."""
    return per_head if per_head.shape[1] == groups else per_head.unflatten(1, (groups, -1)).sum(2)
