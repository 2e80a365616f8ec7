"""`luthier.load`: a model for use in another program."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from transformers import PreTrainedModel

from luthier.adapters.facts import base_for_use
from luthier.adapters.several import HOME
from luthier.adapters.store import load_adapter
from luthier.bases import quantization_of
from luthier.config import ModelConfig, QuantizeConfig
from luthier.errors import Refused
from luthier.models.folder import fingerprint
from luthier.models.load import build_model, load_tokenizer


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
    `model.generate(...)`. Raises Refused for what cannot be read or does not fit.
    """
    name = "auto" if dtype is None else str(dtype).removeprefix("torch.")
    options = {} if adapter is None else base_for_use(Path(adapter))
    config = ModelConfig.model_validate({"path": str(path), "dtype": name, **options})
    stored = _quantize_config(quantize)
    model = build_model(config, seed=0, quantization=quantization_of(stored, adapter, model=config))
    # for `Adapters`, which compares the base's hash when it loads one
    vars(model)[HOME] = (str(path), partial(fingerprint, path))
    if adapter is not None:
        load_adapter(model, adapter, base_name=str(path), base_hash=fingerprint(path))
    return model, load_tokenizer(path)


def _quantize_config(value: str | Mapping[str, Any] | None) -> QuantizeConfig:
    keys = {"weights": value} if isinstance(value, str) else dict(value or {})
    try:
        return QuantizeConfig.model_validate(keys)
    except ValidationError as error:
        problem = error.errors()[0]
        raise Refused(
            f"load(quantize={value!r})",
            f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}",
            "give nf4, fp4, int8 or int4, or the keys of the config's section quantize",
        ) from error
