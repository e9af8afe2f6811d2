"""Own and later losses, discounts and edge windows by dense autograd: one backward pass per loss, or per edge."""

import contextlib

import numpy as np
import torch
from support.reference import dense_attention
from support.spy import attending
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
        self.given, self.captured = {}, None

    def apart(self, module, key, value):
        """Key and value once more, without the gradient that the factor takes."""
        if not self.hidden:
            return key.detach(), value.detach()
        self.captured = []
        args, kwargs = tree_map(lambda x: x.detach() if isinstance(x, torch.Tensor) else x, self.given[module])
        module.forward(*args, **kwargs)
        found, self.captured = self.captured, None
        return found

    def attend(self, module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, **kwargs):
        if self.captured is not None:
            self.captured += [key, value]
            return value.new_zeros(len(query), query.shape[2], query.shape[1], value.shape[3]), None
        share, given = query.shape[1] // key.shape[1], (key, value)
        key, value = key.repeat_interleave(share, 1), value.repeat_interleave(share, 1)
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
        apart = [x.repeat_interleave(share, 1) for x in self.apart(module, *given)]

        def edges(x, other, weight):  # (batch, head, query, key, dim)
            weight = weight[..., None]
            return weight * x[:, :, None] + (1 - weight) * other[:, :, None]

        score = scaling * (query[:, :, :, None] * edges(key, apart[0], weights[0])).sum(-1)
        score = score if softcap is None else softcap * torch.tanh(score / softcap)
        score = score.masked_fill(~allowed, -torch.inf)
        if s_aux is not None:
            score = torch.cat([score, s_aux[None, :, None, None].expand(*score.shape[:3], 1)], -1)
        weight = torch.softmax(score, -1).nan_to_num()[..., : key.shape[2]]
        output = (weight[..., None] * edges(value, apart[1], weights[1])).sum(-2)
        return output.transpose(1, 2).contiguous(), None


@contextlib.contextmanager
def dense(model):
    one = Dense()
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: one.inputs.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        for layer in layers
    ]
    hooks += [
        module.register_forward_pre_hook(
            lambda module, args, kwargs: one.given.update({module: (args, kwargs)}), with_kwargs=True
        )
        for module in model.modules()
        if type(module).__name__.endswith("Attention")
    ]
    try:
        with attending(model, "dense", one.attend):
            yield one
    finally:
        for hook in hooks:
            hook.remove()


def position_losses(model, ids, **given):
    """(batch, position): the loss read at each position, 0 where there is none."""
    labels = given.pop("labels", ids)
    logits = model(input_ids=ids, use_cache=False, **given).logits
    targets = torch.cat((labels[:, 1:], labels.new_full((len(ids), 1), -100)), 1)
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(ids.shape)


def by_position(model, ids, **given):
    """Gradients of every loss position, one backward pass each: per layer (query, key, value, input), loss first."""
    model.get_input_embeddings().weight.requires_grad_(True)
    with dense(model) as spy:
        losses = position_losses(model, ids, **given)
        wanted = [x for call, hidden in zip(spy.calls, spy.inputs, strict=True) for x in (*call, hidden)]
        rows = []
        for t in range(ids.shape[1]):
            found = torch.autograd.grad(losses[:, t].sum(), wanted, retain_graph=True, allow_unused=True)
            rows.append([torch.zeros_like(x) if g is None else g for g, x in zip(found, wanted, strict=True)])
    columns = [torch.stack(column) for column in zip(*rows, strict=True)]
    return [columns[at : at + 4] for at in range(0, len(columns), 4)]


def close(mine, right, rtol=1e-10):
    mine, right = np.asarray(mine), np.asarray(right)
    np.testing.assert_allclose(mine, right, rtol=rtol, atol=rtol * np.abs(right).max())


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
