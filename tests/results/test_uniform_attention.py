"""Uniform attention through all layers, against autograd on a network that has nothing else."""

import numpy as np
import pytest
import torch
from support.tiny import tiny, tokens

import posterity
from posterity.results.uniform_attention import uniform_credit

LENGTH, LAYERS = 7, 3


def test_expected_credit_is_that_of_a_network_of_means():
    """Losses are of one position each, so that independent gradients add up squared."""
    mean = torch.tril(torch.ones(LENGTH, LENGTH, dtype=torch.double))
    mean = mean / mean.sum(1, keepdim=True)
    values, outputs, stream = [], [], torch.randn(LENGTH, dtype=torch.double)
    for _ in range(LAYERS):
        value = stream.clone().requires_grad_()
        output = mean @ value
        output.retain_grad()
        stream = stream / 2 + output / 2
        values.append(value)
        outputs.append(output)
    expected = uniform_credit(LAYERS, LENGTH)
    by_value, energy = np.zeros((LAYERS, LENGTH)), np.zeros((LAYERS, LENGTH))
    for position in range(LENGTH):
        grads = torch.autograd.grad(stream[position], [*values, *outputs], retain_graph=True, allow_unused=True)
        for layer in range(LAYERS):
            by_value[layer] += grads[layer].numpy() ** 2
            energy[layer] += grads[LAYERS + layer].numpy() ** 2
    by_value, energy = by_value * 4, energy * 4  # the half with which an output enters the stream
    np.testing.assert_allclose(expected[:, 2], by_value, rtol=1e-12)
    for layer in range(LAYERS):
        query, key = sampled_credit(np.sqrt(energy[layer]))
        np.testing.assert_allclose(expected[layer, 0], query, rtol=0.05, atol=1e-12)
        np.testing.assert_allclose(expected[layer, 1], key, rtol=0.05)


def sampled_credit(sizes, samples=4000, width=16):
    """Return mean squared gradients of queries and keys of attention with scores of about zero, over random tensors."""
    generator = torch.Generator().manual_seed(0)
    query, key, value, grad = torch.randn(4, samples, LENGTH, width, generator=generator, dtype=torch.double)
    query, key = query.requires_grad_(), key.requires_grad_()
    scale, future = 1e-6, torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    output = (scale * query @ key.mT).masked_fill(future, -torch.inf).softmax(-1) @ value
    (output * grad * torch.from_numpy(sizes)[:, None]).sum().backward()
    return [((x.grad / scale) ** 2).sum(-1).mean(0).numpy() / width**2 for x in (query, key)]


def test_shares_are_those_of_a_plain_causal_mask_alone():
    result = posterity.measure(tiny("llama"), None, tokens(2), context=12, progress=False)
    share = posterity.stats.uniform_attention(result)
    assert share.dims == ("stream", "position")
    np.testing.assert_allclose(share.sum("position"), 1)
    assert (share.sel(stream="value").diff("position") < 0).all()  # earlier values have more readers, in every layer
    window = posterity.measure(tiny("mistral"), None, tokens(2), context=12, progress=False)
    assert posterity.stats.uniform_attention(window) is None


def test_random_weights_come_closer_to_it_than_counting_the_edges_of_one_layer():
    torch.manual_seed(0)
    model = tiny("llama", num_hidden_layers=3)
    result = posterity.measure(model, None, tokens(8), context=12, progress=False)
    measured = result.credit_by_position.sel(stream="value").sum(["layer", "head", "side"])
    measured = measured / measured.sum()
    uniform = posterity.stats.uniform_attention(result).sel(stream="value")
    counted = np.arange(12, 0, -1) / 78
    assert abs(measured - uniform).sum() < abs(measured - counted).sum()


@pytest.mark.parametrize("layers", [1, 4])
def test_the_top_layer_has_no_layer_above(layers):
    top = uniform_credit(layers, 5)[-1]
    mean = np.tril(np.ones((5, 5))) / np.arange(1, 6)[:, None]
    np.testing.assert_allclose(top[2], (mean**2).sum(0))
    np.testing.assert_allclose(top[0], [0, 1 / 4, 2 / 9, 3 / 16, 4 / 25])
