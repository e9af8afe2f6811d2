"""Tiny random models of several architectures, in float64 where their laws are exact."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

COMMON = {"vocab_size": 61, "max_position_embeddings": 64}
PLAIN = {
    **COMMON,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
}
CONFIGS = {
    "llama": PLAIN,
    "qwen3": PLAIN,  # norms on queries and keys
    "phi3": PLAIN | {"pad_token_id": 0},  # one fused projection, grouped heads
    "gpt_neox": {**PLAIN, "rotary_pct": 0.5},  # one fused projection, biases
    "gpt2": {**COMMON, "n_positions": 64, "n_embd": 24, "n_layer": 3, "n_head": 4, "n_inner": 40},  # biases
    "mistral": PLAIN | {"sliding_window": 5},
    "gemma2": PLAIN | {"sliding_window": 5, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 6},
    "gpt_oss": PLAIN | {"sliding_window": 5, "num_local_experts": 2, "num_experts_per_tok": 1},  # sinks
    "deepseek_v3": {  # latent attention: keys wider than values
        **COMMON,
        "hidden_size": 24,
        "intermediate_size": 40,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 12,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 6,
        "v_head_dim": 5,
        "first_k_dense_replace": 2,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 1,
    },
}


def tiny(name, dtype=torch.float64, implementation="eager", **changes):
    """A random model with weights large enough for attention to be far from uniform."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **(CONFIGS[name] | changes))
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).to(dtype)
    model.set_experts_implementation("eager")  # the grouped one knows no float64
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    return model.eval()


def tokens(batch=2, length=12, seed=0):
    return torch.randint(1, 61, (batch, length), generator=torch.Generator().manual_seed(seed))


def summed_loss(model, ids, **inputs):
    """Negative log-likelihood of every next token, summed."""
    logits = model(input_ids=ids, use_cache=False, **inputs).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
