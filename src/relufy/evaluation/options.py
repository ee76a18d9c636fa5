"""How to evaluate, checked."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from relufy.errors import UserError

BackendName = Literal["hf", "engine"]
BACKENDS: tuple[str, ...] = ("hf", "engine")


@dataclass(frozen=True)
class EvalOptions:
    """Options of `evaluate`. Raises UserError for what can't be.

    `backend` "hf" runs the Hugging Face model in f32 on `device` (by default a GPU where there is one),
    "engine" our engine, with a checkpoint packed as `dtype`, on `threads`. `window` is how many tokens a
    window of text has, `max_windows` keeps the first ones. `task_folders` hold task files of one's own;
    `limit` keeps the first documents of each task, `num_fewshot` sets the examples in the prompts.
    `batch_size` changes speed and memory. `level` is the error probability of all paired tests together.
    """

    backend: BackendName = "hf"
    task_folders: tuple[str | Path, ...] = ()
    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int = 8
    window: int = 256
    max_windows: int | None = None
    dtype: str | None = None
    threads: int | None = None
    device: str | None = None
    level: float = 0.05

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise UserError(f"there is no backend {self.backend!r}: choose {' or '.join(BACKENDS)}")
        for name, least in (("limit", 1), ("num_fewshot", 0), ("batch_size", 1), ("max_windows", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name} must be at least {least}, found {value}")
        if self.window < 2:
            raise UserError(f"a window has at least 2 tokens, found {self.window}")
        if not 0 < self.level < 1:
            raise UserError(f"level must lie between 0 and 1, found {self.level}")
        self._refuse_other_backends()

    def _refuse_other_backends(self) -> None:
        owners = {"dtype": "engine", "threads": "engine", "device": "hf"}
        for name, owner in owners.items():
            if getattr(self, name) is not None and self.backend != owner:
                raise UserError(f"{name} belongs to the backend {owner}; this is {self.backend}")
