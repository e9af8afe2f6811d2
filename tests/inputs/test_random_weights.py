"""A model of the same config with random weights, to set beside a trained one."""

import torch
from support.tiny import tiny

from posterity.inputs.model import LoadedModel


def test_random_weights_have_the_config_and_nothing_else():
    loaded = LoadedModel(tiny("llama", torch.float32), "its tokenizer", "a/model", "main")
    state = torch.random.get_rng_state()
    first, second, other = (loaded.with_random_weights(seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (first.name, first.tokenizer) == ("a/model, random weights", "its tokenizer")
    assert first.model.dtype == torch.float32
    assert not first.model.training
    for name, weight in loaded.model.named_parameters():
        ours, again, others = (x.model.get_parameter(name) for x in (first, second, other))
        assert ours.shape == weight.shape
        assert torch.equal(ours, again)
        if weight.dim() > 1:
            assert not torch.equal(ours, weight)
            assert not torch.equal(ours, others)
    assert LoadedModel(loaded.model, None, "", "").with_random_weights().attrs == {}
