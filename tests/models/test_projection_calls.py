"""Gradients of weights from the graph of the forward pass: the same as by running again, and only where they are."""

import pytest
import torch
from support.tiny import summed_loss, tiny, tokens

import posterity
from posterity.models.projection_calls import AttentionInputs, ProjectionCalls
from posterity.models.recompute import Recomputation

LAYERS = 3


@pytest.fixture
def runs(monkeypatch):
    """The documents for which modules have run again."""
    documents, project = [], Recomputation.project

    def count(self, back, document):
        documents.append(document)
        return project(self, back, document)

    monkeypatch.setattr(Recomputation, "project", count)
    return documents


def add_second_use(model):
    """Let the query of each layer be made with W_Q twice, once unseen by hooks of modules."""
    for layer in model.model.layers:
        projection = layer.self_attn.q_proj
        projection.register_forward_hook(
            lambda module, args, output: output + torch.nn.functional.linear(args[0].roll(1, 1), module.weight)
        )


def query_squares(model, ids):
    """The squared norm of each layer's gradient of W_Q, by autograd, for all texts together; norms are in float32."""
    model.requires_grad_(True)
    model.zero_grad()
    summed_loss(model, ids).backward()
    squares = [layer.self_attn.q_proj.weight.grad.square().sum() for layer in model.model.layers]
    model.zero_grad()
    model.requires_grad_(False)
    return torch.stack(squares)


def query_terms(result, documents):
    """The same of a result, whose `weight_mean` is of the mean gradient."""
    own, other, inner = torch.tensor(result.weight_mean.sel(stream="query").transpose("term", "layer").values)
    return (own + other + 2 * inner) * documents**2


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "gpt_neox", "gpt2", "gemma2", "deepseek_v3"])
def test_modules_run_again_for_their_first_text_only(name, runs, monkeypatch):
    model, ids = tiny(name), tokens(4)
    traced = posterity.measure(model, None, ids, context=12, batch=2, progress=False)
    layers = traced.sizes["layer"]
    assert runs == [0] * layers
    monkeypatch.setattr(AttentionInputs, "trace", lambda self: None)
    run_again = posterity.measure(model, None, ids, context=12, batch=2, progress=False)
    assert len(runs) == layers + 4 * layers
    for variable in ("weight_by_document", "weight_mean"):
        left, right = (torch.tensor(result[variable].values) for result in (traced, run_again))
        torch.testing.assert_close(left, right, rtol=1e-10, atol=0, equal_nan=True)


def test_a_weight_that_is_used_past_its_module_is_found_by_running_again(runs):
    model, ids = tiny("llama"), tokens(3)
    add_second_use(model)
    result = posterity.measure(model, None, ids, context=12, progress=False)
    assert len(runs) == LAYERS * (1 + 3)  # to compare, then for each text
    torch.testing.assert_close(query_terms(result, 3), query_squares(model, ids), rtol=1e-5, atol=0)


@pytest.mark.parametrize("second_use", [False, True])
@pytest.mark.parametrize("factor", [0.0, torch.nan])
def test_gradients_that_say_nothing_are_no_evidence(factor, second_use, runs):
    model, ids = tiny("llama"), tokens(3)
    model.requires_grad_(False)
    model.enable_input_require_grads()
    if second_use:
        add_second_use(model)
    with posterity.account(model) as ledger:
        (factor * summed_loss(model, ids[:1])).backward()
        uninformative = len(runs)
        for row in ids:
            summed_loss(model, row[None]).backward()
    documents = ledger.documents
    assert (documents, uninformative) == ((4, 2 * LAYERS) if factor == 0 else (3, 0))
    assert len(runs) - uninformative == LAYERS * (1 + 3 if second_use else 1)
    torch.testing.assert_close(query_terms(ledger.result(), documents), query_squares(model, ids), rtol=1e-5, atol=0)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_layer_runs_again_once(reentrant):
    model, ids, calls = tiny("llama").train(), tokens(2), []
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for layer in model.model.layers:
        layer.input_layernorm.register_forward_pre_hook(lambda *_: calls.append(1))
    with posterity.account(model):
        calls.clear()
        summed_loss(model, ids).backward()
        assert len(calls) == 2 * LAYERS


def test_an_input_that_changed_in_place_is_not_traced():
    model = tiny("llama")
    attention = model.model.layers[0].self_attn
    recorder, hidden = ProjectionCalls([attention]), torch.randn(2, 5, 24, dtype=torch.float64).requires_grad_()
    inputs = hidden * 1
    with recorder.record():
        streams = tuple(getattr(attention, f"{x}_proj")(inputs) for x in "qkv")
        recorded = recorder.enter_attention(attention, streams)
        assert len(recorded.trace().projections) == 3
        inputs.data.add_(1)  # past the count of changes
        assert recorded.trace() is not None
        inputs.mul_(2)
        assert recorded.trace() is None


def test_rows_that_are_not_texts_are_not_traced():
    attention = tiny("llama").model.layers[0].self_attn
    recorder, hidden = ProjectionCalls([attention]), torch.randn(10, 24, dtype=torch.float64).requires_grad_()
    with recorder.record():
        streams = tuple(getattr(attention, f"{x}_proj")(hidden).view(2, 5, -1) for x in "qkv")
        assert recorder.enter_attention(attention, streams).trace() is None
