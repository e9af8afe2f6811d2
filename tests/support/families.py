"""A tiny random model of every causal language model type that transformers knows, made from its config alone.

The default config of a type is shrunk by the names of its settings; what a type needs beyond that is in `CHANGES`.
Where layers differ in kind (attention and a state space, full and sliding windows, dense and sparse), at least one
layer of each kind stays.
"""

import contextlib

import torch
from transformers import CONFIG_MAPPING, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

TYPES: tuple[str, ...] = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
LAYERS = HEADS = 4

# What every config gets that has the setting (and does not leave it at None).
SIZES = {
    0: "pad_token_id eod_token_id sep_token_id cls_token_id num_nextn_predict_layers",
    1: """bos_token_id decoder_start_token_id n_group topk_group num_expert_group first_k_dense_replace num_dense_layers
        n_shared_experts num_shared_experts moe_num_shared_experts mamba_n_groups n_groups mamba_ngroups""",
    2: """eos_token_id forced_eos_token_id num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads
        num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k expand mamba_expand hc_mult hc_count o_groups
        sliding_window_pattern global_attn_every_n_layers index_n_heads attn_layer_period zero_expert_num""",
    # Layers and heads, experts, and what has to divide them.
    4: """num_hidden_layers n_layer n_layers num_layers num_blocks decoder_layers encoder_layers num_decoder_layers
        num_encoder_layers depth num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads
        encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads
        linear_num_heads linear_num_value_heads num_local_experts num_experts n_routed_experts moe_num_experts
        qk_rope_head_dim rotary_dim index_topk""",
    5: """sliding_window sliding_window_size attention_window_size attention_chunk_size window_size local_attention
        local_attention_window_len""",
    8: """head_dim swa_head_dim global_head_dim kv_channels v_head_dim qk_nope_head_dim index_head_dim linear_head_dim
        linear_key_head_dim linear_value_head_dim dim_head d_head attention_head_size q_lora_rank kv_lora_rank
        o_lora_rank mamba_n_heads mamba_num_heads n_mamba_heads mamba_d_head mamba_head_dim mamba_d_state mamba_dt_rank
        state_size ssm_state_size time_step_rank chunk_size mamba_chunk_size hidden_size_per_layer_input adapter_rank
        laurel_rank hc_lowrank router_hidden_size pronunciation_embed_dim shape_embed_dim""",
    32: """hidden_size n_embd d_model emb_dim embedding_size embedding_dim input_embedding_size output_embedding_size
        word_embed_proj_dim lru_width hidden_size_global""",
    48: """intermediate_size n_inner dff dim_ff d_inner ffn_dim ffn_hidden_size feed_forward_size decoder_ffn_dim
        encoder_ffn_dim moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size
        shared_experts_intermediate_size shared_intermediate_size dense_intermediate_size intermediate_size_mlp
        moe_shared_expert_intermediate_size""",
    64: "mamba_d_ssm",
    97: """vocab_size decoder_vocab_size vocab_size_per_layer_input pronunciation_vocab_size shape_vocab_size
        encoder_hash_byte_group_vocab ngram_vocab_size_base""",
    128: """max_position_embeddings n_positions n_ctx max_seq_len context_length model_max_length max_target_positions
        max_source_positions""",
}
SETTINGS = {name: value for value, names in SIZES.items() for name in names.split()}
UNSET = ("head_dim", "num_key_value_heads")  # also set where the default leaves them at None

# What single types need on top: settings by name, sub-configs as dictionaries.
CONVOLUTION = {"layer_types": ["conv", "full_attention"] * 2}
STATE_SPACE = {"layer_types": ["linear_attention", "full_attention"] * 2}
WINDOWS = ["sliding_attention", "full_attention"] * 2
SLIDING = {"use_sliding_window": True, "sliding_window": 5, "layer_types": WINDOWS}
GEMMA3N = {"intermediate_size": 48, "num_kv_shared_layers": 2}
GEMMA4 = {"global_head_dim": 16, "num_kv_shared_layers": 2}
DOTS3 = {
    "head_dim": 12,
    "swa_num_attention_heads": HEADS,
    "swa_num_key_value_heads": HEADS,
    "swa_q_lora_rank": 8,
    "swa_kv_lora_rank": 8,
    "swa_head_dim": 12,
    "swa_qk_nope_head_dim": 8,
    "swa_v_head_dim": 8,
}
QWEN4 = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "ple_layer_ids": [1],
    "eos_token_id": 2,
}
CHANGES: dict[str, dict] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere": {"logit_scale": 1.0},
    "cohere2": {"logit_scale": 1.0},
    "cohere2_moe": {"logit_scale": 1.0},
    "cohere_compass_text": {
        "layer_types": WINDOWS,
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in WINDOWS},
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dots1": {"layer_types": WINDOWS, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {"text_config": DOTS3},
    "dots3_note_text": DOTS3,
    "gemma3n": {"text_config": GEMMA3N},
    "gemma3n_text": GEMMA3N,
    "gemma4": {"text_config": GEMMA4},
    "gemma4_text": GEMMA4,
    "gemma4_unified": {"text_config": GEMMA4},
    "gemma4_unified_text": GEMMA4,
    "got_ocr2": {"vision_config": {"image_size": 32, "patch_size": 8, "output_channels": 8, "mlp_dim": 48}},
    "granitemoehybrid": STATE_SPACE,
    "inkling_text": {"logits_mup_width_multiplier": 1.0, "mlp_layer_types": ["dense", "sparse"] * 2},
    "jamba": {"attn_layer_offset": 1},
    "laguna": {"layer_types": WINDOWS, "sliding_window": 5},
    "lfm2": CONVOLUTION,
    "lfm2_moe": CONVOLUTION,
    "mamba2": {"num_heads": 8},
    "mellum": {"layer_types": WINDOWS, "sliding_window": 5},
    "minicpm3": {"dim_model_base": 32},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
        "index_block_size": 4,
        "index_topk_blocks": 2,
    },
    "phi4_multimodal": {
        "vision_config": {"image_size": 28, "crop_size": 28},
        "audio_config": {
            "ext_pw_out_channel": 32,
            "depthwise_separable_out_channel": 32,
            "nemo_conv_channels": 32,
        },
    },
    "qwen2": SLIDING,
    "qwen2_moe": SLIDING,
    "qwen3": SLIDING,
    "qwen3_moe": {"use_sliding_window": True, "sliding_window": 5},
    "qwen4_exp": {"text_config": QWEN4},
    "qwen4_exp_text": QWEN4,
    "reformer": {"axial_pos_shape": [8, 16], "axial_pos_embds_dim": [16, 16]},
    "smollm3": SLIDING,
    "xlm": {"causal": True},
    "xlnet": {"attn_type": "uni"},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid", "hybrid_sliding"] * 2, "sliding_window": 5},
}

IMPOSSIBLE: dict[str, str] = {
    "gemma4_assistant": "has no keys and values of its own: it reads those of another model",
    "gemma4_unified_assistant": "has no keys and values of its own: it reads those of another model",
}


def build(model_type: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Make the tiny model of a type: seeded, in evaluation mode, with eager attention where it exists."""
    torch.manual_seed(0)
    kind = CONFIG_MAPPING[model_type]
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[kind]
    changes = CHANGES.get(model_type, {})
    for name, part in kind.sub_configs.items():
        if model_class.config_class is part:  # the language model is one tower of several
            kind, changes = part, changes.get(name, {})
    config = kind(**shrunk(kind(), changes))
    with without_timm():
        model = model_class._from_config(config, attn_implementation="eager", experts_implementation="eager")
    with torch.no_grad():  # what begins at zero would hide what it does
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.2)
    return model.to(dtype).eval()


@contextlib.contextmanager
def without_timm():
    """Leave out towers that need the package timm (the vision tower of gemma3n)."""
    make_model = AutoModel.from_config

    def from_config(config, **options):
        return torch.nn.Identity() if config.model_type == "gemma3n_vision" else make_model(config, **options)

    AutoModel.from_config = from_config
    try:
        yield
    finally:
        AutoModel.from_config = make_model


def shrunk(default: PreTrainedConfig, changes: dict) -> dict:
    """Arguments that make a small config like a given one, sub-configs and the lists of layer kinds included."""
    arguments: dict = {}
    for name, value in vars(default).items():
        if isinstance(value, PreTrainedConfig):
            arguments[name] = shrunk(value, changes.get(name, {}))
        elif (type(value) is int and name in SETTINGS) or (value is None and name in UNSET):
            arguments[name] = SETTINGS[name]
        elif "drop" in name and isinstance(value, float):
            arguments[name] = 0.0
        elif name in ("initializer_range", "init_std", "initializer_factor", "embed_init_std"):
            arguments[name] = 0.2  # large enough for attention to be far from uniform
        elif name == "is_decoder":
            arguments[name] = True
        elif isinstance(value, list) and len(value) > LAYERS and all(isinstance(x, str) for x in value):
            arguments[name] = (list(dict.fromkeys(value)) * LAYERS)[:LAYERS]
    if "kv_lora_rank" in arguments:  # latent attention: every head has its own keys
        arguments |= {"num_key_value_heads": HEADS, "head_dim": arguments["qk_rope_head_dim"]}
    parts = {name for name, value in arguments.items() if isinstance(value, dict)}
    return arguments | {name: value for name, value in changes.items() if name not in parts}
