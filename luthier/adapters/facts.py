"""What an adapter folder says besides its tensors: PEFT's adapter_config.json, and facts of our own.

`luthier.json` holds what PEFT would not understand: the base's hash, how the base was made, and the options
as the user gave them. The options count only while adapter_config.json is as it was written with them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from luthier.config import AdapterConfig, RopeScaling
from luthier.errors import Refused
from luthier.files import write_json

CONFIG = "adapter_config.json"
FACTS = "luthier.json"


def write_facts(
    folder: Path,
    fields: Mapping[str, Any],
    config: AdapterConfig,
    base_name: str,
    base_hash: str | None,
    base_options: Mapping[str, Any] | None,
) -> None:
    """Write both files; `fields` are those of adapter_config.json."""
    write_json(folder / CONFIG, dict(fields))
    facts = {
        "format": 1,
        "base_name": base_name,
        "base_hash": base_hash,
        "base_options": dict(base_options or {}),
        "options": {"method": config.method, **config.model_dump(mode="json", include=set(config.changed()))},
        "options_of": _digest(fields),
    }  # fmt: skip
    write_json(folder / FACTS, facts)


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of a PEFT folder; Refused when there is none."""
    if not folder.is_dir():
        raise Refused(f"the adapter folder {folder}", "there is no such folder", "check the path")
    path = folder / CONFIG
    if not path.is_file():
        names = sorted(p.name for p in folder.iterdir())
        raise Refused(
            f"the adapter folder {folder}",
            f"it has no {CONFIG}; it holds {', '.join(names[:8]) or 'nothing'}",
            "give a folder in PEFT's format; luthier convert makes one of PaddleNLP's",
        )
    fields = _read_json(path)
    if not fields.get("peft_type"):
        raise Refused(f"reading {path}", "it has no peft_type", "give a folder in PEFT's format")
    return fields


def own_options(folder: Path, fields: Mapping[str, Any]) -> AdapterConfig | None:
    """The options that the folder was trained with; None where it is not ours, or was edited since."""
    facts = _facts(folder)
    if "options" not in facts or facts.get("options_of") != _digest(fields):
        return None
    try:
        return AdapterConfig.model_validate(facts["options"])
    except ValidationError as error:
        raise Refused(
            f"reading {folder / FACTS}",
            f"its options are not valid ({error.errors()[0]['msg']})",
            f"copy the folder again, or remove {FACTS}",
        ) from error


def check_base(
    folder: Path, made_for: Any, base_name: str | None, base_hash: str | None
) -> list[str]:
    """Refuse a base of another hash than the one recorded in `folder`; another name is a remark.

    An adapter of a quantised folder fits the original, too, that this was made of.
    """
    recorded = _facts(folder).get("base_hash")
    original = base_options(folder).get("original_hash")
    if recorded and base_hash and base_hash not in (recorded, original):
        raise Refused(
            f"the adapter {folder} on {base_name or 'this base'}",
            f"it was trained on a base with other weights (hash {recorded[:12]}, here {base_hash[:12]})",
            f"give the base it was trained on: {made_for}",
        )
    if made_for and base_name and made_for != base_name:
        return [f"the adapter was trained on a base named {made_for}, here it is {base_name}"]
    return []


def base_options(folder: Path) -> dict[str, Any]:
    """How the adapter's base was made of its folder: `num_layers`, `init` and `rope_scaling` as in `model`."""
    return {
        "num_layers": None,
        "init": "pretrained",
        "rope_scaling": None,
        **(_facts(folder).get("base_options") or {}),
    }


def check_made_alike(folder: Path, num_layers: int | None, scaling: RopeScaling | None) -> None:
    """Refuse a base with other layers or other rotary positions than the adapter in `folder` was trained on.

    Scaling a base for an adapter that knew none is allowed: so an adapter is taken to longer documents.
    """
    made = base_options(folder)
    layers = made["num_layers"]
    if layers != num_layers:
        raise Refused(
            f"model.num_layers={num_layers} with the adapter {folder}",
            f"it was trained on {'all layers' if layers is None else f'the first {layers} layers'}",
            f"give model.num_layers={'null' if layers is None else layers}",
        )
    stretched = made["rope_scaling"]
    if stretched is not None and (scaling is None or plain(scaling) != stretched):
        words = ", ".join(f"{key}: {value}" for key, value in stretched.items())
        raise Refused(
            f"the adapter {folder} with "
            + (
                "no model.rope_scaling"
                if scaling is None
                else f"model.rope_scaling {plain(scaling)}"
            ),
            "it was trained with other rotary positions, which are no part of its base",
            f"give model.rope_scaling={{{words}}}",
        )


def check_positions_of(folder: Path, config: Any) -> None:
    """Refuse a model whose rotary positions are others than those that the adapter was trained with."""
    made = base_options(folder).get("config_changes") or {}
    wanted = made.get("rope_parameters")
    if wanted is None or config is None:
        return
    if config.get_text_config().rope_parameters != wanted:
        raise Refused(
            f"the adapter {folder} on this model",
            "its rotary positions are not those that the adapter was trained with",
            f"load both with luthier.load(base, '{folder}')",
        )


def plain(scaling: RopeScaling) -> dict[str, Any]:
    """`model.rope_scaling` as it is recorded: the keys that were given."""
    return scaling.model_dump(mode="json", exclude_none=True)


def base_for_use(folder: Path) -> dict[str, Any]:
    """The keys of `model` that make the adapter's base, for use without the run's config. Refused where no
    folder holds that base."""
    options = base_options(folder)
    if options["init"] == "random":
        raise Refused(
            f"the adapter {folder}",
            "it was trained on random weights (model.init=random), which are in no folder",
            "use it through the config of its run",
        )
    return {name: options[name] for name in ("num_layers", "rope_scaling")}


def _facts(folder: Path) -> dict[str, Any]:
    path = folder / FACTS
    if not path.is_file():
        return {}
    facts = _read_json(path)
    kinds = {"base_hash": str, "options": dict, "base_options": dict}
    wrong = [key for key, kind in kinds.items() if not isinstance(facts.get(key), kind | None)]
    layers = (facts.get("base_options") or {}).get("num_layers") if not wrong else None
    scaling = (facts.get("base_options") or {}).get("rope_scaling") if not wrong else None
    if wrong or not isinstance(layers, int | None) or not isinstance(scaling, dict | None):
        name = wrong[0] if wrong else "base_options"
        raise Refused(
            f"reading {path}",
            f"{name} is of another type than it was written with",
            f"copy the folder again, or remove {FACTS}",
        )
    return facts


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
        if not isinstance(value, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        raise Refused(
            f"reading {path}", f"it is no JSON object ({error})", "copy the folder again"
        ) from error
    return value


def _digest(fields: Mapping[str, Any]) -> str:
    text = json.dumps(fields, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
