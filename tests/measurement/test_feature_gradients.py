"""features(): against the definition of Rofin et al. 2026, stop-gradients at one layer and position, in float64."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.tiny import tiny, tokens
from support.verification import double

import posterity
from posterity.axes import FEATURE_PAIRS, FEATURE_PARTS
from posterity.errors import InputError
from posterity.measurement import feature_gradients

LENGTH = 12
OPTIONS = {"context": LENGTH, "progress": False}


def blocks(model):
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def flat(gradients, parameters):
    return torch.cat([
        (torch.zeros_like(x) if grad is None else grad).flatten() for grad, x in zip(gradients, parameters, strict=True)
    ])  # fmt: skip


class Definition:
    """Gradients of the parameters of single losses, with a stop-gradient at the input of a layer where asked for."""

    def __init__(self, model, row):
        self.model, self.row = model, row
        self.parameters = list(model.parameters())
        for parameter in self.parameters:
            parameter.requires_grad_(True)

    def losses_and_stream(self, layer, stopped=None):
        """The loss of every position and the input of a layer; constant at `stopped` positions."""
        streams = []

        def stop(_module, args, kwargs):
            (hidden, *rest) = args or (kwargs["hidden_states"],)
            if stopped is not None:
                mask = torch.zeros(hidden.shape[1], 1, dtype=torch.bool)
                mask[stopped] = True
                hidden = torch.where(mask, hidden.detach(), hidden)
            streams.append(hidden)
            return ((hidden, *rest), kwargs) if args else ((), kwargs | {"hidden_states": hidden})

        hook = blocks(self.model)[layer].register_forward_pre_hook(stop, with_kwargs=True)
        with double():
            logits = self.model(input_ids=self.row[None], use_cache=False).logits[0, :-1]
        hook.remove()
        return torch.nn.functional.cross_entropy(logits, self.row[1:], reduction="none"), streams[0]

    def gradient(self, loss):
        with double():
            grads = torch.autograd.grad(loss, self.parameters, retain_graph=True, allow_unused=True)
        return flat(grads, self.parameters)

    def parts(self, layer, position):
        """The direct, pre-cached and shared part of the gradient of the summed loss."""
        plain, _ = self.losses_and_stream(layer)
        stopped, _ = self.losses_and_stream(layer, [position])
        direct = self.gradient(plain[position]) - self.gradient(stopped[position])
        shared = self.gradient(stopped.sum())
        return direct, self.gradient(plain.sum()) - shared - direct, shared

    def feature_gradient(self, layer, direction, positions):
        """The gradient of the mean component along a direction."""
        _, stream = self.losses_and_stream(layer)
        return self.gradient((stream[0, positions] @ direction).mean())


def products(parts):
    pairs = [(x, x) for x in parts] + [(parts[0], parts[1]), (parts[0], parts[2]), (parts[1], parts[2])]
    return torch.stack([x @ y for x, y in pairs]).numpy()


MODELS = ("gpt2", "llama", "qwen3", "mistral", "gemma2", "gpt_oss")


@pytest.mark.parametrize("name", MODELS)
def test_parts_and_influence_at_one_position_are_those_of_the_definition(name):
    model, ids = tiny(name), tokens(2, LENGTH)
    directions = {layer: torch.randn(2, 24, generator=torch.Generator().manual_seed(layer)) for layer in (0, 2)}
    with double():
        result = posterity.features(
            model, None, ids, directions=directions, layers=[0, 1, 2], positions=4, influence=True, **OPTIONS
        )
    for document, row in enumerate(ids):
        oracle = Definition(model, row)
        for layer in range(3):
            parts = oracle.parts(layer, 4)
            expected = products(parts)
            np.testing.assert_allclose(result.gram[document, layer], expected, rtol=1e-6, atol=1e-9 * expected.max())
            for index, number in enumerate(result.direction_layer.values):
                if number != layer:
                    continue
                direction = directions[layer][index % 2].double()
                slope = oracle.feature_gradient(layer, direction / direction.norm(), [4])
                expected = [-float(part @ slope) for part in parts]
                np.testing.assert_allclose(result.influence[document, index], expected, rtol=1e-5, atol=1e-9)


def test_parts_of_positions_add_up():
    model, ids = tiny("llama"), tokens(1, LENGTH)
    direction = torch.randn(24, generator=torch.Generator().manual_seed(4))
    options = {"directions": {1: direction}, "layers": [0, 1, 2], "influence": True}
    with double():
        result = posterity.features(model, None, ids, positions=(3, 7), **options, **OPTIONS)
    oracle = Definition(model, ids[0])
    for layer in range(3):
        single = [oracle.parts(layer, position) for position in range(3, 7)]
        direct, pre_cached = (sum(parts[kind] for parts in single) for kind in (0, 1))
        whole = sum(single[0])
        expected = products((direct, pre_cached, whole - direct - pre_cached))
        np.testing.assert_allclose(result.gram[0, layer], expected, rtol=1e-6, atol=1e-9 * expected.max())
        if layer == 1:
            slope = oracle.feature_gradient(layer, (direction / direction.norm()).double(), slice(3, 7))
            expected = [-float(part @ slope) for part in (direct, pre_cached, whole - direct - pre_cached)]
            np.testing.assert_allclose(result.influence[0, 0], expected, rtol=1e-5)
        stopped, _ = oracle.losses_and_stream(layer, slice(3, 7))  # the shared part is that of one stop-gradient at all
        assert float(result.gram[0, layer, 2]) == pytest.approx(float(oracle.gradient(stopped.sum()).square().sum()))


def test_the_three_parts_make_the_whole_gradient():
    model, ids = tiny("gpt2"), tokens(2, LENGTH)
    result = posterity.features(model, None, ids, positions=(2, 9), **OPTIONS)
    for document, row in enumerate(ids):
        oracle = Definition(model, row)
        losses, _ = oracle.losses_and_stream(0)
        norm = float(oracle.gradient(losses.sum()).square().sum())
        weights = result.pair.copy(data=[1.0 if pair in FEATURE_PARTS else 2.0 for pair in FEATURE_PAIRS])
        np.testing.assert_allclose((result.gram[document] * weights).sum("pair"), norm, rtol=1e-9)
        assert float(result.loss[document]) == pytest.approx(float(losses.detach().mean()))


def test_at_all_positions_nothing_below_the_layer_is_shared():
    model, ids = tiny("llama"), tokens(1, LENGTH)  # embedding and head are not tied
    result = posterity.features(model, None, ids, **OPTIONS)
    oracle = Definition(model, ids[0])
    losses, _ = oracle.losses_and_stream(0)
    grads = torch.autograd.grad(losses.sum(), oracle.parameters)
    for layer in range(3):
        behind = {
            id(x) for module in (*blocks(model)[layer:], model.model.norm, model.lm_head) for x in module.parameters()
        }
        norm = sum(float(g.square().sum()) for g, x in zip(grads, oracle.parameters, strict=True) if id(x) in behind)
        assert float(result.gram[0, layer, 2]) == pytest.approx(norm, rel=1e-6)


def test_pulls_are_those_of_one_backward_pass_for_each_loss():
    model, ids = tiny("llama"), tokens(1, LENGTH)
    direction = torch.randn(24, generator=torch.Generator().manual_seed(1))
    with double():
        result = posterity.features(
            model, None, ids, directions={"layers.1": 3 * direction}, positions=(2, 8), **OPTIONS
        )
    oracle = Definition(model, ids[0])
    losses, stream = oracle.losses_and_stream(1)
    with double():
        grads = [torch.autograd.grad(loss, stream, retain_graph=True)[0][0] for loss in losses]
    unit = (direction / direction.norm()).double()
    own = torch.stack([-grads[i][i] @ unit for i in range(2, 8)])
    later = torch.stack([-sum(grads[j][i] for j in range(i + 1, LENGTH - 1)) @ unit for i in range(2, 8)])
    expected = [float(x.mean()) for x in (own, later, own * own, later * later, own * later)]
    np.testing.assert_allclose(result.pull[0, 0], expected, rtol=1e-6)
    assert result.direction.values == ["layers.1"]


def test_a_step_along_a_part_changes_the_feature_by_its_influence():
    model, ids = tiny("llama"), tokens(1, LENGTH)
    direction = torch.randn(24, generator=torch.Generator().manual_seed(2))
    with double():
        result = posterity.features(model, None, ids, directions={1: direction}, positions=5, influence=True, **OPTIONS)
    oracle = Definition(model, ids[0])
    unit = (direction / direction.norm()).double()

    def component():
        with torch.no_grad():
            return float(oracle.losses_and_stream(1)[1][0, 5] @ unit)

    for part, gradient in zip(FEATURE_PARTS, oracle.parts(1, 5), strict=True):
        step, changes = 1e-7, []
        for sign in (1, -1):
            vector = torch.nn.utils.parameters_to_vector(oracle.parameters)
            torch.nn.utils.vector_to_parameters(vector - sign * step * gradient, oracle.parameters)
            changes.append(component())
            torch.nn.utils.vector_to_parameters(vector, oracle.parameters)
        slope = (changes[0] - changes[1]) / (2 * step)
        assert float(result.influence.sel(part=part)[0, 0]) == pytest.approx(slope, rel=1e-4, abs=1e-6)


def test_the_model_is_left_as_it_was():
    model, ids = tiny("llama"), tokens(1, LENGTH)
    model.lm_head.weight.requires_grad_(False)
    posterity.features(model, None, ids, **OPTIONS)
    assert all(x.grad is None for x in model.parameters())
    assert not model.lm_head.weight.requires_grad
    assert model.model.norm.weight.requires_grad
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_directions_come_from_a_file(tmp_path):
    model, ids = tiny("llama"), tokens(1, LENGTH)
    rows = torch.randn(2, 24, generator=torch.Generator().manual_seed(3))
    save_file({"probe_2": rows, "lens": rows[0].clone()}, tmp_path / "d.safetensors")
    result = posterity.features(model, None, ids, directions=tmp_path / "d.safetensors", layers=[0, 1], **OPTIONS)
    assert result.direction.values.tolist() == ["lens at 0", "lens at 1", "probe_2[0]", "probe_2[1]"]
    assert result.direction_layer.values.tolist() == [0, 1, 2, 2]
    assert result.layer.values.tolist() == [0, 1]
    same = posterity.features(model, None, ids, directions={2: rows, 0: rows[0]}, **OPTIONS)
    assert same.layer.values.tolist() == [0, 2]
    np.testing.assert_array_equal(same.pull.values[0], result.pull.values[0, [2, 3, 0]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"directions": {5: torch.ones(24)}}, "no attention layer 5; expected numbers from 0 to 2"),
        ({"layers": [3]}, "no attention layer 3"),
        ({"layers": []}, "layers expects different numbers"),
        ({"layers": [1, 1]}, "layers expects different numbers"),
        ({"directions": {1: torch.ones(23)}}, "direction '1' has 23 numbers; the stream in front of layer 1 has 24"),
        ({"directions": {1: torch.zeros(24)}}, "row 0 of '1' is zero"),
        ({"directions": {1: torch.full((24,), torch.nan)}}, "not finite"),
        ({"directions": {1: torch.ones(2, 3, 24)}}, r"\(width\) or \(direction, width\)"),
        ({"directions": {1: torch.ones(24, dtype=torch.long)}}, "expected real numbers"),
        ({"directions": {"a.1.b.2": torch.ones(24)}}, "has several numbers"),
        ({"directions": {"lens": torch.ones(24)}}, "names no layer"),
        ({"directions": {1: [1.0] * 24}}, "is no tensor but a list"),
        ({"directions": {}}, "holds none"),
        ({"directions": 3}, "directions expects a safetensors file or a dict"),
        ({"directions": "nowhere.safetensors"}, "expected a safetensors file with directions"),
        ({"influence": True}, "is that on directions; got none"),
        ({"positions": 11}, "positions from 0 to 10"),
        ({"positions": (5, 5)}, "got 5:5"),
        ({"positions": "all"}, "positions expects a position"),
    ],
)
def test_mistakes_end_in_one_line(options, message):
    with pytest.raises(InputError, match=message) as error:
        posterity.features(tiny("llama"), None, tokens(1, LENGTH), **options, **OPTIONS)
    assert "\n" not in str(error.value)


def test_an_interrupted_run_goes_on_with_the_same_numbers(tmp_path, monkeypatch):
    model, ids = tiny("llama"), tokens(4, LENGTH)
    options = {"directions": {1: torch.ones(24)}, "influence": True, **OPTIONS}
    whole = posterity.features(model, None, ids, **options)
    add, added = feature_gradients._StreamSplit.add, []

    def interrupted(self, window, *rest):
        if len(added) == 2:
            raise KeyboardInterrupt
        added.append(window)
        add(self, window, *rest)

    monkeypatch.setattr(feature_gradients._StreamSplit, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        posterity.features(model, None, ids, state=tmp_path / "state", **options)
    monkeypatch.setattr(feature_gradients._StreamSplit, "add", lambda *args: added.append(args[1]) or add(*args))
    again = posterity.features(model, None, ids, state=tmp_path / "state", **options)
    assert len(added) < 6
    for name in ("gram", "pull", "influence", "loss"):
        np.testing.assert_array_equal(again[name], whole[name])
    with pytest.raises(InputError, match="positions"):
        posterity.features(model, None, ids, state=tmp_path / "state", positions=3, **options)
