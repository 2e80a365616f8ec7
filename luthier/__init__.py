"""Luthier fine-tunes, compresses and serves large language models.

`finetune, evaluate, predict, quantize_model, preview` take a config (a path, a mapping, a `RunConfig`), `merge` and
`convert` take folders; each prints what the command prints and returns it. `load` gives a model for
use in other programs. Names are imported on first use, so that `import luthier` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "finetune": "recipes",
    "evaluate": "use",
    "predict": "use",
    "quantize_model": "compress",
    "preview": "use",
    "merge": "exchange",
    "convert": "exchange",
    "load": "api",
    "Adapters": "adapters.several",
    "RunConfig": "config",
    "LuthierError": "errors",
    "Refused": "errors",
    "Failed": "errors",
}
__all__ = [  # noqa: RUF022 - as a user meets them
    "finetune",
    "evaluate",
    "predict",
    "quantize_model",
    "preview",
    "merge",
    "convert",
    "load",
    "Adapters",
    "RunConfig",
    "LuthierError",
    "Refused",
    "Failed",
    "__version__",
]

if TYPE_CHECKING:
    from luthier.adapters.several import Adapters as Adapters
    from luthier.api import load as load
    from luthier.compress import quantize_model as quantize_model
    from luthier.config import RunConfig as RunConfig
    from luthier.errors import Failed as Failed
    from luthier.errors import LuthierError as LuthierError
    from luthier.errors import Refused as Refused
    from luthier.exchange import convert as convert
    from luthier.exchange import merge as merge
    from luthier.recipes import finetune as finetune
    from luthier.use import evaluate as evaluate
    from luthier.use import predict as predict
    from luthier.use import preview as preview


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'luthier' has no attribute '{name}'")
    return getattr(import_module(f"luthier.{_HOMES[name]}"), name)
