"""What transformers' `tp_plan` does not tell of a decoder layer that is cut among heads, family by family.

Fused projections, whose pieces are cut each by itself; what has a number per head; norms over the width of all
heads; latents that every head reads. Families without a `tp_plan` (`families.plan_of`) are told in the same words.
What is made of it for one model is `cuts.py`'s.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from luthier.models.families import Cut, Part, plan_of

_IN_HEADS, _IN_INNER = Cut("inputs", ("heads",)), Cut("inputs", ("inner",))
_HEADS, _INNER = Cut("outputs", ("heads",)), Cut("outputs", ("inner",))
_GROUPS, _GATED = Cut("outputs", ("groups",)), Cut("outputs", ("inner", "inner"))
_FUSED = Cut("outputs", ("heads", "groups", "groups"))  # queries, keys, values


@dataclass(frozen=True)
class Split:
    """How a decoder layer is cut. Names are paths in it; those that a layer does not have are left out.

    `cuts`: in place of what the `tp_plan` says of these layers. `rows`: tensors whose first axis is heads, or groups.
    `counts`: attributes that hold numbers of heads or of the pieces of a fused layer, to be a rank's own; with `config`
    also the number of heads in the layer's config. `gathered`: norms over the width of all heads, which need it whole.
    `branches`: layers whose outputs each rank's heads read, -> what lies between them and the heads: the gradient is a
    rank's share there, and is summed when it comes to the branch.
    """

    cuts: dict[str, Cut] = field(default_factory=dict)
    rows: dict[str, Part] = field(default_factory=dict)
    counts: tuple[str, ...] = ()
    config: bool = False
    gathered: tuple[str, ...] = ()
    branches: dict[str, tuple[str, ...]] = field(default_factory=dict)


_GATED_MLP = {"mlp.gate_up_proj": _GATED, "mlp.down_proj": _IN_INNER}
_ATTENTION = {
    "self_attn.q_proj": _HEADS,
    "self_attn.k_proj": _GROUPS,
    "self_attn.v_proj": _GROUPS,
    "self_attn.o_proj": _IN_HEADS,
}
_SHARED_EXPERT = {
    "mlp.shared_expert.gate_proj": _INNER,
    "mlp.shared_expert.up_proj": _INNER,
    "mlp.shared_expert.down_proj": _IN_INNER,
}
_NORMS_OF_HEADS = Split(
    rows={"self_attn.q_norm.weight": "heads", "self_attn.k_norm.weight": "groups"}
)
_NORMS_OF_ALL = Split(_ATTENTION, gathered=("self_attn.q_norm", "self_attn.k_norm"))
_LATENTS = Split(
    {
        "self_attn.q_proj": _HEADS,
        "self_attn.q_b_proj": _HEADS,
        "self_attn.kv_b_proj": _HEADS,  # per head: keys, values
        "self_attn.o_proj": _IN_HEADS,
    },
    # beside the latent of keys and values it gives the turned part of the keys, one for all heads
    branches={"self_attn.kv_a_proj_with_mqa": ("self_attn.kv_a_layernorm", "self_attn.kv_b_proj")},
)
_SPLITS: dict[str, Split] = {
    "cohere": _NORMS_OF_HEADS,
    "deepseek_v3": _LATENTS,
    "glm": Split(_GATED_MLP),
    "glm4": Split(_GATED_MLP),
    "gpt_oss": Split(_ATTENTION, rows={"self_attn.sinks": "heads"}),
    "olmo2": _NORMS_OF_ALL,
    "phi3": Split(
        {"self_attn.qkv_proj": _FUSED, "self_attn.o_proj": _IN_HEADS, **_GATED_MLP},
        counts=("num_key_value_heads",),
        config=True,
    ),
    "qwen2_moe": Split(_SHARED_EXPERT),
}


def split_of(config: Any) -> Split | None:
    """How the layers of this config are cut, beside what the `tp_plan` says; None where nothing is known."""
    plan = plan_of(config.model_type)
    if plan is None:
        return _SPLITS.get(config.model_type)
    rows: dict[str, Part] = dict.fromkeys(plan.by_head, "heads")
    found = Split(dict(plan.cuts), rows=rows, counts=plan.counts)
    if config.model_type == "falcon" and (
        config.new_decoder_architecture or not config.multi_query
    ):
        # by groups of heads and the key and value that they share, or by heads with their own
        fused = {"self_attention.query_key_value": Cut("outputs", ("per_head",))}
        found = replace(found, cuts=found.cuts | fused)
    return found


def heads_of(config: Any) -> tuple[int, int]:
    """Heads of the queries, and of keys and values."""
    heads = config.num_attention_heads
    if config.model_type == "falcon":
        several = config.new_decoder_architecture or not config.multi_query
        return heads, config.num_kv_heads if several else 1
    groups = getattr(config, "multi_query_group_num", None)
    return heads, groups or getattr(config, "num_key_value_heads", None) or heads
