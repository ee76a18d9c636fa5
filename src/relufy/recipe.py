"""What to do to a model, as versioned data: YAML files <-> frozen dataclasses. Knows no torch.

A recipe has three parts. `sparsify` says which zeros to make (method.py), `calibrate` which text to look at
for it, `finetune` how to recover the quality. `then` is a recipe that follows. Recipes shipped with relufy
live in `relufy/recipes/*.yaml`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import yaml

from relufy.errors import UserError
from relufy.method import METHODS, Calibration, method_name
from relufy.schema import from_mapping, suggest, to_mapping, yaml_value

RECIPE_VERSION = 1


@dataclass(frozen=True)
class Penalty:
    """An L1 penalty on what `down` reads, for more zeros (ProSparse, arXiv 2402.13516, section 3.2).

    The loss grows by `strength * sum over layers of the mean over tokens of |a|`, a the MLP's intermediate
    output. With a `target` the strength is found: a controller steers the share of zeros along the schedule.
    """

    strength: tuple[float, ...] = (1.0,)
    """At the end of each stage. Within the first it is constant; from one to the next it follows half a wave
    of sine. With a target these are shares of the way to it."""
    until: tuple[float, ...] = (1.0,)
    """Where the stages end, ascending, in any unit: the run is stretched over them."""
    over_neurons: Literal["mean", "sum"] = "mean"
    """How |a| is taken over the neurons of a layer. The paper does not say."""
    target: float | None = None
    """The share of zeros at the site `neuron` wanted in the end, a mean over layers."""

    def __post_init__(self) -> None:
        if not self.strength or len(self.strength) != len(self.until):
            raise UserError(
                f"a penalty has as many strengths as stages, found {len(self.strength)} and {len(self.until)}"
            )
        if not all(0 <= value < float("inf") for value in self.strength):
            raise UserError(f"strengths must be finite numbers, 0 or greater, found {list(self.strength)}")
        if not all(0 <= a < b < float("inf") for a, b in pairwise((0.0, *self.until))):
            raise UserError(f"until must be positive and ascending, found {list(self.until)}")
        if self.target is None:
            return
        if not 0 < self.target < 1:
            raise UserError(f"target is a share of zeros between 0 and 1, found {self.target}")
        if max(self.strength) != 1:
            raise UserError(
                f"with a target, strengths are shares of the way to it, 1 the greatest; found "
                f"{list(self.strength)}"
            )


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters instead of the weights themselves (arXiv 2106.09685), merged into them at the end."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ()
    """Names of the projections, as peft takes them; none: every projection of the blocks."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"rank must be at least 1, found {self.rank}")
        if not 0 < self.alpha < float("inf"):
            raise UserError(f"alpha must be positive, found {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout must be at least 0 and below 1, found {self.dropout}")


@dataclass(frozen=True)
class Finetune:
    """How to train: to recover quality after the zeros were made, or from scratch.

    The loss is `distill * KL(dense || model) + (1 - distill) * cross_entropy + match_hidden * mismatch`, and
    the penalty. KL and cross-entropy are means over tokens in nats; the mismatch is the squared distance of
    the hidden states to the dense model's, relative to their squared length, a mean over tokens and blocks.
    """

    steps: int = 150
    """Optimizer steps; 0 trains nothing."""
    batch_size: int = 16
    """Windows in an optimizer step, over all processes."""
    accumulate: int = 1
    """Parts that a step's windows are computed in: more parts need less memory, and change nothing else."""
    window: int = 256
    """Tokens in a window, with the beginning-of-sequence token that opens it."""
    learning_rate: float = 2e-5
    """The peak."""
    warmup_steps: int = 10
    schedule: Literal["linear", "cosine", "constant", "wsd"] = "linear"
    """What the rate does after the warm-up: it falls to zero at once, or (wsd) over the last `decay` of the
    steps, or stays."""
    decay: float = 0.5
    optimizer: Literal["adamw", "muon"] = "adamw"
    """Muon takes the blocks' matrices and AdamW the rest, both with updates of AdamW's size."""
    weight_decay: float = 0.0
    distill: float = 0.0
    match_hidden: float = 0.0
    penalty: Penalty | None = None
    """On what `down` reads: more zeros at the site `neuron`."""
    input_penalty: Penalty | None = None
    """On the inputs of q k v, gate and up behind the ReLU of stage 2: more zeros there."""
    lora: Lora | None = None
    precision: Literal["f32", "bf16"] = "f32"
    """Of the arithmetic; weights and optimizer stay in the model's own type."""
    compile: bool = False
    """Have torch.compile fuse the forward and backward pass: a minute at the start, then fewer passes over
    memory. Reported steps run uncompiled, so that the monitor sees them."""
    gradient_checkpointing: bool = False
    """Compute each block again for its gradients instead of keeping its activations."""
    log_steps: int = 1
    """Optimizer steps from one report to the next."""
    save_steps: int = 50
    """Optimizer steps from one checkpoint to the next."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulate", "log_steps", "save_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, found {getattr(self, name)}")
        for name in ("steps", "warmup_steps", "weight_decay", "match_hidden", "seed"):
            if not 0 <= getattr(self, name) < float("inf"):
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
        if not 0.0 < self.decay <= 1.0:
            raise UserError(f"decay is a share of the steps above 0, found {self.decay}")

    @property
    def needs_teacher(self) -> bool:
        """Whether the loss looks at the dense model."""
        return self.distill > 0 or self.match_hidden > 0

    @property
    def tokens(self) -> int:
        """How many tokens are predicted in all of the steps."""
        return self.steps * self.batch_size * (self.window - 1)


@dataclass(frozen=True)
class Recipe:
    """A method (or None: a dense control), the text that it is calibrated on, and a fine-tune."""

    name: str
    description: str = ""
    sparsify: Any = None
    calibrate: Calibration = field(default_factory=Calibration)
    finetune: Finetune = field(default_factory=Finetune)
    then: "Recipe | None" = None
    """What follows on the model that this gives; in YAML also the name of a shipped recipe."""
    version: int = RECIPE_VERSION

    def __post_init__(self) -> None:
        if self.version != RECIPE_VERSION:
            raise UserError(
                f"version {self.version} is not known to this relufy, which reads {RECIPE_VERSION}"
            )

    def stages(self) -> list["Recipe"]:
        """Return this recipe and those that follow it, each without what follows."""
        following = self.then.stages() if self.then is not None else []
        return [replace(self, then=None), *following]

    def with_finetune(self, **changes: Any) -> "Recipe":
        """Return a copy with some values of its fine-tune, and of those that follow, replaced.

        A None leaves the recipes' own; a stage without training stays without.
        """
        given = {key: value for key, value in changes.items() if value is not None}
        trains = self.finetune.steps > 0
        return replace(
            self,
            finetune=replace(self.finetune, **given) if trains else self.finetune,
            then=self.then and self.then.with_finetune(**changes),
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
        data = to_mapping(replace(self, sparsify=None, then=None))
        if self.sparsify is not None:
            data["sparsify"] = {"method": method_name(self.sparsify)} | to_mapping(self.sparsify)
        if self.then is not None:
            data["then"] = self.then.to_mapping()
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
    if isinstance(data, dict) and data.get("then") is not None:
        following = data["then"]
        is_name = isinstance(following, str)
        then = load_recipe(following) if is_name else recipe_from_mapping(following, f"{where}.then")
        data = {**data, "then": then}
    return from_mapping(Recipe, data, where)


def shipped_recipes() -> dict[str, Recipe]:
    """Return the recipes that come with relufy, by name."""
    return {name: _parse(file.read_text(), file.name) for name, file in _shipped_files().items()}


def load_recipe(name_or_path: str | Path) -> Recipe:
    """Return a shipped recipe by name, or one read from a YAML file. Raises UserError."""
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if not path.is_file():
            raise UserError(f"there is no recipe file {path}")
        return _parse(path.read_text(), str(path))
    name, files = str(name_or_path), _shipped_files()
    if name not in files:
        raise UserError(f"there is no recipe {name!r}{suggest(name, list(files))}")
    return _parse(files[name].read_text(), files[name].name)


def _shipped_files() -> dict[str, Path]:
    """Return the files of shipped recipes by name, which is the file's."""
    files = {file.stem: file for file in (Path(__file__).parent / "recipes").glob("*.yaml")}
    return dict(sorted(files.items()))


def _parse(text: str, where: str) -> Recipe:
    return recipe_from_mapping(yaml_value(text, where), where)
