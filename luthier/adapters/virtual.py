"""What prefix and prompt tuning share: keys and values that every document's attention sees first.

The adapter sits on the model itself (path ""). Before each forward of the decoder it computes the keys and
values of all layers (`compute`), shifts the positions of the tokens, and keeps the keys where the
attention seam asks for them (`keys_values`): in the forward, and when a layer is computed again in the backward.
The cache of a generation holds real tokens only; a call that goes on from a cache uses the keys of the
call that began it.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from luthier.adapters.base import Adapter, Placed, Removable
from luthier.batch import Layout, PrefixKeys, capture, current_layout, layout_scope
from luthier.config import AdapterConfig
from luthier.crossing import aside
from luthier.errors import Refused
from luthier.positions import num_positions, position_axes

TABLE = "prompt_embeddings"  # PEFT's name of the trained table in its files
FROM_MASK = ("opt",)  # families that count positions by the mask where they are not given
COMMON = 5000  # ids of byte-pair vocabularies are in the order of frequency
# what PEFT's options of either method mean for a loaded adapter: nothing, or what the shapes tell
INERT = frozenset(
    {
        *("peft_type", "base_model_name_or_path", "modules_to_save", "task_type", "inference_mode"),
        *("revision", "auto_mapping", "peft_version", "num_virtual_tokens", "token_dim"),
        *("num_attention_heads", "num_layers", "num_transformer_submodules"),
    }
)


class Kept:
    """Keys and values of the forward that runs, layer -> (keys, values) [P, K, D].

    They belong to that forward's graph, so a copy of the model starts without them.
    """

    def __init__(self) -> None:
        self.layers: Mapping[int, tuple[Tensor, Tensor]] | None = None
        self.seen = False  # the attention asked for them

    def __deepcopy__(self, memo: dict[int, Any]) -> Kept:
        return Kept()


class Virtual(Adapter):
    """P virtual tokens before every document, in the attention of all layers.

    `follows` stays empty: the tokens belong to no layer that tensor parallelism cuts.
    """

    virtual = False
    """As in `PrefixKeys`."""

    def __init__(self, layer: nn.Module, config: AdapterConfig, *, name: str, seed: int) -> None:
        super().__init__(layer, config, name=name, seed=seed)
        self.kept = Kept()

    @abstractmethod
    def compute(self, decoder: Any) -> Mapping[int, tuple[Tensor, Tensor]]:
        """Layer -> keys and values [P, K, D] of the virtual tokens."""

    def keys_values(self, layer: int) -> PrefixKeys | None:
        """What layer `layer` of the forward that runs sees first; none while it is being computed."""
        if self.kept.layers is None:
            return None
        self.kept.seen = True
        return PrefixKeys(*self.kept.layers[layer], virtual=self.virtual)

    @classmethod
    def plan(cls, model: Any, config: AdapterConfig) -> dict[str, AdapterConfig]:
        if config.layers != "all":
            raise Refused(
                f"adapter.layers={config.layers} with adapter.method={config.method}",
                "the virtual tokens act in all layers",
                "leave adapter.layers out",
            )
        cls.check_length(config, 1, num_positions(model.config))
        return {"": config}

    @classmethod
    def check_length(cls, config: AdapterConfig, length: int, positions: int | None) -> None:
        if positions is None:
            return
        size, taken = config.num_prefix_tokens, cls.reserve(config)
        if size >= positions:
            raise Refused(
                f"adapter.num_prefix_tokens={size}",
                f"the model has {positions} positions",
                f"give less than {positions}",
            )
        if taken + length > positions:
            raise Refused(
                f"adapter.num_prefix_tokens={size} with documents of {length} tokens",
                f"the model has {positions} positions",
                f"give data.length={positions - taken} or less, or fewer virtual tokens",
            )

    @classmethod
    def connect(cls, model: Any, adapters: Mapping[str, Adapter]) -> list[Removable]:
        adapter: Any = adapters[""]
        base = model.get_decoder()  # OPT goes past its base model
        layers = [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "is_causal")]
        return [
            *(Placed(layer, "keys_values", adapter.keys_values) for layer in layers),
            base.register_forward_pre_hook(adapter.enter, with_kwargs=True),
            base.register_forward_hook(adapter.leave),
        ]

    def enter(self, base: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Before a forward of the decoder."""
        past = kwargs.get("past_key_values")
        cached = 0 if past is None else int(past.get_seq_length())
        if not cached or self.kept.layers is None:
            self.kept.layers = None  # while they are computed
            self.kept.layers = self.compute(base)
        self.kept.seen = False
        return args, _shifted(base, args, kwargs, cached, self.reserve(self.config))

    def leave(self, base: Any, args: Any, output: Any) -> None:
        """After a forward: refuse it if the attention did not ask for the keys."""
        if not self.kept.seen:
            raise _unseen(base)

    def tensors(self) -> dict[str, Tensor]:
        return {}  # all are shared tensors: they belong to no layer

    @classmethod
    def take_shared(cls, adapters: Mapping[str, Adapter], tensors: Mapping[str, Tensor]) -> None:
        adapter: Any = adapters[""]
        for name, parameter in adapter.stored().items():
            if name not in tensors:
                raise Refused(
                    "an adapter folder with virtual tokens",
                    f"it lacks the tensor {name}",
                    "copy the folder again",
                )
            if tensors[name].shape != parameter.shape:
                has, fits = (list(t.shape) for t in (tensors[name], parameter))
                raise Refused(
                    f"the tensor {name} of an adapter folder on this base",
                    f"its shape is {has}, {fits} would fit",
                    "give the base that it was trained on",
                )
            parameter.copy_(tensors[name])

    @abstractmethod
    def stored(self) -> dict[str, nn.Parameter]:
        """Name in the adapter's file -> parameter."""


def alone(base: Any, embeddings: Tensor, first: int = 0) -> dict[int, tuple[Tensor, Tensor]]:
    """Keys and values of the P tokens of `embeddings` [P, D], a document of their own whose first position is
    `first`, layer by layer: [P, K, D].

    As attention is causal, they are the same before any document. In families with two position axes they are
    a context of their own, which sees itself and not the document's, so there too. The model's own dropout
    does not act on them: they are common to all rows, so no row can decide it.
    """
    size = len(embeddings)
    positions = torch.arange(first, first + size, device=embeddings.device)[None]
    documents = torch.zeros_like(positions)
    given = {}
    if position_axes(base.config.model_type) == 2:
        positions = torch.stack([positions, documents], dim=1)  # [1, 2, P], all of it context
        given = {"attention_mask": torch.ones_like(documents)}  # outside a layout, GLM asks for it
    layout = None if current_layout() is None else Layout(documents, positions)
    training = [module for module in base.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with layout_scope(layout), aside(), capture() as found:
            # not base(...): its hooks are about the documents
            base.forward(
                inputs_embeds=embeddings[None], position_ids=positions, use_cache=False, **given
            )
    finally:
        for module in training:
            module.training = True
    if not found:
        raise _unseen(base)
    return {
        i: (keys[0].transpose(0, 1), values[0].transpose(0, 1))
        for i, (keys, values) in found.items()
    }


def draw_tokens(model: Any, size: int, generator: torch.Generator) -> Tensor:
    """Embeddings [P, D] of `size` of the model's common tokens.

    Virtual tokens that start as real ones leave the model near to what it was, and learn best (Lester et al.
    2021, arXiv:2104.08691, section 3.2; Li & Liang 2021, section 7.4). Random numbers do not.
    """
    embedding = model.get_input_embeddings()
    common = min(COMMON, model.config.get_text_config().vocab_size)
    ids = torch.randint(0, common, (size,), generator=generator)
    # not embedding(...): its hooks (noise) are about documents
    return embedding.forward(ids.to(embedding.weight.device)).detach()


def options_from(
    fields: Mapping[str, Any], values: Mapping[str, Any], known: frozenset[str]
) -> tuple[AdapterConfig, list[str]]:
    """adapter_config.json of either method, and what it says about the method's own options -> options, remarks."""
    if fields.get("num_transformer_submodules") not in (None, 1):
        raise Refused(
            f"a {fields['peft_type']} folder for models of several parts",
            f"its num_transformer_submodules is {fields['num_transformer_submodules']}",
            "give one that was made for a causal language model",
        )
    size = fields.get("num_virtual_tokens")
    try:
        config = AdapterConfig.model_validate({"num_prefix_tokens": size, **values})
    except ValidationError as error:
        raise Refused(
            "reading adapter_config.json",
            f"its options are not valid ({error.errors()[0]['loc']}: {error.errors()[0]['msg']})",
            "mend the file",
        ) from error
    unknown = {key: value for key, value in fields.items() if key not in INERT | known}
    return config, [
        f"adapter_config.json has an unknown option {key}={value}: ignored"
        for key, value in unknown.items()
    ]


def _unseen(base: Any) -> Refused:
    return Refused(
        f"virtual tokens for a model of the family '{base.config.model_type}'",
        f"its attention ('{base.config._attn_implementation}') does not see them",
        "load the model with luthier.load, which gives it Luthier's attention",
    )


def _shifted(
    base: Any, args: tuple[Any, ...], kwargs: dict[str, Any], cached: int, by: int
) -> dict[str, Any]:
    """The keyword arguments of a forward whose tokens stand `by` positions further (of two axes: on the first)."""
    if by == 0:
        return kwargs
    positions = kwargs.get("position_ids")
    if positions is None:
        if "position_ids" not in inspect.signature(base.forward).parameters:
            return kwargs  # ALiBi: only distances count
        positions = _positions(base, args, kwargs, cached)
    axes = [by] if positions.ndim < 3 else [by, 0]
    return kwargs | {"position_ids": positions + positions.new_tensor(axes)[:, None]}


def _positions(base: Any, args: tuple[Any, ...], kwargs: dict[str, Any], cached: int) -> Tensor:
    """The positions [1 or B, S] that the models take where none are given; [B, 2, S] of ids that say what is context."""
    mask = kwargs.get("attention_mask")
    if hasattr(base, "positions_of"):
        return base.positions_of(args[0] if args else kwargs.get("input_ids"), mask)
    if base.config.model_type in FROM_MASK and mask is not None:
        return ((mask.cumsum(1) * mask).long() - 1)[:, cached:]
    tokens = args[0] if args else kwargs.get("input_ids")
    tokens = kwargs["inputs_embeds"] if tokens is None else tokens
    return torch.arange(cached, cached + tokens.shape[1], device=tokens.device)[None]
