"""Inside the `with` the model computes what it always did, and every layer is measured; outside nothing has changed."""

import copy
import re

import pytest
import torch
import xarray as xr
from support.batches import INPUTS, padded
from support.tiny import CONFIGS, summed_loss, tiny, tokens
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

import posterity
from posterity.errors import InputError
from posterity.models.attach import observe_model
from posterity.models.interception import interceptions
from posterity.models.probe import check


def ignore(layer, back, project):
    pass


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("inputs", INPUTS)
def test_loss_and_every_parameter_gradient_are_those_of_the_eager_model(name, inputs):
    # Eager attention makes an empty row of a float64 model NaN: to its float32 softmax, the smallest float64 is -inf.
    model, ids = tiny(name, torch.float32 if inputs == "left padding" else torch.float64), tokens()
    if inputs == "left padding":  # the last padding row predicts the first real token
        mask, labels = padded(ids, "left")
        labels[1, 4] = -100
        batch = {"attention_mask": mask, "labels": labels}
    else:
        batch = INPUTS[inputs](ids)
    passes = {}
    for inside in (False, True):
        model.zero_grad()
        with observe_model(model, ignore) if inside else torch.enable_grad():
            loss = model(input_ids=ids, use_cache=False, **batch).loss
            loss.backward()
        passes[inside] = [loss.detach(), *(x.grad.clone() for x in model.parameters() if x.grad is not None)]
    assert len(passes[True]) > 10
    largest = max(grad.abs().max() for grad in passes[False])
    for ours, eager in zip(passes[True], passes[False], strict=True):
        # transformers computes norms and softmax in float32 even in a float64 model
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-6 * largest)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_attention_layer_is_found_in_order(name):
    answer = check(tiny(name))
    assert answer.ok
    assert not answer.other_paths
    count = CONFIGS[name].get("num_hidden_layers", 3)
    assert [str(layer).split(".")[2] for layer in answer.layers] == [str(index) for index in range(count)]


def test_the_model_is_restored_even_after_an_error():
    model = tiny("gemma2").train()
    model.model.layers[1].eval()
    before = copy.deepcopy([module.training for module in model.modules()])
    logits = model(input_ids=tokens()).logits

    def fail():
        with observe_model(model, ignore):
            assert model.config._attn_implementation == "posterity"
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        fail()
    assert model.config._attn_implementation == "eager"
    assert [module.training for module in model.modules()] == before
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(input_ids=tokens()).logits, logits)


def test_a_second_model_of_the_same_config_is_not_measured():
    config = AutoConfig.for_model("llama", **CONFIGS["llama"])
    model, other = (AutoModelForCausalLM.from_config(config, attn_implementation="eager") for _ in range(2))
    own = other(input_ids=tokens()).logits
    layers = []
    with observe_model(model, lambda layer, back, project: layers.append(layer)):
        ours = other(input_ids=tokens(), labels=tokens())
        ours.loss.backward()
    torch.testing.assert_close(ours.logits, own)
    assert not layers


def test_attention_dropout_in_training_is_refused_with_the_setting():
    model = tiny("gpt2").train()
    with pytest.raises(InputError, match="attn_pdrop"), observe_model(model, ignore):
        model(input_ids=tokens())


def test_models_that_cannot_be_measured_are_refused_with_the_reason():
    small = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "n_positions": 64}
    falcon = AutoModelForCausalLM.from_config(AutoConfig.for_model("falcon", **small))
    assert "does not let its attention be exchanged" in check(falcon).reason
    t5 = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", vocab_size=61, d_model=24, d_ff=40, num_layers=1))
    assert "encoder-decoder" in check(t5).reason
    bert = AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", **small, intermediate_size=40))
    assert "later token changes earlier logits" in check(bert).reason
    headless = tiny("llama").model
    assert "no language-model head" in check(headless).reason
    assert "got Linear" in check(torch.nn.Linear(2, 2)).reason
    for model in (falcon, t5, bert, headless):
        assert not check(model).ok
        with pytest.raises(InputError, match=re.escape(check(model).reason)), observe_model(model, ignore):
            pass


def test_a_layer_that_computes_something_else_is_found_out():
    model = tiny("llama")
    own = type(model.model.layers[1].self_attn).forward

    def forward(self, *args, **kwargs):
        self.scaling = 3.0 if self.config._attn_implementation.startswith("posterity") else self.head_dim**-0.5
        return own(self, *args, **kwargs)

    model.model.layers[1].self_attn.forward = forward.__get__(model.model.layers[1].self_attn)
    assert "does something the operator does not know" in check(model).reason


def test_other_paths_between_positions_are_reported():
    model = tiny("llama")
    shift = torch.nn.Module()
    shift.forward = lambda x: x + 0.1 * torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]
    inner = model.model.layers[1].mlp
    model.model.layers[1].mlp = torch.nn.Sequential(shift, inner)
    answer = check(model)
    assert answer.ok
    assert answer.other_paths
    assert "through Module (model.layers.1.mlp.0)" in str(answer)


def test_accounts_nest_and_each_counts_what_is_inside_its_with():
    model = tiny("llama")
    with posterity.account(model) as outer:
        summed_loss(model, tokens(1)).backward()
        with posterity.account(model) as inner:
            summed_loss(model, tokens(2)).backward()
        summed_loss(model, tokens(1)).backward()
    assert (outer.documents, inner.documents) == (4, 2)
    with posterity.account(model) as separate:
        summed_loss(model, tokens(2)).backward()
    xr.testing.assert_equal(inner.result().credit, separate.result().credit)
    assert not any(interceptions.values())


def test_a_user_made_mask_of_four_dimensions_is_honoured():
    model, ids = tiny("llama", implementation="sdpa"), tokens()
    allowed = torch.ones(12, 12, dtype=torch.bool).tril()
    allowed[5:, 2] = False
    for mask in (
        allowed[None, None],
        torch.zeros(1, 1, 12, 12).double().masked_fill(~allowed, torch.finfo(torch.double).min),
    ):
        own = model(input_ids=ids, attention_mask=mask.expand(2, 1, 12, 12)).logits
        with observe_model(model, ignore):
            ours = model(input_ids=ids, attention_mask=mask.expand(2, 1, 12, 12)).logits
        torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-5)
    biased = mask.expand(2, 1, 12, 12) + torch.randn(2, 1, 12, 12).double()
    own = model(input_ids=ids, attention_mask=biased).logits
    with observe_model(model, ignore):
        ours = model(input_ids=ids, attention_mask=biased).logits
    torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_wrapped_model_is_measured_like_the_model(name):
    model = tiny(name)
    with observe_model(torch.nn.DataParallel(model), ignore) as watch:
        assert len(watch.layers) == 3


def test_summed_loss_is_the_models_own():
    model, ids = tiny("llama"), tokens()
    own = model(input_ids=ids, labels=ids).loss * (ids.numel() - len(ids))
    torch.testing.assert_close(summed_loss(model, ids), own.double(), rtol=1e-6, atol=0)


def test_a_module_that_cannot_be_run_again_is_refused_for_the_weights_only():
    """Its forward is called past its hooks, so that its input is never seen."""
    model = tiny("llama")
    layer = model.model.layers[1]

    class Past(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *args, **kwargs):
            return self.inner.forward(*args, **kwargs)

    layer.self_attn = Past(layer.self_attn)
    with pytest.raises(InputError, match="measure without the weights"), posterity.account(model):
        summed_loss(model, tokens()).backward()
    with posterity.account(model, weights=False) as ledger:
        summed_loss(model, tokens()).backward()
    assert ledger.result().sizes["document"] == 2
