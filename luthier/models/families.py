"""Facts that an architecture does not tell: what follows the head, dropout outside of modules,
and how families that transformers has no plan for are cut among devices.

Keyed by transformers' `model_type`. A family without a row has a plain head and its dropout in
`nn.Dropout` modules; `stage.check_stage` compares any model with its own plain forward, so that a family
that needs a row and has none is refused instead of computed wrongly.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

from luthier.models.zoo import MODEL_TYPES

# model types that tests/conformance covers (tests/conformance/test_support.py compares); others are tried,
# checked at start-up, and the user is told
TESTED = (
    "llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gpt2", "gpt_neox",
    "gpt_oss", "opt", "phi", "phi3", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "granite",
    "cohere", "cohere2", "olmo2", "seed_oss", "smollm3", "starcoder2", "bloom", "deepseek_v3", "falcon",
    "mpt",
)  # fmt: skip


@dataclass(frozen=True)
class Family:
    """`softcap`, `divide`, `multiply`: config keys of what happens to the logits, in this order of use:
    logits * multiply / divide, then c * tanh(logits / c). `functional_dropout`: class of a layer ->
    (its attribute with the rate, the sub-layers whose outputs it drops). `explicit_mask`: a plain call
    needs the mask of what is visible, [B, 1, S, S], and does not read it from the positions.
    `aligned_labels`: the model's own loss does not shift labels. Axes of positions are in `positions.py`."""

    softcap: str | None = None
    divide: str | None = None
    multiply: str | None = None
    functional_dropout: dict[str, tuple[str, tuple[str, ...]]] | None = None
    explicit_mask: bool = False
    aligned_labels: bool = False


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
    "mpt": Family(functional_dropout={"MptMLP": ("hidden_dropout", ("down_proj",))}),
    "glm_legacy": Family(explicit_mask=True, aligned_labels=True),
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


# families that are refused -> the tested one that computes most alike, where names do not tell
_ALIKE = {"gptj": "gpt_neox", "codegen": "gpt_neox", "xglm": "opt", "biogpt": "opt"}


def nearest(model_type: str) -> str:
    """The tested family most like `model_type`: by what it computes where that is known, else by name; or nothing."""
    near = get_close_matches(model_type, TESTED, n=1, cutoff=0.5)
    return _ALIKE.get(model_type) or (near[0] if near else "")


def untested(model_type: str) -> list[str]:
    """What to tell the user of a family that no row of the support table covers; nothing for the others."""
    if model_type in (*TESTED, *MODEL_TYPES, "chatglm2", "glm_legacy"):
        return []
    near = nearest(model_type)
    return [
        f"the model family '{model_type}' is in no row of the support table (docs/reference/families.md)"
        + (f"; the nearest that is: {near}" if near else "")
        + ". Its packed rows and logits were compared with its plain forward just now, and agree"
    ]


def family_of(model_type: str) -> Family:
    """The facts about a family; the plain ones when nothing is known."""
    return _FAMILIES.get(model_type, Family())


Part = Literal["heads", "groups", "inner", "per_head"]


@dataclass(frozen=True)
class Cut:
    """How tensor parallelism cuts a linear layer among its ranks.

    `along`: its "outputs" (the bias is cut alike) or its "inputs" (partial sums are added, the bias once).
    `parts`: what lies one after the other along the cut side, each to be cut by itself: the "heads" of d
    numbers; the "groups", heads of keys and values that several heads of queries share (a rank's heads
    need theirs, so with more ranks than groups a group is on several); the "inner" numbers of the MLP. "per_head" are
    heads of 3 x d numbers, each its own query, key and value. One part: a plain contiguous cut.
    """

    along: Literal["outputs", "inputs"]
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Plan:
    """How a family is cut. Names are paths in the model; what is named nowhere is whole on every rank.

    Tensor parallel: `cuts` by the layer's path inside a decoder layer; `by_head`: tensors with one number per
    head of the queries, cut with the heads; `counts`: attributes of attention layers that hold the parts of
    their fused layer in numbers, to be made a rank's own (the others read the shape of the weight).
    Embedding and head are cut by vocabulary rows, and are one tensor where the config ties them.
    Pipeline: `embedding`, `layers`, `norm` and `head`. The base model's forward also runs on the
    stages behind the first, with hidden states as inputs_embeds; there `adds` (tables whose rows it
    adds to them) must give 0, and `first` (norm and dropout of embeddings) must change nothing. What
    stands for an absent layer gives the hidden states back, in a tuple where `tuples`.
    """

    cuts: dict[str, Cut]
    embedding: str
    layers: str
    norm: str
    head: str = "lm_head"
    adds: tuple[str, ...] = ()
    first: tuple[str, ...] = ()
    by_head: tuple[str, ...] = ()
    counts: tuple[str, ...] = ()
    tuples: bool = False


_IN_HEADS, _IN_INNER = Cut("inputs", ("heads",)), Cut("inputs", ("inner",))
_HEADS, _INNER = Cut("outputs", ("heads",)), Cut("outputs", ("inner",))
_STACKED = Cut("outputs", ("heads", "heads", "heads"))  # all queries, all keys, all values
_PER_HEAD = Cut("outputs", ("per_head",))
# families without a tp_plan of transformers; gpt2's layers hold their weights as [in, out]
_PLANS: dict[str, Plan] = {
    "bloom": Plan(
        cuts={
            "self_attention.query_key_value": _PER_HEAD,
            "self_attention.dense": _IN_HEADS,
            "mlp.dense_h_to_4h": _INNER,
            "mlp.dense_4h_to_h": _IN_INNER,
        },
        embedding="transformer.word_embeddings",
        layers="transformer.h",
        norm="transformer.ln_f",
        first=("transformer.word_embeddings_layernorm",),
        by_head=("self_attention.alibi_slopes",),
        counts=("num_heads",),
        tuples=True,
    ),
    "chatglm": Plan(
        cuts={
            "attention.query_key_value": _PER_HEAD,
            "attention.dense": _IN_HEADS,
            "mlp.dense_h_to_4h": _INNER,
            "mlp.dense_4h_to_h": _IN_INNER,
        },
        embedding="transformer.word_embeddings",
        layers="transformer.layers",
        norm="transformer.final_layernorm",
    ),
    "chatglm2": Plan(
        cuts={
            "self_attention.query_key_value": Cut("outputs", ("heads", "groups", "groups")),
            "self_attention.dense": _IN_HEADS,
            "mlp.dense_h_to_4h": Cut("outputs", ("inner", "inner")),  # gate, value
            "mlp.dense_4h_to_h": _IN_INNER,
        },
        embedding="transformer.embedding.word_embeddings",
        layers="transformer.encoder.layers",
        norm="transformer.encoder.final_layernorm",
        head="transformer.output_layer",
        counts=("sizes",),
    ),
    "falcon": Plan(
        cuts={
            # one key and value for all heads; other forms: `fused.split_of`
            "self_attention.query_key_value": Cut("outputs", ("heads", "groups", "groups")),
            "self_attention.dense": _IN_HEADS,
            "mlp.dense_h_to_4h": _INNER,
            "mlp.dense_4h_to_h": _IN_INNER,
        },
        embedding="transformer.word_embeddings",
        layers="transformer.h",
        norm="transformer.ln_f",
        by_head=("self_attention.alibi_slopes",),
        counts=("num_heads", "num_kv_heads"),
        tuples=True,
    ),
    "glm_legacy": Plan(
        cuts={
            "attention.query_key_value": _STACKED,
            "attention.dense": _IN_HEADS,
            "mlp.dense_h_to_4h": _INNER,
            "mlp.dense_4h_to_h": _IN_INNER,
        },
        embedding="glm.word_embeddings",
        layers="glm.transformer.layers",
        norm="glm.transformer.final_layernorm",
        adds=(
            "glm.transformer.position_embeddings",
            "glm.transformer.block_position_embeddings",
        ),
        first=("glm.transformer.embedding_dropout",),
    ),
    "gpt2": Plan(
        cuts={
            "attn.c_attn": _STACKED,
            "attn.c_proj": _IN_HEADS,
            "mlp.c_fc": _INNER,
            "mlp.c_proj": _IN_INNER,
        },
        embedding="transformer.wte",
        layers="transformer.h",
        norm="transformer.ln_f",
        adds=("transformer.wpe",),
        first=("transformer.drop",),
        counts=("split_size",),
    ),
    "mpt": Plan(
        cuts={
            "attn.Wqkv": _STACKED,
            "attn.out_proj": _IN_HEADS,
            "ffn.up_proj": _INNER,
            "ffn.down_proj": _IN_INNER,
        },
        embedding="transformer.wte",
        layers="transformer.blocks",
        norm="transformer.norm_f",
        by_head=("attn.alibi_slopes",),
        tuples=True,
    ),
    "opt": Plan(
        cuts={
            **{f"self_attn.{name}": _HEADS for name in ("q_proj", "k_proj", "v_proj")},
            "self_attn.out_proj": _IN_HEADS,
            "fc1": _INNER,
            "fc2": _IN_INNER,
        },
        embedding="model.decoder.embed_tokens",
        layers="model.decoder.layers",
        norm="model.decoder.final_layer_norm",
        adds=("model.decoder.embed_positions",),
        counts=("num_heads",),
    ),
    "qwen": Plan(
        cuts={
            "attn.c_attn": _STACKED,
            "attn.c_proj": _IN_HEADS,
            "mlp.w1": _INNER,
            "mlp.w2": _INNER,
            "mlp.c_proj": _IN_INNER,
        },
        embedding="transformer.wte",
        layers="transformer.h",
        norm="transformer.ln_f",
        first=("transformer.drop",),
    ),
}


def plan_of(model_type: str) -> Plan | None:
    """How the family is cut; None where transformers' own plans say it, or where nothing is known."""
    return _PLANS.get(model_type)
