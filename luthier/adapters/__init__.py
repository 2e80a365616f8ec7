"""Adapters: small trained parts around frozen layers. The contract is in `base.py`, files in `store.py`."""

from luthier.adapters.base import (
    ADAPTERS,
    Adapter,
    Additive,
    adapter_parameters,
    adapters_of,
    attach,
    count_parameters,
    detach,
    fold_into,
    initialise,
    lr_scales,
)
from luthier.adapters.lora import LoRA
from luthier.adapters.store import LoadedAdapter, load_adapter, save_adapter
from luthier.adapters.targets import select_targets

__all__ = [
    "ADAPTERS",
    "Adapter",
    "Additive",
    "LoRA",
    "LoadedAdapter",
    "adapter_parameters",
    "adapters_of",
    "attach",
    "count_parameters",
    "detach",
    "fold_into",
    "initialise",
    "load_adapter",
    "lr_scales",
    "save_adapter",
    "select_targets",
]
