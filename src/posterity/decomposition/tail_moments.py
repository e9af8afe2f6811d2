"""Second moments over documents of how much lies at a lag and beyond: the errors of what a window covers.

For the edges of one key/value head R_b is the sum over the bins from b on without the first keys, A_b with them. Sums
over documents of R_b^2, R_b R_0, R_b A_0, A_b^2 and A_b A_0 give the standard errors of R_b / R_0, R_b / A_0 and
A_b / A_0 (`posterity.results.ratios.ratio`) without a row for each document; a shorter document adds zeros.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from posterity.decomposition.credit import PassCredit


def tail_moments(credit: PassCredit, groups: int) -> Float[Tensor, "group quantity moment bin"]:
    """Sum the moments of one backward pass over its documents, in float64.

    Args:
        credit: By lag, and by query head.
        groups: Number of key/value heads.

    Returns:
        In the squared units of each quantity (`posterity.axes.QUANTITIES`); moments in the order of `MOMENTS` there.
    """
    by_head = torch.cat((credit.attention[:, :, None], credit.mass, credit.credit), 2)
    first, rest = _sum_groups(by_head, groups).unbind(-2)
    rest, whole = (x.flip(-1).cumsum(-1).flip(-1) for x in (rest, first + rest))
    pairs = ((rest, rest), (rest, rest[..., :1]), (rest, whole[..., :1]), (whole, whole), (whole, whole[..., :1]))
    return torch.stack([left * right for left, right in pairs], -2).sum(0)


def _sum_groups(
    by_head: Float[Tensor, "batch head quantity reader bin"], groups: int
) -> Float[Tensor, "batch group quantity reader bin"]:
    return by_head.unflatten(1, (groups, -1)).sum(2)
