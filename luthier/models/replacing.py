"""A family's attention layers become a subclass of ours, on one model that was made already."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel


def replace_attention(model: PreTrainedModel, theirs: type, ours: type, **values: Any) -> None:
    """Make each layer of class `theirs` one of its subclass `ours`, with these attributes."""
    for module in model.modules():
        if isinstance(module, theirs):
            module.__class__ = ours
            for name, value in values.items():
                setattr(module, name, value)
        if isinstance(module, PreTrainedModel):
            # transformers judges by the source of the class that these layers have left
            module._can_set_attn_implementation = _true  # pyright: ignore[reportAttributeAccessIssue]


def _true() -> bool:
    return True
