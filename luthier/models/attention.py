"""The attention seam: transformers' models call `attend` here, whichever family they are.

Registered under the name "luthier" with `AttentionInterface` and `AttentionMaskInterface` on import.
Inside a stage there is a current `Layout`: no mask is built, and a kernel works on the layout's documents
(trap: masks that families build from position_ids leak where a family forgets to pass them). Outside one
(a plain call, `generate`) the masks are transformers' own and the result is that of the plain model.
The kernels are in `kernels.py`.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from luthier.batch import current_layout
from luthier.errors import Refused
from luthier.models import kernels
from luthier.models.families import TESTED
from luthier.models.kernels import KERNELS, LACKS, Scores

NAME = "luthier"
ATTENDED = {
    "full_attention",
    "sliding_attention",
    "attention",
}  # layer types that are attention only
# arguments that change what is attended to, in families that no kernel here covers
FOREIGN = ("position_bias", "indices", "block_indices", "sinks", "head_mask")


def install(model: PreTrainedModel, kernel: str, *, train: bool = False) -> str:
    """Make `model` attend through this file with `kernel` (`model.attention` of the config).

    `auto` is `sdpa` on CPU and `flex` on GPU. Gives back what was installed, in words: layers with a
    feature that the kernel lacks are computed by `math`, and the text says so. Refused: a family
    that does not go through transformers' attention interface or mixes in other layers, a kernel that
    does not fit the device, and `varlen` or `flash` with a feature that they lack. `train`:
    gradients are needed, and the model's own attention dropout acts.
    """
    check_family(type(model), model.config)
    device = next(model.parameters()).device
    chosen = check_kernel(kernel, device, train)
    layers = [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "is_causal")]
    if any(not m.is_causal for m in layers):
        raise _unsupported(model.config.model_type, "has layers that see what follows")
    asked = {feature for layer in layers for feature in _features(layer, train)}
    lacking = sorted(asked & LACKS[chosen])
    if lacking and chosen in ("varlen", "flash"):
        raise Refused(
            f"model.attention={chosen} was asked for",
            f"it cannot do the {' and '.join(lacking)} of {model.config.model_type}",
            "use model.attention=flex or math",
        )
    model.set_attn_implementation(NAME)
    for module in layers:
        module.attention_kernel = chosen  # pyright: ignore[reportArgumentType]
    return f"{chosen} (layers with {' or '.join(lacking)}: math)" if lacking else chosen


def check_family(cls: type[PreTrainedModel], config: Any) -> None:
    """Refuse a family whose layers this file cannot serve, before it is built."""
    if not cls.is_backend_compatible() or not cls._can_set_attn_implementation():
        raise _unsupported(config.model_type, "does not use transformers' attention interface")
    text = config.get_text_config()
    types = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or ()
    other = sorted(set(types) - ATTENDED)
    if other:
        raise _unsupported(config.model_type, f"has layers of the type {', '.join(other)}")


@torch.compiler.disable  # the layout and the number of documents must not enter a compiled graph
def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **extra: Any,
) -> tuple[Tensor, None]:
    """What a model's attention layer calls: query [B, H, S, D], key and value [B, K, T, D] -> [B, S, H, D].

    In a layout T = S and there is no mask. `s_aux` [H] are attention sinks.
    """
    layout = current_layout()
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if layout is None:
        scores = Scores(scale, softcap=softcap, sinks=s_aux, dropout=dropout)
        return _plain(module, query, key, value, attention_mask, scores, extra), None
    _refuse_foreign(module, attention_mask, sliding_window, extra)
    if dropout and not hasattr(module, "dropout_key"):
        raise RuntimeError("dropout inside a layout needs models.dropout.seed_dropout(model, seed)")
    scores = Scores(
        scale,
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
        dropout=dropout,
        dropout_key=getattr(module, "dropout_key", (0, "")),
    )
    chosen = getattr(module, "attention_kernel", None) or check_kernel("auto", query.device, False)
    used = {name for name in ("softcap", "sinks") if getattr(scores, name) is not None}
    used |= {"dropout"} if dropout else set()
    kernel = kernels.math if used & LACKS[chosen] else KERNELS[chosen]
    return kernel(query, key, value, layout, scores), None


def _plain(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scores: Scores,
    extra: dict[str, Any],
) -> Tensor:
    """As transformers' `sdpa`; softcap and sinks, which it lacks, by plain products over [B, H, S, T]."""
    if scores.softcap is None and scores.sinks is None:
        sdpa = AttentionInterface()["sdpa"]
        return sdpa(
            module, query, key, value, mask, dropout=scores.dropout, scaling=scores.scale, **extra
        )[0]
    repeat = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeat, dim=1) for x in (key, value))
    table = kernels.capped(query @ key.transpose(-1, -2) * scores.scale, scores.softcap)
    if mask is None and query.shape[2] > 1:
        # a cache with room ahead: query i is at position i, later keys are unused
        mask = torch.ones(table.shape[-2:], dtype=torch.bool, device=table.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        # as transformers' masks: the lowest number, not -inf, so that a row of padding gives no NaN
        table = table.masked_fill(~mask, torch.finfo(table.dtype).min)
    elif mask is not None:
        table = table + mask
    weights = kernels.with_sinks(table, scores.sinks, value.dtype)
    weights = nn.functional.dropout(weights, scores.dropout, training=scores.dropout > 0)
    return (weights @ value).transpose(1, 2).contiguous()


def _mask(**arguments: Any) -> Tensor | None:
    """transformers asks here for the mask of a forward: none inside a layout, else that of `sdpa`."""
    if current_layout() is not None:
        return None
    return AttentionMaskInterface()["sdpa"](**arguments)


def _refuse_foreign(
    module: nn.Module, mask: Tensor | None, window: int | None, extra: dict[str, Any]
) -> None:
    """Stop where a family means something that would be lost here."""
    family = getattr(getattr(module, "config", None), "model_type", type(module).__name__)
    found = [name for name in FOREIGN if extra.get(name) is not None]
    if mask is not None:
        found.append("a mask of its own")
    if extra.get("is_causal") is False:
        found.append("is_causal=False")
    types = getattr(getattr(module, "config", None), "layer_types", None)
    index = getattr(module, "layer_idx", None)
    if types and index is not None and window is None and types[index] == "sliding_attention":
        found.append("a sliding window that it does not pass on")
    if found:
        raise _unsupported(family, f"uses {', '.join(found)} in its attention")


def _features(module: nn.Module, train: bool) -> set[str]:
    """Features a layer will ask for, as far as its attributes tell."""
    found = set()
    if getattr(module, "attn_logit_softcapping", None) is not None:
        found.add("softcap")
    if isinstance(getattr(module, "sinks", None), Tensor):
        found.add("sinks")
    rates = (getattr(module, "attention_dropout", 0.0), getattr(module, "attn_dropout", 0.0))
    if train and any(getattr(rate, "p", rate) for rate in rates):
        found.add("dropout")
    return found


def check_kernel(kernel: str, device: torch.device, train: bool) -> str:
    """The kernel for a device; Refused when it cannot run there."""
    gpu = device.type == "cuda"
    if kernel == "auto":
        return "flex" if gpu else "sdpa"
    if kernel in ("varlen", "flash") and not gpu:
        raise Refused(
            f"model.attention={kernel} was asked for",
            f"it needs a GPU and the model is on {device.type}",
            "use model.attention=auto",
        )
    if kernel == "flex" and train and not gpu:
        raise Refused(
            "model.attention=flex was asked for",
            f"torch's FlexAttention computes no gradients on {device.type}",
            "use model.attention=auto",
        )
    if kernel == "flash" and importlib.util.find_spec("flash_attn") is None:
        raise Refused(
            "model.attention=flash needs the package 'flash-attn'",
            "it is not installed",
            "pip install flash-attn, or use model.attention=flex",
        )
    return kernel


def _unsupported(family: str, why: str) -> Refused:
    return Refused(
        f"model family '{family}' was asked for",
        f"it {why}, which packed rows need here",
        f"tested families: {', '.join(TESTED)}",
    )


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, _mask)
