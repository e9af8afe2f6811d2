"""Half precision: what is stored is rounded once, what is added up is not; bounds as derived in docs/precision.md."""

import contextlib
import math

import pytest
import torch
from support.reference import by_lag
from support.tiny import summed_loss, tiny, tokens

import posterity
from posterity import Discount, InputError
from posterity.decomposition.bins import Bins
from posterity.decomposition.credit import pass_credit, self_edge_gradients
from posterity.models.attach import observe_model
from posterity.ops.attention import attention
from posterity.results import stats

HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "autocast": torch.bfloat16}
ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # unit roundoff: half a unit in the last place of 1
SMALLEST = {torch.bfloat16: 2.0**-134, torch.float16: 2.0**-25}  # half of the smallest number: what underflow takes
LENGTH = 48


def in_half(name, kind, **changes):
    model = tiny(name, torch.float32 if kind == "autocast" else HALVES[kind], **changes)
    casting = torch.autocast("cpu", torch.bfloat16) if kind == "autocast" else contextlib.nullcontext()
    return model, casting


def backwards(model, casting, ids):
    """Every layer's finished backward pass."""
    backs = []
    with observe_model(model, lambda layer, back, project: backs.append(back)), casting:
        summed_loss(model, ids).backward()
    return backs


def dense(back):
    """Credit of every edge (stream, batch, head, query, key), mass, weights, and each head's own gradients; in float64,
    from what is stored."""
    query, output, lse, grad = (x.double() for x in (back.query, back.output, back.lse, back.grad_output))
    key, value = back.repeat(back.key).double(), back.repeat(back.value).double()
    length = query.shape[2]
    score, slope = back.scale * (query @ key.mT), 1.0
    if back.softcap is not None:
        score = back.softcap * torch.tanh(score / back.softcap)
        slope = 1 - (score / back.softcap) ** 2
    position = torch.arange(length)
    allowed = position[None] <= position[:, None]
    if back.mask.allowed is not None:
        allowed = back.mask.allowed(position[:, None], position[None])
    weight = torch.exp(score - lse[..., None]).masked_fill(~allowed, 0)
    change = back.scale * slope * weight * (grad @ value.mT - (grad * output).sum(-1, keepdim=True))
    whole = [x.double() for x in back.total_gradients()]
    credit = torch.stack((change * (whole[0] @ key.mT), change * (query @ whole[1].mT), weight * (grad @ whole[2].mT)))
    return credit, (change @ key, change.mT @ query, weight.mT @ grad)


class Sizes:
    """What the sums of a backward pass add up, without its signs: the error of float32 is relative to that.

    An error of a score is one of the weight relative to 1, hence the factor with the size of score and log-sum-exp.
    """

    def __init__(self, back):
        query, key, value, grad, output = (
            x.double().abs()
            for x in (back.query, back.repeat(back.key), back.repeat(back.value), back.grad_output, back.output)
        )
        score = back.scale * (back.query.double() @ back.repeat(back.key).double().mT)
        score = score if back.softcap is None else back.softcap * torch.tanh(score / back.softcap)
        lse = back.lse.double()[..., None]
        weight = torch.exp(score - lse).tril() * (1 + back.scale * (query @ key.mT) + lse.abs())
        change = back.scale * weight * (grad @ value.mT + (grad * output).sum(-1, keepdim=True))
        whole = [x.double().abs() for x in back.total_gradients()]
        self.grads = change @ key, change.mT @ query, weight.mT @ grad
        sums = (change * (whole[0] @ key.mT), change * (query @ whole[1].mT), weight * (grad @ whole[2].mT))
        self.credit = torch.stack([x.sum((0, 2, 3)) for x in sums], -1)  # head, stream
        self.float32 = (LENGTH + 8 + max(query.shape[-1], value.shape[-1])) * 2.0**-24  # so many in a row, at most


def bound(back, exact, roundoff, smallest):
    """How far credit by lag and by position may be apart, (head, stream): each head's gradient was rounded once."""
    sizes = Sizes(back)
    lost = [
        (rounded_once(actual, size, sizes.float32, roundoff, smallest) * whole.double().abs()).sum((0, 2, 3))
        for actual, size, whole in zip(exact, sizes.grads, back.total_gradients(), strict=True)
    ]
    return torch.stack(lost, -1) + sizes.float32 * sizes.credit


def rounded_once(exact, size, float32, roundoff, smallest):
    """How far a stored number may be from the exact one."""
    return roundoff * exact.abs() + smallest + (1 + roundoff) * float32 * size


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gemma2", "gpt_oss", "deepseek_v3", "mistral"])
@pytest.mark.parametrize("kind", HALVES)
def test_accounts_in_half_precision_balance_within_the_rounding_of_the_gradients(name, kind):
    model, casting = in_half(name, kind)
    roundoff, smallest = ROUNDOFF[HALVES[kind]], SMALLEST[HALVES[kind]]
    backs = backwards(model, casting, tokens(1, LENGTH))
    assert len(backs) == model.config.num_hidden_layers
    for back in backs:
        assert back.query.dtype == back.grad_key.dtype == HALVES[kind]
        _, exact = dense(back)
        entry = pass_credit(back, self_edge_gradients(back), Bins.of("all", LENGTH))
        by_edge, by_place = entry.credit.sum((0, -2, -1)), entry.credit_by_position.sum((0, -1, -2))
        assert entry.credit.dtype == torch.float64
        allowed = bound(back, exact, roundoff, smallest)
        assert ((by_edge - by_place).abs() <= allowed).all()
        whole = by_place.sum(0)
        # autograd's own squared norm: the sum over shared heads is rounded once more
        groups = back.key.shape[1]
        share = back.query.shape[1] // groups
        for stream, repeated in enumerate((1, share, share)):
            squared = back.total_gradients()[stream].double().square().sum() / repeated
            assert abs(whole[stream] - squared) <= 1.05 * roundoff * squared


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("kind", HALVES)
def test_nothing_is_added_up_in_half_precision(name, kind):
    """Credit by lag is the dense float64 account of the stored numbers, to the rounding of float32."""
    model, casting = in_half(name, kind)
    for back in backwards(model, casting, tokens(1, LENGTH)):
        credit, exact = dense(back)
        entry = pass_credit(back, self_edge_gradients(back), Bins.of("all", LENGTH))
        expected = by_lag(credit).sum(1).movedim(0, 1)
        sizes, rounding = Sizes(back), (ROUNDOFF[HALVES[kind]], SMALLEST[HALVES[kind]])
        assert ((entry.credit[0].sum(-2) - expected).abs() <= sizes.float32 * sizes.credit[..., None]).all()
        grads = (back.grad_query, back.grad_key, back.grad_value)
        for actual, one, size in zip(grads, exact, sizes.grads, strict=True):
            assert ((actual.double() - one).abs() <= rounded_once(one, size, sizes.float32, *rounding)).all()


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_a_key_with_many_readers_is_rounded_once_however_many_blocks_there_are(kind):
    """Added up in half precision, a sum over 4096 readers would lose what each further block adds."""
    dtype, length = HALVES[kind], 4096
    query, key, value = (torch.randn(1, 1, length, 8) for _ in range(3))
    query[..., 0], key[..., 0], key[:, :, 0] = 4.0, -4.0, 0.0
    key[:, :, 0, 0] = 4.0  # a sink: all queries attend to the first key
    leaves = [x.to(dtype).requires_grad_() for x in (query, key, value)]
    seen = []
    attention(*leaves, observe=seen.append).backward((torch.rand(1, 1, length, 8) + 0.5).to(dtype))
    back = seen[0]
    weight = torch.exp(back.scale * (back.query.double() @ back.key[:, :, :1].double().mT).squeeze(-1) - back.lse)
    expected = (weight[..., None] * back.grad_output.double()).sum(2)
    assert weight.mean() > 0.5
    error = (leaves[2].grad[:, :, 0].double() - expected).abs()
    assert (error <= ROUNDOFF[dtype] * expected.abs() * (1 + 1e-3)).all()


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_factors_of_a_horizon_are_not_rounded_to_half_precision(kind):
    """0.999 is 1 in bfloat16."""
    dtype, length = HALVES[kind], 256
    query, key, value = ((torch.randn(1, 1, length, 8) / 4).to(dtype).requires_grad_() for _ in range(3))
    grad = (torch.rand(1, 1, length, 8) + 0.5).to(dtype)
    seen = []
    horizon = lambda: (Discount(0.999), Discount(0.999))  # noqa: E731
    attention(query, key, value, horizon=horizon, observe=seen.append).backward(grad)
    back, position = seen[0], torch.arange(length)
    assert back.value_factor.dtype == torch.float32
    score = back.scale * (back.query.double() @ back.key.double().mT) - back.lse.double()[..., None]
    factor = 0.999 ** (position[:, None] - position[None]).clamp(min=0).double()
    expected = (torch.exp(score).tril() * factor).mT @ grad.double()
    error = (value.grad.double() - expected).abs()
    assert (error <= ROUNDOFF[dtype] * expected * (1 + 1e-2)).all()


@pytest.mark.parametrize("kind", HALVES)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_shares_in_half_precision_are_near_those_of_float32(name, kind):
    """No law: forward passes differ. Rounding is a part u of every number; a tenth is twenty-five of them."""
    options = {"context": LENGTH, "losses": True, "horizons": (4,), "progress": False}
    exact = tiny(name, torch.float32)
    with torch.no_grad():  # the same weights in all precisions
        exact.load_state_dict({n: x.to(HALVES[kind]).float() for n, x in exact.state_dict().items()})
    expected = posterity.measure(exact, None, tokens(2, LENGTH), **options)
    model, casting = in_half(name, kind)
    model.load_state_dict(exact.state_dict())
    with casting:
        result = posterity.measure(model, None, tokens(2, LENGTH), **options)
    for shares in (
        lambda result: stats.shares(result).share,
        lambda result: stats.loss_shares(result).share,
        lambda result: stats.weight_shares(result).share,
    ):
        one, other = shares(result), shares(expected)
        assert math.isfinite(float(one.sum()))
        assert float(abs(one - other).max()) < 0.1
    balance = float(stats.balance(result).max())
    assert balance < 8 * ROUNDOFF[HALVES[kind]]


def test_what_float16_cannot_hold_is_refused_by_name():
    model = tiny("llama", torch.float16)

    def enlarge(module, args, output):
        if output.requires_grad:
            output.register_hook(lambda grad: grad * 6e4)

    model.model.layers[1].mlp.register_forward_hook(enlarge)
    with pytest.raises(InputError, match=r"gradient of layer .* is not finite in window .*: check the model, or use"):
        posterity.measure(model, None, tokens(1, LENGTH), context=LENGTH, progress=False)
