"""Tiny configs of the four families of `models/zoo`, by the keys of their own code; see `conftest.tiny_model`."""

from __future__ import annotations

from typing import Any

VOCAB = 320

ZOO_CONFIGS: dict[str, dict[str, Any]] = {
    "chatglm": {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "num_layers": 2,
        "num_attention_heads": 4,
        "inner_hidden_size": 96,
        "max_sequence_length": 256,
        "mask_token_id": VOCAB - 5,
        "gmask_token_id": VOCAB - 4,
        "bos_token_id": VOCAB - 2,
        "eos_token_id": VOCAB - 1,
        "pad_token_id": 0,
    },
    "chatglm2": {
        "padded_vocab_size": VOCAB,
        "hidden_size": 64,
        "num_layers": 2,
        "num_attention_heads": 4,
        "multi_query_group_num": 2,
        "kv_channels": 20,  # 4 x 20 is not the hidden size
        "ffn_hidden_size": 96,
        "seq_length": 256,
    },
    "glm_legacy": {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "num_layers": 2,
        "num_attention_heads": 4,
        "max_sequence_length": 256,
        "mask_token_ids": [VOCAB - 5, VOCAB - 4, VOCAB - 3],
        "sop_token_id": VOCAB - 2,
    },
    "qwen": {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "kv_channels": 16,
        "intermediate_size": 192,  # of both halves
        "seq_length": 6,  # shorter than the documents: in evaluation they are stretched
        "max_position_embeddings": 256,
    },
}
# rates of dropout beside attention_dropout
ZOO_RATES = {
    "chatglm2": ("hidden_dropout",),
    "glm_legacy": ("embedding_dropout_prob", "output_dropout_prob", "attention_dropout_prob"),
    "qwen": ("emb_dropout_prob", "attn_dropout_prob"),
}
