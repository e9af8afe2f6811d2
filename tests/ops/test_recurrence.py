"""Recurrences and convolutions under a discount, against a plain loop and one backward pass per output position."""

import pytest
import torch
from torch.autograd import grad

from posterity.ops import recurrence
from posterity.ops.recurrence import discounted_convolution, discounted_recurrence

RATES = [0.0, 0.3, 0.9, 1.0]
LENGTH = 7


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def looped_recurrence(query, key, value, log_decay, beta):
    """The recurrence of one position after the other."""
    state, outputs = torch.zeros(*key.shape[0::2], key.shape[3], value.shape[3], dtype=key.dtype), []
    for t in range(key.shape[1]):
        state = state * log_decay[:, t, :, :, None].exp()
        written = value[:, t]
        if beta is not None:
            written = beta[:, t, :, None] * (written - torch.einsum("bhkv,bhk->bhv", state, key[:, t]))
        state = state + torch.einsum("bhk,bhv->bhkv", key[:, t], written)
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, query[:, t]))
    return torch.stack(outputs, 1)


def discounted(output, weights, inputs, rate, dim):
    """Sum over positions t of rate^(t-j) times the gradient of the output at t, at every position j of the inputs."""
    totals = [torch.zeros_like(x) for x in inputs]
    for t in range(LENGTH):
        loss = (output * weights).select(dim, t).sum()
        for total, x in zip(totals, grad(loss, inputs, retain_graph=True), strict=True):
            factors = torch.tensor([rate ** (t - j) if j <= t else 0.0 for j in range(LENGTH)], dtype=x.dtype)
            total += x * factors.view(-1, *(1,) * (x.dim() - 1 - dim % x.dim()))
    return totals


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("positions_in_block", [1, 3, LENGTH])
@pytest.mark.parametrize("delta", [True, False])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_discounted_recurrence_has_the_gradients_of_single_positions_times_the_rates(
    monkeypatch, rate, positions_in_block, delta, channels
):
    monkeypatch.setattr(recurrence, "_BLOCK", positions_in_block * 2 * 2 * 3 * 4)
    query, key = random(2, LENGTH, 2, 3), random(2, LENGTH, 2, 3)
    value, log_decay = random(2, LENGTH, 2, 4), (-random(2, LENGTH, 2, channels).detach().abs()).requires_grad_()
    beta = random(2, LENGTH, 2).detach().sigmoid().requires_grad_() if delta else None
    inputs = [query, key, value, log_decay] + [beta] * delta
    expected, output = (
        looped_recurrence(query, key, value, log_decay, beta),
        discounted_recurrence(rate, *inputs, *[None] * (not delta)),
    )
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(output)
    actual = grad((output * weights).sum(), inputs)
    torch.testing.assert_close(actual, tuple(discounted(expected, weights, inputs, rate, 1)), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("bias", [True, False])
def test_a_discounted_convolution_has_the_gradients_of_single_positions_times_the_rates(rate, bias):
    x, weight, bias = random(2, 5, LENGTH), random(5, 3), random(5) if bias else None
    expected = torch.nn.functional.conv1d(x, weight[:, None], bias, padding=2, groups=5)[..., :LENGTH]
    output = discounted_convolution(rate, x, weight, bias)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(output)
    actual = grad((output * weights).sum(), [x, weight], retain_graph=True)
    torch.testing.assert_close(actual[0], discounted(expected, weights, [x], rate, -1)[0], rtol=1e-11, atol=1e-11)
    # The weights act at the position that reads: the discount of what they read takes nothing from them.
    torch.testing.assert_close(actual[1], grad((expected * weights).sum(), weight)[0], rtol=1e-11, atol=1e-11)
