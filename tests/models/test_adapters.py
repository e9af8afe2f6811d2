"""The split of the weights of adapted models, against the merged model and the adapters' own gradients in autograd."""

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from support.adapted import PEFT_WARNING, TARGETS, adapt, adapter_parameters, configs, randomise, squared_norm
from support.loss_oracles import exact
from support.pages import tables
from support.reference import dense_attention
from support.spy import spy_on, use_attention
from support.tiny import summed_loss, tokens

import posterity
from posterity import stats
from posterity.errors import InputError
from posterity.results.formatting import percent
from posterity.results.steps import join_steps

pytestmark = pytest.mark.filterwarnings(PEFT_WARNING)
ROWS = {  # the rows of the merged matrices that make query, key and value
    "llama": [{f"{n}.weight": slice(None)} for n in ("q_proj", "k_proj", "v_proj")],
    "gpt2": [{f"c_attn.{n}": (..., slice(24 * s, 24 * s + 24)) for n in ("weight", "bias")} for s in range(3)],
    "phi3": [{"qkv_proj.weight": rows} for rows in (slice(0, 24), slice(24, 36), slice(36, 48))],
}
KINDS = [(name, kind) for name in TARGETS for kind in configs("llama") if (name, kind) != ("gpt2", "vera")]
QUICK = {("llama", "lora"), ("phi3", "dora"), ("gpt2", "lora"), ("deepseek_v3", "ia3"), ("llama", "ia3")}
CASES = [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in KINDS]


def measure(model, ids, **options):
    return posterity.measure(model, None, ids, context=ids.shape[1], progress=False, **options)


def gradients(model, row):
    """Autograd's own gradients of all parameters, by name."""
    model.requires_grad_(True)
    model.zero_grad()
    with spy_on(model):
        summed_loss(model, row[None]).backward()
    return {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}


@pytest.mark.parametrize(("name", "kind"), [case for case in CASES if case.values[0] in ROWS])
def test_the_weights_of_an_adapted_projection_are_those_of_the_merged_model(name, kind):
    model, ids = adapt(name, configs(name)[kind]), tokens(2)
    result = measure(model, ids)
    merged = copy.deepcopy(model).merge_and_unload()
    by_document = [gradients(merged, row) for row in ids]
    for layer, module in enumerate(result.module.values):
        for stream, rows in enumerate(ROWS[name]):
            parts = [torch.cat([g[f"{module}.{n}"][i].flatten() for n, i in rows.items()]) for g in by_document]
            terms = result.isel(layer=layer, stream=stream)
            expected = [part.square().sum().item() for part in parts]
            np.testing.assert_allclose(squared_norm(terms.weight_by_document), expected, rtol=1e-10)
            expected = torch.stack(parts).mean(0).square().sum().item()
            np.testing.assert_allclose(squared_norm(terms.weight_mean), expected, rtol=1e-10)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_two_parts_of_an_adapters_gradient_add_up_to_autograds_own(name, kind):
    model, ids = adapt(name, configs(name)[kind]), tokens(3)
    result = measure(model, ids, batch=2)
    assert list(result.adapter.values) == list(adapter_parameters(model))
    by_document = [gradients(model.get_base_model(), row) for row in ids]
    for adapter in result.adapter.values:
        terms, parts = result.sel(adapter=adapter), [g[adapter] for g in by_document]
        expected = [part.square().sum().item() for part in parts]
        np.testing.assert_allclose(squared_norm(terms.adapter_by_document), expected, rtol=1e-10)
        expected = torch.stack(parts).mean(0).square().sum().item()
        np.testing.assert_allclose(squared_norm(terms.adapter_mean), expected, rtol=1e-10)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_self_part_of_an_adapters_gradient_is_the_gradient_with_all_other_edges_cut(kind):
    model, ids = adapt("phi3", configs("phi3")[kind]), tokens(1)
    result = measure(model, ids)
    inner = model.get_base_model()
    last = inner.model.layers[-1].self_attn

    def keep_self(module, query, key, value, attention_mask, scaling, **_):
        eye = torch.eye(query.shape[2], dtype=torch.bool)
        if module is last:
            shares = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(shares, 1), value.repeat_interleave(shares, 1)
            score = (query @ key.mT) * scaling
            score = torch.where(eye, score, score.detach())
            weight = torch.softmax(score.masked_fill(~torch.ones_like(eye).tril(), -torch.inf), -1)
            own = torch.where(eye, weight.detach(), 0)
            output = weight @ value.detach() + own @ value - (own @ value).detach()
        else:
            output, _, _ = dense_attention(query, key, value, scaling, torch.ones_like(eye).tril())
        return output.transpose(1, 2), None

    inner.requires_grad_(True)
    inner.zero_grad()
    with use_attention(inner, "keep_self", keep_self):
        summed_loss(inner, ids).backward()
    for name, parameter in adapter_parameters(model).items():
        if "layers.2." in name:
            actual = result.adapter_by_document.sel(adapter=name, term="self").item()
            assert actual == pytest.approx(parameter.grad.square().sum().item(), rel=1e-10), name
    np.testing.assert_allclose(result.adapter_mean, result.adapter_by_document[0], rtol=1e-12)


@pytest.mark.parametrize("kind", ["dora", *(pytest.param(x, marks=pytest.mark.slow) for x in ("lora", "ia3", "vera"))])
def test_credit_losses_and_horizons_of_an_adapted_model_are_those_of_the_merged_one(kind):
    options = {"losses": True, "horizons": (1, 4), "lags": "all"}
    model, ids = adapt("llama", configs("llama")[kind], num_hidden_layers=2), tokens(2)
    result = measure(model, ids, **options)
    merged = measure(copy.deepcopy(model).merge_and_unload(), ids, **options)
    for name in merged.data_vars:
        scale = float(abs(merged[name]).max())
        np.testing.assert_allclose(result[name], merged[name], rtol=1e-9, atol=1e-11 * scale, err_msg=name)


def test_of_several_adapters_the_active_ones_count_and_the_weights_are_those_of_both_merged():
    config = configs("llama")["lora"]
    model = adapt("llama", config)
    model.add_adapter("second", LoraConfig(r=3, target_modules=["q_proj", "k_proj"], init_lora_weights=False))
    model.add_adapter("idle", LoraConfig(r=1, target_modules=["q_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    randomise(model.double())
    ids = tokens(1)
    result = measure(model, ids)
    expected = gradients(model.get_base_model(), ids[0])
    active = [name for name in adapter_parameters(model) if "idle" not in name]
    assert list(result.adapter.values) == active
    for name in active:
        actual = squared_norm(result.adapter_by_document.sel(adapter=name)).item()
        assert actual == pytest.approx(expected[name].square().sum().item(), rel=1e-10)
    merged = measure(copy.deepcopy(model).merge_and_unload(), ids)
    assert "adapter" not in merged.dims
    np.testing.assert_allclose(result.weight_mean, merged.weight_mean, rtol=1e-10)


def test_merged_and_switched_off_adapters_have_no_gradient_and_other_modules_do_not_count():
    ids = tokens(1)
    model = adapt("llama", LoraConfig(r=2, target_modules=["q_proj", "o_proj", "up_proj"], init_lora_weights=False))
    result = measure(model, ids)
    assert {name.split(".")[4] for name in result.adapter.values} == {"q_proj"}
    model.merge_adapter()
    merged = measure(model, ids)
    assert "adapter" not in merged.dims
    np.testing.assert_allclose(result.weight_mean, merged.weight_mean, rtol=1e-9)
    model.unmerge_adapter()
    with model.disable_adapter():
        plain = measure(model, ids)
    assert "adapter" not in plain.dims
    np.testing.assert_allclose(plain.weight_mean, measure(exact("llama"), ids).weight_mean, rtol=1e-9)


def test_within_a_training_the_ledger_has_the_gradients_that_the_optimiser_gets():
    model, ids = adapt("llama", configs("llama")["lora"], attention_dropout=0.0), tokens(3)
    assert not any(x.requires_grad for name, x in model.named_parameters() if "lora_" not in name)
    model.train()
    model.enable_input_require_grads()
    sums = {}
    with posterity.account(model) as ledger:
        for row in ids:
            model.zero_grad()
            summed_loss(model, row[None]).backward()
            for name, x in adapter_parameters(model).items():
                sums.setdefault(name, []).append(x.grad.square().sum().item())
    result = ledger.result()
    for name, expected in sums.items():
        np.testing.assert_allclose(squared_norm(result.adapter_by_document.sel(adapter=name)), expected, rtol=1e-10)
    frozen = measure(model.eval(), ids)
    np.testing.assert_allclose(result.adapter_mean, frozen.adapter_mean, rtol=1e-10)


def test_an_adapter_that_is_switched_on_later_has_no_gradient_in_the_documents_before():
    model, ids = adapt("llama", configs("llama")["lora"]), tokens(3)
    inner = model.get_base_model()
    with posterity.account(model) as ledger:
        for number, row in enumerate(ids):
            inner.requires_grad_(True)
            if number == 1:
                summed_loss(model, row[None]).backward()
            else:
                with model.disable_adapter():
                    inner.requires_grad_(True)
                    summed_loss(model, row[None]).backward()
    result = ledger.result()
    whole = squared_norm(result.adapter_by_document)
    assert (whole.isel(document=[0, 2]) == 0).all()
    assert (whole.isel(document=1) > 0).all()
    np.testing.assert_allclose(squared_norm(result.adapter_mean), whole.isel(document=1) / 9, rtol=1e-10)


def test_dropout_inside_an_adapter_is_refused_with_the_split_and_measured_without():
    model = adapt("llama", LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5, init_lora_weights=False))
    model.train()
    model.enable_input_require_grads()
    with posterity.account(model), pytest.raises(InputError, match="weights=False"):
        summed_loss(model, tokens(1)).backward()
    with posterity.account(model, weights=False) as ledger:
        summed_loss(model, tokens(1)).backward()
    assert float(ledger.result().credit.sum()) > 0


def test_a_layer_below_which_all_is_frozen_is_named_with_the_remedy():
    model = adapt("llama", LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[1], init_lora_weights=False))
    ids = tokens(1)
    with posterity.account(model) as ledger:
        summed_loss(model, ids).backward()
    with pytest.raises(InputError, match=r"layers.0.self_attn has seen 0 of 1 .* model.enable_input_require_grads\(\)"):
        ledger.result()
    model.enable_input_require_grads()
    with posterity.account(model) as ledger:
        summed_loss(model, ids).backward()
    np.testing.assert_allclose(ledger.result().credit, measure(model, ids).credit, rtol=1e-9)


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_check_measure_and_account_refuse_a_learned_prompt_alike(kind):
    model = get_peft_model(exact("llama").float(), kind(num_virtual_tokens=3, task_type="CAUSAL_LM")).eval()
    reason = "puts a learned prompt in front of every text"
    found = posterity.check(model)
    assert not found.ok
    assert reason in found.reason
    with pytest.raises(InputError, match=reason):
        measure(model, tokens(1))
    with pytest.raises(InputError, match=reason), posterity.account(model):
        pass


def test_shares_of_adapters_follow_from_their_terms_and_go_with_the_result_into_files_states_and_steps(
    tmp_path, capsys
):
    model, ids = adapt("llama", configs("llama")["lora"]), tokens(3)
    result = measure(model, ids, state=tmp_path / "state")
    shares = stats.adapter_shares(result, ("adapter",))
    terms = result.adapter_by_document.sum("document")
    own = terms.sel(term="self") + terms.sel(term="inner")
    np.testing.assert_allclose(shares.share, own / squared_norm(terms), rtol=1e-12)
    pooled = float(own.sum() / squared_norm(terms).sum())
    assert float(stats.adapter_shares(result).share) == pytest.approx(pooled, rel=1e-12)
    assert np.isfinite(shares.error).all()
    with pytest.raises(InputError, match="by expects"):
        stats.adapter_shares(result, ("layer",))
    posterity.save(result, tmp_path / "a.nc")
    assert posterity.load(tmp_path / "a.nc").identical(result)
    again = measure(model, ids, state=tmp_path / "state")
    assert again.drop_attrs().identical(result.drop_attrs())
    joined = join_steps({1: result, 2: again})
    assert joined.adapter_mean.dims == ("step", "adapter", "term")
    posterity.summary(joined)
    assert "Gradient of the adapters at queries, keys and values (12 parameters" in capsys.readouterr().out
    rows = {row[0]: row[1:] for row in tables(posterity.report(result).html)["Gradient of the adapters"]}
    name = "model.layers.0.self_attn.q_proj.lora_A.default.weight"
    assert rows[name][0] == percent(
        *(float(shares[x].sel(adapter=name)) for x in ("share", "error")), windows=result.sizes["document"]
    )
    plain = measure(exact("llama"), ids)
    with pytest.raises(InputError, match="a model with adapters"):
        stats.adapter_shares(plain)
