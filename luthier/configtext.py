"""Config files as plain values: YAML and JSON in, with the line of each key, and values out as text.

One dialect of YAML for files and overrides: numbers as in YAML 1.2, so that `1e-4` is a number while
`010` and `2024-01-01` are text; `yes`/`no`/`on`/`off` stay booleans. A key given twice is refused. What
the values mean is the business of `configfile.py` (our keys) and `interop` (other suites' keys).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from luthier.errors import Refused, suggest

_WHOLE = r"[-+]?(?:0|[1-9][0-9_]*)"
_SCALARS = [  # tag, pattern, first characters; the first that matches wins
    ("bool", r"true|True|TRUE|false|False|FALSE|yes|Yes|no|No|on|On|off|Off", "tTfFyYnNoO"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", _WHOLE, "-+0123456789"),
    ("float", rf"(?:{_WHOLE}(?:\.[0-9_]*)?|[-+]?\.[0-9]+)(?:[eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("merge", r"<<", "<"),
]
_LINE_DEPTH = 3  # lines are recorded for keys down to this depth


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012 (filled below; the inherited ones are YAML 1.1's)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = {}  # noqa: RUF012


for _tag, _pattern, _first in _SCALARS:
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), list(_first)
        )


@dataclass(frozen=True)
class Parsed:
    """A file's values, and the line (from 1) of each key path where it is certain."""

    path: Path
    values: dict[str, Any]
    lines: dict[tuple[str, ...], int]

    def origin(self, *key: str) -> str:
        """`run.yaml:12`, or just the file's name."""
        line = self.lines.get(key)
        return f"{self.path.name}:{line}" if line else self.path.name


def parse_file(path: Path) -> Parsed:
    """Read a YAML or (by its suffix `.json`) JSON file.

    Raises `Refused` for a missing or unreadable file, broken text (with line and column), a key given
    twice, an empty file, or one that is no mapping.
    """
    text = _read(path)
    values, lines = (_json if path.suffix.lower() == ".json" else _yaml)(path, text)
    if values is None:
        raise Refused(
            f"the config {path}", "the file is empty", "luthier example prints ready ones"
        )
    if not isinstance(values, dict):
        raise Refused(
            f"the config {path}",
            f"it holds {_kind_of(values)}, not a mapping of keys to values",
            "luthier example prints ready ones",
        )
    return Parsed(path, {str(key): value for key, value in values.items()}, lines)


def parse_value(text: str) -> Any:
    """An override's value: a YAML scalar, `[list]` or `{mapping}`; text that is no YAML stays text."""
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader: it builds plain values only
    except (yaml.YAMLError, ValueError):
        return text


def dump_value(value: Any) -> str:
    """`value` on one line, such that `parse_value` gives it back."""
    options: dict[str, Any] = {
        "default_flow_style": True,
        "allow_unicode": True,
        "width": 2**31,
        "sort_keys": False,
    }
    text = yaml.dump(value, Dumper=_Dumper, **options).removesuffix("...\n").strip()
    if len(text.splitlines()) > 1:  # a text with line breaks: escape them
        text = yaml.dump(value, Dumper=_Dumper, default_style='"', **options).strip()
    return text


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise Refused(
            f"the config {path}", f"line {line} is not UTF-8", "save the file as UTF-8"
        ) from error
    except IsADirectoryError as error:
        raise Refused(
            f"the config {path}", f"it is a folder that {_holds(path)}", "name one file"
        ) from error
    except FileNotFoundError as error:
        raise Refused(
            f"the config {path}",
            f"there is no such file; {path.parent} {_holds(path.parent)}",
            suggest(path.name, _configs(path.parent)),
        ) from error
    except OSError as error:
        raise Refused(f"the config {path}", error.strerror or str(error)) from error


def _configs(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    names = (p.name for p in folder.iterdir() if p.suffix.lower() in (".yaml", ".yml", ".json"))
    return sorted(names)


def _holds(folder: Path) -> str:
    if not folder.is_dir():
        return "is no folder"
    names = _configs(folder)
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"holds {', '.join(names[:8])}{more}" if names else "holds no config file"


def _kind_of(value: Any) -> str:
    return {list: "a list", str: "text", bool: "a boolean"}.get(type(value), "a number")


def _yaml(path: Path, text: str) -> tuple[Any, dict[tuple[str, ...], int]]:
    lines: dict[tuple[str, ...], int] = {}
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None, lines
            _walk(path, node, (), lines)
            return loader.construct_document(node), lines
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise Refused(
            f"the config {path}",
            f"broken YAML at {where}{error.problem or error.context}",
            "indent with spaces, and quote text that holds ': ' or starts with one of [ { * & % @",
        ) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # odd characters, absurd sizes
        raise Refused(
            f"the config {path}", f"broken YAML: {' '.join(str(error).split())}"
        ) from error


def _walk(path: Path, node: yaml.Node, above: tuple[str, ...], lines: dict) -> None:
    """Record the line of each key; refuse one that stands twice in the same mapping."""
    if not isinstance(node, yaml.MappingNode) or len(above) == _LINE_DEPTH:
        return
    for key_node, value_node in node.value:
        key = (*above, str(key_node.value))
        line = key_node.start_mark.line + 1
        if key in lines and key_node.tag != "tag:yaml.org,2002:merge":
            raise _twice(path, ".".join(key), f"lines {lines[key]} and {line}")
        lines[key] = line
        _walk(path, value_node, key, lines)


def _json(path: Path, text: str) -> tuple[Any, dict[tuple[str, ...], int]]:
    if not text.strip():
        return None, {}

    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            names = [name for name, _ in pairs]
            name = next(name for name in names if names.count(name) > 1)
            raise _twice(path, name, f"lines {' and '.join(map(str, _lines_of(text, name)))}")
        return values

    def constant(name: str) -> None:
        raise Refused(f"the config {path}", f"the value {name} is not JSON", "write a number")

    try:
        values = json.loads(text, object_pairs_hook=mapping, parse_constant=constant)
    except json.JSONDecodeError as error:
        raise Refused(
            f"the config {path}",
            f"broken JSON at line {error.lineno}, column {error.colno}: {error.msg}",
            "look for a missing or superfluous comma or quote there",
        ) from error
    except (ValueError, RecursionError) as error:  # absurdly long numbers or deep nesting
        raise Refused(f"the config {path}", f"broken JSON: {error}") from error
    return values, _json_lines(values, text)


def _json_lines(values: Any, text: str) -> dict[tuple[str, ...], int]:
    """Lines of keys whose name stands only once in the text; the others are left out."""
    lines: dict[tuple[str, ...], int] = {}

    def visit(value: Any, above: tuple[str, ...]) -> None:
        if isinstance(value, dict) and len(above) < _LINE_DEPTH:
            for name, below in value.items():
                if len(found := _lines_of(text, name)) == 1:
                    lines[(*above, name)] = found[0]
                visit(below, (*above, name))

    visit(values, ())
    return lines


def _lines_of(text: str, name: str) -> list[int]:
    hits = re.finditer(rf'"{re.escape(name)}"\s*:', text)
    return [text.count("\n", 0, hit.start()) + 1 for hit in hits]


def _twice(path: Path, key: str, where: str) -> Refused:
    return Refused(
        f"the config {path}", f"the key {key} stands twice ({where})", "keep one of the two"
    )
