"""Checkpoints whose tensors do not fit their config.json, taken on purpose (`model.misfits=accept`).

Missing tensors and those of another shape are drawn as the family draws new ones, from (seed, module name), so that they
are the same in every layout. What no parameter is named after was not read. Refusing is `load.py`'s.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel, initialization

from luthier.seeding import derive


def draw(model: PreTrainedModel, names: set[str], seed: int) -> None:
    """Draw the parameters `names` of `model` anew, in float32, and leave all others as they are."""
    parameters = dict(model.named_parameters())
    names = names & parameters.keys()  # what else is missing is computed (buffers)
    for name, parameter in parameters.items():
        marked: Any = parameter  # transformers' initialisers pass over what has its values
        marked._is_hf_initialized = name not in names
    types = {name: parameters[name].dtype for name in names}
    for name in names:
        parameters[name].data = torch.zeros_like(parameters[name], dtype=torch.float32)
    with (
        torch.random.fork_rng(devices=[]),
        torch.no_grad(),
        initialization.guard_torch_init_functions(),
    ):
        # from the leaves up, as transformers does: a parent may refine its children's values
        for path, module in reversed(list(model.named_modules())):
            if any(name.startswith(f"{path}." if path else "") for name in names):
                torch.manual_seed(derive(seed, "init", path))
                model._init_weights(module)
    for name, dtype in types.items():
        parameters[name].data = parameters[name].data.to(dtype)


def listed(what: str, names: list[str]) -> str:
    """`4 missing: a, b, c and 1 more`."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{len(names)} {what}: {', '.join(names[:3])}{more}"
