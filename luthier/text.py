"""What turns rows into ids, opened and checked before any weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PretrainedConfig

from luthier.config import RunConfig
from luthier.data.encode import Renderer
from luthier.data.templates import PaddleNLP
from luthier.errors import Refused
from luthier.models.folder import find_folder
from luthier.models.load import check_tokenizer, load_config, load_tokenizer, pad_id, quiet
from luthier.models.rotary import scale
from luthier.positions import check_positions, kind_of_positions


@dataclass(frozen=True)
class Text:
    tokenizer: Any
    renderer: Renderer
    pad_id: int
    model_config: PretrainedConfig


def open_text(config: RunConfig, path: str | None = None) -> Text:
    """Tokenizer and renderer of the model at `path` (default: model.path), checked against its config."""
    where = path or config.model.path
    remote = config.model.trust_remote_code
    model_config = load_config(where, trust_remote_code=remote)
    remarks = []
    if config.model.rope_scaling is not None and where == config.model.path:
        remarks = scale(model_config, config.model.rope_scaling)
    words = where if config.model.tokenizer is None or path else config.model.tokenizer
    tokenizer = load_tokenizer(words, trust_remote_code=remote)
    if tokenizer is None:
        file, origin = getattr(model_config, "vocabulary", ("", ""))
        raise Refused(
            f"the tokenizer of '{words}'",
            f"the folder has no {file or 'tokenizer files (tokenizer.json, tokenizer.model, ...)'}",
            f"copy it from {origin} into it"
            if file
            else "copy those of the model into it, or name their folder with model.tokenizer",
        )
    check_tokenizer(tokenizer, model_config)
    data = config.data
    renderer = Renderer(
        tokenizer,
        template=data.template,
        length=data.length,
        source_length=data.source_length,
        overlong=data.overlong,
        supervise=data.supervise,
        blanks=data.blanks,
        stop_ids=_model_stops(find_folder(where, code=remote)),
    )
    renderer.notes += tuple(remarks)
    check_positions(model_config, data.length, f"data.length={data.length}")
    if data.pose != "off":
        _check_pose(data.reach, renderer, model_config)
    if isinstance(renderer.template, PaddleNLP):
        renderer.notes += (
            "PaddleNLP's chat template is no Jinja template of transformers: the final model's "
            "tokenizer keeps its own",
        )
    elif data.template not in ("auto", "none"):  # what was trained is what goes with the model
        tokenizer.chat_template = Path(data.template).read_text("utf-8")
    return Text(tokenizer, renderer, pad_id(tokenizer, model_config), model_config)


def _check_pose(window: int, renderer: Renderer, model_config: PretrainedConfig) -> None:
    """Refuse PoSE where positions that skip mean nothing, and a window beyond the model's positions."""
    asked = f"data.pose with data.pose_window={window}"
    if renderer.positions is not None:
        found = "the positions of its two axes say what is context"
    elif kind_of_positions(model_config) == "alibi":
        found = "it has ALiBi, which reads no positions and reaches any length as it is"
    else:
        check_positions(model_config, window, f"data.pose_window={window}")
        return
    raise Refused(f"{asked} for the family '{model_config.model_type}'", found, "leave it out")


def _model_stops(folder: Path) -> list[int]:
    """End ids of the folder's generation_config.json."""
    if not (folder / "generation_config.json").is_file():
        return []
    with quiet():
        end = GenerationConfig.from_pretrained(folder).eos_token_id
    return [] if end is None else [end] if isinstance(end, int) else list(end)
