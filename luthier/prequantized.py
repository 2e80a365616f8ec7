"""Model folders that are quantised already: what of them the models' loader must be handed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from luthier.config import ModelConfig, QuantizeConfig
from luthier.errors import Refused
from luthier.models.folder import find_folder, read_config, read_header, weight_files
from luthier.quantize.folders import Prequantized


def prequantized(model: ModelConfig, asked: QuantizeConfig | None = None) -> Prequantized | None:
    """The quantised weights of the folder `model.path`; None where it is in its original precision.

    Reads headers and small tensors only. Refused: a method that is not read, weights that are damaged, and later,
    where its layers are known, `asked` for another form than it has.
    """
    folder = find_folder(model.path, code=model.trust_remote_code)
    fields = read_config(folder, code=model.trust_remote_code).get("quantization_config")
    if not fields:
        return None
    headers: dict[str, dict[str, Any]] = {}
    files: dict[str, Path] = {}
    for file in weight_files(folder):
        if file.suffix != ".safetensors":
            raise Refused(
                f"model '{folder}' was asked for",
                f"its quantised weights are in {file.name}; they are read from safetensors only",
                "save it as safetensors with the program that made it",
            )
        found = read_header(file)
        headers |= found
        files |= dict.fromkeys(found, file)
    return Prequantized(folder, fields, headers, files, asked)
