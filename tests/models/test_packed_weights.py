"""Models with packed weights: what has a gradient is measured as in the unpacked model, and the rest is named."""

import copy
import logging

import numpy as np
import pytest
import torch
from support.adapted import PEFT_WARNING, adapter_parameters, squared_norm
from support.loss_oracles import exact
from support.tiny import summed_loss, tiny, tokens
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import posterity
from posterity.errors import InputError
from posterity.measurement.run_state import fingerprint

# What the libraries themselves say on import and on a CPU.
pytestmark = [
    pytest.mark.filterwarnings(PEFT_WARNING),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torch"),
]
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def small():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=61, num_key_value_heads=2, initializer_range=0.2, **sizes)
    return LlamaForCausalLM(config).eval()


def bitsandbytes(tmp_path, **options):
    """The small model, packed by bitsandbytes; in a model as small as this no column is an outlier by threshold 0."""
    from transformers import BitsAndBytesConfig

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    small().save_pretrained(tmp_path / "model")
    config = BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.float32, llm_int8_threshold=0.0, **options)
    return AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=config, device_map="cpu").eval()


def torchao(config):
    from torchao.quantization import quantize_

    model = small()
    quantize_(model, config)
    return model


def unpacked(model, weight_of):
    """The dense model with the numbers that the packed one computes with."""
    dense = small()
    for name, module in model.named_modules():
        if name.endswith(PROJECTIONS) or (name == "lm_head" and hasattr(module.weight, "qdata")):
            dense.get_submodule(name).weight.data = weight_of(module).detach().clone().float()
    return dense


def build(kind, tmp_path):
    """Return a packed model, the dense one that it stands for, and by what it is packed."""
    if kind == "4bit":
        from bitsandbytes.functional import dequantize_4bit

        model = bitsandbytes(tmp_path, load_in_4bit=True)
        return model, unpacked(model, lambda m: dequantize_4bit(m.weight.data, m.weight.quant_state)), "Linear4bit"
    from torchao.quantization import Int8WeightOnlyConfig

    model = torchao(Int8WeightOnlyConfig())
    return model, unpacked(model, lambda m: m.weight.dequantize()), "Int8Tensor"


def measure(model, **options):
    return posterity.measure(model, None, tokens(2), context=12, **{"progress": False} | options)


@pytest.mark.parametrize("kind", ["4bit", "torchao"])
def test_a_model_with_packed_weights_is_measured_as_the_dense_one_it_stands_for(kind, tmp_path, capsys):
    model, dense, name = build(kind, tmp_path)
    options = {"losses": True, "horizons": (1, 4)}
    result, expected = measure(model, progress=True, **options), measure(dense, **options)
    for variable in ("credit", "mass", "attention", "credit_by_position", "loss", "loss_credit", "horizon_by_document"):
        scale = float(abs(expected[variable]).max())  # float32: 1e-5 of the largest, as in other tests of float32
        np.testing.assert_allclose(result[variable], expected[variable], rtol=1e-4, atol=1e-5 * scale, err_msg=variable)
    assert result.weight_by_document.isnull().all()
    reason = f"W_Q of 2 layers, W_K of 2 layers, W_V of 2 layers: {name} keeps them packed"
    assert reason in result.attrs["weights_left_out"]
    assert result.attrs["packed_weights"] == name
    assert result.attrs["parameters"] == expected.attrs["parameters"]
    posterity.summary(result)
    assert f"{name} keeps them packed" in " ".join(capsys.readouterr().out.split())
    page = posterity.report(result).html
    assert reason in page
    assert 'id="weights"' not in page
    assert fingerprint(model) != fingerprint(dense)
    shares = measure(model, parameters=True, batch=1)
    assert not any(x.endswith(PROJECTIONS) for x in shares.parameter.values)


def test_eight_bit_weights_are_measured_by_default(tmp_path):
    """Its forward pass rounds activations, so no dense model is the same: against autograd at its own projections."""
    model = bitsandbytes(tmp_path, load_in_8bit=True)
    result = measure(model)
    assert "Linear8bitLt keeps them packed" in result.attrs["weights_left_out"]
    values = []
    hooks = [
        layer.self_attn.v_proj.register_forward_hook(lambda _m, _a, out: (out.retain_grad(), values.append(out))[1])
        for layer in model.model.layers
    ]
    embed = model.get_input_embeddings().register_forward_hook(lambda _m, _a, x: x.detach().requires_grad_())
    for row in tokens(2):
        summed_loss(model, row[None]).backward()
    for hook in (*hooks, embed):
        hook.remove()
    for layer in range(2):
        expected = sum(x.grad.square().sum().item() for x in values[layer::2])
        assert result.credit.sel(layer=layer, stream="value").sum().item() == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("bits", [4, 8])
def test_adapters_over_packed_weights_are_split_and_their_base_is_left_out(bits, tmp_path):
    from peft import LoraConfig, get_peft_model

    base = bitsandbytes(tmp_path, **{f"load_in_{bits}bit": True})
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)).eval()
    result = measure(model)
    assert "keeps them packed" in result.attrs["weights_left_out"]
    assert result.weight_by_document.isnull().all()
    parameters = adapter_parameters(model)
    assert list(result.adapter.values) == list(parameters)
    model.enable_input_require_grads()
    for document, row in enumerate(tokens(2)):
        model.zero_grad()
        summed_loss(model, row[None]).backward()
        for name, x in parameters.items():
            actual = squared_norm(result.adapter_by_document.sel(adapter=name, document=document)).item()
            assert actual == pytest.approx(x.grad.square().sum().item(), rel=1e-4 if bits == 4 else 5e-2), name


def test_a_stream_of_dense_weights_beside_packed_ones_keeps_its_split():
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model, dense = small(), small()
    quantize_(model, Int8WeightOnlyConfig(), lambda _module, name: name.endswith("k_proj"))
    for name, module in model.named_modules():
        if name.endswith("k_proj"):
            dense.get_submodule(name).weight.data = module.weight.dequantize()
    result, expected = measure(model), measure(dense)
    assert result.attrs["weights_left_out"].startswith("W_K of 2 layers: Int8Tensor")
    for stream in ("query", "value"):
        actual, other = (x.weight_mean.sel(stream=stream) for x in (result, expected))
        np.testing.assert_allclose(actual, other, rtol=1e-4)
    assert result.weight_mean.sel(stream="key").isnull().all()


def test_a_stream_of_which_one_of_two_factors_is_packed_has_no_split():
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model, ids = tiny("deepseek_v3", torch.float32), tokens(1)
    quantize_(model, Int8WeightOnlyConfig(), lambda _module, name: name.endswith("kv_a_proj_with_mqa"))
    result = posterity.measure(model, None, ids, context=12, progress=False)
    assert result.weight_mean.sel(stream=["key", "value"]).isnull().all()
    assert result.weight_mean.sel(stream="query").notnull().all()
    assert result.attrs["weights_left_out"].startswith("W_K of 2 layers, W_V of 2 layers: Int8Tensor")


def test_quanto_keeps_its_split_for_autograd_sends_gradients_to_its_weights():
    from optimum.quanto import freeze, qint8, quantize

    model, dense = small(), small()
    quantize(model, weights=qint8)
    freeze(model)
    for name, module in model.named_modules():
        if name.endswith(PROJECTIONS):
            dense.get_submodule(name).weight.data = module.weight.dequantize().detach()
    dense.lm_head.weight.data = model.lm_head.weight.dequantize().detach()
    result, expected = measure(model.eval(), progress=True), measure(dense)
    assert result.attrs["weights_left_out"] == ""
    for variable in ("credit", "weight_mean"):
        scale = float(abs(expected[variable]).max())
        np.testing.assert_allclose(result[variable], expected[variable], rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_packed_weights_without_a_backward_pass_are_refused_by_name(kind):
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        Int8StaticActivationInt8WeightConfig,
        PerTensor,
    )

    scale = torch.full((1, 1, 1), 0.05)
    static = Int8StaticActivationInt8WeightConfig(act_quant_scale=scale, granularity=PerTensor())
    model = torchao(Int8DynamicActivationInt8WeightConfig() if kind == "dynamic" else static)
    reason = r"no gradient passes through model.layers.0.self_attn.q_proj: the kernel .* \(Int8Tensor\) has no backward"
    with pytest.raises(InputError, match=reason):
        measure(model)


class Packed(nn.Module):
    """A projection with packed weights whose kernel says nothing to autograd, as some of C++ do."""

    def __init__(self, weight, gradient):
        super().__init__()
        self.scale = weight.abs().max().item() / 127
        self.weight = nn.Parameter((weight / self.scale).round().to(torch.int8), requires_grad=False)
        self.gradient = gradient

    def forward(self, x):
        return _Kernel.apply(x, self.weight * self.scale, self.gradient)


class _Kernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, gradient):
        ctx.save_for_backward(weight)
        ctx.gradient = gradient
        return x @ weight.T

    @staticmethod
    def backward(ctx, grad):
        return (grad @ ctx.saved_tensors[0] if ctx.gradient else torch.zeros(*grad.shape[:-1], 64)), None, None


@pytest.mark.parametrize("place", ["self_attn.o_proj", "mlp.down_proj"])
def test_a_kernel_that_loses_the_gradient_is_refused_wherever_it_stands(place):
    model = small()
    parent, _, name = f"model.layers.1.{place}".rpartition(".")
    weight = model.get_submodule(f"{parent}.{name}").weight.detach()
    setattr(model.get_submodule(parent), name, Packed(weight, gradient=True))
    assert posterity.check(model).ok
    setattr(model.get_submodule(parent), name, Packed(weight, gradient=False))
    with pytest.raises(InputError, match=rf"no gradient passes through {parent}.{name}: .* \(Packed\)"):
        measure(model)


def test_bitsandbytes_does_not_pack_anew_for_the_cpu_while_a_model_is_measured(tmp_path, monkeypatch):
    """Where the CPU has bf16 instructions it would, for good, and without a backward pass."""
    model = bitsandbytes(tmp_path, load_in_4bit=True)
    packed = [x for x in model.modules() if hasattr(x, "support_avx512bf16_for_cpu")]
    for module in packed:
        module.support_avx512bf16_for_cpu = True
    name = "bitsandbytes.nn.modules._convert_weight_packed_for_cpu"
    monkeypatch.setattr(name, lambda *_: pytest.fail("packed anew"))
    assert float(measure(model).credit.sum()) > 0
    assert packed
    assert all(module.support_avx512bf16_for_cpu for module in packed)


def test_a_ledger_of_zeros_is_refused_and_one_layer_of_zeros_is_not():
    model = exact("llama")
    ids = tokens(1)
    with posterity.account(model) as ledger:
        (summed_loss(model, ids) * 0).backward()
    with pytest.raises(InputError, match="all gradients of queries, keys and values are exactly 0"):
        ledger.result()
    silent = copy.deepcopy(model)
    silent.model.layers[1].self_attn.o_proj.weight.data.zero_()
    credit = measure(silent).credit.sum(("head", "stream", "reader_of", "lag"))
    assert float(credit[1]) == 0
    assert float(credit[0]) > 0
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
    with pytest.raises(InputError, match="all gradients of queries, keys and values are exactly 0"):
        measure(model)
