"""Training: fine-tuning and pretraining, in one process or many; text for it, and what a model writes itself.

(`finetune` and `pretrain` themselves are in the modules of their names.)
"""

from importlib import import_module
from typing import Any

_PUBLIC = {
    "FinetuneResult": "relufy.train.finetune",
    "Run": "relufy.train.run",
    "WindowStream": "relufy.train.stream",
    "diagnose": "relufy.train.diagnose",
    "new_model": "relufy.train.new_model",
    "open_windows": "relufy.train.data",
    "overlap": "relufy.measure.overlap",
    "run_recipe": "relufy.train.run",
    "train_tokenizer": "relufy.train.tokenizer",
    "write_windows": "relufy.train.selftext",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'relufy.train' has no attribute {name!r}")
