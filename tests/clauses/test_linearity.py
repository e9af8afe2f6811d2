"""Row 8: where each position sees only itself, an attention layer is its linear layer; what that costs by head."""

import numpy as np
import pytest
import torch
from support.loss_oracles import exact
from support.losses_by_hand import mean_loss
from support.tiny import tiny, tokens

import posterity
from posterity import as_linear, load, save
from posterity.clauses import linearity
from posterity.clauses.drawing import View
from posterity.clauses.linearity import LINEARITY
from posterity.clauses.subject import Plan, Subject
from posterity.results.audit_schema import HOLDS, MIXED


def finding_on(name, **plan):
    return LINEARITY.find(Subject(tiny(name), None, tokens(6, 10), Plan(short=10, pass_tokens=30, **plan)))


def test_row_8_holds_where_every_layer_is_its_linear_layer():
    for name in ("llama", "gemma2", "mistral"):
        finding = finding_on(name)
        assert finding.verdict == HOLDS, finding.reason
        assert 0 < finding.figures[0].value < 1e-13
        assert finding.variables["straight_difference"].shape == (3,)


def test_row_8_sees_a_linear_layer_that_is_another(monkeypatch):
    def wrong(module):
        linear = as_linear(module)
        with torch.no_grad():
            linear.weight[0, 0] += 0.5
        return linear

    monkeypatch.setattr(linearity, "as_linear", wrong)
    finding = finding_on("llama")
    assert finding.verdict == "fails"
    assert "0 of 3 layers" in finding.reason
    assert "not layers 0, 1 and 2" in finding.reason


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3"])
def test_row_8_names_the_layers_that_are_not_linear(name):
    finding = finding_on(name)
    assert finding.verdict == MIXED
    assert "layers 0" in finding.reason
    assert ("kv_a_layernorm" if name == "deepseek_v3" else "sinks") in finding.reason
    assert np.isnan(finding.variables["straight_difference"]).all()
    assert ("straight_cost" in finding.variables) == (name == "deepseek_v3")


def test_row_8_prices_heads_as_a_diagonal_mask_by_hand_does():
    model, ids = exact("llama"), tokens(9, 10)
    finding = LINEARITY.find(Subject(model, None, ids, Plan(short=10, pass_tokens=30, fold=0.02)))
    figures = {figure.name: figure for figure in finding.figures}
    pricing = ids[:3]
    before, cost = mean_loss(model, pricing, {}), finding.variables["straight_cost"].values
    for layer, head in ((0, 0), (1, 2), (2, 3)):
        change = mean_loss(model, pricing, {layer: [head]}) - before
        assert cost[layer, head] == pytest.approx(float(change.mean()), abs=1e-12)
        error = float(change.std()) / 3**0.5
        assert finding.variables["straight_cost_error"].values[layer, head] == pytest.approx(error, abs=1e-12)
    taken = finding.variables["straight_folded"].values
    folded = {layer: list(np.flatnonzero(row)) for layer, row in enumerate(taken)}
    assert taken.sum() == figures["heads that can look only at themselves"].value > 0
    for name, windows in (("together", ids[3:6]), ("together, held out", ids[6:])):
        change = mean_loss(model, windows, folded) - mean_loss(model, windows, {})
        figure = figures[f"loss change with these heads {name}"]
        assert figure.value == pytest.approx(float(change.mean()), abs=1e-12)
        assert figure.error == pytest.approx(float(change.std()) / 3**0.5, abs=1e-12)
    assert figures["loss change with these heads together"].value <= 0.02


def test_the_charts_of_row_8_come_from_a_saved_audit_with_or_without_its_costs(tmp_path):
    models = {"one": tiny("llama"), "two": tiny("gpt_oss")}
    audit = posterity.audit(models, None, tokens(6, 10), rows=[8], short=10, pass_tokens=20, progress=False)
    saved = load(save(audit, tmp_path / "audit.nc"))
    charts = LINEARITY.draw(View(saved, "one"))
    assert [chart.traces[0]["type"] for chart in charts] == ["heatmap", "scatter"]
    cost = audit.straight_cost.sel(model="one").values
    assert np.array_equal(charts[0].traces[0]["z"], cost)
    assert charts[0].colours["cmin"] == -charts[0].colours["cmax"] < 0
    assert LINEARITY.draw(View(saved, "two")) == []
