"""The command that does each step of the demo alone."""

import shlex
from pathlib import Path

from relufy.demo.options import STAGES, DemoOptions, Stage


def info(options: DemoOptions) -> str:
    return _line("info", options.model)


def finetune(options: DemoOptions, stage: Stage, previous: Stage | None) -> str:
    """Return the command for a stage's fine-tune, from the checkpoint of the stage before."""
    words = [
        "finetune",
        options.checkpoint(previous),
        "-o",
        options.checkpoint(stage),
        "--recipe",
        stage.recipe,
    ]
    words += ["--data", str(options.text or "self")]
    for assignment in options.assignments():
        words += ["--set", assignment]
    if options.steps is not None:
        words += ["--steps", str(options.steps)]
    if options.learning_rate is not None:
        words += ["--learning-rate", str(options.learning_rate)]
    if previous is not None:
        words += ["--dense", options.model]
    return _line(*words)


def measure(options: DemoOptions, stage: Stage) -> str:
    text = str(options.text or "FILE")
    return _line("measure", options.checkpoint(stage), "--text", text, "--dense", options.model)


def pack(options: DemoOptions, stage: Stage | None) -> str:
    return _line("pack", options.checkpoint(stage), "-o", str(packed_file(options.output, stage)))


def generate(options: DemoOptions, stage: Stage | None, num_tokens: int) -> str:
    packed = packed_file(options.output, stage)
    return _line("generate", str(packed), options.prompt, "--max-new-tokens", str(num_tokens))


def packed_file(folder: Path, stage: Stage | None) -> Path:
    """Return where the demo puts a packed file."""
    return folder / f"{stage.folder if stage else 'dense'}.relufy"


def every_step(options: DemoOptions, num_tokens: int) -> list[tuple[str, str]]:
    """Return what each step does and the command for it, in the demo's order."""
    last = STAGES[-1]
    return [
        ("what the dense model is", info(options)),
        *(
            (f"{stage.title}, and its fine-tune", finetune(options, stage, previous))
            for previous, stage in zip((None, *STAGES), STAGES, strict=False)
        ),
        ("sparsity, perplexity and costs, on a text of yours", measure(options, last)),
        ("the engine's weight file", pack(options, last)),
        ("text", generate(options, last, num_tokens)),
    ]


def _line(*words: str) -> str:
    return shlex.join(("relufy", *words))
