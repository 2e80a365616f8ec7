"""GGUF file -> Hugging Face folder.

transformers' own reader dequantises the tensors; what is left to do here is to drop the quantisation
record (the weights are plain afterwards), to keep the tokenizer and its chat template, and to check
that the written folder computes what was read. Writing GGUF is not done here.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from luthier.errors import Failed, Refused, need
from luthier.files import publish
from luthier.models.load import quiet, save_model

MAGIC = b"GGUF"


def is_gguf(path: Path) -> bool:
    """Whether the file begins as a GGUF file does."""
    if not path.is_file():
        return False
    with path.open("rb") as handle:
        return handle.read(4) == MAGIC


def convert_gguf(
    source: Path, out: Path, *, dtype: torch.dtype = torch.float32
) -> dict[str, object]:
    """Write the model in `source` as a Hugging Face folder `out` and return facts about it.

    Weights are dequantised to float32 (exact for the k-bit integer types, whose scales are float16) and
    written as `dtype`. Raises `Refused` for a file that cannot be read and `Failed` when the written
    folder does not reproduce the logits of what was read.
    """
    if importlib.util.find_spec("gguf") is None:
        raise need("gguf", "gguf", f"reading {source.name}")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    with quiet():
        try:
            model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(**where)
        except Exception as error:  # damaged bytes make the reader raise almost anything
            raise _unreadable(source, error) from error
        model.eval()
        _forget_quantisation(model)
        model.to(dtype)  # pyright: ignore[reportArgumentType]
        probe = torch.arange(32).remainder(model.config.vocab_size)[None]  # [1, 32]
        with torch.no_grad():
            expected = model(input_ids=probe, use_cache=False).logits
        with publish(out, manifest=False) as folder:
            save_model(model, folder, tokenizer)
            again = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
            with torch.no_grad():
                found = again(input_ids=probe, use_cache=False).logits
            if not torch.equal(expected, found):
                worst = float((expected - found).abs().max())
                raise Failed(
                    f"convert {source} to {out}",
                    f"the written model's logits differ by up to {worst:.3g}; nothing was published",
                    "report this file: its configuration does not survive saving",
                )
    return {
        "model_type": model.config.model_type,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(dtype).removeprefix("torch."),
        "vocabulary": len(tokenizer),
        "chat_template": bool(tokenizer.chat_template),
    }


def _unreadable(source: Path, error: Exception) -> Refused:
    """Why transformers could not read the file: because it is damaged, or because of what is in it."""
    from gguf import GGUFReader

    try:
        GGUFReader(source)
    except Exception as damage:  # of numpy, struct and gguf
        return Refused(
            f"convert {source}",
            f"the file ({source.stat().st_size:,} bytes) is cut short or damaged: {damage}",
            "copy or download it again",
        )
    return Refused(
        f"convert {source}", f"transformers cannot read it: {error}", "give another GGUF file"
    )


def _forget_quantisation(model: Any) -> None:
    """Make transformers treat the dequantised weights as ordinary ones when it saves them."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for name, value in (
        ("hf_quantizer", None),
        ("is_quantized", False),
        ("quantization_method", None),
    ):
        if hasattr(model, name):
            setattr(model, name, value)
