"""The local myopia bonus, and probes of hidden states."""

import numpy as np
import pytest
import torch
from support.tiny import tiny, tokens
from support.trainings import equal_tensors

from posterity.training import myopia
from posterity.training.myopia import local_bonus, probe

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def test_a_local_model_that_has_not_been_trained_is_the_plain_one():
    model, ids = tiny("llama", torch.float32), tokens(6)
    result = local_bonus(model, (ids, ids), (ids, ids), steps=0, progress=False)
    assert result.bonus == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        right = torch.stack([model(input_ids=row[None], labels=row[None]).loss for row in ids]).mean()
    assert result.loss == pytest.approx(float(right), rel=1e-5)
    assert model.config._attn_implementation == "eager"


def test_a_local_model_learns_for_its_own_position_from_the_plain_model_s_past():
    plain, local, ids = tiny("llama"), tiny("llama"), tokens(2)
    with torch.no_grad():
        for x in local.parameters():
            x += 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(x.numel()), dtype=x.dtype)
    past = myopia._PastKeyValues()
    with myopia._attending_to(plain, past), myopia._attending_to(local, past):
        losses = myopia._local_losses(plain, local, past, ids, ids)
        for position in range(ids.shape[1] - 1):  # one position at a time: plain before it, local at it
            logits = last_logits(plain, local, ids[:, : position + 1])
            right = torch.nn.functional.cross_entropy(logits, ids[:, position + 1], reduction="none").double()
            torch.testing.assert_close(losses[:, position], right, rtol=1e-4, atol=1e-5)


def last_logits(plain, local, ids):
    """Logits of the last position by the local model, with a cache that the plain model has filled."""
    for model in (plain, local):
        model.set_attn_implementation("eager")
    cache = plain(input_ids=ids[:, :-1], use_cache=True).past_key_values if ids.shape[1] > 1 else None
    logits = local(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True).logits[:, -1]
    for model in (plain, local):
        model.set_attn_implementation(myopia._NAME)
    return logits


def test_training_the_local_model_gains_and_leaves_the_plain_one_as_it_is():
    model, ids = tiny("llama", torch.float32), tokens(64) % 3
    before = {name: x.clone() for name, x in model.named_parameters()}
    result = local_bonus(model, (ids, ids), (ids, ids), steps=20, rate=1e-2, progress=False)
    assert result.bonus > 0.1
    assert result.bonus == pytest.approx(result.loss - result.local_loss)
    assert equal_tensors(before, dict(model.named_parameters()))


def test_a_probe_reads_off_what_a_linear_map_can():
    torch.manual_seed(0)
    model = tiny("llama", torch.float32)
    fitted, judged = tokens(200, seed=1), tokens(50, seed=2)
    with torch.no_grad():
        embedded = [model.get_input_embeddings()(ids) for ids in (fitted, judged)]
        states = [model(input_ids=ids, output_hidden_states=True).hidden_states[2] for ids in (fitted, judged)]
    direction = torch.randn(embedded[0].shape[-1])
    linear = [x @ direction for x in embedded]
    scores = probe(model, (fitted, linear[0]), (judged, linear[1]), ridge=1e-8)
    assert scores[0] == pytest.approx(1, abs=1e-4)
    noise = [torch.randn(ids.shape) for ids in (fitted, judged)]
    assert max(abs(score) for score in probe(model, (fitted, noise[0]), (judged, noise[1]))) < 0.1
    x, other = ((torch.nn.functional.pad(state.flatten(0, 1), (0, 1), value=1)).double().numpy() for state in states)
    weight = np.linalg.lstsq(x, linear[0].flatten().double().numpy(), rcond=None)[0]
    y = linear[1].flatten().double().numpy()
    right = 1 - ((y - other @ weight) ** 2).sum() / ((y - y.mean()) ** 2).sum()
    assert scores[2] == pytest.approx(right, abs=1e-4)
