"""Strict conversion between plain mappings (YAML, JSON) and frozen dataclasses.

Unknown keys, wrong types and missing values are user errors that name the place and suggest the nearest key.
"""

import dataclasses
import difflib
import math
import re
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from relufy.errors import UserError

T = TypeVar("T")

_EXPONENT = re.compile(r"[+-]?\d+[eE][+-]?\d+")
"""Numbers like 1e-5, which are text to the yaml package (YAML 1.1 wants 1.0e-5)."""


def suggest(wrong: str, known: list[str]) -> str:
    """Return " (did you mean 'x'?)" for the nearest known word, or the list of the known ones."""
    near = difflib.get_close_matches(wrong, known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else f" (known: {', '.join(sorted(known))})"


def from_mapping(cls: type[T], data: object, where: str) -> T:
    """Build the dataclass `cls` from a mapping; raise UserError at the first thing that does not fit."""
    if not isinstance(data, Mapping):
        raise UserError(f"{where}: expected a mapping of keys and values, found {_named(data)}")
    hints = get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            raise UserError(f"{where}: unknown key {key!r}{suggest(str(key), list(fields))}")
    values = {key: _convert(hints[key], value, f"{where}.{key}") for key, value in data.items()}
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise UserError(f"{where}: the key {name!r} is missing")
    try:
        return cls(**values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def to_mapping(instance: Any) -> dict[str, Any]:
    """Return the dataclass as plain data for YAML or JSON; fields at None are left out."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return to_mapping(value)
        if isinstance(value, tuple | list):
            return [plain(item) for item in value]
        return value

    pairs = ((f.name, plain(getattr(instance, f.name))) for f in dataclasses.fields(instance) if f.init)
    return {name: value for name, value in pairs if value is not None}


def finite(value: Any) -> Any:
    """Return plain data with None for every number that is none (NaN, infinities), as JSON needs it."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def yaml_value(text: str, where: str) -> Any:
    """Return the value of a piece of YAML; `where` names it in errors. Raises UserError."""
    import yaml  # only some commands need it

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin = get_origin(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in get_args(hint):
            return None
        (inner,) = [arg for arg in get_args(hint) if arg is not type(None)]
        return _convert(inner, value, where)
    if origin is Literal:
        if value not in get_args(hint) or isinstance(value, bool):
            raise UserError(
                f"{where}: expected one of {', '.join(map(repr, get_args(hint)))}, found {value!r}"
            )
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{where}: expected a list, found {_named(value)}")
        item_hint = get_args(hint)[0]
        return tuple(_convert(item_hint, item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise UserError(f"{where}: expected a mapping, found {_named(value)}")
        return dict(value)
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_mapping(hint, value, where)  # type: ignore[arg-type]
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str) and _EXPONENT.fullmatch(value):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"{where}: expected {hint.__name__}, found {_named(value)}")
    return value


def _named(value: object) -> str:
    return f"{type(value).__name__} {value!r}"
