"""Several adapters on one base: load, switch, weigh and unload them.

At any moment a layer carries one adapter: that of the method in use, or a `Mix` of several additive ones. The
others wait off the model, so what is not in use costs memory and no time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from luthier.adapters.base import Adapter, Additive
from luthier.adapters.placing import adapters_of, detach, install, whole_parameters
from luthier.adapters.store import load_adapter
from luthier.config import AdapterConfig
from luthier.errors import Refused, suggest

HOME = "luthier_home"  # attribute of a model that `luthier.load` made: its name, and a function for its hash


@dataclass(frozen=True)
class Held:
    """An adapter that was loaded: its options, its parts by layer, and parameters that replace the base's."""

    config: AdapterConfig
    adapters: dict[str, Adapter]
    whole: dict[str, Tensor]
    remarks: tuple[str, ...]


class Mix(Additive):
    """The weighted sum of what several adapters add to one layer."""

    def __init__(self, layer: nn.Module, parts: list[tuple[Additive, float]], *, name: str) -> None:
        config = parts[0][0].config
        super().__init__(layer, config, name=name, seed=parts[0][0].seed)
        self.parts = nn.ModuleList(part for part, _ in parts)
        self.weights = [weight for _, weight in parts]

    def delta(self, x: Tensor) -> Tensor:
        deltas = [w * part.delta(x) for part, w in self._pairs()]
        return torch.stack(deltas).sum(0) if len(deltas) > 1 else deltas[0]

    def update(self) -> Tensor:
        return torch.stack([w * part.update() for part, w in self._pairs()]).sum(0)

    def _pairs(self) -> list[tuple[Any, float]]:
        return list(zip(self.parts, self.weights, strict=True))


class Adapters:
    """The adapters of one model, for inference.

        several = luthier.Adapters(model)
        several.load("law", "runs/law")
        several.load("tone", "runs/tone")
        several.use("law")
        several.use({"law": 0.7, "tone": 0.3})     # additive methods only
        several.use(None)                          # the base alone
        several.unload("law")

    `model` is one of `luthier.load(path)`. An adapter that it carries already is known as "default". Names
    are the caller's. Folding and training go on with what is in use.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.held: dict[str, Held] = {}
        self.active: dict[str, float] = {}
        if carried := adapters_of(model):
            config = next(iter(carried.values())).config
            self.held["default"] = Held(config, carried, self._whole(), ())
            self.active = {"default": 1.0}

    @property
    def names(self) -> list[str]:
        """The adapters that are loaded."""
        return list(self.held)

    def load(
        self,
        name: str,
        folder: str | Path,
        *,
        base_name: str | None = None,
        base_hash: str | None = None,
    ) -> tuple[str, ...]:
        """Read an adapter folder under `name`, without putting it to use; its remarks.

        What the base is called and its hash are known of a model of `luthier.load`. Raises Refused, with
        nothing changed, for a name that is taken and all that `load_adapter` refuses.
        """
        if name in self.held:
            raise Refused(
                f"loading {folder} as '{name}'",
                "an adapter of this name is loaded",
                "unload it first, or take another name",
            )
        home = vars(self.model).get(HOME)
        if home is not None:
            base_name, base_hash = base_name or home[0], base_hash or home[1]()
        active = self.active
        self.use(None)
        try:
            loaded = load_adapter(self.model, folder, base_name=base_name, base_hash=base_hash)
            found = Held(loaded.config, adapters_of(self.model), self._whole(), loaded.remarks)
            self.held[name] = found
            detach(self.model)
        finally:
            self.use(active or None)
        return loaded.remarks

    def use(self, names: str | Mapping[str, float] | None) -> None:
        """Put one adapter, a weighted sum of several, or none (the base alone) to use.

        Refused, with nothing changed, for a name that is not loaded and a sum that has no meaning.
        """
        if not isinstance(names, str | Mapping | None) or (
            isinstance(names, Mapping) and not all(_is_weight(w) for w in names.values())
        ):
            raise Refused(
                f"using the adapters {names}",
                "expected a name, or a mapping of names to numbers",
                "use('law'), use({'law': 0.7, 'tone': 0.3}) or use(None)",
            )
        weights = {names: 1.0} if isinstance(names, str) else dict(names or {})
        for name in weights:
            if name not in self.held:
                raise Refused(
                    f"using the adapter '{name}'",
                    f"loaded are {', '.join(self.held) or 'none'}",
                    suggest(name, self.held) or "load it first",
                )
        mixed = len(weights) > 1 or any(weight != 1 for weight in weights.values())
        if mixed:
            self._refuse_mixture(weights)
        if adapters_of(self.model):
            detach(self.model)
        if mixed:
            self._install_mixture(weights)
        for name in () if mixed else weights:
            held = self.held[name]
            install(self.model, held.adapters, held.whole)
            with torch.no_grad():
                for path, value in held.whole.items():
                    self.model.get_parameter(path).requires_grad_(False).copy_(value)
        for adapter in adapters_of(self.model).values():
            adapter.requires_grad_(False)
        self.active = weights

    def unload(self, name: str) -> None:
        """Forget an adapter; one in use is taken off first."""
        if name not in self.held:
            raise Refused(
                f"unloading the adapter '{name}'",
                f"loaded are {', '.join(self.held) or 'none'}",
                suggest(name, self.held) or "",
            )
        if name in self.active:
            self.use(None)
        del self.held[name]

    def _whole(self) -> dict[str, Tensor]:
        return {n: p.detach().clone() for n, p in whole_parameters(self.model).items()}

    def _refuse_mixture(self, weights: Mapping[str, float]) -> None:
        for name in weights:
            held = self.held[name]
            stacked = any(adapter.stacked for adapter in held.adapters.values())
            if held.whole or stacked or not all(additive(a) for a in held.adapters.values()):
                what = "dora=true" if held.config.dora else f"method={held.config.method}"
                why = (
                    "it holds whole modules of its own"
                    if held.whole
                    else "it adapts fused experts"
                    if stacked
                    else f"adapter.{what} does more than add to layers"
                )
                raise Refused(f"weighing the adapter '{name}'", why, f"use it alone: use('{name}')")

    def _install_mixture(self, weights: Mapping[str, float]) -> None:
        by_layer: dict[str, list[tuple[Any, float]]] = {}
        for name, weight in weights.items():
            for layer, adapter in self.held[name].adapters.items():
                by_layer.setdefault(layer, []).append((adapter, weight))
        mixes = {
            layer: Mix(self.model.get_submodule(layer), parts, name=layer)
            for layer, parts in by_layer.items()
        }
        install(self.model, mixes)


def _is_weight(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def additive(adapter: Adapter) -> bool:
    """Whether what an adapter does is adding to its layer's output, so that it can be weighed."""
    return isinstance(adapter, Additive) and not adapter.config.dora
