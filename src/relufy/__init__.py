"""relufy makes language models activation-sparse, and turns the zeros into speed.

The public names below are imported on first use, so that `import relufy` stays free of torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from relufy.measure.measure import measure as measure

_PUBLIC = {
    "CompareOptions": "relufy.methods.compare",
    "Engine": "relufy.engine",
    "Recipe": "relufy.recipe",
    "UserError": "relufy.errors",
    "EvalOptions": "relufy.evaluation.options",
    "compare": "relufy.methods.compare",
    "evaluate": "relufy.evaluation.evaluate",
    "finetune": "relufy.train.finetune",
    "info": "relufy.engine.info",
    "load_model": "relufy.model.checkpoint",
    "load_recipe": "relufy.recipe",
    "load_tokenizer": "relufy.model.checkpoint",
    "new_model": "relufy.train.new_model",
    "pack": "relufy.engine",
    "pretrain": "relufy.train.pretrain",
    "save_checkpoint": "relufy.model.checkpoint",
    "site_table": "relufy.model.site_table",
    "sparsify": "relufy.methods.sparsify",
}
"""Public name -> the module that has it."""

_WINGS = ("measure",)
"""A wing that can be called: `relufy.measure(model, text)`, and has more in it: `relufy.measure.quality`."""

__all__ = ["__version__", *sorted(_PUBLIC), *_WINGS]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    if name in _WINGS:
        return import_module(f"relufy.{name}")
    if name == "__version__":
        return _version()
    raise AttributeError(f"module 'relufy' has no attribute {name!r}")


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("relufy")
    except PackageNotFoundError:  # a source tree on the path, not installed
        return "unknown"


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
