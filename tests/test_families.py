"""Hybrids: what carries information between positions outside attention is found by measurement, in every one."""

import pytest
import torch
from families import build

import posterity
from posterity import InputError, check, derived

HYBRIDS = {  # the module that the probe must name
    "bailing_hybrid": "DeltaAttention",
    "bamba": "BambaMixer",
    "falcon_h1": "FalconH1Mixer",
    "granitemoehybrid": "MambaLayer",
    "jamba": "JambaMambaMixer",
    "kimi_linear": "DeltaAttention",
    "lfm2": "ShortConv",
    "lfm2_moe": "ShortConv",
    "lfm3": "ShortConv",
    "minimax": "LightningAttention",
    "nemotron_h": "Mamba2Mixer",
    "olmo_hybrid": "GatedDeltaNet",
    "qwen3_5_moe_text": "GatedDeltaNet",
    "qwen3_5_text": "GatedDeltaNet",
    "qwen3_next": "GatedDeltaNet",
    "recurrent_gemma": "RecurrentBlock",
    "zamba": "MambaMixer",
    "zamba2": "Mamba2Mixer|MambaMixer",
    "zaya": "Zaya|Conv",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", HYBRIDS)
def test_a_hybrid_is_refused_for_who_pays_by_name_and_still_has_its_ledger(name):
    model, ids = build(name), torch.arange(1, 33)[None]
    found = check(model)
    assert found.ok, found
    assert found.other_paths
    assert any(part in found.reason for part in HYBRIDS[name].split("|")), found.reason
    with pytest.raises(InputError, match="carries information between them too"):
        posterity.measure(model, None, ids, context=32, losses=True, weights=False, progress=False)
    with pytest.raises(InputError, match="a horizon needs"), posterity.horizon(model, posterity.Myopic()):
        pass
    with pytest.raises(InputError, match="every path between positions"):
        posterity.inspect(model, None, ids[0], progress=False)
    result = posterity.measure(model, None, ids, context=32, weights=False, progress=False)
    assert float(derived.balance(result).max()) < 1e-4
    assert result.attrs["other_paths"]


@pytest.mark.parametrize("name", ["gemma3_text", "olmo2", "mixtral", "cohere", "opt"])
def test_a_model_of_attention_alone_has_no_other_paths(name):
    found = check(build(name))
    assert found.ok
    assert not found.leaks
