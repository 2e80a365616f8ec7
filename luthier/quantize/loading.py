"""A model's linear layers quantised: which ones, and how, while their weights are read.

Each weight is quantised as soon as its tensor is read, so the model in full precision never exists: transformers'
loader offers a seam for that (`HfQuantizer`), which also knows checkpoints whose tensors are renamed or
merged. The storage is `linears.py`'s; reading and its refusals are those of the models' loader, which
is handed a `Quantization` as a plain value.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from luthier.config import QuantizeConfig
from luthier.errors import Refused
from luthier.heap import return_freed_memory
from luthier.held import Holding, HoldingQuantizer, Way, hold
from luthier.layers import ALL_LINEAR, features, is_quantized, select_linear
from luthier.quantize.linears import QuantizedLinear, QuantizedTensor
from luthier.quantize.spec import Spec, make_spec
from luthier.stacks import own_stacks, run, shape_of

METHOD = "luthier"  # our name among transformers' quantisers

Split = Callable[[str, Tensor], tuple[Tensor, Tensor, Tensor] | None]
"""(layer path, its weight [out, in]) -> what is quantised of it, and two factors of the rest for the adapter,
which finds them as the layer's `split`. None: the weight itself is quantised."""


def plan_quantization(model: nn.Module, config: QuantizeConfig) -> dict[str, Spec]:
    """Paths of the linear layers to quantise -> how; `model` may be on meta.

    Refused: names that match no linear layer, layers whose weight is another's too (a tied head), and what
    `make_spec` refuses for a layer's shape.
    """
    chosen: dict[str, str] = {}
    if isinstance(config.modules, dict):
        chosen = dict.fromkeys(select_linear(model, ALL_LINEAR, "quantize.modules"), config.weights)
        for item, scheme in config.modules.items():
            chosen |= dict.fromkeys(select_linear(model, item, "quantize.modules"), scheme)
    else:
        names = select_linear(model, config.modules, "quantize.modules")
        chosen = dict.fromkeys(names, config.weights)
    chosen = {name: scheme for name, scheme in chosen.items() if scheme != "none"}
    if config.on and not chosen:
        raise Refused(
            f"quantize.weights={config.weights}",
            f"quantize.modules={config.modules} leaves no layer to quantise",
            "name layers there, or leave the section quantize out",
        )
    return {name: _spec(model, name, scheme, config) for name, scheme in chosen.items()}


def _spec(model: nn.Module, name: str, scheme: str, config: QuantizeConfig) -> Spec:
    owner, last = _held(model, name)
    layer: Any = getattr(owner, last)
    if is_quantized(layer):
        raise Refused(
            f"quantize.weights={scheme}",
            f"layer '{name}' is quantised already, in {layer.scheme}",
            "leave quantize.weights out, or start from the model in its original precision",
        )
    # by transformers' table: while weights are read they are not tied yet
    other = getattr(model, "all_tied_weights_keys", {}).get(f"{name}.weight")
    if other is not None:
        raise Refused(
            f"quantize.weights={scheme} for layer '{name}'",
            f"its weight is '{other}' too, which stays in full precision",
            "leave it out of quantize.modules: tied, it takes no memory of its own",
        )
    shape = shape_of(owner, last) if last in own_stacks(owner) else features(layer)[::-1]
    double = config.double_quant and scheme not in ("int8", "int4")
    try:
        return make_spec(scheme, shape, config.block_size, double)
    except Refused as refused:
        raise Refused(f"{refused.asked} for layer '{name}'", refused.found, refused.do) from None


class Quantization(QuantizationConfigMixin):
    """What a model's loader has to quantise: `quantization_config` of transformers' `from_pretrained`."""

    quant_method: Any = METHOD
    ways: Collection[Way] = ()  # axes whose ranks hold what is read together, on `device`
    device: torch.device | None = None

    def __init__(
        self,
        config: QuantizeConfig,
        split_of: Callable[[nn.Module], Split] | None = None,
        seen: Callable[[QuantizedLinear, Tensor], None] | None = None,
    ) -> None:
        """`split_of` gets the model before its weights are read; `seen` each layer just quantised, with the
        weight [out, in] that it stands for."""
        self.config, self.split_of, self.seen = config, split_of, seen

    def tensors(self, model: nn.Module) -> set[str]:
        """Names of the folder's tensors that no parameter of `model` is named after: none."""
        return set()

    def convert(self, model: nn.Module) -> None:
        """Quantise a model that is in memory already, layer by layer; on meta, without values."""
        plan = plan_quantization(model, self.config)
        split = None if self.split_of is None else self.split_of(model)
        for name, spec in plan.items():
            owner, last = _held(model, name)
            held: Any = getattr(owner, last)
            weight: Any = held.weight if isinstance(held, nn.Module) else held
            replace(model, name, spec, weight, split)


class _Quantize(ConversionOps):
    """The step of transformers' loader that gets a weight just read: it ends in a `QuantizedLinear`."""

    def __init__(self, quantizer: Any) -> None:
        self.quantizer = quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        model: Any = None,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        rest = {}
        for name, found in input_dict.items():
            if self.quantizer.layer_of(name) not in self.quantizer.plan:
                rest[name] = found
                continue
            weight = found[0] if isinstance(found, list) else found
            self.quantizer.take(model, self.quantizer.layer_of(name), weight)
            if missing_keys is not None:
                missing_keys.discard(name)
        # of what is quantised nothing is left for the loader to set
        return self.quantizer.holding.convert(rest) if rest else {}


@register_quantizer(METHOD)
class _Quantizer(HoldingQuantizer):
    quantization_config: Quantization

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        asked = self.quantization_config
        self.plan = plan_quantization(model, asked.config)
        self.split = None if asked.split_of is None else asked.split_of(model)
        self.faults: list[Refused] = []
        self.holding = Holding(model, asked.ways, asked.device)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return self.layer_of(param_name) in self.plan or param_name in self.holding.wanted

    def layer_of(self, parameter: str) -> str:
        """The layer that a weight belongs to; a stack of experts is its own."""
        return parameter if parameter in self.plan else parameter.removesuffix(".weight")

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def take(self, model: nn.Module, name: str, weight: Tensor) -> None:
        try:
            replace(model, name, self.plan[name], weight, self.split)
            if (seen := self.quantization_config.seen) is not None:
                layer: Any = model.get_submodule(name)
                seen(layer, weight.mT if layer.transposed else weight)
            hold_codes(model.get_submodule(name), self.quantization_config)
            stand_in(model.get_submodule(name))
            return_freed_memory()
        except Refused as refused:  # the loader would swallow it
            self.faults.append(Refused(f"layer '{name}': {refused}"))

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if self.faults:
            raise self.faults[0]
        self.holding.settle(model)
        for name in self.plan:
            vars(model.get_submodule(name)).pop("weight", None)
        self.remove_quantization_config(model)


register_quantization_config(METHOD)(Quantization)


def stand_in(layer: nn.Module) -> None:
    """Give a layer a `weight` for the time of loading: families (gpt2) draw initial values for it by its name, and
    leave alone what has its values."""
    weight: Any = torch.empty(0)
    weight._is_hf_initialized = True
    vars(layer)["weight"] = weight


def hold_codes(layer: Any, asked: Any) -> None:
    """Keep a rank's rows of the codes and scales; `asked` tells of `ways` and `device`."""
    for tensor in layer.tensors().values():
        hold(tensor, asked.ways, asked.device)


def replace(
    model: nn.Module, name: str, spec: Spec, weight: Tensor, split: Split | None = None
) -> None:
    """Put the quantised form of linear layer `name`, whose weight is `weight` in its orientation, in its place."""
    owner, last = _held(model, name)
    if last in own_stacks(owner):
        _replace_stack(owner, last, spec, weight)
        return
    layer: Any = getattr(owner, last)
    made = QuantizedLinear.like(layer, spec.scheme, spec.block_size, spec.double_quant)
    if weight.device.type != "meta":
        if split is not None:
            dense = weight.detach().t() if made.transposed else weight.detach()
            found = split(name, dense)
            if found is not None:
                rest, *factors = found
                weight = rest.t() if made.transposed else rest
                vars(made)["split"] = tuple(factors)
        made.load_from(weight)
    if layer.bias is not None and layer.bias.device.type != "meta":
        made.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
    _mark(made)
    model.set_submodule(name, made)


def _replace_stack(experts: nn.Module, stack: str, spec: Spec, weight: Tensor) -> None:
    """Fused experts [E, out, in], or transposed as their module has them."""
    made = QuantizedTensor(
        spec.shape,
        spec.scheme,
        spec.block_size,
        spec.double_quant,
        dtype=weight.dtype,
        device="meta",
    )
    made.transposed = bool(getattr(experts, "is_transposed", False))
    if weight.device.type != "meta":
        made.load_from(weight.mT if made.transposed else weight)
    _mark(made)
    vars(made)["_is_hf_initialized"] = True  # families draw initial values for it by its name
    delattr(experts, stack)
    setattr(experts, stack, made)
    vars(experts)["forward"] = MethodType(run, experts)


def _mark(made: nn.Module) -> None:
    """Or else the loader, which knows no such tensors, would draw them anew."""
    for parameter in made.parameters():
        parameter._is_hf_initialized = parameter.device.type != "meta"  # pyright: ignore[reportAttributeAccessIssue]


def _held(model: nn.Module, name: str) -> tuple[Any, str]:
    """The module that has the layer, or the stack of experts, `name`; and its name there."""
    path, _, last = name.rpartition(".")
    return model.get_submodule(path), last
