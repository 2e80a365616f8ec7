"""PaddleNLP's arguments as typed values: unknown, ill-typed and unsupported ones are refused by name.

What each argument is, is told by `paddlenlp_keys.py`; what becomes of it in our tree is the business of
`paddlenlp.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from luthier.configtext import dump_value
from luthier.errors import LuthierError, Refused, suggest
from luthier.interop.paddlenlp_keys import (
    ALIASES,
    CODE_DEFAULTS,
    INERT,
    JOBS,
    LEGACY,
    NAMES,
    OFF,
    READ,
)

TRUE = {"true", "t", "yes", "y", "1"}
FALSE = {"false", "f", "no", "n", "0"}
KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
}


@dataclass
class Arguments:
    """Arguments that were given, by their current names, and where each stands."""

    values: dict[str, Any]
    origins: dict[str, str]
    legacy: bool = False  # spelt as only versions without a default chat template do

    def __getitem__(self, name: str) -> Any:
        """The value given, else the document's default."""
        return self.values.get(name, READ[name][1])

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def origin(self, name: str) -> str:
        if name in self.values:
            return f"PaddleNLP {name} ({self.origins[name]})"
        code = (
            f" by its document; by its code {CODE_DEFAULTS[name]}" if name in CODE_DEFAULTS else ""
        )
        return f"PaddleNLP's default of {name}{code}"


def check(given: Mapping[str, Any], origins: Mapping[str, str]) -> tuple[Arguments, list[str]]:
    """The typed arguments, and remarks. Raises `Refused` for all that is unknown, ill-typed or not there."""
    _refuse_job(given)
    values: dict[str, Any] = {}
    where: dict[str, str] = {}
    problems: list[LuthierError] = []
    remarks: list[str] = []
    inert: list[str] = []
    # an old name comes after the current one, and wins, as in the versions that knew both
    for spelt, raw in sorted(given.items(), key=lambda item: item[0] in ALIASES):
        name = ALIASES.get(spelt, spelt)
        if raw is None:  # JSON's null
            continue
        try:
            value = _typed(name, raw, f"{spelt}={_short(raw)} ({origins[spelt]})")
        except Refused as problem:
            problems.append(problem)
            continue
        if values.get(name, value) != value:
            remarks.append(f"{spelt}={_short(raw)} wins over {name}={_short(values[name])}")
        if name in INERT and not is_off(value):
            inert.append(spelt)
        values[name], where[name] = value, origins[spelt]
    if problems:
        raise problems[0] if len(problems) == 1 else _together(problems)
    if inert:
        remarks.append(f"without effect on the result here: {', '.join(sorted(inert))}")
    return Arguments(values, where, legacy=any(name in given for name in LEGACY)), remarks


def _together(problems: list[LuthierError]) -> Refused:
    lines = "".join(f"\n  - {problem}" for problem in problems)
    return Refused(f"the PaddleNLP arguments have {len(problems)} errors:{lines}")


def _refuse_job(given: Mapping[str, Any]) -> None:
    for job, names in JOBS:
        if found := [name for name in given if name in names]:
            more = f" and {len(found) - 4} more" if len(found) > 4 else ""
            raise Refused(
                f"{job} was asked for, by {', '.join(found[:4])}{more}",
                "it is not there yet",
                "run_finetune.py's arguments (SFT, LoRA) are understood",
            )


def _typed(name: str, raw: Any, asked: str) -> Any:
    """The value in the type of its argument; raises for unknown names and for switches that are on."""
    if name not in NAMES:
        near = suggest(name, NAMES) or "all arguments stand in docs/reference/paddlenlp.md"
        raise Refused(asked, "PaddleNLP's fine-tuning has no such argument", near)
    if name in READ:
        return _convert(READ[name][0], raw, asked)
    if name in OFF:
        switch = OFF[name]
        on = (
            not is_off(raw)
            if switch.off is None
            else _convert(switch.kind, raw, asked) != switch.off
        )
        if on:
            raise Refused(asked, switch.why, switch.do)
    return raw


def _convert(kind: type, raw: Any, asked: str) -> Any:
    if isinstance(raw, list) and len(raw) == 1 and kind is not list:
        raw = raw[0]
    text = str(raw).strip()
    try:
        if kind is bool and text.lower() in TRUE | FALSE:
            return text.lower() in TRUE
        if kind is list:
            return [str(item) for item in raw] if isinstance(raw, list) else text.split()
        if isinstance(raw, (bool, list, dict)) and kind is not str:
            raise ValueError
        if kind is int and float(text) == int(float(text)):
            return int(float(text))
        if kind is float:
            return float(text)
        if kind is str and not isinstance(raw, (list, dict)):
            return text
    except (ValueError, OverflowError):
        pass
    raise Refused(asked, f"expected {KINDS[kind]}")


def is_off(value: Any) -> bool:
    return value in (None, "", [], {}, 0) or str(value).lower() in FALSE | {"none"}


def _short(value: Any) -> str:
    text = dump_value(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
