"""Which modules of a model see whole rows when its decoder layers hold a rank's own tokens (sequence parallelism).

The module that holds a pair of cut layers, attention or MLP, needs all tokens and gives back the rank's own; where
such layers stand in the decoder layer itself (opt), the layer cut by its outputs does. So do experts, which are
told their own way. All else in a decoder layer, a router too, acts on single tokens. The hooks are `parallel/sequence.py`'s.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import PreTrainedModel

from luthier.models.cuts import Cuts
from luthier.models.stage import decoder_layers


@dataclass(frozen=True)
class TokenCut:
    """`entries`: paths of modules that gather tokens. `shares`: of parameters whose gradient is a rank's share: they see
    its own tokens; or all of them, but what they give is read by the rank's own heads alone (latents)."""

    entries: list[str] = field(default_factory=list)
    shares: list[str] = field(default_factory=list)


def tokens_of(model: PreTrainedModel, cuts: Cuts) -> TokenCut | str:
    """How the tokens of `model` are cut, adapters and all; or in words what stands in the way."""
    paths = {id(module): path for path, module in model.named_modules()}
    entries: dict[str, None] = {}
    shares: list[str] = []
    for layer in decoder_layers(model):
        top = paths[id(layer)]
        inside = [path for path in cuts.layers if path.startswith(f"{top}.")]
        scattered = set()
        for path in inside:
            owner = path.rpartition(".")[0]
            scattered |= {owner} if cuts.layers[path].along == "inputs" else set()
            if cuts.layers[path].along == "outputs":
                entries[path if owner == top else owner] = None
        for entry in [entry for entry in entries if entry.startswith(f"{top}.")]:
            if entry not in cuts.layers and entry not in scattered:
                return f"its '{entry}' has no layer that is cut by its inputs"
        experts = [path for path in cuts.experts if path.startswith(f"{top}.")]
        if any(path.startswith(f"{entry}.") for path in experts for entry in entries):
            return "its experts lie in a module that gathers tokens"
        for name, _ in layer.named_parameters():
            path = f"{top}.{name}"
            if name.startswith("adapter.") or any(path.startswith(f"{p}.") for p in experts):
                continue  # it sees whole rows
            cut = next((p for p in inside if path.startswith(f"{p}.")), None)
            if cut is not None:
                if path == f"{cut}.bias" and cuts.layers[cut].along == "inputs":
                    shares.append(path)
                continue
            if path not in cuts.rows:
                shares.append(path)
    return TokenCut(list(entries), shares)
