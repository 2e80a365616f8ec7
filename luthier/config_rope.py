"""The part of the configuration that stretches rotary positions: `model.rope_scaling`.

Names and meanings are those of transformers' `rope_parameters`, so that what a model card prints can be
copied. What becomes of them is `models/rotary.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from luthier.config_optim import Positive, Section

YARN = frozenset({"beta_fast", "beta_slow", "attention_factor"})
# which of the optional keys each type reads; a key that would do nothing is refused
ROPE_KEYS: dict[str, frozenset[str]] = {
    "linear": frozenset(),
    "ntk": frozenset(),
    "dynamic": frozenset(),
    "yarn": YARN | {"mscale", "mscale_all_dim", "truncate"},
    "yarn_paddlenlp": YARN,
    "llama3": frozenset({"low_freq_factor", "high_freq_factor"}),
}


class RopeScaling(Section):
    """How rotary positions are stretched, so that documents may be `factor` times as long."""

    type: Literal["linear", "ntk", "dynamic", "yarn", "llama3", "yarn_paddlenlp"] = Field(
        description="`linear`: positions divided by `factor` (arXiv:2306.15595). `ntk`: a larger base. "
        "`dynamic`: a base that grows with each document's own length. `yarn`: arXiv:2309.00071. `llama3`: "
        "Llama 3.1's. `yarn_paddlenlp`: PaddleNLP's blend, which is not the paper's."
    )
    factor: Annotated[float, Field(ge=1)] = Field(
        description="How many times as long documents may be."
    )
    original_max_position_embeddings: Positive | None = Field(
        None, description="Positions before scaling. Default: what the model's config.json says."
    )
    attention_factor: Annotated[float, Field(gt=0)] | None = Field(
        None, description="YaRN: multiplies cos and sin. Default: 0.1 ln(factor) + 1."
    )
    beta_fast: Annotated[float, Field(gt=0)] | None = Field(None, description="YaRN; default 32.")
    beta_slow: Annotated[float, Field(gt=0)] | None = Field(None, description="YaRN; default 1.")
    mscale: float | None = Field(None, description="YaRN, as DeepSeek uses it.")
    mscale_all_dim: float | None = Field(None, description="YaRN, as DeepSeek uses it.")
    truncate: bool | None = Field(
        None, description="YaRN: borders of the ramp at whole dimensions; default true."
    )
    low_freq_factor: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Llama 3; default 1."
    )
    high_freq_factor: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Llama 3; default 4."
    )

    @model_validator(mode="before")
    @classmethod
    def _spellings(cls, value: Any) -> Any:
        """transformers' `rope_type`, and the longer names of the types."""
        if not isinstance(value, dict):
            return value
        value = dict(value)
        if "rope_type" in value:
            value.setdefault("type", value.pop("rope_type"))
        names = {"dynamic_ntk": "dynamic"}
        if isinstance(value.get("type"), str):
            value["type"] = names.get(value["type"], value["type"])
        return value

    @model_validator(mode="after")
    def _read_keys(self) -> RopeScaling:
        for name in sorted(self.options().keys() - ROPE_KEYS[self.type]):
            readers = " and ".join(t for t, names in ROPE_KEYS.items() if name in names)
            raise ValueError(f"{name} has no meaning for type={self.type}; {readers} read it")
        if (self.beta_fast or 32) <= (self.beta_slow or 1):
            raise ValueError("beta_fast has to be larger than beta_slow")
        if (self.high_freq_factor or 4) <= (self.low_freq_factor or 1):
            raise ValueError("high_freq_factor has to be larger than low_freq_factor")
        return self

    def options(self) -> dict[str, Any]:
        """The keys of single types that were given."""
        general = {"type", "factor", "original_max_position_embeddings"}
        return self.model_dump(exclude=general, exclude_none=True)
