"""How far the positions of a model reach, as its config tells: learned, rotary, or distances only.

Read by whoever must refuse a document that is too long. `config` is a model's config of transformers.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from luthier.errors import Refused

DISTANCES = ("bloom", "mpt")  # families that have no positions at all, only ALiBi
# families whose position_ids are [B, 2, S]: where in the context, and how far behind it (0 = context)
TWO_AXES = ("chatglm", "glm_legacy")


def position_axes(model_type: str) -> int:
    """2 where position_ids are [B, 2, S] and the second axis says what is context (0), else 1."""
    return 2 if model_type in TWO_AXES else 1


def kind_of_positions(config: Any) -> Literal["rotary", "alibi", "other"]:
    """`rotary`: turned as transformers' rope functions do it. `other`: a learned table, or a form of its own."""
    text = config.get_text_config()
    if getattr(text, "alibi", False) or text.model_type in DISTANCES:
        return "alibi"
    return "rotary" if getattr(text, "rope_parameters", None) else "other"


def num_positions(config: Any) -> int | None:
    """Tokens of the longest document; None where there is no limit (ALiBi) or the config does not say.

    With dynamic NTK `max_position_embeddings` is the length from which the base grows, and `factor` how
    many times longer documents are meant to be.
    """
    text = config.get_text_config()
    count = getattr(text, "max_position_embeddings", None)
    if count is None or kind_of_positions(config) == "alibi":
        return None
    entries = rope_entries(text).values()
    dynamic = [e["factor"] for e in entries if e.get("rope_type") == "dynamic"]
    return math.floor(count * max([1.0, *dynamic]))


def rope_entries(text: Any) -> dict[str, dict[str, Any]]:
    """`rope_parameters` by type of layer; one entry named "" where all layers share it."""
    parameters = getattr(text, "rope_parameters", None) or {}
    nested = {k: v for k, v in parameters.items() if isinstance(v, dict)}
    return nested or ({"": parameters} if parameters else {})


def check_positions(config: Any, length: int, asked: str) -> None:
    """Refuse documents of `length` tokens where the model has fewer positions; `asked` names the key."""
    limit = num_positions(config)
    if limit is None or length <= limit:
        return
    shorter = f"give {asked.partition('=')[0]}={limit} or less"
    if kind_of_positions(config) == "rotary":
        recorded = [
            e.get("original_max_position_embeddings")
            for e in rope_entries(config.get_text_config()).values()
        ]
        factor = math.ceil(length / (recorded[-1] or limit))
        shorter += f", or stretch its rotary positions: model.rope_scaling.type=yarn model.rope_scaling.factor={factor}"
    else:
        shorter += "; there are no others to learn from, and model.rope_scaling is for rotary positions only"
    raise Refused(asked, f"the model has {limit} positions", shorter)
