"""The adapter contract: what a method says about itself, and the base classes.

An adapter is a submodule `adapter` of an otherwise untouched layer: parameters of the base keep their
names. It acts by hooks (`before`, `after`), or, if it adds something to a layer's output (`Additive`),
inside the layer's own matrix product. A method that adapts no single layer (prefix) sits on the model
itself, path "", and gives the attention keys and values. Putting adapters on a model is `placing.py`'s,
which layers a method may go to is `targets.py`'s, files are `store.py`'s.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luthier import seeding
from luthier.adapters.targets import (
    options_of,
    refuse_idle_patterns,
    select_targets,
)
from luthier.batch import current_layout
from luthier.config import AdapterConfig
from luthier.errors import Failed, Refused
from luthier.layers import dense_weight, features, is_double, is_linear, is_transposed
from luthier.parts import Part, Stretch, both
from luthier.registry import Registry
from luthier.stacks import shape_of_matrix

ADAPTERS: Registry[type[Adapter]] = Registry("adapter method")


class Removable(Protocol):
    """What undoes a change of the model, as the handles of hooks do."""

    def remove(self) -> None: ...


class Beside(Protocol):
    """`parallel.beside`: a whole update on a layer that is cut among ranks."""

    def delta(self, make: Callable[[Tensor], Tensor], x: Tensor) -> Tensor: ...
    def low_rank(self, whole: LowRank) -> LowRank: ...


class Placed:
    """An attribute that was set on one module (its own `forward`, say); `remove` deletes it.

    Not a closure: a deep copy of a model has to undo its own changes.
    """

    def __init__(self, module: nn.Module, name: str, value: Any) -> None:
        self.module, self.name = module, name
        vars(module)[name] = value  # past nn.Module's registration of sub-modules

    def remove(self) -> None:
        del vars(self.module)[self.name]


class Adapter(nn.Module):
    """One method on one layer. Weights are float32 (float64 on a float64 base), computation is the base's.

    All parameters are trained; what is fixed is a buffer. Subclasses override what they need; a member
    that is not overridden costs nothing.
    """

    uses: ClassVar[frozenset[str]] = frozenset()
    """Keys of `AdapterConfig` that the method reads; another one that is set is refused. `layers` and
    `modules_to_save` are everybody's."""

    follows: ClassVar[Mapping[str, Mapping[str, int]]] = {}
    """Under tensor parallelism: style of the layer ("colwise", "rowwise") -> parameter -> axis that is cut
    like the layer's; the others are whole on every rank. A style that is not named: all of them are, and
    `beside` says what a rank adds."""

    by_heads: ClassVar[bool] = False
    """Whether it gives heads of keys and values, of which a tensor-parallel rank needs its own."""

    peft_types: ClassVar[tuple[str, ...]] = ()
    """Values of `peft_type` in adapter_config.json that are this method's; names of our own
    (`LUTHIER_...`) where PEFT lacks the form."""

    suffixes: ClassVar[tuple[str, ...]] = ()
    """What may follow a layer's path in the names of the adapter file's tensors."""

    shared_names: ClassVar[tuple[str, ...]] = ()
    """Names of tensors of the adapter's file that belong to no single layer."""

    from_layer: ClassVar[bool] = True
    """Whether an adapter's first values depend on its own layer alone: then a pipeline's rank reads no other."""

    zero_at_start: frozenset[str] = frozenset()
    """Parameters whose gradient is zero at the first step (LoRA's A while B is zero). A form or option may
    set it on the instance."""

    stacked: int = 0
    """Of an adapter on fused experts (`experts.py`): their number; its tensors have it as their first axis."""

    may_idle: frozenset[str] = frozenset()
    """Parameters that the loss may not depend on at all (an edit of early tokens in the last layer)."""

    tokens_aside: int = 0
    """Tokens of its own that run through the layers beside the batch's, each time (prompt tuning)."""

    entering: Part | None = None
    """What of its whole inputs a tensor-parallel rank's layer has, where they are cut (last axis)."""

    total: Callable[[Tensor], Tensor] = staticmethod(lambda x: x)
    """The sum of x over the ranks among which the layer's inputs are cut, without gradient."""

    beside: Beside | None = None
    """What of the update a rank adds to its part of the layer, where the update is whole."""

    tokens: tuple[int, int] = (0, 1)
    """Which stretch of a row's tokens a rank's whole layers see, where these are cut between the layers."""

    heads_here: Part | None = None
    """What of the heads of keys and values [P, K, D] a rank's attention has (`by_heads`)."""

    def __init__(self, layer: nn.Module, config: AdapterConfig, *, name: str, seed: int) -> None:
        """Make the parameters, on the layer's device, without values; `name` is the layer's path."""
        super().__init__()
        self.config, self.name, self.seed = config, name, seed
        self.handles: list[Removable] = []

    @property
    def path(self) -> str:
        """Where it is in the model: below its layer, or below the module that has its stack."""
        owner, _, stack = self.name.rpartition(".")
        path = f"{owner}.adapter.{stack}" if self.stacked else f"{self.name}.adapter"
        return path.removeprefix(".")

    @classmethod
    def plan(cls, model: nn.Module, config: AdapterConfig) -> dict[str, AdapterConfig]:
        """Layers to adapt -> the options of each. Refused if that is impossible."""
        names = select_targets(model, config.targets, config.layer_numbers)
        refuse_idle_patterns(config, names)
        return {name: options_of(config, name) for name in names}

    @classmethod
    def check_length(cls, config: AdapterConfig, length: int, positions: int | None) -> None:
        """Refuse documents of `length` tokens in a model of `positions` positions, where they do not fit."""

    @classmethod
    def reserve(cls, config: AdapterConfig) -> int:
        """Positions of the model that the method takes from every document."""
        return 0

    @classmethod
    def accepts(cls, layer: nn.Module) -> bool:
        """Whether the method can adapt this kind of layer."""
        return True

    @classmethod
    def share(cls, model: nn.Module, adapters: Mapping[str, Adapter]) -> None:
        """Make what the adapters of a model have in common (VeRA's projections); called once they are
        built, before they are on the model."""

    @classmethod
    def connect(cls, model: nn.Module, adapters: Mapping[str, Adapter]) -> list[Removable]:
        """Connect with the model as a whole, once the adapters are on it; what undoes it."""
        return []

    def before(self, x: Tensor) -> Tensor:
        """What enters the layer instead of x."""
        return x

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """What leaves the layer instead of y, where x entered it."""
        return y

    def fold(self, weight: Tensor) -> Tensor:
        """The layer's weight, in its own orientation, that does alone what layer and adapter do.

        `weight` is float32 or wider; so is the result.
        """
        where = f"layer '{self.name}'" if self.name else "the model"
        raise Refused(
            f"folding the adapter of {where} into its weight",
            f"what adapter.method={self.config.method} does is no change of a weight",
            "use the base together with the adapter",
        )

    def fold_bias(self, bias: Tensor) -> Tensor:
        """The layer's bias, as `fold`."""
        return bias

    def initialise(self, layer: nn.Module, generator: torch.Generator) -> None:
        """Set the first values, once the layer's weights are read; the layer's output stays the same."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def retract(self) -> None:
        """Called after each step of the optimiser: put parameters back where they have to stay."""

    def lr_scale(self, parameter: str) -> float:
        """Learning rate of the adapter's parameter of this name, as a multiple of the run's."""
        return 1.0

    def tensors(self) -> dict[str, Tensor]:
        """Tensors of the adapter's file: suffix -> tensor."""
        return {f"{name}.weight": parameter for name, parameter in self.named_parameters()}

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `tensors` gave, bit for bit."""
        for suffix, tensor in self.tensors().items():
            tensor.copy_(tensors[suffix])

    @classmethod
    def shared_tensors(cls, adapters: Mapping[str, Adapter]) -> dict[str, Tensor]:
        """Tensors of the file that belong to no single layer, by their names there (of `shared_names`)."""
        return {}

    @classmethod
    def take_shared(cls, adapters: Mapping[str, Adapter], tensors: Mapping[str, Tensor]) -> None:
        """Take over what `shared_tensors` gave. Tensors may be absent: Refused if they are needed, or if
        a shape does not fit."""

    @classmethod
    def settle(cls, config: AdapterConfig, adapters: Mapping[str, Adapter]) -> AdapterConfig:
        """`config` as a folder records it: what it left to the run (VeRA's seed) is said."""
        return config

    @classmethod
    def to_peft(cls, config: AdapterConfig, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        """Entries of adapter_config.json of this method, `peft_type` among them; layers may differ from
        `config`."""
        raise TypeError(f"{cls.__name__} is not saved")

    @classmethod
    def from_peft(
        cls, fields: Mapping[str, Any], layers: list[str]
    ) -> tuple[AdapterConfig, dict[str, AdapterConfig], list[str]]:
        """adapter_config.json -> options, options of each layer, remarks. Refused if one is not supported.

        `layers` are the paths that the file has tensors for; none for a method whose tensors are all shared.
        """
        raise TypeError(f"{cls.__name__} is not loaded")

    def new_parameter(self, layer: nn.Module, *shape: int) -> nn.Parameter:
        """A new parameter of zeros that fits the layer: its device, float32 or the layer's float64."""
        return nn.Parameter(self.new_tensor(layer, *shape))

    def new_tensor(self, layer: nn.Module, *shape: int) -> Tensor:
        """As `new_parameter`, for what is not trained."""
        dtype = torch.float64 if is_double(layer) else torch.float32
        return torch.zeros(shape, dtype=dtype, device=next(layer.parameters()).device)

    def drop(self, x: Tensor) -> Tensor:
        """`adapter.dropout` of x [B, S, ...] or [B*S, ...], in training mode.

        Which units are dropped is a function of (seed, layer, row), so the cut into micro-batches does
        not matter. Outside a layout there are no rows, and the global generator decides.
        """
        if not self.training or self.config.dropout == 0:
            return x
        return self._drop(x)

    @torch.compiler.disable()
    def _drop(self, x: Tensor) -> Tensor:
        p, layout = self.config.dropout, current_layout()
        if layout is None:
            return F.dropout(x, p)
        batch, width = layout.shape
        flat = x.shape[0] != batch
        stretch = Stretch(width, *self.tokens)
        length = x.shape[0] / batch if flat else x.shape[1]
        if flat and length not in (width, stretch.length):
            raise Failed(
                f"adapter.dropout={p} on layer '{self.name}'",
                f"the model regroups the tokens before it ({x.shape[0]} of {batch * width})",
                "set adapter.dropout=0, or leave this layer out of adapter.targets",
            )
        x = x.unflatten(0, (batch, -1)) if flat else x
        rows = layout.rows or tuple(range(batch))
        part = self.entering
        if part is not None and x.shape[-1] == sum(part.sizes):
            part = None  # gathered for an update that is whole
        part = both(part, stretch if length == stretch.length != width else None)
        part = both(part, layout.share)
        name = f"{self.name}.adapter"
        x = seeding.dropout(x, p, seed=self.seed, name=name, rows=rows, part=part)
        return x.flatten(0, 1) if flat else x


class LowRank(NamedTuple):
    """delta(x) = up down drop(x). With `gain`, what leaves the layer, its bias apart, is 1 + gain times
    as much."""

    down: Tensor  # [R, in]
    up: Tensor  # [out, R], the scale in it
    gain: Tensor | None = None  # [out]


class Additive(Adapter):
    """A method on linear layers that adds `delta(x)` to the layer's output."""

    def __init__(self, layer: nn.Module, config: AdapterConfig, *, name: str, seed: int) -> None:
        super().__init__(layer, config, name=name, seed=seed)
        self.transposed = is_transposed(layer)  # its weight is [in, out]

    @classmethod
    def accepts(cls, layer: nn.Module) -> bool:
        return is_linear(layer)

    @abstractmethod
    def delta(self, x: Tensor) -> Tensor:
        """x [..., in] -> what is added to the layer's output, [..., out], in x's dtype."""

    @abstractmethod
    def update(self) -> Tensor:
        """What is added to the layer's weight, [out, in], in the parameters' dtype: `delta` of an identity."""

    def low_rank(self) -> LowRank | None:
        """The factors of `delta`, of a method that has them: layer and adapter are then one autograd node."""
        return None

    def delta_here(self, x: Tensor) -> Tensor:
        """What is added to this rank's part of the layer's output."""
        return self.delta(x) if self.beside is None else self.beside.delta(self.delta, x)

    def low_rank_here(self) -> LowRank | None:
        """The factors of `delta_here`."""
        factors = self.low_rank()
        return factors if self.beside is None or factors is None else self.beside.low_rank(factors)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.delta_here(x)

    def fold(self, weight: Tensor) -> Tensor:
        update = self.update().to(weight.dtype)
        return weight + (update.t() if self.transposed else update)

    def weight_of(self, layer: nn.Module) -> Tensor:
        """The layer's weight as [out, in], float32 or wider."""
        return dense_weight(layer, torch.float64 if is_double(layer) else torch.float32)


def check_rank(model: nn.Module, plan: Mapping[str, AdapterConfig]) -> None:
    """Refuse a rank above that of a layer's weight."""
    for name, config in plan.items():
        stack = shape_of_matrix(model, name)
        num_in, num_out = features(model.get_submodule(name)) if stack is None else stack[::-1]
        if config.rank > min(num_in, num_out):
            raise Refused(
                f"adapter.rank={config.rank}",
                f"layer '{name}' is {num_in} -> {num_out}: its weight has rank {min(num_in, num_out)} at most",
                f"give adapter.rank={min(num_in, num_out)} or less, or leave this layer out of adapter.targets",
            )


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type of an adapter on weights of this one."""
    return torch.float64 if dtype == torch.float64 else torch.float32
