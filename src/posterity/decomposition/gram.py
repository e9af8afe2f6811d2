"""Squared norms and inner product of two parts of a gradient."""

import torch
from jaxtyping import Float
from torch import Tensor

from posterity.axes import TERMS


def gram_terms(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> Float[Tensor, " term"]:
    """Return |left|^2, |right|^2 and their inner product, for two parts of a gradient over all parameters.

    NaN without any parameter.
    """
    if not left:
        return torch.full((len(TERMS),), torch.nan, dtype=torch.float64)
    return torch.stack((_inner(left, left), _inner(right, right), _inner(left, right)))


def _inner(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> Float[Tensor, ""]:
    products = (torch.dot(x.flatten(), y.flatten()).double() for x, y in zip(left, right, strict=True))
    return torch.stack(list(products)).sum()
