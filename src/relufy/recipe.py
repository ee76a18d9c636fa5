"""What to do to a model, as versioned data: YAML files <-> frozen dataclasses. Knows no torch.

A recipe has three parts. `sparsify` says which zeros to make (method.py), `calibrate` which text to look at
for it, `finetune` how to recover the quality. Recipes shipped with relufy live in `relufy/recipes/*.yaml`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from relufy.errors import UserError
from relufy.method import METHODS, Calibration, method_name
from relufy.schema import from_mapping, suggest, to_mapping, yaml_value

RECIPE_VERSION = 1


@dataclass(frozen=True)
class Finetune:
    """How to recover quality after the zeros were made.

    The loss is `distill * KL(dense || model) + (1 - distill) * cross_entropy + match_hidden * mismatch`. KL
    and cross-entropy are means over tokens in nats; the mismatch is the squared distance of the hidden states
    to the dense model's, relative to their squared length, a mean over tokens and blocks. AdamW; after the
    warm-up the learning rate falls linearly to zero.
    """

    steps: int = 150
    batch_size: int = 16
    """Windows in an optimizer step."""
    accumulate: int = 1
    """Parts that a step's windows are computed in: more parts need less memory, and change nothing else."""
    window: int = 256
    """Tokens in a window, with the beginning-of-sequence token that opens it."""
    learning_rate: float = 2e-5
    warmup_steps: int = 10
    weight_decay: float = 0.0
    distill: float = 0.0
    match_hidden: float = 0.0
    save_steps: int = 50
    """Optimizer steps from one checkpoint to the next."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "save_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, found {getattr(self, name)}")
        for name in ("warmup_steps", "weight_decay", "match_hidden", "seed"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name} must not be negative, found {getattr(self, name)}")
        if self.seed >= 1 << 32:
            raise UserError(f"seed must be below 2**32, found {self.seed}")
        if self.batch_size % self.accumulate:
            raise UserError(
                f"batch_size {self.batch_size} cannot be split into {self.accumulate} equal parts"
            )
        if self.window < 2:
            raise UserError(f"window must be at least 2 tokens, found {self.window}")
        if not 0.0 <= self.distill <= 1.0:
            raise UserError(f"distill is a weight between 0 and 1, found {self.distill}")
        if not 0.0 < self.learning_rate < float("inf"):
            raise UserError(f"learning_rate must be positive, found {self.learning_rate}")

    @property
    def needs_teacher(self) -> bool:
        """Whether the loss looks at the dense model."""
        return self.distill > 0 or self.match_hidden > 0


@dataclass(frozen=True)
class Recipe:
    """A method (or None: a dense control), the text that it is calibrated on, and a fine-tune."""

    name: str
    description: str = ""
    sparsify: Any = None
    calibrate: Calibration = field(default_factory=Calibration)
    finetune: Finetune = field(default_factory=Finetune)
    version: int = RECIPE_VERSION

    def __post_init__(self) -> None:
        if self.version != RECIPE_VERSION:
            raise UserError(
                f"version {self.version} is not known to this relufy, which reads {RECIPE_VERSION}"
            )

    def with_finetune(self, **changes: Any) -> "Recipe":
        """Return a copy whose fine-tune has some values replaced; a None leaves the recipe's own."""
        return replace(
            self, finetune=replace(self.finetune, **{k: v for k, v in changes.items() if v is not None})
        )

    def with_values(self, assignments: Sequence[str]) -> "Recipe":
        """Return a copy with values set by their place, as "finetune.distill=0.5" (the value is YAML)."""
        data = self.to_mapping()
        for assignment in assignments:
            place, equals, value = assignment.partition("=")
            if not equals:
                raise UserError(f"expected KEY=VALUE, as in finetune.steps=100, found {assignment!r}")
            *path, last = place.strip().split(".")
            part: Any = data
            for key in path:
                part = part.get(key) if isinstance(part, dict) else None
            if not isinstance(part, dict):
                raise UserError(f"the recipe {self.name} has no {'.'.join(path)!r} to set {last!r} in")
            part[last] = yaml_value(value, assignment)
        return recipe_from_mapping(data, self.name)

    def to_mapping(self) -> dict[str, Any]:
        """Return plain data that `recipe_from_mapping` reads back to an equal recipe."""
        data = to_mapping(replace(self, sparsify=None))
        if self.sparsify is not None:
            data["sparsify"] = {"method": method_name(self.sparsify)} | to_mapping(self.sparsify)
        return data

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_mapping(), sort_keys=False)


def recipe_from_mapping(data: object, where: str) -> Recipe:
    """Build a recipe from plain data; `where` names the source in errors. Raises UserError."""
    if isinstance(data, dict) and isinstance(data.get("sparsify"), dict):
        parameters = dict(data["sparsify"])
        method = parameters.pop("method", None)
        if method not in METHODS:
            raise UserError(
                f"{where}.sparsify: unknown method {method!r}{suggest(str(method), list(METHODS))}"
            )
        data = {**data, "sparsify": from_mapping(METHODS[method], parameters, f"{where}.sparsify")}
    elif isinstance(data, dict) and data.get("sparsify") is not None:
        raise UserError(f"{where}.sparsify: expected a mapping with a method, found {data['sparsify']!r}")
    return from_mapping(Recipe, data, where)


def shipped_recipes() -> dict[str, Recipe]:
    """Return the recipes that come with relufy, by name."""
    files = sorted((Path(__file__).parent / "recipes").glob("*.yaml"))
    return {recipe.name: recipe for recipe in (_parse(file.read_text(), file.name) for file in files)}


def load_recipe(name_or_path: str | Path) -> Recipe:
    """Return a shipped recipe by name, or one read from a YAML file. Raises UserError."""
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if not path.is_file():
            raise UserError(f"there is no recipe file {path}")
        return _parse(path.read_text(), str(path))
    shipped = shipped_recipes()
    if str(name_or_path) not in shipped:
        raise UserError(
            f"there is no recipe {str(name_or_path)!r}{suggest(str(name_or_path), list(shipped))}"
        )
    return shipped[str(name_or_path)]


def _parse(text: str, where: str) -> Recipe:
    return recipe_from_mapping(yaml_value(text, where), where)
