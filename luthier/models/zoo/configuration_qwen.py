"""The config of Qwen v1, of today's and of older files. See `qwen.py`."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PretrainedConfig

from luthier.errors import Refused

# keys of the code of August 2023 -> today's
OLDER_KEYS = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
    "ffn_hidden_size": "intermediate_size",
    "embd_pdrop": "emb_dropout_prob",
    "attn_pdrop": "attn_dropout_prob",
}


class QWenConfig(PretrainedConfig):
    """Fields of the original config.json; the defaults are Qwen-7B's. `intermediate_size` counts w1 and w2.

    `bf16`, `fp16`, `fp32` and `use_flash_attn` are kept and not looked at: the caller chooses. Refused: a
    quantised checkpoint, an int8 cache, and heads that do not make up `hidden_size`.
    """

    model_type = "qwen"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - transformers' own form
    vocabulary: ClassVar = ("qwen.tiktoken", "Qwen/Qwen-7B")  # file, and a folder that has it

    vocab_size: int = 151936
    hidden_size: int = 4096
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    kv_channels: int = 128
    intermediate_size: int = 22016
    emb_dropout_prob: float = 0.0
    attn_dropout_prob: float = 0.0
    layer_norm_epsilon: float = 1e-6
    initializer_range: float = 0.02
    max_position_embeddings: int = 8192
    seq_length: int = 8192
    rotary_pct: float = 1.0
    rotary_emb_base: float = 10000
    use_dynamic_ntk: bool = True
    use_logn_attn: bool = True
    scale_attn_weights: bool = True
    use_cache: bool = True
    bf16: bool = False
    fp16: bool = False
    fp32: bool = False
    use_flash_attn: bool | str = "auto"
    no_bias: bool = True
    onnx_safe: bool | None = None
    tie_word_embeddings: bool = False
    use_cache_quantization: bool = False
    use_cache_kernel: bool = False
    softmax_in_fp32: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        asked = "the config.json of a Qwen v1 model"
        quantised = kwargs.get("quantization_config") or {}
        method = quantised.get("quant_method") if isinstance(quantised, dict) else "unknown"
        if method in ("gptq", "awq", "unknown"):
            raise Refused(
                asked,
                f"its weights are quantised ({method}), as those of Qwen-7B-Chat-Int4",
                "give the original, unquantised weights (Qwen-7B-Chat)",
            )
        if self.use_cache_quantization or self.use_cache_kernel:
            raise Refused(
                asked,
                "it asks for an int8 cache (use_cache_quantization, use_cache_kernel)",
                "set both to false: the weights are the same",
            )
        if self.num_attention_heads * self.kv_channels != self.hidden_size:
            raise Refused(
                asked,
                f"{self.num_attention_heads} heads of kv_channels={self.kv_channels} do not make up "
                f"hidden_size={self.hidden_size}",
                "give the config.json that came with the weights",
            )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers', with the keys and defaults of the older code where it was written by that."""
        older = {new: config_dict[old] for old, new in OLDER_KEYS.items() if old in config_dict}
        if older:
            rest = {key: value for key, value in config_dict.items() if key not in OLDER_KEYS}
            config_dict = {"layer_norm_epsilon": 1e-5, "seq_length": 2048} | rest | older
        return super().from_dict(config_dict, **kwargs)
