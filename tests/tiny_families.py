"""Tiny random configs of every family of the support table, one entry a family or a form of one.

Windows are shorter than the documents of tests, softcaps and scales bite, experts are more than a token is
sent to. `conftest.tiny_model` builds them; `tests/conformance` runs them all.
"""

from __future__ import annotations

from typing import Any

from tests.zoo_configs import ZOO_CONFIGS, ZOO_RATES

VOCAB = 320  # above the tokenizer's 286: a padded vocabulary is the normal case

_IDS = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
DECODER = {
    **_IDS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
}
_WINDOWED = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
_UNTIED = {"tie_word_embeddings": False}
_ALIBI = {
    **_IDS,
    "hidden_size": 72,
    "n_layer": 2,
    "n_head": 6,  # no power of two: the slopes of ALiBi come from two series
    "initializer_range": 0.1,
}
_FALCON = {
    **_IDS,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.1,
    "max_position_embeddings": 256,
}
_OPT = {
    **_IDS,
    "hidden_size": 64,
    "word_embed_proj_dim": 64,
    "ffn_dim": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "init_std": 0.1,
}

# what differs from DECODER
DECODERS: dict[str, dict[str, Any]] = {
    "llama": _UNTIED,
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": _UNTIED,
    "mistral": {"sliding_window": 4, **_UNTIED},
    "mixtral": {"num_local_experts": 4, **_UNTIED},
    "gemma": {},
    "gemma2": {
        "sliding_window": 4,
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {**_WINDOWED, "query_pre_attn_scalar": 16},
    "phi3": _UNTIED,
    "glm4": _UNTIED,
    "granite": {
        "embedding_multiplier": 12.0,
        "logits_scaling": 8.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.1,
    },
    "olmo2": _UNTIED,
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "decoder_sparse_step": 1,
        **_UNTIED,
    },
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "head_dim": 8,  # of the rotated part
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,  # keys and values of different widths
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        **_UNTIED,
    },
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 2.0,
            "original_max_position_embeddings": 128,
        },
        **_WINDOWED,
        **_UNTIED,
    },
}
# whole configs
OTHERS: dict[str, dict[str, Any]] = {
    "gpt2": {
        **_IDS,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 256,
        "initializer_range": 0.1,
    },
    "gpt_neox": {
        **_IDS,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "initializer_range": 0.1,
        "rotary_pct": 0.25,
        **_UNTIED,
    },
    "opt": _OPT,
    "opt_350m": {**_OPT, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
    "bloom": _ALIBI,
    "falcon": {**_FALCON, "multi_query": True, "parallel_attn": True},
    "falcon_40b": {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon_alibi": {
        **_FALCON,
        "hidden_size": 72,
        "num_attention_heads": 6,
        "alibi": True,
        "multi_query": False,
        "parallel_attn": False,
        "bias": True,
    },
}
# forms of a family beside its usual one -> its model_type
MODEL_TYPES = {"opt_350m": "opt", "falcon_40b": "falcon", "falcon_alibi": "falcon"}
FAMILIES = (*DECODERS, *OTHERS)
# families beside those of the first list, which CI leaves to `make test-all`
MORE: dict[str, dict[str, Any]] = {
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25, **_WINDOWED},
    "glm": _UNTIED,
    "phi": {"partial_rotary_factor": 0.5, **_UNTIED},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "decoder_sparse_step": 1,
        **_UNTIED,
    },
    "seed_oss": _UNTIED,
    "smollm3": {"no_rope_layers": [1, 0], **_UNTIED},
    "starcoder2": {},
}
# whole configs among these
MORE_OTHERS: dict[str, dict[str, Any]] = {
    "mpt": {
        **_IDS,
        "d_model": 72,
        "n_layers": 2,
        "n_heads": 6,
        "max_seq_len": 256,
        "initializer_range": 0.1,
        "attn_config": {"clip_qkv": 1.5},
    },
}
MORE |= MORE_OTHERS
# rates of dropout beside attention_dropout
RATES = {
    "gpt2": ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    "opt": ("dropout",),
    "bloom": ("hidden_dropout",),
    "falcon": ("hidden_dropout",),
    "gpt_neox": ("hidden_dropout",),
    "phi": ("resid_pdrop", "embd_pdrop"),
    "phi3": ("resid_pdrop",),
    "seed_oss": ("residual_dropout",),
    "starcoder2": ("residual_dropout", "embedding_dropout"),
}


def model_type(family: str) -> str:
    """transformers' name of the family."""
    return MODEL_TYPES.get(family, family)


def config_keys(family: str, dropout: float = 0.0) -> dict[str, Any]:
    """The keys of config.json of a family of the table; `dropout` is every rate that it has."""
    if family in ZOO_CONFIGS:
        rates = (*ZOO_RATES.get(family, ()), "attention_dropout")
        return {**ZOO_CONFIGS[family], **dict.fromkeys(rates, dropout)}
    whole = {**OTHERS, **MORE_OTHERS}
    keys = whole[family] if family in whole else {**DECODER, **{**DECODERS, **MORE}[family]}
    if family == "mpt":
        return keys  # its rate is a whole number: there is none
    rates = ("attention_dropout", *RATES.get(model_type(family), ()))
    return {**keys, **dict.fromkeys(rates, dropout)}
