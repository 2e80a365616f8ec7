"""Rotary positions that are stretched: `model.rope_scaling` written into a model's config, and packed rows.

What is asked for becomes transformers' own `rope_parameters`, so that its functions compute the tables and a
saved folder means the same to everybody. Static NTK is a larger base; PaddleNLP's YaRN is written as
`longrope`, whose factors are free. Types that look at the length of what they turn (dynamic NTK, longrope) do
so for the longest row of a batch: `per_document` makes it each document's own length, packed or not.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from luthier.batch import current_layout
from luthier.config_rope import RopeScaling
from luthier.errors import Refused
from luthier.positions import kind_of_positions, rope_entries

KEPT = ("rope_theta", "partial_rotary_factor")  # facts of the model that no scaling changes
BY_LENGTH = frozenset({"dynamic", "longrope"})


def scale(config: Any, scaling: RopeScaling) -> list[str]:
    """Write `scaling` into a model's config, before the model is built; gives back remarks.

    A scaling that the checkpoint has already is replaced, from the positions that it began with. Where
    layers with a sliding window have positions of their own, those stay: no distance there exceeds the
    window. Refused: a family without rotary positions, or with a form of its own.
    """
    text = config.get_text_config()
    entries = rope_entries(text)
    kind = kind_of_positions(config)
    if kind != "rotary":
        words = (
            "ALiBi, which reaches any length"
            if kind == "alibi"
            else "no rotary positions of transformers' kind"
        )
        raise Refused(
            f"model.rope_scaling (type {scaling.type}) was asked for",
            f"the model family '{config.model_type}' has {words}",
            "leave it out"
            + ("" if kind == "alibi" else ", and keep data.length within the model's positions"),
        )
    if getattr(text, "head_dim", 0) is None:  # transformers' yarn and dynamic do not expect it
        text.head_dim = text.hidden_size // text.num_attention_heads
    chosen = [name for name in entries if "sliding" not in name] or list(entries)
    original = scaling.original_max_position_embeddings or _original(text, entries[chosen[0]])
    before = {entries[name].get("rope_type", "default") for name in chosen} - {"default"}
    for name in chosen:
        entries[name] = _entry(text, entries[name], scaling, original)
    text.rope_parameters = entries.get("") or {**text.rope_parameters, **entries}
    if getattr(text, "original_max_position_embeddings", None):  # Phi 3 keeps it there, and it wins
        text.original_max_position_embeddings = original
    grows = scaling.type == "dynamic"  # its formula wants the length at which it begins
    text.max_position_embeddings = original if grows else math.floor(original * scaling.factor)
    if not _admitted(config) and not (_as_longrope(text) and _admitted(config)):
        raise Refused(
            f"model.rope_scaling (type {scaling.type}) was asked for",
            f"the configuration of the model family '{config.model_type}' does not admit it",
            "use type yarn, llama3, linear or ntk",
        )
    return [
        f"model.rope_scaling replaces the checkpoint's own scaling ({b})" for b in sorted(before)
    ]


def config_changes(config: Any) -> dict[str, Any]:
    """The keys of config.json that `scale` changes, as they are now: what a plain user of transformers
    gives to `from_pretrained` to get the same positions."""
    text = config.get_text_config()
    names = ("rope_parameters", "max_position_embeddings", "original_max_position_embeddings")
    return {name: getattr(text, name) for name in names if getattr(text, name, None) is not None}


def _original(text: Any, entry: dict[str, Any]) -> int:
    """The positions that a checkpoint began with."""
    return entry.get("original_max_position_embeddings") or text.max_position_embeddings


def _entry(
    text: Any, before: dict[str, Any], scaling: RopeScaling, original: int
) -> dict[str, Any]:
    """transformers' `rope_parameters` for `scaling`."""
    kept = {name: before[name] for name in KEPT if name in before}
    if before.get("rope_type") == scaling.type:  # the same kind again, with another factor
        kept = {name: value for name, value in before.items() if name != "attention_factor"}
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    dim = int(head * before.get("partial_rotary_factor", 1.0))
    base, factor, options = before["rope_theta"], scaling.factor, scaling.options()
    recorded = {"factor": factor, "original_max_position_embeddings": original}
    match scaling.type:
        case "ntk":  # a constant base is nothing else than another rope_theta
            return {
                **kept,
                "rope_type": "default",
                "rope_theta": base * factor ** (dim / (dim - 2)),
            }
        case "yarn":
            return {**kept, "rope_type": "yarn", **recorded, **options}
        case "llama3":
            usual = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
            return {**usual, **kept, "rope_type": "llama3", **recorded, **options}
        case "yarn_paddlenlp":
            factors = paddlenlp_yarn(dim, base, factor, original, **_betas(options))
            attention = options.get("attention_factor", 0.1 * math.log(factor) + 1)
            both = {"short_factor": factors, "long_factor": factors, "attention_factor": attention}
            return {**kept, "rope_type": "longrope", **recorded, **both}
        case _:  # linear, dynamic
            return {**kept, "rope_type": scaling.type, "factor": factor}


def _admitted(config: Any) -> bool:
    """Whether plain transformers reads such a config.json again; Phi 3 takes only longrope."""
    try:
        type(config).from_dict(config.to_dict())
    except (ValueError, TypeError, KeyError, StrictDataclassError):
        return False
    return True


def _as_longrope(text: Any) -> bool:
    """Write a scaling that no length changes as longrope, which has a free factor for each frequency."""
    entry = text.rope_parameters
    kind = entry.get("rope_type")
    if kind not in ("linear", "yarn", "llama3"):
        return False
    table, attention = ROPE_INIT_FUNCTIONS[kind](text)
    dim = 2 * len(table)
    exponents = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    factors = (entry["rope_theta"] ** -exponents / table.double()).tolist()
    kept = {name: entry[name] for name in (*KEPT, "factor") if name in entry}
    text.rope_parameters = {
        **kept,
        "rope_type": "longrope",
        "original_max_position_embeddings": text.original_max_position_embeddings,
        "short_factor": factors,
        "long_factor": factors,
        "attention_factor": float(attention),
    }
    return True


def _betas(options: dict[str, Any]) -> dict[str, float]:
    return {name: options[name] for name in ("beta_fast", "beta_slow") if name in options}


def paddlenlp_yarn(
    dim: int,
    base: float,
    factor: float,
    original: int,
    *,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    extrapolation: float = 1.0,
) -> list[float]:
    """What PaddleNLP's YaRNScalingRotaryEmbedding divides each of the dim / 2 frequencies by.

    It mixes wavelengths, (1 - m) * factor + m; the paper (arXiv:2309.00071, eq. 23) and transformers mix
    frequencies. The two agree outside the ramp, where m is 0 or 1.
    """

    def turning(turns: float) -> float:
        """The dimension that turns so many times over the original length."""
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(turning(beta_fast)), 0)
    high = min(math.ceil(turning(beta_slow)), dim - 1)
    width = high - low or 0.001
    ramp = (min(max((i - low) / width, 0.0), 1.0) for i in range(dim // 2))
    return [(1 - m) * factor + m for m in ((1 - r) * extrapolation for r in ramp)]


def per_document(model: nn.Module) -> None:
    """Let rotary modules whose frequencies depend on a length see each document's own."""
    for module in list(model.modules()):
        if not isinstance(module, PerDocument) and BY_LENGTH & _types(module):
            module.__class__ = _subclass(type(module))


def _types(module: nn.Module) -> frozenset[str]:
    """transformers' names of what a rotary module computes; several where types of layers differ."""
    found = getattr(module, "rope_type", None)
    if isinstance(found, dict):
        return frozenset(found.values())
    return frozenset({found} if isinstance(found, str) else ())


class PerDocument(nn.Module):
    """A rotary module of transformers that is asked once per length instead of once per batch.

    Its own result depends on the longest position of the batch, and on what it was asked before: it keeps
    the frequencies of the longest batch yet. Here it starts afresh each time, so that a document is turned
    as if it were alone. Outside a layout a row is a document.
    """

    config: Any
    rope_type: Any
    original_max_seq_len: int

    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        """position_ids [B, S] -> cos and sin [B, S, D] (or what else the family makes of them)."""
        named = {} if layer_type is None else {"layer_type": layer_type}
        kind = self.rope_type if layer_type is None else self.rope_type[layer_type]
        if kind not in BY_LENGTH:
            return super().forward(x, position_ids, **named)
        lengths = self._lengths(position_ids, kind, layer_type)
        found: Any = None
        for length in lengths.unique().tolist():
            mine = lengths == length
            self._start_afresh(kind, layer_type)
            # what is not of this length is out of the way at position 0
            part = super().forward(x, torch.where(mine, position_ids, 0), **named)
            found = part if found is None else _merge(mine, part, found)
        return found

    def _lengths(self, position_ids: Tensor, kind: str, layer_type: str | None) -> Tensor:
        """[B, S]: how long the document of each token is, by its last position; below the length at which
        frequencies begin to change all count alike."""
        layout = current_layout()
        share = layout and layout.share
        if layout is not None and share is not None and share.columns.shape == position_ids.shape:
            # a document may end on another rank; virtual tokens shift all positions alike
            whole = layout.position_ids
            position_ids = whole + (position_ids - share.of(whole))[0, 0]
        if layout is None or layout.borders.shape != position_ids.shape:
            last = position_ids.amax(-1, keepdim=True).expand_as(position_ids)
        else:
            number = layout.borders.cumsum(1) - 1  # of the document in its row
            last = torch.zeros_like(position_ids).scatter_reduce(1, number, position_ids, "amax")
            last = layout.here(last.gather(1, number))
        if kind == "dynamic":
            return (last + 1).clamp(min=self.original_max_seq_len)
        entry = rope_entries(self.config)[layer_type or ""]
        begin = entry["original_max_position_embeddings"]
        return (last + 1).clamp(min=begin, max=begin + 1)  # two tables: short and long

    def _start_afresh(self, kind: str, layer_type: str | None) -> None:
        """Undo what the last call left behind."""
        if kind == "dynamic":
            ahead = "" if layer_type is None else f"{layer_type}_"
            own = getattr(self, f"{ahead}original_inv_freq")
            self.register_buffer(f"{ahead}inv_freq", own, persistent=False)
            setattr(self, f"{ahead}max_seq_len_cached", self.original_max_seq_len)


def _merge(mine: Tensor, part: Any, rest: Any) -> Any:
    if isinstance(part, tuple):
        return tuple(_merge(mine, a, b) for a, b in zip(part, rest, strict=True))
    return torch.where(mine[..., None], part, rest)


@cache
def _subclass(cls: type[nn.Module]) -> type[nn.Module]:
    return type(f"PerDocument{cls.__name__}", (PerDocument, cls), {})
