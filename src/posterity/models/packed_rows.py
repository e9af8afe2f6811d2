"""Whether documents packed into one row of a model leave each other alone, found out by trying.

transformers tells packed documents apart by positions that start again, in models that read positions so, and only
without a cache and without a padding mask. Nothing is believed: a row of two documents runs beside each of them alone.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from posterity.errors import InputError, first_line
from posterity.models.chunked_loss import LMHead
from posterity.models.language_model import input_device, rounding


def refuse_shared_rows(model: PreTrainedModel, head: LMHead, context: int, other_paths: Sequence[str]) -> None:
    """Raise InputError unless each of two random documents in a row of `context` tokens is what it is alone.

    `other_paths`: modules beside attention that mix positions; a weak one may be lost in the rounding of the trial.
    """
    advice = "measure without packing (pack=False; leave --pack out)"
    if other_paths:
        raise InputError(
            "expected a model in which only attention mixes positions, for packed documents; here "
            f"{', '.join(other_paths)} does too, across documents: {advice}"
        )
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.get_text_config().vocab_size, (1, context), generator=generator)
    length = max(1, min(4, context // 2), context // 8)  # the second document is long: it crosses the bounds of chunks
    first, second = ids.to(input_device(model)).split([length, context - length], 1)
    positions = torch.cat([torch.arange(part.shape[1], device=first.device) for part in (first, second)])[None]
    try:
        with torch.no_grad():
            row = _states(model, head, torch.cat((first, second), 1), positions)
            alone = torch.cat([_states(model, head, part, None) for part in (first, second)], 1)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"expected a model that reads positions that start again, for packed documents; it fails: "
            f"{first_line(error, typed=True)}: {advice}"
        ) from error
    difference = ((row - alone).norm(dim=-1) / alone.norm(dim=-1)).mean().item()
    if not difference <= rounding(row.dtype):
        raise InputError(
            "expected a model in which documents packed into one row do not see each other; in this one what they give "
            f"differs by {difference:.1e} from what they give alone: {advice}"
        )


def _states(model: PreTrainedModel, head: LMHead, ids: Tensor, positions: Tensor | None) -> Tensor:
    """Return the hidden states in front of the LM head, or the logits where it cannot be told apart."""
    options = {} if positions is None else {"position_ids": positions}
    body = head.run_body(model, ids, **options)
    return model(input_ids=ids, use_cache=False, **options).logits if body is None else body[0]
