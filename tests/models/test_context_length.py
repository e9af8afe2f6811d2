"""Contexts beyond what a config says: measured where the model reads them, refused where a table of positions ends."""

import logging

import numpy as np
import pytest
import torch
from support.spy import spy_on
from support.tiny import summed_loss, tiny, tokens
from transformers import AutoConfig, AutoModelForCausalLM

import posterity
from posterity import InputError
from posterity.errors import warn_once
from posterity.models.context_length import check_context

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}
LONG |= {"short_factor": [1.0] * 3, "long_factor": [2.0] * 3}
ROTARY = {"plain": ("llama", {}), "windowed": ("mistral", {})}
ROTARY |= {
    name: ("llama", {"rope_parameters": rope}) for name, rope in (("yarn", YARN), ("dynamic", DYNAMIC), ("long", LONG))
}


@pytest.mark.parametrize("kind", ROTARY)
def test_a_rotary_model_is_measured_beyond_its_config_and_this_is_logged(kind, caplog):
    warn_once.cache_clear()
    name, changes = ROTARY[kind]
    ids = tokens(1, 100)
    with caplog.at_level(logging.WARNING, "posterity"):
        result = posterity.measure(tiny(name, **changes), None, ids, context=100, progress=False)
    assert "a context of 100 tokens is beyond the 64 of the model's config" in caplog.text
    assert result.attrs["context_of_config"] == 64
    model = tiny(name, **changes)
    with spy_on(model) as spy:
        loss = summed_loss(model, ids)
        loss.backward()
    np.testing.assert_allclose(result.loss, loss.item() / 99, rtol=1e-5)
    for layer, (query, key, value, *_) in enumerate(spy.calls):
        credit = result.credit.isel(layer=layer).sum(("reader_of", "lag"))
        by_head = query.grad.square().sum((0, 2, 3))
        np.testing.assert_allclose(credit.sel(stream="query"), by_head, rtol=1e-4)
        for stream, x in (("key", key), ("value", value)):
            np.testing.assert_allclose(credit.sel(stream=stream).sum(), x.grad.square().sum().item(), rtol=1e-4)


SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
TABLES = {
    "gpt2": {"n_positions": 64, "n_embd": 32, "n_layer": 1, "n_head": 4},
    "opt": SMALL | {"max_position_embeddings": 64, "ffn_dim": 32, "word_embed_proj_dim": 32},
    "bart": {"max_position_embeddings": 64, "d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 4},
    "whisper": {"max_target_positions": 64, "d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 4},
    "mpt": {"max_seq_len": 64, "d_model": 32, "n_layers": 1, "n_heads": 4},
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


@pytest.mark.parametrize("name", TABLES)
def test_a_context_ends_where_a_table_of_positions_does(name):
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(name, vocab_size=61, **TABLES[name], **SPECIAL)
    ).eval()
    check_context(model, 64)
    for context in (65, 200):
        with pytest.raises(InputError, match=rf"reads at most 64 tokens; got a context of {context} \(.+\): lower it"):
            check_context(model, context)
        with pytest.raises((IndexError, RuntimeError)), torch.no_grad():
            model(input_ids=torch.ones(1, context, dtype=torch.long))


def test_the_table_that_ends_is_named():
    with pytest.raises(InputError, match=r"got a context of 65 \(transformer.wpe ends after 64 entries\): lower it"):
        check_context(tiny("gpt2"), 65)


def test_a_table_with_rows_that_no_token_gets_ends_before_its_config_says():
    config = AutoConfig.for_model(
        "roberta", vocab_size=61, max_position_embeddings=64, is_decoder=True, intermediate_size=32, **SMALL
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    check_context(model, 60)
    with pytest.raises(InputError, match=r"reads fewer tokens than that; got a context of 64 \(index 64 is out of"):
        check_context(model, 64)


def test_no_pass_is_run_within_a_rotary_model_s_config_and_none_is_long_beyond_it():
    model, lengths = tiny("llama"), []
    model.register_forward_pre_hook(
        lambda _module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    check_context(model, 64)
    assert lengths == []
    check_context(model, 10**6)
    assert lengths == [2]
