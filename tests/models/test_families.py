"""Every causal language model type of transformers: none may be silently wrong.

docs/models.md says what each of them is; `make models` writes it, and here it is found again.
"""

import re
from pathlib import Path

import pytest
import torch
import transformers
from support.families import TYPES, build
from support.verification import TOLERANCE, double, nll, row, verify

import posterity
from posterity import InputError, check
from posterity.ops.blockwise import block_backward
from posterity.results import stats

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
ROWS = {
    line.split(" ")[1]: line for line in PAGE.splitlines() if re.match(r"\| \S+ \| (exact|ledger|refused|not)", line)
}

HYBRIDS = {  # the module that the probe must name; tests/models/test_state_horizon.py has those under a horizon
    "doge": "bias of the scores",
    "inkling2_text": "ShortConvolution",
    "minimax": "LightningAttention",
    "recurrent_gemma": "RecurrentBlock",
    "zaya": "Zaya|Conv",
}


def quick(names, *chosen):
    """The names as parameters, all but a few marked slow."""
    return [pytest.param(name, marks=[] if name in chosen else pytest.mark.slow) for name in names]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", quick(TYPES, "llama", "gpt2", "gemma3_text", "gpt_oss", "deepseek_v3", "falcon"))
def test_every_type_is_what_the_page_says(name):
    assert row(name, verify(name)) == ROWS[name]


def test_the_page_lists_every_type_of_the_installed_transformers():
    assert tuple(ROWS) == TYPES
    assert (
        f"{len(TYPES)} types, transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}" in PAGE
    )
    exact, ledger = (sum(f"| {kind} |" in line for line in ROWS.values()) for kind in ("exact", "ledger only"))
    hook, share = re.search(r"(\d+) of them attend through[^:]*:\n\d+ exact, \d+ ledger only \((\S+) %", PAGE).groups()
    assert f"{exact} exact, {ledger} ledger only" in PAGE
    assert float(share) == pytest.approx(100 * (exact + ledger) / int(hook), abs=0.05)
    assert float(share) >= 95


def test_a_wrong_gradient_makes_a_type_wrong(monkeypatch):
    def wrong_backward(*args, **kwargs):
        query, key, value = block_backward(*args, **kwargs)
        return [query, key * (1 + 10 * TOLERANCE), value]

    monkeypatch.setattr("posterity.ops.attention.block_backward", wrong_backward)
    verdict = verify("gemma2")
    assert verdict.kind == "wrong"
    assert "gradient of" in verdict.reason


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", quick(HYBRIDS, "minimax", "recurrent_gemma"))
def test_a_hybrid_that_no_horizon_covers_is_refused_for_who_pays_by_name_and_still_has_its_ledger(name):
    model, ids = build(name), torch.arange(1, 33)[None]
    answer = check(model)
    assert answer.ok, answer
    assert answer.other_paths
    assert any(part in answer.reason for part in HYBRIDS[name].split("|")), answer.reason
    with pytest.raises(InputError, match="carries information between them too"):
        posterity.measure(model, None, ids, context=32, losses=True, weights=False, progress=False)
    with pytest.raises(InputError, match="a horizon needs"), posterity.horizon(model, posterity.Myopic()):
        pass
    with pytest.raises(InputError, match="every path between positions"):
        posterity.inspect(model, None, ids[0], progress=False)
    result = posterity.measure(model, None, ids, context=32, weights=False, progress=False)
    assert float(stats.balance(result).max()) < 1e-4
    assert result.attrs["other_paths"]


@pytest.mark.parametrize("name", ["gemma3_text", "olmo2", "mixtral", "cohere", "opt"])
def test_a_model_of_attention_alone_has_no_other_paths(name):
    answer = check(build(name))
    assert answer.ok
    assert not answer.other_paths


@pytest.mark.parametrize("name", ["hrm_text", "diffllama"])
def test_layers_called_several_times_have_the_gradient_of_each_call_at_their_input(name):
    """hrm_text enters its layers several times in a pass; the attention modules of diffllama attend twice an entry."""
    model, ids = build(name, torch.float64), torch.arange(3, 19)[None]
    layers, inputs = dict.fromkeys(str(layer).partition(".self_attn")[0] for layer in check(model).layers), []

    def keep(module, args):
        if args[0].requires_grad:
            args[0].retain_grad()
        inputs.append(args[0])

    hooks = [model.get_submodule(layer).register_forward_pre_hook(keep) for layer in layers]
    with double():
        nll(model(input_ids=ids, use_cache=False).logits, ids).sum().backward()
        for hook in hooks:
            hook.remove()
        expected = torch.tensor([x.grad.square().sum() for x in inputs if x.requires_grad])
        result = posterity.measure(model, None, ids, context=16, losses=True, progress=False)
    own, later, inner = torch.tensor(result.hidden.sum("position").transpose("loss_term", "layer").values)
    total = own + later + 2 * inner
    if name == "diffllama":
        torch.testing.assert_close(total[::2], total[1::2])
        total = total[::2]
    else:
        assert len(set(map(str, result.module.values))) == len(expected) > len(layers)
    torch.testing.assert_close(total, expected, rtol=TOLERANCE, atol=0)
    borrowed = torch.zeros(result.sizes["layer"], 3, dtype=torch.bool)
    if name == "diffllama":  # the second call reads the queries and keys of the first
        borrowed[1::2, :2] = True
    weights = torch.tensor(result.weight_mean.values)
    assert torch.equal(weights.isnan().any(-1), borrowed)


def test_a_split_of_weights_over_shared_keys_is_that_of_single_documents():
    model, ids = build("gemma3n_text", torch.float64), torch.arange(3, 43).view(2, 20)
    with double():
        both = posterity.measure(model, None, ids, context=20, batch=2, progress=False)
        alone = posterity.measure(model, None, ids, context=20, batch=1, progress=False)
    both, single = (torch.tensor(x.weight_by_document.values) for x in (both, alone))
    torch.testing.assert_close(both, single, rtol=TOLERANCE, atol=0, equal_nan=True)
    assert both[:, -1, 1:].isnan().all()  # the last layer reads keys and values of an earlier one
    assert both[:, 0].isfinite().all()


def test_a_cut_at_the_hidden_state_is_refused_where_layers_share_keys():
    model, ids = build("gemma3n_text"), torch.arange(3, 19)[None]
    cut = posterity.horizon(model, posterity.Myopic(), cut="hidden")
    with pytest.raises(InputError, match="keys and values that another layer made"), cut:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["hrm_text", "deepseek_v32"])
def test_gradient_checkpointing_is_refused_where_it_would_mix_up_calls_or_masks(name):
    model, ids = build(name), torch.arange(3, 19)[None]
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(InputError, match="gradient_checkpointing_disable"), posterity.account(model):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["deepseek_v32", "minimax_m3_vl_text", "qwen4_exp_text"])
def test_padding_is_no_reader_where_the_model_chooses_keys(name):
    model, ids, mask = build(name), torch.arange(3, 23)[None], torch.ones(1, 20, dtype=torch.long)
    mask[:, -4:] = 0
    results = []
    for batch in ({"input_ids": ids, "attention_mask": mask}, {"input_ids": ids[:, :-4]}):
        with posterity.account(model, weights=False) as ledger:
            labels = ids[:, : batch["input_ids"].shape[1]].clone()
            labels[:, 16:] = -100
            model(**batch, labels=labels, use_cache=False).loss.backward()
        results.append(ledger.result())
    padded, short = results
    for result in results:  # what counting alone predicts does not ask which keys were chosen
        assert (result.edges.sum("reader_of").isel(lag=0) == 16).all()
        assert (result.edges.sum(("reader_of", "lag")) == 16 * 17 / 2).all()
    same = padded.attention.sum(("reader_of", "lag")), short.attention.sum(("reader_of", "lag"))
    torch.testing.assert_close(*(torch.tensor(x.values) for x in same), rtol=1e-5, atol=0)


def test_packed_documents_without_a_key_and_padding_on_the_left_are_refused():
    model, ids = build("minimax_m3_vl_text"), torch.arange(3, 23)[None]
    positions = torch.cat((torch.arange(9), torch.arange(11)))[None]
    with pytest.raises(InputError, match="packed documents are not measured"), posterity.account(model):
        model(input_ids=ids, position_ids=positions, use_cache=False)
    mask = torch.ones(1, 20, dtype=torch.long)
    mask[:, :4] = 0
    with pytest.raises(InputError, match="put the padding on the right"), posterity.account(model):
        model(input_ids=ids, attention_mask=mask, use_cache=False)


TOWERS = {
    "gemma3": "model.vision_tower",
    "got_ocr2": "model.vision_tower",
    "phi4_multimodal": "model.embed_tokens_extend.image_embed.img_processor",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", quick(TOWERS, "gemma3"))
def test_the_vision_tower_of_a_model_keeps_its_own_attention(name):
    model, ids = build(name), torch.arange(3, 19)[None]
    tower = model.get_submodule(TOWERS[name])
    size, patch = tower.config.image_size, tower.config.patch_size
    images = {"pixel_values": torch.randn(1, 3, size, size)}
    if name == "phi4_multimodal":
        images["patch_attention_mask"] = torch.ones(1, size // patch, size // patch, dtype=torch.bool)
    with torch.no_grad():
        hidden = tower(**images).last_hidden_state
    with posterity.account(model, weights=False) as ledger:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        assert model.config.get_text_config(decoder=True)._attn_implementation == "posterity"
        assert tower.config._attn_implementation == "eager"
        with torch.no_grad():
            assert torch.equal(tower(**images).last_hidden_state, hidden)
    assert not [layer for layer in ledger.result().module.values if str(layer).startswith(TOWERS[name])]
