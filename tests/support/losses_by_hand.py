"""The mean loss of a model whose heads are changed by hand."""

import torch
from support.reference import dense_attention
from support.spy import attending


def mean_loss(model, ids, folded):
    """Mean loss of a token in every window; folded heads (by layer) have a diagonal mask, written down by hand."""

    def attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
        lower = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool).tril()
        allowed = lower.expand(query.shape[1], -1, -1).clone()
        allowed[folded.get(module.layer_idx, [])] = torch.eye(query.shape[2], dtype=torch.bool)
        output, _, _ = dense_attention(query, key, value, scaling, allowed[None])
        return output.transpose(1, 2).contiguous(), None

    with attending(model, "by hand", attend), torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses.view(len(ids), -1).mean(1)
