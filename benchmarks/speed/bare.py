"""A stand-in for pydantic where it is not installed, so that `gpu.py` runs beside torch and transformers alone.

It holds values and defaults and checks nothing: the benchmark makes its configs in code, from known values. What
reads config files (`luthier.configfile`) does not work with it and is not imported there.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
import types
from collections.abc import Callable
from typing import Any


class FieldInfo:
    """A default, or what makes it."""

    def __init__(
        self, default: Any = ..., default_factory: Callable[[], Any] | None = None
    ) -> None:
        self.default, self.default_factory = default, default_factory

    def get_default(self, call_default_factory: bool = False) -> Any:
        return self.default_factory() if self.default_factory else self.default


def field(default: Any = ..., *, default_factory: Any = None, **checks: Any) -> Any:
    return FieldInfo(default, default_factory)


class BaseModel:
    """Keyword arguments over the defaults of the class and its bases."""

    model_fields: dict[str, FieldInfo]

    def __init_subclass__(cls, **options: Any) -> None:
        cls.model_fields = dict(getattr(cls, "model_fields", {}))
        for name in inspect.get_annotations(cls):
            value = cls.__dict__.get(name, ...)
            cls.model_fields[name] = value if isinstance(value, FieldInfo) else FieldInfo(value)

    def __init__(self, **values: Any) -> None:
        unknown = values.keys() - self.model_fields.keys()
        if unknown:
            raise TypeError(f"{type(self).__name__} has no {', '.join(sorted(unknown))}")
        self.model_fields_set = set(values)
        for name, info in self.model_fields.items():
            setattr(self, name, values[name] if name in values else info.get_default(True))

    @classmethod
    def model_validate(cls, values: dict[str, Any]) -> Any:
        return cls(**values)

    def model_copy(self, update: dict[str, Any]) -> Any:
        kept = {name: getattr(self, name) for name in self.model_fields_set}
        return type(self)(**{**kept, **update})


def plain(*names: str, **options: Any) -> Callable[[Any], Any]:
    """A validator's decorator: the function stays, nothing calls it."""
    return lambda function: function


def stand_in() -> bool:
    """Put the stand-in where pydantic would be, if that is missing; whether it was."""
    if "pydantic" in sys.modules or importlib.util.find_spec("pydantic") is not None:
        return False
    module, fields = types.ModuleType("pydantic"), types.ModuleType("pydantic.fields")
    names = {
        "BaseModel": BaseModel,
        "Field": field,
        "ConfigDict": dict,
        "ValidationError": ValueError,
    }
    names |= {"field_validator": plain, "model_validator": plain, "fields": fields}
    vars(module).update(names)
    vars(fields)["FieldInfo"] = FieldInfo
    sys.modules |= {"pydantic": module, "pydantic.fields": fields}
    return True
