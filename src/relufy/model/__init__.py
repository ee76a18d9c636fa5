"""Where zeros can be, and the functions that make them: sites, sparsifiers, observation, checkpoints."""

from importlib import import_module
from typing import Any

_PUBLIC = {
    "apply_sparsity": "sparsifiers",
    "find_sites": "sites",
    "load_model": "checkpoint",
    "load_tokenizer": "checkpoint",
    "observe_sites": "observe",
    "save_checkpoint": "checkpoint",
    "sparsity_of": "configuration",
    "sparsity_tensors": "sparsifiers",
}


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
