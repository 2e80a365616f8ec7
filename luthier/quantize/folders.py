"""Whole models and quantised Hugging Face folders: opening one as it is, and what of a model is saved to make one.

A folder's weights are taken over tensor by tensor, while transformers' loader reads what is not
quantised: nothing is dequantised or quantised anew. The layouts on disk are `layouts.py`'s, files and their
refusals the models' loader's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, apply_renamings
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from luthier.config import QuantizeConfig
from luthier.errors import Refused
from luthier.held import Holding, HoldingQuantizer, Way
from luthier.layers import features, is_linear
from luthier.quantize import layouts
from luthier.quantize.linears import QuantizedLinear, QuantizedTensor
from luthier.quantize.loading import hold_codes, plan_quantization, replace, stand_in
from luthier.quantize.stored import Headers, Read, Stored, broken

METHOD = "luthier-folder"  # our name among transformers' quantisers


class Prequantized(QuantizationConfigMixin):
    """The quantised weights of a folder, for a model's loader: `quantization_config` of `from_pretrained`.

    `fields` is the `quantization_config` of its config.json, `headers` those of its weight `files`. Refused
    here, before any work: a method that is not read, tensors that are missing or do not fit together.
    """

    quant_method: Any = METHOD
    opens_folder = True
    ways: Collection[Way] = ()  # as of `loading.Quantization`
    device: torch.device | None = None

    def __init__(
        self,
        folder: Path,
        fields: Mapping[str, Any],
        headers: Headers,
        files: Mapping[str, Path],
        asked: QuantizeConfig | None = None,
    ) -> None:
        """`asked`, where it asks for anything, must be what the folder holds."""
        self.folder, self.fields, self.files = str(folder), fields, files
        self.asked = asked if asked is not None and asked.on else None
        with ExitStack() as stack:
            plan = layouts.plan(self.folder, fields, headers, self.reader(stack))
        self.plan = {name.removesuffix(".weight"): stored for name, stored in plan.items()}

    @property
    def specs(self) -> dict[str, Any]:
        """Layer path -> its form."""
        return {name: stored.spec for name, stored in self.plan.items()}

    def reader(self, stack: ExitStack) -> Read:
        """A function that reads one tensor by name; files stay open until `stack` closes."""
        opened: dict[Path, Any] = {}

        def read(name: str) -> Tensor:
            file = self.files[name]
            if file not in opened:
                opened[file] = stack.enter_context(safe_open(file, "pt", backend="pread"))
            return opened[file].get_tensor(name)

        return read

    def layers(self, model: nn.Module) -> dict[str, nn.Module]:
        """The linear layers of `model` that are quantised here. Refused: those of another shape, and a folder
        that does not hold what was asked for.

        Weights of layers that the model lacks are left out: the loader refuses them, or does not where
        fewer layers are built.
        """
        modules, plan = dict(model.named_modules()), self.plan_for(model)
        found = {name: modules[name] for name in plan if name in modules}
        for name, layer in found.items():
            shape = plan[name].spec.shape
            own = tuple(reversed(features(layer))) if is_linear(layer) else None
            if own != shape:
                fault = f"layer '{name}' is {list(own)}" if own else f"'{name}' is no linear layer"
                raise broken(self.folder, f"{name}.weight", f"its shape is {list(shape)}, {fault}")
        self._check_asked(model, set(found))
        return found

    def plan_for(self, model: nn.Module) -> dict[str, Stored]:
        """Path of a layer in `model` -> how it lies in the folder, whose name for it may be an older one (GPT-NeoX's
        head, `embed_out`)."""
        rename = _renaming(model)
        paths = {name: rename(f"{name}.weight").removesuffix(".weight") for name in self.plan}
        return {paths[name]: stored for name, stored in self.plan.items()}

    def _check_asked(self, model: nn.Module, found: set[str]) -> None:
        """Refuse to quantise what is quantised already, unless it is so in just the form asked for."""
        if self.asked is None:
            return
        plan, held = plan_quantization(model, self.asked), self.plan_for(model)
        for name in [*found, *(plan.keys() - found)]:
            mine = held[name].spec if name in found else None
            if plan.get(name) != mine:
                form = (
                    "not quantised"
                    if mine is None
                    else f"{mine.scheme} in blocks of {mine.block_size}"
                )
                raise Refused(
                    f"quantize.weights={self.asked.weights} for '{self.folder}'",
                    f"it is quantised already, in another form: layer '{name}' is {form}",
                    "leave the section quantize out, or start from the model in its original precision",
                )

    def tensors(self, model: nn.Module) -> set[str]:
        """The folder's tensors that the quantised layers of `model` are made of, by the loader's names for them."""
        modules, rename = dict(model.named_modules()), _renaming(model)
        return {
            rename(part)
            for name, stored in self.plan_for(model).items()
            if name in modules
            for part in stored.parts.values()
        }

    def convert(self, model: nn.Module) -> None:
        """Give a model in memory, or on meta, layers of the folder's forms, with its own values."""
        plan = self.plan_for(model)
        for name, layer in self.layers(model).items():
            replace(model, name, plan[name].spec, layer.get_parameter("weight"))


def _renaming(model: nn.Module) -> Callable[[str], str]:
    """A tensor's name in a folder -> its name in `model`, as transformers' loader changes it."""
    mapping = get_model_conversion_mapping(model) if isinstance(model, PreTrainedModel) else []
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    return lambda name: apply_renamings(name, renamings)


class _Awaited(nn.Module):
    """Holds a quantised layer's place, and its bias, while transformers reads the rest."""

    def __init__(self, layer: Any, made: QuantizedLinear) -> None:
        super().__init__()
        self.bias = layer.bias
        vars(self)["made"] = made  # no submodule: its tensors are no business of the loader
        stand_in(self)


@register_quantizer(METHOD)
class _FolderQuantizer(HoldingQuantizer):
    quantization_config: Prequantized

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        asked = self.quantization_config
        plan = asked.plan_for(model)
        for name, layer in asked.layers(model).items():
            spec = plan[name].spec
            made = QuantizedLinear.like(layer, spec.scheme, spec.block_size, spec.double_quant)
            model.set_submodule(name, _Awaited(layer, made))
        self.holding = Holding(model, asked.ways, asked.device)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        source = self.quantization_config
        self.holding.settle(model)
        plan = source.plan_for(model)
        awaited = {n: m for n, m in model.named_modules() if isinstance(m, _Awaited)}
        with ExitStack() as stack:
            read = source.reader(stack)
            for name, holder in awaited.items():
                made, stored = vars(holder)["made"], plan[name]
                values = layouts.take(source.folder, source.fields, stored, read)
                made.load_state_dict(values, strict=False, assign=True)
                made.bias = holder.bias
                for parameter in made.parameters():
                    parameter.requires_grad_(False)
                hold_codes(made, source)
                model.set_submodule(name, made)
        self.remove_quantization_config(model)


register_quantization_config(METHOD)(Prequantized)


def pack(
    model: Any, state: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """`state` with its quantised weights in a layout that others read, and the `quantization_config` for it.

    None, and `state` as it is, for a model without quantised layers. Refused where no layout holds them all.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedTensor)}
    if not layers:
        return dict(state), None
    other = [name for name, layer in layers.items() if not isinstance(layer, QuantizedLinear)]
    if other:
        raise Refused(
            "saving a quantised model",
            f"'{other[0]}' is a stack of matrices, which no layout of other programs knows",
            "leave it out of quantize.modules",
        )
    specs = {name: layer.spec for name, layer in layers.items()}
    method = layouts.choose(specs)
    own = {f"{name}.{part}" for name, spec in specs.items() for part in spec.layout}
    packed = {name: values for name, values in state.items() if name not in own}
    for name, layer in layers.items():
        values = {part: t.detach() for part, t in layer.tensors().items()}
        packed |= layouts.write(method, f"{name}.weight", values, layer.spec, layer.dtype)
    kept = [n for n, m in model.named_modules() if is_linear(m) and n not in layers]
    return packed, layouts.config(method, specs, kept, model.dtype)


def save_packed(model: Any) -> None:
    """Make `model.save_pretrained` write the quantised layers in a layout that others read, as `luthier quantize` does.

    transformers asks a model's quantiser for what is saved; without one it would write our codes under names that
    nobody reads. Nothing is done to a model without quantised layers.
    """
    if any(isinstance(module, QuantizedTensor) for module in model.modules()):
        model.hf_quantizer = _Packer(QuantizationConfigMixin(quant_method=cast(Any, METHOD)))


class _Packer(HoldingQuantizer):
    """Says what of a quantised model is saved. Refused: an adapter on it, and what `pack` refuses."""

    def is_serializable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
        state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        if any(".adapter." in name for name in state):
            raise Refused(
                "save_pretrained of a quantised model with an adapter on it",
                "the folder of a base has no place for the adapter",
                "use luthier merge --quantized BASE ADAPTER OUT, or keep base and adapter apart",
            )
        packed, fields = pack(model, state)
        model.config.quantization_config = fields
        return packed, {}


Pack = Callable[[Any, Mapping[str, Tensor]], tuple[dict[str, Tensor], dict[str, Any] | None]]
"""The type of `pack`, for the models' loader, which is handed it as a plain function."""
