"""Adapters: small trained parts around frozen layers. The contract is in `base.py`, files in `store.py`."""

from luthier.adapters.base import ADAPTERS, Adapter, Additive
from luthier.adapters.ia3 import IA3
from luthier.adapters.lokr import LoKr
from luthier.adapters.lora import LoRA
from luthier.adapters.mora import MoRA
from luthier.adapters.noise import add_noise, remove_noise
from luthier.adapters.placing import (
    adapter_parameters,
    adapters_of,
    attach,
    detach,
    fold_into,
    initialise,
    lr_scales,
    plan_of,
    retract,
    whole_parameters,
)
from luthier.adapters.prefix import Prefix
from luthier.adapters.prompt import Prompt
from luthier.adapters.reft import ReFT
from luthier.adapters.store import LoadedAdapter, load_adapter, save_adapter
from luthier.adapters.targets import select_targets
from luthier.adapters.vera import VeRA

__all__ = [
    "ADAPTERS",
    "IA3",
    "Adapter",
    "Additive",
    "LoKr",
    "LoRA",
    "LoadedAdapter",
    "MoRA",
    "Prefix",
    "Prompt",
    "ReFT",
    "VeRA",
    "adapter_parameters",
    "adapters_of",
    "add_noise",
    "attach",
    "detach",
    "fold_into",
    "initialise",
    "load_adapter",
    "lr_scales",
    "plan_of",
    "remove_noise",
    "retract",
    "save_adapter",
    "select_targets",
    "whole_parameters",
]
