"""What a stage's layers keep for the backward, and layers that are compiled.

The results are the same in every way. Recomputation goes around the layer, by the switch that transformers documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from typing import Any, Literal

import torch
import torch.nn.attention.varlen  # registers its operator
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from luthier.batch import current_layout, layout_scope
from luthier.errors import Refused
from luthier.models import cpu_attention as cpu_attention  # registers the operator
from luthier.models.absent import Absent, present
from luthier.models.fast import keep_products
from luthier.models.stage import Stage, decoder_layers

_ATTENTION = {  # of the kernels `native`, `sdpa` and `varlen`
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.torch_attn._varlen_attn.default,
    torch.ops.luthier.attention.default,
}
# results that `selective` recomputation keeps: matrix products are dear to redo, the rest is cheap. Not those that are
# written into a tensor that is there (`addmm_`): torch takes that for a change of what it kept
_KEPT = _ATTENTION | {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
}
KEEPS = ("native", "sdpa", "varlen")  # kernels whose results `keep_attention` finds


def set_recompute(
    stage: Stage, mode: Literal["none", "layer", "selective"], keep_attention: int = 0
) -> None:
    """What the layers keep for the backward: all; their input; or their input and matrix products.

    With `layer`, the first `keep_attention` layers (-1: all) keep what attention gives, too.
    The results are the same. It acts in training mode only.
    """
    stage.recompute, stage.keep_attention = mode, keep_attention
    keep_products(stage.model, mode != "none")
    if mode == "none":
        for module in stage.model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.gradient_checkpointing = False
        return
    for number, layer in enumerate(decoder_layers(stage.model)):
        if isinstance(layer, Absent):
            continue
        kept = _KEPT if mode == "selective" else set()
        if mode == "layer" and (keep_attention < 0 or number < keep_attention):
            kept = _ATTENTION
        # dropout is a function of the rows: there is no generator state to keep
        run = partial(
            checkpoint,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=partial(_contexts, kept),
        )
        # the switch that transformers documents on GradientCheckpointingLayer
        layer.gradient_checkpointing = True  # pyright: ignore[reportArgumentType]
        layer._gradient_checkpointing_func = run  # pyright: ignore[reportArgumentType]


def check_kept(keep_attention: int, kernel: str) -> None:
    """Refuse `keep_attention` with an attention kernel whose results recomputation does not see as one."""
    if keep_attention and kernel not in KEEPS:
        raise Refused(
            f"train.keep_attention={keep_attention}",
            f"attention is computed by {kernel} here, whose results cannot be told from others",
            f"give model.attention={' or '.join(KEEPS[1:])}, or leave train.keep_attention out",
        )


def compile_layers(stage: Stage) -> None:
    """Compile each decoder layer; call it after `set_recompute`.

    Attention is one operator there, or stays outside of the graphs: they know no documents, and rows of any
    length share them. Recomputation goes around the
    compiled layer. Refused together with `selective`, which has to see each product of a layer.
    """
    if stage.recompute == "selective":
        raise Refused(
            "train.compile=true was asked for",
            "train.recompute=selective cannot see into compiled layers",
            "use train.recompute=layer or none",
        )
    for layer in present(decoder_layers(stage.model)):
        if stage.recompute == "layer":
            plain: Any = layer._gradient_checkpointing_func
            run = partial(_run_compiled, plain)
            layer._gradient_checkpointing_func = run  # pyright: ignore[reportArgumentType]
        else:
            layer.compile(dynamic=True)  # rows have many lengths


def _run_compiled(run: Callable[..., Any], layer: partial[Any], *args: Any) -> Any:
    """`run` on the compiled form of the partial that transformers makes of a layer's forward."""
    return run(partial(_compiled(layer.func), *layer.args, **layer.keywords), *args)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)


def _contexts(kept: set[Any]) -> tuple[AbstractContextManager, AbstractContextManager]:
    """Contexts of a layer's first run and of its recomputation, which re-enters the layout of the first."""
    again = layout_scope(current_layout())
    if not kept:
        return nullcontext(), again
    first, replay = create_selective_checkpoint_contexts(partial(_policy, kept))
    return first, _both(again, replay)


def _policy(kept: set[Any], context: Any, op: Any, *args: Any, **_: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE


@contextmanager
def _both(outer: AbstractContextManager, inner: AbstractContextManager) -> Iterator[None]:
    with outer, inner:
        yield
