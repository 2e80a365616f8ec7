"""From files and overrides to a `RunConfig`, and back: reading, checking, showing, writing.

Values come in layers (files, then overrides; later ones win), each with the origin of every key. All
errors of a config are reported at once: unknown keys with a suggestion, wrong types with what was
expected. `configtext.py` parses the text, `configkeys.py` words the errors, `interop.read` adds other
suites' files; nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import yaml
from pydantic import ValidationError

from luthier.config import RunConfig
from luthier.config_adapter import USUAL
from luthier.configkeys import (
    KEYS,
    SECTIONS,
    admits,
    expected,
    is_mapping,
    near_choice,
    nearest_key,
)
from luthier.configtext import Parsed, dump_value, parse_file, parse_value
from luthier.errors import Refused

# of two keys that exclude each other, the one in the later layer wins
EXCLUSIVE = (("train.batch", "train.accumulation"), ("train.accumulation", "train.batch"))


@dataclass(frozen=True)
class Layer:
    """Values of one source: dotted key -> value, and dotted key -> where it stands."""

    values: dict[str, Any]
    origins: dict[str, str]


@dataclass(frozen=True)
class Resolved:
    """A checked config, the origin of each key that was given, and what the user should know."""

    config: RunConfig
    origins: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


def read(paths: Sequence[Path | str], overrides: Sequence[str] = ()) -> Resolved:
    """Read Luthier's own files; the keys of a later file, then of the overrides, win.

    `overrides` are words: `section.key=value`, `--section.key=value`, `--section.key value`, or
    `--section.key` alone for true. Values are YAML scalars or lists. Raises `Refused`.
    """
    layers = [file_layer(parse_file(Path(path))) for path in paths]
    return resolve([*layers, override_layer(split_overrides(overrides, KEYS.__contains__))])


def from_mapping(values: Mapping[str, Any], overrides: Sequence[str] = ()) -> Resolved:
    """As `read`, of a nested mapping that a program made."""
    layer = file_layer(Parsed(Path("given"), dict(values), {}))
    return resolve([layer, override_layer(split_overrides(overrides, KEYS.__contains__))])


def file_layer(parsed: Parsed) -> Layer:
    """The layer of one of our own files; unknown names stay in, `resolve` refuses them."""
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for name, below in parsed.values.items():
        if name in SECTIONS and below is None:  # a section whose keys are all commented out
            continue
        if name in SECTIONS and isinstance(below, dict):
            for key, value in below.items():
                values[f"{name}.{key}"] = str(value) if isinstance(value, PurePath) else value
                origins[f"{name}.{key}"] = parsed.origin(name, str(key))
        else:
            values[name] = str(below) if isinstance(below, PurePath) else below
            origins[name] = parsed.origin(name)
    return Layer(values, origins)


def split_overrides(
    words: Sequence[str], is_key: Callable[[str], bool]
) -> list[tuple[str, list[str]]]:
    """Words of the command line -> (name, values); no value means a bare `--flag`.

    `is_key` tells whether a word `name=value` behind a `--flag` is a new override or its value.
    """
    found: list[tuple[str, list[str]]] = []
    open_flag = False  # the last item is a `--name` that may still take values
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if word.startswith("--") and name:
            found.append((name, [value] if equals else []))
            open_flag = not equals
        elif equals and (not open_flag or is_key(name)):
            found.append((name, [value]))
            open_flag = False
        elif open_flag:
            found[-1][1].append(word)
        else:
            raise Refused(
                f"the override '{word}'", "it gives no value", "write it as section.key=value"
            )
    return found


def override_layer(items: Sequence[tuple[str, list[str]]]) -> Layer:
    """The layer of overrides by our own names."""
    values: dict[str, Any] = {}
    for name, words in items:
        many = [_value(name, word) for word in words]
        values[name] = True if not many else many[0] if len(many) == 1 else many
    return Layer(values, dict.fromkeys(values, "override"))


def _value(key: str, text: str) -> Any:
    value = parse_value(text)
    if key in KEYS and admits(key, text) and not admits(key, value):
        return text  # `output=2024` names a folder
    return value


def resolve(layers: Sequence[Layer], remarks: Sequence[str] = ()) -> Resolved:
    """Merge the layers, check everything, and build the config. Raises `Refused`."""
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for layer in layers:
        for given, loser in EXCLUSIVE:
            if given in layer.values and loser not in layer.values:
                values.pop(loser, None)
                origins.pop(loser, None)
        values |= layer.values
        origins |= layer.origins
    _gather(values, origins)
    problems = {key: problem for key in values if (problem := _misfit(key, values[key], origins))}
    config = None
    try:  # without the misfits, to find the other errors too
        config = RunConfig.model_validate(
            _nest({key: value for key, value in values.items() if key not in problems})
        )
    except ValidationError as error:
        problems |= _problems(error, values, origins, known=problems)
    if config is None or problems:
        raise _refusal(list(problems.values()))
    return Resolved(config, origins, list(remarks))


def _gather(values: dict[str, Any], origins: dict[str, str]) -> None:
    """Put `model.rope_scaling.factor` into the mapping `model.rope_scaling`."""
    for name in [
        name for name in values if name.count(".") == 2 and name.rpartition(".")[0] in KEYS
    ]:
        key, _, part = name.rpartition(".")
        whole = values.get(key)
        if isinstance(whole, dict | None):
            values[key] = {**(whole or {}), part: values.pop(name)}
            origins[key] = origins.pop(name)


def _nest(values: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {name: {} for name in SECTIONS}
    for key, value in values.items():
        section, dot, name = key.partition(".")
        if dot:
            tree[section][name] = value
        else:
            tree[key] = value
    return tree


Problem = tuple[str, str, str]  # asked, found, do


def _misfit(key: str, value: Any, origins: Mapping[str, str]) -> Problem | None:
    """What pydantic would not see or not say well: unknown keys, booleans given as numbers."""
    asked = f"{key}={_short(value)} ({origins[key]})"
    if key in SECTIONS:
        names = list(SECTIONS[key].model_fields)
        nearer = f"write it as {key}.{names[0]}={_short(value)}"
        return asked, f"{key} is a section; its keys are {', '.join(names)}", nearer
    if key not in KEYS:
        return asked, "there is no such key", nearest_key(key)
    if isinstance(value, bool) and not admits(key, value):
        return asked, f"expected {expected(key)}", ""
    return None


def _problems(
    error: ValidationError,
    values: Mapping[str, Any],
    origins: Mapping[str, str],
    known: Mapping[str, Problem],
) -> dict[str, Problem]:
    """One problem per key, though pydantic reports each member of a union; the deepest is kept."""
    found: dict[str, Problem] = {}
    for item in sorted(error.errors(include_url=False), key=lambda item: len(item["loc"])):
        path = [str(part) for part in item["loc"]]
        key = ".".join(path[: 2 if path and path[0] in SECTIONS else 1])
        if key in known:
            continue
        if key not in KEYS:  # a check across several keys
            found[item["msg"]] = (item["msg"].removeprefix("Value error, "), "", "")
        elif item["type"] == "missing" and key not in values:
            found[key] = (f"{key} is needed", "it is not given", KEYS[key].description or "")
        else:
            asked = f"{key}={_short(values.get(key))} ({origins.get(key, 'default')})"
            # a path into an item of a list says more than what the whole key takes
            inner = f", but {'.'.join(path[3:])}: {item['msg']}" if len(path) > 4 else ""
            if is_mapping(key) and isinstance(values.get(key), dict):
                words = item["msg"].removeprefix("Value error, ")
                inner = f", but {': '.join([*path[2:], words])}"
            found[key] = (
                asked,
                f"expected {expected(key)}{inner}",
                near_choice(key, values.get(key)),
            )
    return found


def _refusal(problems: Sequence[Problem]) -> Refused:
    if len(problems) == 1:
        return Refused(*problems[0])
    lines = "".join(f"\n  - {Refused(*problem)}" for problem in problems)
    return Refused(f"the config has {len(problems)} errors:{lines}")


def _short(value: Any) -> str:
    try:
        text = dump_value(value)
    except yaml.YAMLError:  # an object that a program put there
        text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def computed(config: RunConfig) -> dict[str, tuple[Any, str]]:
    """Defaults that follow from other keys: dotted name -> (value, from what)."""
    found: dict[str, tuple[Any, str]] = {}
    if config.optim.lr is None:
        kind = "full fine-tuning" if config.adapter.method == "none" else "adapters"
        found["optim.lr"] = (config.lr, f"default of {kind}")
    if config.adapter.alpha is None and config.adapter.method != "none":
        alpha, rank = config.adapter.scale_alpha, config.adapter.rank
        found["adapter.alpha"] = (alpha, "the rank" if alpha == rank else "2 x rank")
    if config.train.accumulation is not None:
        found["train.batch"] = (config.batch, "micro_batch x accumulation")
    if config.train.micro_batch is None:
        found["train.micro_batch"] = (config.micro_batch, "the whole batch")
    if config.evaluate.micro_batch is None:
        found["evaluate.micro_batch"] = (config.evaluate_micro_batch, "train.micro_batch")
    return found


def show(resolved: Resolved) -> str:
    """The resolved tree, one key a line with its value and where it comes from; then the remarks."""
    extra = computed(resolved.config)
    rows: list[tuple[str, str, str]] = []  # key, value, origin
    current, hidden = "", 0  # options of single adapter methods are left out until one is set
    for section, key, value in _entries(resolved.config):
        if section != current:
            rows += [(section, "", "")] if section else []
            current = section
        name = f"{section}.{key}" if section else key
        origin = resolved.origins.get(name, "default")
        if section == "adapter" and key not in USUAL and origin == "default":
            hidden += 1
            continue
        if hidden and section != "adapter":
            rows.insert(len(rows) - 1, ("  ...", f"{hidden} more", "default"))
            hidden = 0
        if name in extra:
            value, why = extra[name]
            origin = f"computed: {why}"
        rows.append((f"  {key}" if section else key, dump_value(value), origin))
    key_width = max(len(key) for key, _, _ in rows) + 2
    value_width = min(max(len(value) for _, value, _ in rows), 40)
    lines = [f"{k:<{key_width}}{v:<{value_width}}  {o}".rstrip() for k, v, o in rows]
    lines += ["", *(f"note: {remark}" for remark in resolved.remarks)] if resolved.remarks else []
    return "\n".join(lines) + "\n"


def to_yaml(config: RunConfig) -> str:
    """The whole tree as YAML that `read` turns into an equal config; computed values as comments."""
    extra = computed(config)
    lines: list[str] = []
    current = ""
    for section, key, value in _entries(config):
        if section != current:
            lines += [f"{section}:"] if section else []
            current = section
        name, indent = (f"{section}.{key}", "  ") if section else (key, "")
        line = f"{indent}{key}: {dump_value(value)}"
        if name in extra:
            seen, why = extra[name]
            line = f"{line}  # {seen}: {why}"
            if name == "train.batch":  # it may not stand beside train.accumulation
                line = f"{indent}# {key}: {seen}  ({why})"
        lines.append(line)
    return "\n".join(lines) + "\n"


def _entries(config: RunConfig) -> list[tuple[str, str, Any]]:
    """(section, key, plain value) of the whole tree, in the order of the classes."""
    found: list[tuple[str, str, Any]] = []
    for name, value in config.model_dump(mode="json").items():
        if name in SECTIONS:
            found += [(name, key, _bare(below)) for key, below in value.items()]
        else:
            found.append(("", name, value))
    return found


def _bare(value: Any) -> Any:
    """A mapping (rope_scaling) without the keys that nobody gave."""
    return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value


def json_schema() -> dict[str, Any]:
    """JSON schema of a config file, for editors and other programs."""
    schema = RunConfig.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | schema
