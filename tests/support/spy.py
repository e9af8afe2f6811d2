"""An attention function for transformers that keeps everything dense, with autograd's own gradients of q, k and v.

It is the oracle for whole models: the reference's attention, transformers' own N x N masks, nothing of the package.
"""

import contextlib

import torch
from support.reference import dense_account, dense_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask


class Spy:
    """Calls of one model, in order: (query, key, value, output, options)."""

    def __init__(self):
        self.calls = []

    def attend(self, module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, **kwargs):
        for x in (query, key, value):
            if not x.requires_grad:
                x.requires_grad_()
            x.retain_grad()
        allowed = attention_mask > torch.finfo(attention_mask.dtype).min / 2
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        output, _, _ = dense_attention(query, key, value, scaling, allowed, softcap, s_aux)
        output.retain_grad()
        self.calls.append((query, key, value, output, scaling, allowed, softcap, s_aux))
        return output.transpose(1, 2).contiguous(), None

    def accounts(self, readers=None):
        """Return the dense account of every call; call it after the backward pass."""
        return [
            dense_account(query, key, value, output.grad, scaling, allowed, softcap, sinks, readers)
            for query, key, value, output, scaling, allowed, softcap, sinks in self.calls
        ]


@contextlib.contextmanager
def use_attention(model, name, attend):
    """Let the model compute attention by `attend` within the block, with transformers' own N x N masks."""
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, eager_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextlib.contextmanager
def spy_on(model):
    spy = Spy()
    with use_attention(model, "spy", spy.attend):
        yield spy
