"""What sparsity bought and what it cost: quality, fidelity, zeros, and the two costs of a token.

The wing itself can be called: `relufy.measure(model, text)` is `relufy.measure.measure.measure`.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

_PUBLIC = {
    "Difference": "relufy.measure.statistics",
    "Fidelity": "relufy.measure.quality",
    "Perplexity": "relufy.measure.quality",
    "Measurement": "relufy.measure.measurement",
    "PreActivations": "relufy.measure.preactivations",
    "compare_preactivations": "relufy.measure.preactivations",
    "fidelity": "relufy.measure.quality",
    "measure_preactivations": "relufy.measure.preactivations",
    "paired_difference": "relufy.measure.quality",
    "perplexity": "relufy.measure.quality",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'relufy.measure' has no attribute {name!r}")


class _Wing(ModuleType):
    """A package that is a function as well."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return import_module("relufy.measure.measure").measure(*arguments, **options)


sys.modules[__name__].__class__ = _Wing
