"""The adapter's part of the configuration.

One flat section for all methods: `uses` of a method's class (luthier/adapters) says which keys it reads, and
another one that is set is refused. Here are names, types, defaults and what excludes each other.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from luthier.config_optim import Positive, Section

METHODS = Literal["none", "lora", "mora", "vera", "lokr", "reft", "prefix", "prompt", "ia3"]
# variants of a method that differ in their formula; the first is the default: the paper's, or its authors'
FORMS: dict[str, tuple[str, ...]] = {
    "mora": ("type6", "type1", "type2", "type3", "type4", "paddlenlp"),
    "vera": ("paper", "paddlenlp"),
    "lokr": ("peft", "lycoris", "paddlenlp"),
    "reft": ("loreft", "noreft", "direft", "tiny"),
    "prefix": ("paper", "paddlenlp"),
}
# keys that act whatever the method is, also in full fine-tuning
GENERAL = frozenset({"neftune_alpha", "neftune_scaling"})
# keys that are shown even when nobody set them
USUAL = frozenset({"method", "path", "rank", "alpha", "dropout", "targets"})
# rates at which methods far from LoRA usually learn: the default of 3e-4 is too small for them
USUAL_RATES = {"prefix": 1e-2, "prompt": 1e-2, "ia3": 5e-3, "vera": 4e-3, "reft": 2e-3}
_POSITIONS = re.compile(r"all|f[1-9]\d*|l[1-9]\d*|f[1-9]\d*\+l[1-9]\d*")
_LAYERS = re.compile(r"all|\d+(-\d+)?([,;]\s*\d+(-\d+)?)*")


class AdapterConfig(Section):
    method: METHODS = Field("none", description="Adapter to train; `none` trains all weights.")
    path: str | None = Field(
        None, description="Adapter folder to continue from, evaluate or predict with."
    )
    rank: int = Field(8, ge=1, description="Rank of the update.")
    alpha: float | None = Field(
        None,
        gt=0,
        description="Scale: the update is multiplied by alpha / rank. Default: 2 x rank; the rank in PaddleNLP's forms of vera and lokr.",
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="Dropout before the update; in reft after it."
    )
    targets: str | tuple[str, ...] = Field(
        "all-linear",
        description="Layers to adapt: `all-linear` (all but the head), a name or regular expression, or a list of them.",
    )
    form: str | None = Field(
        None,
        description="Variant of the method. mora: `type6`, `type1` to `type4`, `paddlenlp`; vera: `paper`, "
        "`paddlenlp`; lokr: `peft`, `lycoris`, `paddlenlp`; reft: `loreft`, `noreft`, `direft`, `tiny`; prefix: "
        "`paper`, `paddlenlp`. Default: the first.",
    )
    layers: str | tuple[int, ...] = Field(
        "all",
        description="Decoder layers to adapt, counted from 0: `all`, ranges like `0-11,20`, or a list of numbers.",
    )
    rank_pattern: dict[str, Positive] = Field(
        default_factory=dict,
        description="Ranks of single layers: name or regular expression (as in targets) -> rank.",
    )
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="Alphas of single layers, as rank_pattern."
    )
    modules_to_save: tuple[str, ...] = Field(
        (),
        description="Modules that are trained whole beside the adapter and saved with it: names such as lm_head, embed_tokens, norm.",
    )
    rslora: bool = Field(False, description="Scale by alpha / sqrt(rank) (rank-stabilised LoRA).")
    lora_plus: Annotated[float, Field(gt=0)] = Field(
        1.0, description="Learning rate of LoRA's B as a multiple of A's (LoRA+; 16 is usual)."
    )
    pissa: bool = Field(
        False, description="Start LoRA from the principal singular vectors of the weights (PiSSA)."
    )
    dora: bool = Field(
        False, description="Train the magnitude of each output apart from its direction (DoRA)."
    )
    mixer: bool = Field(False, description="A trained matrix between LoRA's A and B (MoSLoRA).")
    factor: int = Field(
        -1, description="LoKr: one factor of each dimension; -1 splits nearest to the square root."
    )
    decompose_both: bool = Field(False, description="LoKr: also the first factor is of low rank.")
    d_initial: float = Field(0.1, description="VeRA: first value of the vector d.")
    projection_seed: Annotated[int, Field(ge=0)] | None = Field(
        None, description="VeRA: seed of the shared projections. Default: train.seed."
    )
    save_projection: bool = Field(
        False, description="VeRA: also save the shared projections, which the seed gives again."
    )
    positions: str = Field(
        "f7+l7",
        description="ReFT: tokens to edit: the first and last of the prompt (`f7+l7`, `f1`, `l3`), or `all` tokens.",
    )
    tied: bool = Field(
        False, description="ReFT: one edit for the first and the last tokens, not one for each."
    )
    act_fn: Literal["linear", "relu"] = Field(
        "linear",
        description="ReFT: of the source. With `relu`, `loreft` cannot start from the unchanged model; the other forms can.",
    )
    add_bias: bool = Field(True, description="ReFT: the source has a bias (`tiny` has no source).")
    num_prefix_tokens: Positive = Field(
        128, description="prefix, prompt: number of virtual tokens."
    )
    prefix_projection: bool = Field(
        False, description="prefix: compute the keys and values by a small network while training."
    )
    projection_size: Positive | None = Field(
        None, description="prefix: width of that network. Default: the model's hidden size."
    )
    feedforward: tuple[str, ...] | None = Field(
        None,
        description="ia3: targets that are scaled at their input. Default: the second linear layer of each MLP.",
    )
    neftune_alpha: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="Add noise to the embeddings while training (NEFTune; 5 is usual). Works with every method, and with `none`.",
    )
    neftune_scaling: Literal["paper", "paddlenlp"] = Field(
        "paper",
        description="Size of the noise: alpha / sqrt(document's tokens x width), or PaddleNLP's alpha / sqrt(all tokens of the batch).",
    )

    @field_validator("positions")
    @classmethod
    def _grammar_of_positions(cls, value: str) -> str:
        if not _POSITIONS.fullmatch(value):
            raise ValueError(f"'{value}' is none of: all, f7, l7, f7+l7 (with any numbers)")
        return value

    @field_validator("layers")
    @classmethod
    def _grammar_of_layers(cls, value: str | tuple[int, ...]) -> str | tuple[int, ...]:
        if isinstance(value, str) and not _LAYERS.fullmatch(value):
            raise ValueError(f"'{value}' is none of: all, numbers and ranges such as 0-11,20")
        pairs = re.findall(r"(\d+)-(\d+)", value) if isinstance(value, str) else []
        if any(not int(a) <= int(b) < 10_000 for a, b in pairs):
            raise ValueError(
                f"'{value}' holds a range that does not run from a smaller number to a larger"
            )
        if not isinstance(value, str) and (not value or min(value) < 0):
            raise ValueError(f"{list(value)} is no list of layers counted from 0")
        return value

    @model_validator(mode="after")
    def _combinations(self) -> AdapterConfig:
        known = FORMS.get(self.method, ())
        if self.form is not None and self.form not in known:
            some = f"one of {', '.join(known)}" if known else "nothing: it has one form only"
            raise ValueError(f"adapter.form={self.form}: adapter.method={self.method} takes {some}")
        if self.pissa and self.dropout:
            raise ValueError(
                f"adapter.pissa=true with adapter.dropout={self.dropout}: PiSSA's update holds a part of the "
                "model itself, which must not be dropped; set adapter.dropout=0"
            )
        if self.mixer and (self.pissa or self.dora):
            other = "pissa" if self.pissa else "dora"
            raise ValueError(
                f"adapter.mixer=true with adapter.{other}=true: no one has defined their combination; keep one"
            )
        if self.neftune_scaling != "paper" and self.neftune_alpha is None:
            raise ValueError("adapter.neftune_scaling has no meaning without adapter.neftune_alpha")
        if self.projection_size is not None and not self.prefix_projection:
            raise ValueError(
                "adapter.projection_size has no meaning without adapter.prefix_projection=true"
            )
        return self

    @property
    def form_(self) -> str:
        """`form`, or the method's default."""
        return self.form or FORMS[self.method][0]

    @property
    def scale_alpha(self) -> float:
        """`alpha`, or its default."""
        if self.alpha is not None:
            return self.alpha
        same = self.method in ("vera", "lokr") and self.form == "paddlenlp"
        return float(self.rank if same else 2 * self.rank)

    @property
    def layer_numbers(self) -> frozenset[int] | None:
        """Numbers of the decoder layers to adapt; None for all."""
        if not isinstance(self.layers, str):
            return frozenset(self.layers)
        if self.layers == "all":
            return None
        found: set[int] = set()
        for part in re.split(r"[,;]\s*", self.layers):
            first, _, last = part.partition("-")
            found.update(range(int(first), int(last or first) + 1))
        return frozenset(found)

    def changed(self) -> dict[str, Any]:
        """The keys that differ from their defaults, but for `method` and `path`."""
        fields = type(self).model_fields
        values = {n: getattr(self, n) for n in fields if n not in ("method", "path")}
        return {n: v for n, v in values.items() if v != fields[n].get_default(call_default_factory=True)}  # fmt: skip
