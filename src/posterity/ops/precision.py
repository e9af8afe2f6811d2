"""The precision of sums: half precision is accounted for in float32."""

import torch
from jaxtyping import Float
from torch import Tensor


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float32 for half precision, and any other dtype as it is."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def dot(x: Float[Tensor, "*#rest dim"], y: Float[Tensor, "*#rest dim"]) -> Float[Tensor, "*#rest"]:
    """Return the inner products along the last dimension, in the working precision."""
    return (x.to(working_dtype(x.dtype)) * y).sum(-1)
