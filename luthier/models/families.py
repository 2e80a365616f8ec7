"""Facts that an architecture does not tell: what follows the head, dropout outside of modules, axes of positions.

Keyed by transformers' `model_type`. A family without a row has a plain head and its dropout in
`nn.Dropout` modules; `stage.check_stage` compares any model with its own plain forward, so that a family
that needs a row and has none is refused instead of computed wrongly.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

from luthier.models.zoo import MODEL_TYPES

# model types that tests/conformance covers (tests/conformance/test_support.py compares); others are tried,
# checked at start-up, and the user is told
TESTED = (
    "llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gpt2", "gpt_neox",
    "gpt_oss", "opt", "phi", "phi3", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "granite",
    "cohere", "cohere2", "olmo2", "seed_oss", "smollm3", "starcoder2", "bloom", "deepseek_v3", "falcon",
)  # fmt: skip


@dataclass(frozen=True)
class Family:
    """`softcap`, `divide`, `multiply`: config keys of what happens to the logits, in this order of use:
    logits * multiply / divide, then c * tanh(logits / c). `functional_dropout`: class of a layer ->
    (its attribute with the rate, the sub-layers whose outputs it drops). `position_axes`: 2 where
    position_ids are [B, 2, S] and the second axis says what is context (0). `explicit_mask`: a plain call
    needs the mask of what is visible, [B, 1, S, S], and does not read it from the positions."""

    softcap: str | None = None
    divide: str | None = None
    multiply: str | None = None
    functional_dropout: dict[str, tuple[str, tuple[str, ...]]] | None = None
    position_axes: int = 1
    explicit_mask: bool = False


_SOFTCAP = Family(softcap="final_logit_softcapping")
_GRANITE = Family(divide="logits_scaling")
_COHERE = Family(multiply="logit_scale")
_FAMILIES: dict[str, Family] = {
    "gemma2": _SOFTCAP,
    "gemma3_text": _SOFTCAP,
    "vaultgemma": _SOFTCAP,
    "nanochat": _SOFTCAP,
    "granite": _GRANITE,
    "granitemoe": _GRANITE,
    "granitemoeshared": _GRANITE,
    "cohere": _COHERE,
    "cohere2": _COHERE,
    "bloom": Family(
        functional_dropout={
            "PackedBloomAttention": ("hidden_dropout", ("dense",)),
            "BloomMLP": ("hidden_dropout", ("dense_4h_to_h",)),
        }
    ),
    "chatglm": Family(position_axes=2),
    "glm_legacy": Family(position_axes=2, explicit_mask=True),
    "opt": Family(functional_dropout={"OPTDecoderLayer": ("dropout", ("self_attn", "fc2"))}),
    "seed_oss": Family(
        functional_dropout={
            "SeedOssAttention": ("residual_dropout", ("o_proj",)),
            "SeedOssMLP": ("residual_dropout", ("down_proj",)),
        }
    ),
    "starcoder2": Family(
        functional_dropout={
            "Starcoder2Model": ("embedding_dropout", ("embed_tokens",)),
            "Starcoder2Attention": ("residual_dropout", ("o_proj",)),
            "Starcoder2MLP": ("residual_dropout", ("c_proj",)),
        }
    ),
}


def untested(model_type: str) -> list[str]:
    """What to tell the user of a family that no row of the support table covers; nothing for the others."""
    if model_type in (*TESTED, *MODEL_TYPES, "chatglm2", "glm_legacy"):
        return []
    near = get_close_matches(model_type, TESTED, n=1)
    return [
        f"the model family '{model_type}' is in no row of the support table (docs/reference/families.md)"
        + (f"; the nearest that is: {near[0]}" if near else "")
        + ". Its packed rows and logits were compared with its plain forward just now, and agree"
    ]


def family_of(model_type: str) -> Family:
    """The facts about a family; the plain ones when nothing is known."""
    return _FAMILIES.get(model_type, Family())
