"""A backward pass that is not the derivative of its forward pass is named."""

import pytest
import torch
from support.loss_oracles import exact
from support.tiny import tiny, tokens
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

import posterity
from posterity import check


class Scaled(torch.autograd.Function):
    """The identity, with a gradient that is too large."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return ctx.factor * grad, None


class WrongInput(torch.nn.Linear):
    """A projection whose gradient is wrong at its input."""

    def forward(self, x):
        return super().forward(Scaled.apply(x, 1.1))


class WrongWeight(torch.nn.Linear):
    """A projection whose gradient is wrong at its weight."""

    def forward(self, x):
        return torch.nn.functional.linear(x, Scaled.apply(self.weight, 0.5))


def replace_query_projection(model, kind):
    attention = model.model.layers[1].self_attn
    linear = attention.q_proj
    attention.q_proj = kind(linear.in_features, linear.out_features, bias=False, dtype=linear.weight.dtype)
    attention.q_proj.load_state_dict(linear.state_dict())


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gemma2", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_right_models_have_no_wrong_gradient(name, dtype):
    answer = check(tiny(name, dtype))
    assert answer.ok
    assert answer.wrong_gradients == ()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_wrong_backward_pass_of_every_mlp_is_named(monkeypatch, dtype):
    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: Scaled.apply(forward(self, x), 1.5))
    answer = check(tiny("llama", dtype))
    assert answer.ok
    (name,) = answer.wrong_gradients
    assert name.startswith("LlamaMLP (model.layers.0.mlp), off by ")
    assert f"not the derivative of the forward pass in {name}" in str(answer)


@pytest.mark.parametrize("kind", [WrongInput, WrongWeight])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_wrong_backward_pass_of_a_single_projection_is_named(kind, dtype):
    model = tiny("llama", dtype)
    replace_query_projection(model, kind)
    (name,) = check(model).wrong_gradients
    assert name.startswith(f"{kind.__name__} (model.layers.1.self_attn.q_proj), off by ")


@pytest.mark.parametrize("seed", range(3))
def test_an_embedding_of_zero_in_front_of_norms_is_no_wrong_gradient(seed):
    """The embedding of the padding token is zero, where a norm of queries has a kink."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, pad_token_id=2,
    )  # fmt: skip
    assert check(Qwen3ForCausalLM(config).eval()).wrong_gradients == ()


def test_a_hook_that_changes_gradients_is_seen_at_the_layer_around_it():
    model = tiny("llama")
    model.model.layers[2].mlp.down_proj.register_full_backward_hook(lambda module, ins, outs: (2 * ins[0],))
    assert any("model.layers.2.mlp.down_proj" in name for name in check(model).wrong_gradients)


def test_a_module_that_needs_what_another_left_behind_is_left_out():
    model, left = exact("llama"), {}
    first, last = model.model.layers[0].mlp, model.model.layers[-1].mlp
    first.register_forward_hook(lambda module, args, output: left.update(first=output))
    last.register_forward_hook(lambda module, args, output: output + left.pop("first"))
    result = check(model)
    assert result.ok
    assert result.wrong_gradients == ()


def test_a_wrong_gradient_stands_in_result_and_summary(monkeypatch, capsys):
    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: Scaled.apply(forward(self, x), 1.5))
    result = posterity.measure(tiny("llama", torch.float32), None, tokens(1), context=12, progress=False)
    assert "LlamaMLP (model.layers.0.mlp)" in result.attrs["wrong_gradients"]
    posterity.summary(result)
    assert "not the derivative of the forward pass in LlamaMLP" in " ".join(capsys.readouterr().out.split())


def test_a_check_leaves_parameters_gradients_and_buffers_as_they_are():
    model = tiny("gpt2", torch.float32)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    assert check(model).ok
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(x.grad is None for x in model.parameters())
