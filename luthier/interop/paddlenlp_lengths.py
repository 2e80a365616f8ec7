"""PaddleNLP's long-sequence strategies and PoSE -> `model.rope_scaling` and `data.pose`.

The strategies (`use_long_sequence_strategies`, `strategy_type`, `strategy_name`, `rope_scaling_factor`) stretch from
the argument max_length, not from the model's own window. What its code does by mistake is not copied: dynamic
NTK that never acts, a YaRN blend other than the paper's (`yarn_paddlenlp` here), ALiBi for powers of two only.
"""

from __future__ import annotations

from typing import Any

from luthier.errors import Refused, suggest
from luthier.interop.paddlenlp_arguments import Arguments

KEYS = ("strategy_name", "rope_scaling_factor", "strategy_type", "use_long_sequence_strategies")
# strategy_type -> strategy_name -> our type; None where nothing is stretched
STRATEGIES: dict[str, dict[str, str | None]] = {
    "embedding_strategies": {
        "RotaryEmbedding": None,
        "LinearScalingRotaryEmbedding": "linear",
        "NTKScalingRotaryEmbedding": "ntk",
        "DynamicNTKScalingRotaryEmbedding": "dynamic",
        "YaRNScalingRotaryEmbedding": "yarn",
    },
    "attention_strategies": {"AttentionWithLinearBias": None},
}
REMARKS = {
    "RotaryEmbedding": "it only makes PaddleNLP's table longer",
    "AttentionWithLinearBias": "BLOOM has ALiBi as it is, for any length and any number of heads; other families ignore it",
    "DynamicNTKScalingRotaryEmbedding": "the base grows beyond max_length; PaddleNLP's never grows inside the scaled length",
    "YaRNScalingRotaryEmbedding": "the paper's blend of frequencies; PaddleNLP's own is asked for by "
    "model.rope_scaling.type=yarn_paddlenlp beside the file",
}


def lengths(t: Any, a: Arguments) -> None:
    """Translate into `t`, a `Translation`. Raises Refused for an unknown strategy."""
    window = a["max_length"]
    if a["use_long_sequence_strategies"]:
        window = int(window * a["rope_scaling_factor"])
        _strategy(t, a)
    elif given := [name for name in KEYS if name in a]:
        t.remarks.append(
            f"without use_long_sequence_strategies these do nothing: {', '.join(given)}"
        )
    if a["use_pose_convert"] and a["autoregressive"]:
        t.put("data.pose", "paddlenlp", "use_pose_convert")
        t.put("data.pose_window", window, "rope_scaling_factor", "max_length")
    elif a["use_pose_convert"]:
        t.remarks.append("use_pose_convert does nothing without autoregressive=true")


def _strategy(t: Any, a: Arguments) -> None:
    known = STRATEGIES.get(str(a["strategy_type"]))
    if known is None:
        raise Refused(
            f"strategy_type={a['strategy_type']} with use_long_sequence_strategies=true",
            f"known here: {', '.join(STRATEGIES)}",
            suggest(str(a["strategy_type"]), STRATEGIES),
        )
    name = str(a["strategy_name"])
    if name not in known:
        raise Refused(
            f"strategy_name={name} of {a['strategy_type']}",
            f"known here: {', '.join(known)}",
            suggest(name, known),
        )
    if name in REMARKS:
        t.remarks.append(f"{name}: {REMARKS[name]}")
    kind = known[name]
    if kind is None:
        return
    scaling: dict[str, Any] = {"type": kind, "factor": a["rope_scaling_factor"]}
    if kind in ("yarn", "dynamic"):
        scaling["original_max_position_embeddings"] = a["max_length"]
    t.put("model.rope_scaling", scaling, *KEYS)
