"""Attention that sees only itself is the linear layer that `as_linear` reads off; what is none is refused by name."""

import numpy as np
import pytest
import torch
from support.families import build
from support.loss_oracles import exact
from support.losses_by_hand import mean_loss
from support.reference import dense_attention
from support.spy import attending
from support.tiny import tiny, tokens

from posterity import InputError, as_linear, load, save
from posterity.clauses.clause import Plan, Subject
from posterity.clauses.drawing import View
from posterity.clauses.linearity import CLAUSES, straight
from posterity.results.audit_schema import HOLDS, MIXED

CASES = [("llama", {}), ("llama", {"attention_bias": True}), ("gpt2", {}), ("gpt_neox", {}), ("phi3", {})]
NAMES = ["llama", "llama with biases", "gpt2", "gpt_neox", "phi3"]


def with_biases(model):
    """Those of a fresh model are zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def modules(model):
    return [one for one in model.modules() if type(one).__name__.endswith("Attention")]


def only_self(module, query, key, value, attention_mask, scaling=None, heads=None, **kwargs):
    """Attention over a mask with the diagonal alone, written down by hand."""
    allowed = torch.eye(query.shape[2], dtype=torch.bool)[None, None]
    output, _, weight = dense_attention(query, key, value, query.shape[-1] ** -0.5, allowed)
    assert torch.equal(weight, allowed.to(weight).expand_as(weight))
    if heads is not None:
        output = output * torch.tensor([float(head in heads) for head in range(query.shape[1])])[:, None, None]
    return output.transpose(1, 2).contiguous(), None


def met(model, ids, attend):
    """(input, output) of every attention module, run under `attend`."""
    seen = []

    def note(_module, args, kwargs, output):
        seen.append((args[0] if args else kwargs["hidden_states"], output[0]))

    hooks = [one.register_forward_hook(note, with_kwargs=True) for one in modules(model)]
    try:
        with attending(model, "diagonal", attend), torch.no_grad():
            model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


@pytest.mark.parametrize(("name", "changes"), CASES, ids=NAMES)
def test_the_linear_layer_is_the_attention_layer_under_a_diagonal_mask(name, changes):
    model = with_biases(tiny(name, **changes))
    linear = [as_linear(one) for one in modules(model)]
    for length in range(1, 9):
        seen = met(model, tokens(2, length), only_self)
        assert len(seen) == len(linear) == 3
        for layer, (given, output) in zip(linear, seen, strict=True):
            assert layer.weight.dtype == torch.float64
            torch.testing.assert_close(layer(given), output, rtol=1e-12, atol=1e-12)
    assert (linear[0].bias is not None) == (name in ("gpt2", "gpt_neox") or bool(changes))


@pytest.mark.parametrize("heads", [[0], [1, 3], [], [0, 1, 2, 3]], ids=str)
@pytest.mark.parametrize(("name", "changes"), CASES, ids=NAMES)
def test_heads_that_are_left_out_give_zero_before_the_output_projection(name, changes, heads):
    model = with_biases(tiny(name, **changes))

    def attend(*args, **kwargs):
        return only_self(*args, **kwargs, heads=heads)

    for module, (given, output) in zip(modules(model), met(model, tokens(2, 5), attend), strict=True):
        torch.testing.assert_close(as_linear(module, heads)(given), output, rtol=1e-12, atol=1e-12)


def test_half_precision_is_read_off_in_float32():
    model = tiny("llama", torch.bfloat16)
    linear, precise = as_linear(modules(model)[0]), as_linear(modules(model.to(torch.float64))[0])
    assert linear.weight.dtype == torch.float32
    torch.testing.assert_close(linear.weight.double(), precise.weight, rtol=1e-5, atol=1e-5)


REFUSED = {
    "gpt_oss": "GptOssAttention is not linear.*its attention sinks take a part of the weight",
    "deepseek_v3": r"DeepseekV3RMSNorm \(kv_a_layernorm\) on the way of its values is not$",
    "gemma3n_text": r"Gemma3nRMSNorm \(v_norm\) on the way of its values is not$",
    "gemma4_text": r"Gemma4RMSNorm \(v_norm\) on the way of its values is not$",
    "qwen3_next": "a gate, a clamp or another product of the hidden state with itself in Qwen3NextAttention.forward is",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_linear_is_refused_by_name_and_the_config_comes_back(name):
    model = build(name)
    module = modules(model)[0].train()
    with pytest.raises(InputError, match=REFUSED[name]):
        as_linear(module)
    assert module.config._attn_implementation == "eager"
    assert all(one.training for one in module.modules())


def test_wrong_arguments_are_one_line_and_the_config_comes_back():
    model = tiny("llama")
    for wrong in (model, model.model.layers[0], model.model.layers[0].mlp, torch.nn.Linear(2, 2), None):
        with pytest.raises(InputError, match=f"{type(wrong).__name__} is no attention module of transformers"):
            as_linear(wrong)
    for heads in ([4], [-1], [True], [0.5]):
        with pytest.raises(InputError, match="heads expects numbers from 0 to 3"):
            as_linear(modules(model)[0], heads)
    assert model.config._attn_implementation == "eager"


def test_reading_off_draws_no_random_number_of_the_callers():
    module = modules(tiny("llama"))[0]
    state = torch.random.get_rng_state()
    as_linear(module)
    assert torch.equal(torch.random.get_rng_state(), state)


def found_on(name, **plan):
    return straight(Subject(tiny(name), None, tokens(6, 10), Plan(short=10, budget=30, **plan)))


def test_row_8_holds_where_every_layer_is_its_linear_layer():
    for name in ("llama", "gemma2", "mistral"):
        found = found_on(name)
        assert found.verdict == HOLDS, found.reason
        assert 0 < found.figures[0].value < 1e-13
        assert found.variables["straight_difference"].shape == (3,)


def test_row_8_sees_a_linear_layer_that_is_another(monkeypatch):
    def wrong(module):
        linear = as_linear(module)
        with torch.no_grad():
            linear.weight[0, 0] += 0.5
        return linear

    monkeypatch.setitem(straight.__globals__, "as_linear", wrong)
    found = found_on("llama")
    assert found.verdict == "fails"
    assert "0 of 3 layers" in found.reason
    assert "not layers 0, 1 and 2" in found.reason


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3"])
def test_row_8_names_the_layers_that_are_not_linear(name):
    found = found_on(name)
    assert found.verdict == MIXED
    assert "layers 0" in found.reason
    assert ("kv_a_layernorm" if name == "deepseek_v3" else "sinks") in found.reason
    assert np.isnan(found.variables["straight_difference"]).all()
    assert ("straight_cost" in found.variables) == (name == "deepseek_v3")


def test_row_8_prices_heads_as_a_diagonal_mask_by_hand_does():
    model, ids = exact("llama"), tokens(9, 10)
    found = straight(Subject(model, None, ids, Plan(short=10, budget=30, fold=0.02)))
    names = {one.name: one for one in found.figures}
    chosen = ids[:3]
    before, cost = mean_loss(model, chosen, {}), found.variables["straight_cost"].values
    for layer, head in ((0, 0), (1, 2), (2, 3)):
        change = mean_loss(model, chosen, {layer: [head]}) - before
        assert cost[layer, head] == pytest.approx(float(change.mean()), abs=1e-12)
        error = float(change.std()) / 3**0.5
        assert found.variables["straight_cost_error"].values[layer, head] == pytest.approx(error, abs=1e-12)
    taken = found.variables["straight_folded"].values
    folded = {layer: list(np.flatnonzero(row)) for layer, row in enumerate(taken)}
    assert taken.sum() == names["heads that can look only at themselves"].value > 0
    for name, some in (("together", ids[3:6]), ("together, held out", ids[6:])):
        change = mean_loss(model, some, folded) - mean_loss(model, some, {})
        figure = names[f"loss change with these heads {name}"]
        assert figure.value == pytest.approx(float(change.mean()), abs=1e-12)
        assert figure.error == pytest.approx(float(change.std()) / 3**0.5, abs=1e-12)
    assert names["loss change with these heads together"].value <= 0.02


def test_the_charts_of_row_8_come_from_a_saved_audit_with_or_without_its_costs(tmp_path):
    import posterity

    models = {"one": tiny("llama"), "two": tiny("gpt_oss")}
    audit = posterity.audit(models, None, tokens(6, 10), rows=[8], short=10, budget=20, progress=False)
    saved = load(save(audit, tmp_path / "audit.nc"))
    charts = CLAUSES[0].draw(View(saved, "one"))
    assert [chart.traces[0]["type"] for chart in charts] == ["heatmap", "scatter"]
    cost = audit.straight_cost.sel(model="one").values
    assert np.array_equal(charts[0].traces[0]["z"], cost)
    assert charts[0].traces[0]["zmin"] == -charts[0].traces[0]["zmax"] < 0
    assert CLAUSES[0].draw(View(saved, "two")) == []
