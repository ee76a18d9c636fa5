"""What a user can choose for the demo, and the stages that it goes through."""

from dataclasses import dataclass, replace
from pathlib import Path

from relufy.hub import BUNDLED
from relufy.recipe import Finetune, Recipe, load_recipe

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
        """Return a stage's recipe with these options in it."""
        return load_recipe(stage.recipe).with_finetune(steps=self.steps, learning_rate=self.learning_rate)

    def control(self) -> Finetune:
        """Return the fine-tune of the dense control: as stage 1's, but by plain cross-entropy."""
        return replace(self.recipe(STAGES[0]).finetune, distill=0.0, match_hidden=0.0)

    def checkpoint(self, stage: Stage | None) -> str:
        """Return what a command calls the model that a stage made, or the dense one."""
        return self.model if stage is None else str(self.output / stage.folder)
