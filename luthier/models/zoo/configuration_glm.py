"""The config of GLM (blank infilling), and how its files are told from GLM-4's. See `glm.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

from transformers import PretrainedConfig

from luthier.errors import Refused

ORIGINAL_TYPE = "glm"  # what config.json says
MASKS = ("[MASK]", "[sMASK]", "[gMASK]")  # a short blank, a sentence, the rest of the text
SOP = "<|startofpiece|>"
LEGACY_KEYS = ("block_position_encoding", "max_sequence_length", "num_layers")
# vocabulary size of the released models -> <|startofpiece|> and the mask tokens, by their training code
RELEASED_IDS = {
    50304: (50257, (50260, 50264, 50263)),  # glm-2b, glm-10b: [MASK], [sMASK], [gMASK]
    50048: (50006, (50003, 50008, 50009)),  # glm-large-chinese, glm-10b-chinese
}


def is_legacy_glm(config: dict[str, Any]) -> bool:
    """Whether a config.json of model_type "glm" is the blank-infilling GLM's, not GLM-4's."""
    return any(key in config for key in LEGACY_KEYS)


def special_ids_beside(folder: Path) -> dict[str, Any]:
    """`sop_token_id` and `mask_token_ids` by the added_tokens.json or tokenizer_config.json of a folder."""
    added, settings = folder / "added_tokens.json", folder / "tokenizer_config.json"
    ids: dict[str, int] = {}
    if settings.is_file():
        found = json.loads(settings.read_text("utf-8")).get("added_tokens_decoder") or {}
        ids = {entry["content"]: int(number) for number, entry in found.items()}
    if added.is_file():
        ids |= json.loads(added.read_text("utf-8"))
    masks = [ids[token] for token in MASKS if token in ids]
    known = SOP in ids and masks
    return {"sop_token_id": ids[SOP], "mask_token_ids": masks} if known else {}


class GLMConfig(PretrainedConfig):
    """Fields of the original config.json; the defaults are glm-large's. The feed-forward width is 4 x hidden.

    `sop_token_id` and `mask_token_ids` are not in the original: where they are known, `generate` finds the
    blank and the border of the context in the ids by itself. They are read from the tokenizer files beside
    config.json, or known for the vocabulary of a released model. Refused: ids outside of the vocabulary or
    alike, and what no released model has (relative or one-axis positions).
    """

    model_type = "glm_legacy"  # here; files say "glm", so that the original code loads them
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - transformers' own form
    vocabulary: ClassVar = (
        "cog-pretrain.model",
        "THUDM/glm-large-chinese",
    )  # file, and a folder that has it
    attribute_map = {  # noqa: RUF012
        "num_hidden_layers": "num_layers",
        "max_position_embeddings": "max_sequence_length",
    }

    num_layers: int = 24
    vocab_size: int = 30592
    hidden_size: int = 1024
    num_attention_heads: int = 16
    embedding_dropout_prob: float = 0.1
    attention_dropout_prob: float = 0.1
    output_dropout_prob: float = 0.1
    max_sequence_length: int = 512
    checkpoint_activations: bool = False
    checkpoint_num_layers: int = 1
    parallel_output: bool = True
    relative_encoding: bool = False
    block_position_encoding: bool = True
    output_predict: bool = True
    spell_length: int | None = None
    spell_func: str = "lstm"
    attention_scale: float = 1.0  # only guards half precision: it cancels in the softmax
    initializer_range: float = 0.02
    pool_token: str = "cls"
    use_cache: bool = True
    tie_word_embeddings: bool = True  # the original computes the logits from the embedding
    sop_token_id: int | None = None
    mask_token_ids: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("model_type", None)
        super().__post_init__(**kwargs)
        asked = "the config.json of a GLM model"
        if self.relative_encoding or not self.block_position_encoding:
            raise Refused(
                asked,
                f"relative_encoding={self.relative_encoding} and "
                f"block_position_encoding={self.block_position_encoding}, which no released model has",
                "use relative_encoding=false and block_position_encoding=true",
            )
        if self.sop_token_id is None and self.mask_token_ids is None:
            sop, masks = RELEASED_IDS.get(self.vocab_size, (None, None))
            self.sop_token_id, self.mask_token_ids = sop, list(masks) if masks else None
        ids = [*(self.mask_token_ids or ())]
        ids += [] if self.sop_token_id is None else [self.sop_token_id]
        if len(set(ids)) < len(ids) or not all(0 <= i < self.vocab_size for i in ids):
            raise Refused(
                asked,
                f"sop_token_id={self.sop_token_id}, mask_token_ids={self.mask_token_ids}: they must "
                f"differ and lie below vocab_size={self.vocab_size}",
                "take them from the model's own tokenizer (added_tokens.json)",
            )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers', with the special ids that tokenizer files beside config.json tell."""
        if where := kwargs.get("name_or_path"):  # AutoConfig says where it read
            config_dict = special_ids_beside(Path(where)) | config_dict
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def get_config_dict(cls, where: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """As transformers' (`where`: folder or hub name), refused for a config.json of GLM-4."""
        found, rest = super().get_config_dict(where, **kwargs)
        if found and not is_legacy_glm(found):
            raise Refused(
                "a blank-infilling GLM was asked for",
                f"the config.json has none of {', '.join(LEGACY_KEYS)}: it is another model's",
                "load it with AutoModelForCausalLM, which tells the families apart",
            )
        return special_ids_beside(Path(where)) | found | {"model_type": cls.model_type}, rest

    def to_dict(self) -> dict[str, Any]:
        """The fields as config.json has them."""
        found = super().to_dict() | {"model_type": ORIGINAL_TYPE}
        unknown = [key for key in ("sop_token_id", "mask_token_ids") if found[key] is None]
        return {key: value for key, value in found.items() if key not in unknown}
