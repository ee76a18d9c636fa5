"""What a user can choose for the demo, and the stages that it goes through."""

from dataclasses import dataclass
from pathlib import Path

from relufy.hub import BUNDLED
from relufy.recipe import Recipe, load_recipe

PROMPT = "The old man looked at the door, and"


@dataclass(frozen=True)
class Stage:
    """One relufication: the recipe's name, what the tables call it, and its folder's name."""

    recipe: str
    name: str
    title: str
    folder: str


STAGES = (
    Stage("demo-stage1", "stage 1", "stage 1: ReLU in the MLP", "stage1"),
    Stage("demo-stage2", "stage 2", "stage 2: also after the norms", "stage2"),
)


@dataclass(frozen=True)
class DemoOptions:
    """`text` replaces self-written text; `steps` and `learning_rate` replace those of the stages' recipes."""

    output: Path = Path("relufy-demo")
    model: str = BUNDLED
    text: Path | None = None
    prompt: str = PROMPT
    steps: int | None = None
    learning_rate: float | None = None

    def recipe(self, stage: Stage) -> Recipe:
        """Return a stage's recipe with these options in it.

        On the user's text stages and control learn by cross-entropy alike, so that what is left between them
        is what the zeros cost.
        """
        recipe = load_recipe(stage.recipe).with_values(self.assignments())
        return recipe.with_finetune(steps=self.steps, learning_rate=self.learning_rate)

    def assignments(self) -> tuple[str, ...]:
        """Return what replaces the recipes' values, as `relufy finetune --set` takes it."""
        return ("finetune.distill=0", "finetune.match_hidden=0") if self.text else ()

    def checkpoint(self, stage: Stage | None) -> str:
        """Return what a command calls the model that a stage made, or the dense one."""
        return self.model if stage is None else str(self.output / stage.folder)
