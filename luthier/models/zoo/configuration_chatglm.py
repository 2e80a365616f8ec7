"""Configs of ChatGLM-6B and of ChatGLM2-6B (which is ChatGLM3-6B's too), and what is refused about them.

Files of both generations say model_type "chatglm" and are told apart by their keys (`is_chatglm_v1`); in here
the second one is "chatglm2". Fields have their original names, with transformers' usual ones beside them
through `attribute_map`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from transformers import PretrainedConfig

from luthier.errors import Refused
from luthier.models.folder import read_header, read_json

ORIGINAL_TYPE = "chatglm"  # what config.json says
# config keys that only one of the two families of model_type "chatglm" has
V1_KEYS = ("inner_hidden_size", "max_sequence_length", "position_encoding_2d")
V2_KEYS = ("padded_vocab_size", "multi_query_group_num", "ffn_hidden_size", "kv_channels")


def is_chatglm_v1(config: dict[str, Any]) -> bool:
    """Whether a config.json of model_type "chatglm" is ChatGLM-6B's, not ChatGLM2's or ChatGLM3's.

    Refused when it has the keys of both or of neither.
    """
    first = [key for key in V1_KEYS if key in config]
    second = [key for key in V2_KEYS if key in config]
    if bool(first) == bool(second):
        found = (
            f"both {first[0]} and {second[0]}"
            if first
            else f"neither {V1_KEYS[0]} nor {V2_KEYS[0]}"
        )
        raise Refused(
            "a model of the family 'chatglm' was asked for",
            f"its config.json has {found}, so it is not clear which generation it is",
            "give the config.json that came with the weights",
        )
    return bool(first)


class ChatGLMConfig(PretrainedConfig):
    """Fields of the original config.json; the defaults are ChatGLM-6B's.

    Refused: a ChatGLM2 config, special ids outside of the vocabulary or alike, and what only the original
    code offers (int4/int8 weights, P-tuning weights inside the model, one-axis positions).
    """

    model_type = "chatglm"
    keys_to_ignore_at_inference: ClassVar = ["past_key_values"]
    vocabulary: ClassVar = ("ice_text.model", "THUDM/chatglm-6b")  # file, and a folder that has it
    attribute_map: ClassVar = {
        "num_hidden_layers": "num_layers",
        "max_position_embeddings": "max_sequence_length",
        "intermediate_size": "inner_hidden_size",
    }

    vocab_size: int = 130528
    hidden_size: int = 4096
    num_layers: int = 28
    num_attention_heads: int = 32
    inner_hidden_size: int = 16384
    max_sequence_length: int = 2048
    layernorm_epsilon: float = 1e-5
    position_encoding_2d: bool = True
    use_cache: bool = True
    bos_token_id: int = 130004
    eos_token_id: int = 130005
    mask_token_id: int = 130000
    gmask_token_id: int = 130001
    pad_token_id: int = 3
    # not in config.json: the original ties by an old default of transformers
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        refuse_config("ChatGLM-6B", kwargs, V2_KEYS, {"position_encoding_2d": True}, self)
        names = ("bos", "eos", "mask", "gmask", "pad")
        ids = {name: getattr(self, f"{name}_token_id") for name in names}
        if len(set(ids.values())) < len(ids) or not all(
            0 <= number < self.vocab_size for number in ids.values()
        ):
            listed = ", ".join(f"{name}_token_id={number}" for name, number in ids.items())
            raise Refused(
                "the special ids of a ChatGLM-6B config.json",
                f"{listed}: they must differ and lie below vocab_size={self.vocab_size}",
                "give the config.json that came with the weights",
            )
        super().__post_init__(**kwargs)


class ChatGLM2Config(PretrainedConfig):
    """Fields of the original config.json; the defaults are ChatGLM2-6B's, which ChatGLM3-6B's are too.

    Refused: a ChatGLM-6B config, int4/int8 weights and P-tuning weights of the original code, the
    `rope_ratio` of the 32k versions, and variants of the network that no released checkpoint uses.
    """

    model_type = "chatglm2"  # here; files say "chatglm", so that the original code loads them
    keys_to_ignore_at_inference: ClassVar = ["past_key_values"]
    vocabulary: ClassVar = ("tokenizer.model", "THUDM/chatglm2-6b")
    attribute_map: ClassVar = {
        "num_hidden_layers": "num_layers",
        "max_position_embeddings": "seq_length",
        "intermediate_size": "ffn_hidden_size",
        "vocab_size": "padded_vocab_size",
        "num_key_value_heads": "multi_query_group_num",
        "head_dim": "kv_channels",
    }

    padded_vocab_size: int = 65024
    hidden_size: int = 4096
    num_layers: int = 28
    num_attention_heads: int = 32
    multi_query_group_num: int = 2
    kv_channels: int = 128
    ffn_hidden_size: int = 13696
    seq_length: int = 32768
    layernorm_epsilon: float = 1e-5
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    add_bias_linear: bool = False
    add_qkv_bias: bool = True
    multi_query_attention: bool = True
    rmsnorm: bool = True
    post_layer_norm: bool = True
    original_rope: bool = True
    rope_ratio: float | int = 1
    apply_residual_connection_post_layernorm: bool = False
    fp32_residual_connection: bool = False
    use_cache: bool = True
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = 0
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("model_type", None)
        fixed = {
            "multi_query_attention": True,
            "rmsnorm": True,
            "post_layer_norm": True,
            "original_rope": True,
            "rope_ratio": 1,
            "apply_residual_connection_post_layernorm": False,
            "fp32_residual_connection": False,
            "tie_word_embeddings": False,
        }
        refuse_config("ChatGLM2", kwargs, V1_KEYS, fixed, self)
        super().__post_init__(**kwargs)

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """As transformers' (source: path or name), under the type that it has here."""
        found, rest = super().get_config_dict(*args, **kwargs)
        return found | {"model_type": cls.model_type}, rest

    def to_dict(self) -> dict[str, Any]:
        """The fields as config.json has them."""
        return super().to_dict() | {"model_type": ORIGINAL_TYPE}


def refuse_config(
    family: str,
    unknown: dict[str, Any],
    foreign: tuple[str, ...],
    fixed: dict[str, Any],
    config: PretrainedConfig,
) -> None:
    """Refuse a config of the other generation, and settings that no released model needs.

    `unknown` are the keys that are no fields; `foreign` those of the other generation; `fixed` the only
    supported value of a field.
    """
    asked = f"a {family} config.json"
    other = [key for key in foreign if key in unknown]
    if other:
        raise Refused(
            asked,
            f"it has {', '.join(other)}, which belong to the other generation of ChatGLM",
            "give the config.json that came with the weights",
        )
    if bits := unknown.get("quantization_bit"):
        raise Refused(
            asked,
            f"it has quantization_bit={bits}: a ChatGLM checkpoint quantised by the original code",
            "give the original, unquantised weights; quantize.weights quantises them here",
        )
    if unknown.get("pre_seq_len"):
        raise Refused(
            asked,
            f"it has pre_seq_len={unknown['pre_seq_len']}: P-tuning weights inside the model",
            "remove the key and train with adapter.method=prefix",
        )
    for key, value in fixed.items():
        if getattr(config, key) != value:
            raise Refused(
                asked, f"it has {key}={getattr(config, key)}", f"only {value} is supported"
            )


def refuse_weights(path: Any, family: str, mark: str) -> None:
    """Refuse a local folder whose safetensors files are another model's or quantised; reads headers only.

    `mark` is in the names of all layers of the family.
    """
    files = sorted(Path(path).glob("model*.safetensors")) if path and Path(path).is_dir() else []
    names = [name for file in files for name in read_header(file)]
    asked = f"{family} weights were asked for from '{path}'"
    # quantised folders of other layouts, whose names they may share, say so in their config.json
    own = names and "quantization_config" not in read_json(Path(path) / "config.json", Path(path))
    if own and any(name.endswith("weight_scale") for name in names):
        raise Refused(
            asked,
            "they are quantised by the original code (weight_scale)",
            "give the original, unquantised weights",
        )
    if names and not any(name.startswith(mark) for name in names):
        raise Refused(
            asked,
            f"no tensor is called {mark}...; the first is {names[0]}",
            "give the config.json that came with the weights",
        )


def refuse_length(family: str, length: int, config: Any) -> None:
    limit = config.max_position_embeddings
    if length > limit:
        raise Refused(
            f"{family} was given rows of {length} tokens",
            f"it has {limit} positions",
            f"give rows of at most {limit} tokens",
        )
