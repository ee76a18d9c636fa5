"""Runs a packed model. Imports no torch; packing and reading files work without the compiled part."""

from importlib import import_module
from typing import Any

from relufy.engine.pack import pack

_COMPILED = {
    "Engine": "relufy.engine.engine",
    "Generation": "relufy.engine.generate",
    "GenerationStats": "relufy.engine.generate",
}

__all__ = ["Engine", "Generation", "GenerationStats", "pack"]


def __getattr__(name: str) -> Any:
    if name in _COMPILED:
        return getattr(import_module(_COMPILED[name]), name)
    raise AttributeError(f"module 'relufy.engine' has no attribute {name!r}")
