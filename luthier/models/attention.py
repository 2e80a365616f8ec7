"""The attention seam: transformers' models call `attend` here, whichever family they are.

Registered under the name "luthier" with `AttentionInterface` and `AttentionMaskInterface` on import.
Inside a stage there is a current `Layout`: no mask is built, and a kernel works on the layout's documents
(trap: masks that families build from position_ids leak where a family forgets to pass them). Outside one
(a plain call, `generate`) the masks are transformers' own and the result is that of the plain model.
A layer with an attribute `keys_values`, a function of its index that gives `PrefixKeys`, sees those keys
first, in a layout or outside one. The kernels are in `kernels.py`, families that do not call here by
themselves in `bloom.py`, `falcon.py` and `mpt.py`.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from luthier.batch import capture as capture
from luthier.batch import current_capture, current_layout
from luthier.errors import Refused
from luthier.models import across, bloom, cpu_attention, falcon, kernels, mpt, rotary
from luthier.models.cpu_attention import why_torch as why_torch
from luthier.models.families import TESTED, nearest
from luthier.models.kernels import KERNELS, LACKS, Scores, features

NAME = "luthier"
ATTENDED = {
    "full_attention",
    "sliding_attention",
    "attention",
}  # layer types that are attention only
FEATURES = ("softcap", "s_aux", "alibi_slopes", "alibi")  # arguments beyond plain attention
# arguments that change what is attended to, in families that no kernel here covers
FOREIGN = ("position_bias", "indices", "block_indices", "sinks", "head_mask")
# model_type -> what makes such a model's layers call the attention interface
REPAIRS = {"bloom": bloom.repair, "falcon": falcon.repair, "mpt": mpt.repair}
MASKED = ("mpt",)  # families that convert the mask they are given, so that it cannot be None


def install(model: PreTrainedModel, kernel: str, *, train: bool = False) -> str:
    """Make `model` attend through this file with `kernel` (`model.attention` of the config).

    `auto` is `flex` on GPU, and on CPU `native` where it can be and `sdpa` else. Gives back what was installed, in words: layers with a
    feature that the kernel lacks are computed by another (`_instead`), and the text says so. Refused: a family
    that does not go through transformers' attention interface or mixes in other layers, a kernel that
    does not fit the device, and `varlen` or `flash` with a feature that they lack. `train`:
    gradients are needed, and the model's own attention dropout acts.
    """
    check_family(type(model), model.config)
    if model.config.model_type in REPAIRS:
        REPAIRS[model.config.model_type](model)
    device = next(model.parameters()).device
    chosen = check_kernel(kernel, device, train)
    if chosen == "native":
        _refuse_native(device, model.dtype)
    if kernel == "auto" and chosen == "sdpa" and cpu_attention.lacks(model.dtype) is None:
        chosen = "native"
    layers = [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "is_causal")]
    if any(not m.is_causal for m in layers):
        raise _unsupported(model.config.model_type, "has layers that see what follows")
    asked = {feature for layer in layers for feature in _features(layer, train)}
    lacking = sorted(asked & LACKS[chosen])
    _refuse_lacking(chosen, lacking, model.config.model_type)
    if kernel == "auto" and lacking:
        chosen = _instead(chosen, asked)  # no layer would be faster for the first one
        lacking = sorted(asked & LACKS[chosen])
    model.set_attn_implementation(NAME)
    rotary.per_document(model)
    for module in layers:
        module.attention_kernel = chosen  # pyright: ignore[reportArgumentType]
    other = _instead(chosen, set(lacking))
    return f"{chosen} (layers with {' or '.join(lacking)}: {other})" if lacking else chosen


def _instead(kernel: str, asked: set[str]) -> str:
    """What computes a layer with these features: the kernel if it can, else the next that can."""
    order = (kernel, "sdpa", "math") if kernel == "native" else (kernel, "math")
    return next(name for name in order if not asked & LACKS[name])


def check_family(cls: type[PreTrainedModel], config: Any) -> None:
    """Refuse a family whose layers this file cannot serve, before it is built."""
    known = cls.is_backend_compatible() and cls._can_set_attn_implementation()
    if not known and config.model_type not in REPAIRS:
        raise _unsupported(config.model_type, "does not use transformers' attention interface")
    text = config.get_text_config()
    types = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or ()
    other = sorted(set(types) - ATTENDED)
    if other:
        raise _unsupported(config.model_type, f"has layers of the type {', '.join(other)}")


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """What a model's attention layer calls; see `_attend`. In a compiled graph, plain layers on a CPU are one
    operator, which finds the layout when it runs; the others stay outside of the graph."""
    kernel = getattr(module, "attention_kernel", None)
    native = kernel == "native" and query.dtype == torch.bfloat16
    if (
        torch.compiler.is_compiling()
        and kernel in ("native", "sdpa")
        and not (dropout or any(more.get(name) is not None for name in (*FEATURES, *FOREIGN)))
        and attention_mask is None
        and getattr(module, "keys_values", None) is None
        and (native or (sliding_window is None and query.shape[-1] == value.shape[-1]))
    ):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        out = cpu_attention.packed(query, key, value, scale, sliding_window, by_native=native)
        return out, None
    return _attend(
        module, query, key, value, attention_mask, scaling, dropout, sliding_window, **more
    )


@torch.compiler.disable()  # the layout and the number of documents must not enter a compiled graph
def _attend(
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
    alibi_slopes: Tensor | None = None,
    alibi: Tensor | None = None,
    **extra: Any,
) -> tuple[Tensor, None]:
    """query [B, H, S, D], key and value [B, K, T, D] -> [B, S, H, D].

    In a layout T = S and there is no mask. `s_aux` [H] are attention sinks. ALiBi comes as slopes [H]
    and, for plain calls, as the family's own bias of the keys [B, H, 1, T].
    """
    layout, captured = current_layout(), current_capture()
    if captured is not None:
        captured[module.layer_idx] = key, value  # pyright: ignore[reportArgumentType]
    prefix = getattr(module, "keys_values", None) if captured is None else None
    scores = Scores(
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
        dropout=dropout,
        dropout_key=getattr(module, "dropout_key", (0, "")),
        heads=getattr(module, "heads_here", None),
        alibi=alibi_slopes,
        prefix=None if prefix is None else prefix(module.layer_idx),
    )
    if layout is None:
        return _plain(module, query, key, value, attention_mask, scores, alibi, extra), None
    _refuse_foreign(module, attention_mask, sliding_window, extra)
    if dropout and not hasattr(module, "dropout_key"):
        raise RuntimeError("dropout inside a layout needs models.dropout.seed_dropout(model, seed)")
    chosen = getattr(module, "attention_kernel", None) or check_kernel("auto", query.device, False)
    asked = features(layout, scores)
    _refuse_lacking(chosen, sorted(asked & LACKS[chosen]), _family(module))
    if chosen == "native" and query.dtype != torch.bfloat16:
        chosen = "sdpa"  # a layer that is kept in a wider type
    chosen = _instead(chosen, asked)
    if layout.share is not None:
        return across.attend(chosen, query, key, value, layout, scores, layout.share), None
    return KERNELS[chosen](query, key, value, layout, scores), None


def _plain(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scores: Scores,
    alibi: Tensor | None,
    extra: dict[str, Any],
) -> Tensor:
    """As transformers' `sdpa`; softcap and sinks, which it lacks, by plain products over [B, H, S, T]."""
    by_products = scores.softcap is not None or scores.sinks is not None
    if scores.prefix is not None or alibi is not None or by_products:
        mask = _written_out(mask, query, key)
        if scores.prefix is not None:
            key, value, mask, alibi = _after_prefix(key, value, mask, alibi, scores)
        if alibi is not None:
            mask = _masked(alibi.to(query.dtype), mask)
    if not by_products:
        sdpa = AttentionInterface()["sdpa"]
        return sdpa(
            module, query, key, value, mask, dropout=scores.dropout, scaling=scores.scale, **extra
        )[0]
    repeat = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeat, dim=1) for x in (key, value))
    table = kernels.capped(query @ key.transpose(-1, -2) * scores.scale, scores.softcap)
    assert mask is not None
    weights = kernels.with_sinks(_masked(table, mask), scores.sinks, value.dtype)
    weights = nn.functional.dropout(weights, scores.dropout, training=scores.dropout > 0)
    return (weights @ value).transpose(1, 2).contiguous()


def _written_out(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
    """transformers' mask [B, H or 1, S, T]; the one that it leaves out as bool."""
    if mask is not None:
        return mask
    table = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=key.device)
    if query.shape[2] > 1:
        # a cache with room ahead: query i is at position i, later keys are unused
        table = table.tril()
    return table.expand(query.shape[0], 1, -1, -1)


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    """As transformers' masks: the lowest number, not -inf, so that a row of padding gives no NaN."""
    if mask.dtype == torch.bool:
        return torch.where(mask, scores, torch.finfo(scores.dtype).min)
    return scores + mask


def _after_prefix(
    key: Tensor, value: Tensor, mask: Tensor, alibi: Tensor | None, scores: Scores
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Keys, values, mask and ALiBi of a plain call with the prefix on the left: T becomes P + T."""
    prefix = scores.prefix
    assert prefix is not None
    ahead, batch = prefix.keys.shape[0], key.shape[0]
    place = torch.arange(-ahead, 0, device=key.device)
    near = torch.ones(*mask.shape[:-1], ahead, dtype=torch.bool, device=key.device)
    lowest = None if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    if prefix.virtual and scores.window is not None:
        # query i sees min(i + 1, window) keys of its own document: caches keep no more, so that this
        # count alone tells its distance; if it is the window, no key of the prefix is near enough
        own = mask if lowest is None else mask > lowest / 2
        near = own.sum(-1, keepdim=True) - place <= scores.window
    if lowest is not None:
        near = torch.zeros_like(near, dtype=mask.dtype).masked_fill_(~near, lowest)
    before = (x.transpose(0, 1).expand(batch, -1, -1, -1) for x in (prefix.keys, prefix.values))
    key, value = (
        torch.cat([x.to(y.dtype), y], dim=2) for x, y in zip(before, (key, value), strict=True)
    )
    if alibi is not None and scores.alibi is not None:
        bias = scores.alibi.to(key.device)[:, None, None] * place  # [H, 1, P]
        alibi = torch.cat([bias.to(alibi.dtype).expand(batch, -1, -1, -1), alibi], dim=-1)
    return key, value, torch.cat([near, mask], dim=-1), alibi


def _mask(**arguments: Any) -> Tensor | None:
    """transformers asks here for the mask of a forward: none inside a layout, else that of `sdpa`."""
    masked = getattr(arguments.get("config"), "model_type", "") in MASKED
    if current_layout() is not None:
        return torch.empty(0, dtype=torch.bool) if masked else None
    skip = arguments.get("allow_is_causal_skip", True) and not masked
    return AttentionMaskInterface()["sdpa"](**{**arguments, "allow_is_causal_skip": skip})


def _refuse_foreign(
    module: nn.Module, mask: Tensor | None, window: int | None, extra: dict[str, Any]
) -> None:
    """Stop where a family means something that would be lost here."""
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
        raise _unsupported(_family(module), f"uses {', '.join(found)} in its attention")


def _family(module: nn.Module) -> str:
    return getattr(getattr(module, "config", None), "model_type", type(module).__name__)


def _refuse_lacking(kernel: str, lacking: list[str], family: str) -> None:
    """`varlen` and `flash` are asked for by their name: nothing else is computed in their stead."""
    if lacking and kernel in ("varlen", "flash"):
        raise Refused(
            f"model.attention={kernel} was asked for",
            f"it cannot do the {' and '.join(lacking)} of {family}",
            "use model.attention=flex or math",
        )


def _features(module: nn.Module, train: bool) -> set[str]:
    """Features a layer will ask for, as far as its attributes tell."""
    found = set()
    if getattr(module, "attn_logit_softcapping", None) is not None:
        found.add("softcap")
    if isinstance(getattr(module, "sinks", None), Tensor):
        found.add("sinks")
    if isinstance(getattr(module, "alibi_slopes", None), Tensor):
        found.add("alibi")
    if getattr(module, "keys_values", None) is not None:
        found.add("prefix")
    rates = (getattr(module, "attention_dropout", 0.0), getattr(module, "attn_dropout", 0.0))
    if train and any(getattr(rate, "p", rate) for rate in rates):
        found.add("dropout")
    return found


def check_kernel(kernel: str, device: torch.device, train: bool) -> str:
    """The kernel for a device; Refused when it cannot run there."""
    gpu = device.type == "cuda"
    if kernel == "auto":
        return "flex" if gpu else "sdpa"
    if kernel == "native":
        _refuse_native(device, torch.bfloat16)
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


def _refuse_native(device: torch.device, dtype: torch.dtype) -> None:
    why = f"the model is on {device.type}" if device.type != "cpu" else cpu_attention.lacks(dtype)
    if why is not None:
        raise Refused(
            "model.attention=native was asked for, the kernels in C++ for a CPU",
            why,
            "use model.attention=auto",
        )


def _unsupported(family: str, why: str) -> Refused:
    near = nearest(family)
    return Refused(
        f"model family '{family}' was asked for",
        f"it {why}, which packed rows need here",
        (f"the nearest family that is tested is {near}; " if near else "")
        + f"tested families: {', '.join(TESTED)}",
    )


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, _mask)
