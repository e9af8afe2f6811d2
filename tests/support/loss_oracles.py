"""Own and later losses, discounts and edge windows by dense autograd: one backward pass per loss, or per edge."""

import contextlib

import numpy as np
import torch
from support.reference import dense_attention
from support.spy import use_attention
from support.tiny import tiny
from torch.utils._pytree import tree_map


def exact(name, **changes):
    """A tiny model whose norms stay in float64; those of transformers go through float32."""
    model = tiny(name, **changes)

    def norm(module):
        shift = 1 if "Gemma" in type(module).__name__ else 0
        epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        return lambda x: (shift + module.weight) * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon)

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = norm(module)
    return model


class Dense:
    """An attention function that keeps each head's own key and value, and can put a factor on every edge's gradient.

    The factor is autograd's own: an edge (i, j) reads w x + (1 - w) x', where x' is x.detach(), or with `hidden` what
    the module makes of its detached input.
    """

    def __init__(self):
        self.calls, self.inputs = [], []
        self.factor = None  # (key, value): functions of the lag, or None
        self.hidden = False
        self.module_inputs, self.captured = {}, None

    def detached(self, module, key, value):
        """Key and value once more, without the gradient that the factor takes."""
        if not self.hidden:
            return key.detach(), value.detach()
        self.captured = []
        args, kwargs = tree_map(lambda x: x.detach() if isinstance(x, torch.Tensor) else x, self.module_inputs[module])
        module.forward(*args, **kwargs)
        streams, self.captured = self.captured, None
        return streams

    def attend(self, module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, **kwargs):
        if self.captured is not None:
            self.captured += [key, value]
            return value.new_zeros(len(query), query.shape[2], query.shape[1], value.shape[3]), None
        group, grouped = query.shape[1] // key.shape[1], (key, value)
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        allowed = attention_mask > torch.finfo(attention_mask.dtype).min / 2
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        for x in (query, key, value):
            x.requires_grad_() if not x.requires_grad else None
        self.calls.append((query, key, value))
        if self.factor is None:
            output, _, _ = dense_attention(query, key, value, scaling, allowed, softcap, s_aux)
            return output.transpose(1, 2).contiguous(), None
        lag = torch.arange(query.shape[2])[:, None] - torch.arange(key.shape[2])
        weights = [(factor(lag.clamp(min=0)) if factor else torch.ones_like(lag)).to(query) for factor in self.factor]
        detached = [x.repeat_interleave(group, 1) for x in self.detached(module, *grouped)]

        def edges(x, constant, weight):  # (batch, head, query, key, dim)
            weight = weight[..., None]
            return weight * x[:, :, None] + (1 - weight) * constant[:, :, None]

        score = scaling * (query[:, :, :, None] * edges(key, detached[0], weights[0])).sum(-1)
        score = score if softcap is None else softcap * torch.tanh(score / softcap)
        score = score.masked_fill(~allowed, -torch.inf)
        if s_aux is not None:
            score = torch.cat([score, s_aux[None, :, None, None].expand(*score.shape[:3], 1)], -1)
        weight = torch.softmax(score, -1).nan_to_num()[..., : key.shape[2]]
        output = (weight[..., None] * edges(value, detached[1], weights[1])).sum(-2)
        return output.transpose(1, 2).contiguous(), None


@contextlib.contextmanager
def dense(model):
    oracle = Dense()
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: oracle.inputs.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        for layer in layers
    ]
    hooks += [
        module.register_forward_pre_hook(
            lambda module, args, kwargs: oracle.module_inputs.update({module: (args, kwargs)}), with_kwargs=True
        )
        for module in model.modules()
        if type(module).__name__.endswith("Attention")
    ]
    try:
        with use_attention(model, "dense", oracle.attend):
            yield oracle
    finally:
        for hook in hooks:
            hook.remove()


def position_losses(model, ids, **inputs):
    """(batch, position): the loss read at each position, 0 where there is none."""
    labels = inputs.pop("labels", ids)
    logits = model(input_ids=ids, use_cache=False, **inputs).logits
    targets = torch.cat((labels[:, 1:], labels.new_full((len(ids), 1), -100)), 1)
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(ids.shape)


def by_position(model, ids, **inputs):
    """Gradients of every loss position, one backward pass each: per layer (query, key, value, input), loss first."""
    model.get_input_embeddings().weight.requires_grad_(True)
    with dense(model) as oracle:
        losses = position_losses(model, ids, **inputs)
        tensors = [x for call, hidden in zip(oracle.calls, oracle.inputs, strict=True) for x in (*call, hidden)]
        rows = []
        for t in range(ids.shape[1]):
            grads = torch.autograd.grad(losses[:, t].sum(), tensors, retain_graph=True, allow_unused=True)
            rows.append([torch.zeros_like(x) if grad is None else grad for grad, x in zip(grads, tensors, strict=True)])
    columns = [torch.stack(column) for column in zip(*rows, strict=True)]
    return [columns[start : start + 4] for start in range(0, len(columns), 4)]


def close(actual, expected, rtol=1e-10):
    actual, expected = np.asarray(actual), np.asarray(expected)
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=rtol * np.abs(expected).max())


def own_of(grads):
    """The diagonal (loss at the position itself) of (loss, batch, head, position, dim)."""
    return torch.stack([grads[t, ..., t, :] for t in range(len(grads))], -2)


def remaining(grads, rate):
    """Sum over losses t of rate^(t-j) times the gradient of l_t at position j; nothing where t < j."""
    length = len(grads)
    lag = torch.arange(length)[:, None] - torch.arange(length)
    factor = torch.where(lag >= 0, torch.tensor(float(rate), dtype=torch.double) ** lag.clamp(min=0), 0.0)
    factor = factor.view(length, *(1,) * (grads.dim() - 3), length, 1)
    return (grads * factor).sum(0)
