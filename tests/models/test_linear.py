"""Attention that sees only itself is the linear layer that `as_linear` reads off; what is none is refused by name."""

import pytest
import torch
from support.families import build
from support.reference import dense_attention
from support.spy import use_attention
from support.tiny import tiny, tokens

from posterity import InputError, as_linear

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
    return [module for module in model.modules() if type(module).__name__.endswith("Attention")]


def only_self(module, query, key, value, attention_mask, scaling=None, heads=None, **kwargs):
    """Attention over a mask with the diagonal alone, written down by hand."""
    allowed = torch.eye(query.shape[2], dtype=torch.bool)[None, None]
    output, _, weight = dense_attention(query, key, value, query.shape[-1] ** -0.5, allowed)
    assert torch.equal(weight, allowed.to(weight).expand_as(weight))
    if heads is not None:
        output = output * torch.tensor([float(head in heads) for head in range(query.shape[1])])[:, None, None]
    return output.transpose(1, 2).contiguous(), None


def record_inputs_and_outputs(model, ids, attend):
    """Inputs and outputs of all attention modules, run under `attend`."""
    calls = []

    def note(_module, args, kwargs, output):
        calls.append((args[0] if args else kwargs["hidden_states"], output[0]))

    hooks = [module.register_forward_hook(note, with_kwargs=True) for module in modules(model)]
    try:
        with use_attention(model, "diagonal", attend), torch.no_grad():
            model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


@pytest.mark.parametrize(("name", "changes"), CASES, ids=NAMES)
def test_the_linear_layer_is_the_attention_layer_under_a_diagonal_mask(name, changes):
    model = with_biases(tiny(name, **changes))
    linear = [as_linear(module) for module in modules(model)]
    for length in range(1, 9):
        calls = record_inputs_and_outputs(model, tokens(2, length), only_self)
        assert len(calls) == len(linear) == 3
        for layer, (hidden, output) in zip(linear, calls, strict=True):
            assert layer.weight.dtype == torch.float64
            torch.testing.assert_close(layer(hidden), output, rtol=1e-12, atol=1e-12)
    assert (linear[0].bias is not None) == (name in ("gpt2", "gpt_neox") or bool(changes))


@pytest.mark.parametrize("heads", [[0], [1, 3], [], [0, 1, 2, 3]], ids=str)
@pytest.mark.parametrize(("name", "changes"), CASES, ids=NAMES)
def test_heads_that_are_left_out_give_zero_before_the_output_projection(name, changes, heads):
    model = with_biases(tiny(name, **changes))

    def attend(*args, **kwargs):
        return only_self(*args, **kwargs, heads=heads)

    for module, (hidden, output) in zip(
        modules(model), record_inputs_and_outputs(model, tokens(2, 5), attend), strict=True
    ):
        torch.testing.assert_close(as_linear(module, heads)(hidden), output, rtol=1e-12, atol=1e-12)


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
    assert all(part.training for part in module.modules())


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
