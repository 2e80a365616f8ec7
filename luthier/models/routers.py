"""Routers of mixtures of experts: which modules they are, and their logits in a running forward.

A family tells transformers which module gives its router's logits (`_can_record_outputs`); the same is
hooked here, so that the stage, which calls the base model, has them too. What is made of them is
`train/router.py`'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

_found: ContextVar[list[Tensor] | None] = ContextVar("luthier_router_logits", default=None)


def watch_routers(model: PreTrainedModel) -> int:
    """Hook the routers of a model, for `router_logits`; how many there are."""
    number = 0
    for module in model.modules():
        recorder = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits")
        if recorder is None or not isinstance(module, PreTrainedModel):
            continue
        for router in module.modules():
            if isinstance(router, recorder.target_class) and not hasattr(router, "luthier_watched"):
                router.luthier_watched = True  # pyright: ignore[reportArgumentType]
                router.register_forward_hook(_Hook(recorder.index))
                number += 1
    return number


@contextmanager
def router_logits() -> Iterator[list[Tensor]]:
    """Collect the logits [B*S, E] of every router that runs inside, layer by layer.

    A layer that is computed again in the backward runs outside.
    """
    found: list[Tensor] = []
    token = _found.set(found)
    try:
        yield found
    finally:
        _found.reset(token)


class _Hook:
    def __init__(self, index: int) -> None:
        self.index = index

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        found = _found.get()
        if found is not None:
            logits = output[self.index] if isinstance(output, tuple) else output
            found.append(logits.reshape(-1, logits.shape[-1]))


def router_facts(config: Any) -> dict[str, Any] | None:
    """`top_k` and the weights `balance` and `z` that a model's config gives to its router's losses.

    None where the family has no such loss (dense models; DeepSeek-V3, whose routers are balanced otherwise).
    `balance` and `z` are 0 unless the config asks for router logits (output_router_logits), as in transformers.
    """
    text = config.get_text_config()
    weight = getattr(text, "router_aux_loss_coef", None)
    top_k = getattr(text, "num_experts_per_tok", None)
    if weight is None or not top_k:
        return None
    asked = bool(getattr(text, "output_router_logits", False))
    z = getattr(text, "router_z_loss_coef", None) or 0.0
    return {"top_k": top_k, "balance": weight if asked else 0.0, "z": z if asked else 0.0}
