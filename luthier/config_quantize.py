"""`quantize`: the storage of the base's frozen weights. Part of `config.py`, which documents the whole tree."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from luthier.config_optim import Positive, Section

Stored = Literal["none", "nf4", "fp4", "int8", "int4"]


class QuantizeConfig(Section):
    weights: Stored = Field(
        "none",
        description="Keep the frozen base in few bits, quantised while it is read: `nf4` and `fp4` are "
        "bitsandbytes' 4-bit code books (QLoRA), `int8` and `int4` whole numbers. Only adapters can be trained on it.",
    )
    block_size: Positive | None = Field(
        None,
        description="Numbers that share a scale. Default: 64 for nf4 and fp4, for int8 and int4 one scale per output.",
    )
    double_quant: bool = Field(
        False, description="Quantise the scales of nf4 and fp4 too: 0.4 bits less per number."
    )
    modules: str | tuple[str, ...] | dict[str, Stored] = Field(
        "all-linear",
        description="Which linear layers: `all-linear` (all but the head), a name or regular expression, or a list. "
        "Or name -> scheme, for different schemes: the last name that matches counts, `none` keeps full "
        "precision, and layers that no name matches take `weights`.",
    )

    @model_validator(mode="after")
    def _idle(self) -> QuantizeConfig:
        if self.double_quant and self.on and not self.schemes & {"nf4", "fp4"}:
            raise ValueError(
                "quantize.double_quant=true: only the scales of nf4 and fp4 are quantised a second time"
            )
        if self.on:
            return self
        for key in ("block_size", "double_quant", "modules"):
            if (
                key in self.model_fields_set
                and getattr(self, key) != type(self).model_fields[key].default
            ):
                raise ValueError(
                    f"quantize.{key} has no meaning for quantize.weights=none; add quantize.weights=nf4"
                )
        return self

    @property
    def on(self) -> bool:
        """Whether anything is quantised."""
        return bool(self.schemes)

    @property
    def schemes(self) -> set[str]:
        """The schemes in use."""
        named = self.modules.values() if isinstance(self.modules, dict) else ()
        return {self.weights, *named} - {"none"}
