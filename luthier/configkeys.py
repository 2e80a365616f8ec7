"""What each key of the config takes, in words: for error messages, suggestions and the reference page.

Everything is read off the pydantic classes of `config.py`; nothing is listed twice.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from luthier.config import RunConfig, Section
from luthier.errors import suggest

SECTIONS: dict[str, type[Section]] = {
    name: info.annotation
    for name, info in RunConfig.model_fields.items()
    if isinstance(info.annotation, type) and issubclass(info.annotation, Section)
}
KEYS: dict[str, FieldInfo] = {  # by dotted name
    f"{name}.{key}": info
    for name, cls in SECTIONS.items()
    for key, info in cls.model_fields.items()
} | {name: info for name, info in RunConfig.model_fields.items() if name not in SECTIONS}

# names that people bring along from other tools -> ours
SYNONYMS = {
    "learning_rate": "optim.lr",
    "batch_size": "train.batch",
    "num_epochs": "train.epochs",
    "max_steps": "train.steps",
    "gradient_accumulation_steps": "train.accumulation",
    "max_length": "data.length",
    "max_seq_length": "data.length",
    "dataset": "data.path",
    "r": "adapter.rank",
    "lora_rank": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "target_modules": "adapter.targets",
    "max_grad_norm": "optim.clip",
    "output_dir": "output",
}


# options of commands that are no keys, for who mistypes one or gives it to another command
OPTIONS = {
    "nproc": "finetune, evaluate, predict and verify",
    "rows": "preview",
    "max-restarts": "finetune",
}


def nearest_key(key: str) -> str:
    """`did you mean 'optim.lr'?`: the same name in another section, a synonym, or a near miss."""
    if near := [o for o in OPTIONS if key == o or suggest(key, [o])]:
        return f"--{near[0]} goes with {OPTIONS[near[0]]}"
    section, _, name = key.rpartition(".")
    twins = [known for known in KEYS if known.rpartition(".")[2] == name]
    if twins:
        return f"did you mean '{' or '.join(twins)}'?"
    if name in SYNONYMS:
        return f"did you mean '{SYNONYMS[name]}'?"
    if section in SECTIONS and (near := suggest(name, SECTIONS[section].model_fields)):
        return near.replace("'", f"'{section}.", 1)
    return suggest(key, [*KEYS, *SECTIONS]) or "all keys stand in docs/reference/config.md"


def expected(key: str) -> str:
    """What a key takes: `a whole number of at least 1`, `one of linear, cosine, ...`."""
    info = KEYS[key]
    return " or ".join(dict.fromkeys(_words(info.annotation, info.metadata)))


def near_choice(key: str, value: Any) -> str:
    """`did you mean 'cosine'?` where the key takes one of a list of words."""
    words = [word for part in _members(KEYS[key].annotation) for word in _choices(part)]
    return suggest(value, words) if isinstance(value, str) else ""


def admits(key: str, value: Any) -> bool:
    """Whether a key may hold a value of this plain type. Of numbers, an int is also a float."""
    kinds: set[Any] = set()
    for part in _members(KEYS[key].annotation):
        part = get_args(part)[0] if get_origin(part) is Annotated else part
        if get_origin(part) in (tuple, dict):
            kinds.add({tuple: list, dict: dict}[get_origin(part)])
        elif isinstance(part, type) and issubclass(part, BaseModel):
            kinds.add(dict)
        else:
            kinds |= {type(choice) for choice in _choices(part)} or {part}
    kinds |= {int} if float in kinds else set()
    return type(value) in kinds or (value is None and _optional(KEYS[key].annotation))


def is_mapping(key: str) -> bool:
    """Whether a key takes a mapping with keys of its own."""
    members = _members(KEYS[key].annotation)
    return any(isinstance(m, type) and issubclass(m, BaseModel) for m in members)


def _optional(annotation: Any) -> bool:
    return type(None) in get_args(annotation)


def _members(annotation: Any) -> list[Any]:
    """The members of a union (or the type itself), without None."""
    if get_origin(annotation) in (Union, types.UnionType):
        return [m for part in get_args(annotation) for m in _members(part)]
    return [] if annotation is type(None) else [annotation]


def _choices(annotation: Any) -> tuple[str, ...]:
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def _words(annotation: Any, metadata: Sequence[Any] = ()) -> list[str]:
    said: list[str] = []
    for part in _members(annotation):
        bounds = list(metadata)
        if get_origin(part) is Annotated:
            part, *notes = get_args(part)
            bounds += [m for note in notes for m in getattr(note, "metadata", [note])]
        said.append(_word(part) + _bounds(bounds))
    return said


def _word(part: Any) -> str:
    if choices := _choices(part):
        return ("one of " if len(choices) > 1 else "") + ", ".join(choices)
    if get_origin(part) is tuple:
        items = get_args(part)
        if items[-1] is Ellipsis:
            return f"a list of {_words(items[0])[0]}"
        return f"a list of {len(items)}, each {_words(items[0])[0]}"
    if get_origin(part) is dict:
        values = get_args(part)[1]
        return f"a mapping {{name: {'name' if values is str else _words(values)[0]}}}"
    if isinstance(part, type) and issubclass(part, BaseModel):
        return f"{{{', '.join(part.model_fields)}}}"
    return {int: "a whole number", float: "a number", bool: "true or false"}.get(part, "text")


def _bounds(metadata: Sequence[Any]) -> str:
    signs = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    found = [
        f"{word} {getattr(note, sign):g}"
        for note in metadata
        for sign, word in signs.items()
        if getattr(note, sign, None) is not None
    ]
    return (" of " if found[0].startswith("at") else " ") + " and ".join(found) if found else ""
