"""Tiny models with adapters of peft, and the model that each is when they are merged."""

import torch
from peft import IA3Config, LoraConfig, VeraConfig, get_peft_model
from support.loss_oracles import exact

PEFT_WARNING = "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"  # of transformers, when peft asks
TARGETS = {
    "llama": ["q_proj", "v_proj"],
    "gpt2": ["c_attn"],
    "phi3": ["qkv_proj"],
    "deepseek_v3": ["q_a_proj", "kv_b_proj"],  # low-rank factors, one of each adapted
}


def configs(name):
    """One config of each kind, for the projections of a model."""
    targets, transposed = TARGETS[name], name == "gpt2"
    lora = {"r": 2, "target_modules": targets, "init_lora_weights": False, "fan_in_fan_out": transposed}
    return {
        "lora": LoraConfig(**lora),
        "rslora": LoraConfig(**lora, use_rslora=True, lora_alpha=4),
        "dora": LoraConfig(**lora, use_dora=True),
        "ia3": IA3Config(target_modules=targets, feedforward_modules=[], fan_in_fan_out=transposed),
        "vera": VeraConfig(r=2, target_modules=targets, init_weights=False, fan_in_fan_out=transposed),
    }


def adapt(name, config, **changes):
    """A tiny model with an adapter whose parameters are all random, in float64."""
    torch.manual_seed(0)
    model = get_peft_model(exact(name, **changes), config).double().eval()
    randomise(model)
    return model


def randomise(model):
    """Move the parameters of all adapters away from where they begin: magnitudes that norms give, ones, zeros."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.mul_(1 + 0.3 * noise)


def adapter_parameters(model):
    """The parameters that peft has added, by their names in the model inside."""
    inner = model.get_base_model()
    marks = ("lora_", "ia3_", "vera_")
    return {name: x for name, x in inner.named_parameters() if any(mark in name for mark in marks)}


def squared_norm(terms):
    """The squared norm of the whole gradient from its three terms."""
    return terms.sel(term="self") + terms.sel(term="other") + 2 * terms.sel(term="inner")
