"""`luthier.load`: a model for use in another program."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from luthier.adapters.facts import base_for_use
from luthier.adapters.several import HOME
from luthier.adapters.store import load_adapter
from luthier.bases import quantization_of
from luthier.compress import NO_DATA, resolve_without_data
from luthier.models.folder import fingerprint
from luthier.models.load import build_model
from luthier.models.tokenizer import load_tokenizer
from luthier.quantize.folders import save_packed


def load(
    path: str | Path,
    adapter: str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    quantize: str | Mapping[str, Any] | None = None,
) -> tuple[PreTrainedModel, Any]:
    """The model at `path` (folder or hub name) in eval mode, and its tokenizer (None where there is none).

    `adapter` is a PEFT folder, applied by hooks; `quantize` the base's storage, "nf4" or the keys of the config's
    section `quantize` ({"weights": "nf4", "double_quant": True}); `dtype` a torch dtype or its name (`bf16` too), by default the
    checkpoint's. The model is used as any of transformers': `model(input_ids, attention_mask=...)`,
    `model.generate(...)`, `model.save_pretrained(...)`. Raises Refused for what cannot be read or does not fit.
    """
    name = "auto" if dtype is None else str(dtype).removeprefix("torch.")
    options = {} if adapter is None else base_for_use(Path(adapter))
    model_keys = {"path": str(path), "dtype": name, **options}
    values: dict[str, Any] = {"model": model_keys, "output": NO_DATA}  # nothing is written
    if quantize is not None:
        values["quantize"] = {"weights": quantize} if isinstance(quantize, str) else quantize
    asked = resolve_without_data(values).config
    config = asked.model
    quantization = quantization_of(asked.quantize, adapter, model=config)
    model = build_model(config, seed=0, quantization=quantization)
    save_packed(model)
    # for `Adapters`, which compares the base's hash when it loads one
    vars(model)[HOME] = (str(path), partial(fingerprint, path))
    if adapter is not None:
        load_adapter(model, adapter, base_name=str(path), base_hash=fingerprint(path))
    return model, load_tokenizer(path)
