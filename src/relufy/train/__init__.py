"""Fine-tuning, and the text that a model writes for its own. (`finetune` itself is in `train.finetune`.)"""

from importlib import import_module
from typing import Any

_PUBLIC = {
    "FinetuneResult": "relufy.train.finetune",
    "overlap": "relufy.measure.overlap",
    "write_windows": "relufy.train.selftext",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'relufy.train' has no attribute {name!r}")
