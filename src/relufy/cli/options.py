"""Arguments and options that several commands share, so that they read alike everywhere."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from relufy.errors import UserError

if TYPE_CHECKING:
    from relufy.engine.reuse import Reuse
    from relufy.engine.speculation import Speculation

Model = Annotated[str, typer.Argument(help="A checkpoint folder, 'bundled', or a Hugging Face hub id.")]
ModelOrFile = Annotated[
    str, typer.Argument(help="A checkpoint folder, 'bundled', a hub id, or a packed file.")
]
OutputFolder = Annotated[Path, typer.Option("-o", "--output", help="The new checkpoint folder.")]
RecipeName = Annotated[
    str, typer.Option("--recipe", help="A shipped recipe (see `relufy recipes`) or a YAML file.")
]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Another value in the recipe, as finetune.distill=0.5."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
KvDtype = Annotated[
    str | None,
    typer.Option(
        "--kv-dtype", help="Keys and values: f32, bf16 or f16; by default f32 for f32 weights, else f16."
    ),
]
NoMmap = Annotated[
    bool,
    typer.Option("--no-mmap", "--load", help="Copy the weights into huge pages instead of mapping the file."),
]
Mlock = Annotated[
    bool, typer.Option("--mlock", help="Keep the weights in memory: the system must not swap them out.")
]
Threads = Annotated[
    int | None,
    typer.Option("--threads", min=1, help="Threads of the engine; by default the cores it may use."),
]
Context = Annotated[
    int | None, typer.Option("--context", min=1, help="Positions to keep; by default the model's.")
]
Dtype = Annotated[
    str | None,
    typer.Option("--dtype", help="How a folder is packed: f32 (the default), bf16, int8 or int4."),
]

Temperature = Annotated[
    float | None, typer.Option("--temperature", min=0.0, help="0 takes the most likely token.")
]
TopK = Annotated[
    int | None, typer.Option("--top-k", min=0, help="Choose among the k most likely tokens; 0: all.")
]
TopP = Annotated[
    float | None,
    typer.Option("--top-p", min=0.0, max=1.0, help="Choose within this mass of probability."),
]
MinP = Annotated[
    float | None,
    typer.Option("--min-p", min=0.0, max=1.0, help="Leave out what is less likely than p times the first."),
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option("--repetition-penalty", help="Above 1: what the text holds, prompt too, is less likely."),
]
PresencePenalty = Annotated[
    float | None,
    typer.Option("--presence-penalty", help="Taken from the logit of every token written before."),
]
FrequencyPenalty = Annotated[
    float | None,
    typer.Option("--frequency-penalty", help="Taken from a token's logit each time that it was written."),
]
LogitBias = Annotated[
    list[str] | None,
    typer.Option(
        "--logit-bias", metavar="ID=BIAS", help="Added to the logit of a token's id; may be repeated."
    ),
]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of the random numbers; 0 by default.")]
Stop = Annotated[list[str] | None, typer.Option("--stop", help="Stop before this text; may be repeated.")]
Policy = Annotated[
    str | None,
    typer.Option(
        "--context-policy",
        metavar="refuse|sliding",
        help="A full context ends the text (refuse), or its older half is forgotten (sliding).",
    ),
]
Keep = Annotated[
    int | None,
    typer.Option("--keep", min=0, help="First tokens that sliding never forgets; 4 by default."),
]
ReusePeriod = Annotated[
    int | None,
    typer.Option(
        "--reuse",
        metavar="G",
        min=1,
        help="Of each G tokens one computes all neurons, the others those active lately; 1 is exact.",
    ),
]
ReuseWindow = Annotated[
    int | None,
    typer.Option("--reuse-window", min=1, help="How many last tokens' neurons are reused; 32 by default."),
]
ReusePolicyName = Annotated[
    str | None,
    typer.Option("--reuse-policy", help="Which neurons: window (the default), prompt, blocks or adaptive."),
]
PredictorMode = Annotated[
    str | None,
    typer.Option(
        "--predictor",
        metavar="on|off",
        help="on: tokens compute only the neurons that the model's predictor names; not exact.",
    ),
]
Speculative = Annotated[
    str | None,
    typer.Option(
        "--speculative",
        metavar="DRAFT|lookup|self",
        help="Who proposes tokens that the model verifies together: a smaller model, the text, or itself.",
    ),
]
Gamma = Annotated[
    int | None, typer.Option("--gamma", min=1, help="Tokens proposed at a time, at most; 4 by default.")
]
MinProbability = Annotated[
    float | None,
    typer.Option(
        "--min-probability",
        min=0.0,
        max=1.0,
        help="A draft model stops where its likeliest token has less.",
    ),
]
Adaptive = Annotated[
    bool, typer.Option("--adaptive", help="Propose fewer tokens after a rejection, more after none.")
]


def parse_predictor(mode: str | None) -> bool:
    """Tell whether the model's predictor is to be used. Raises UserError for anything but on and off."""
    if mode not in (None, "on", "off"):
        raise UserError(f"--predictor is on or off, found {mode!r}: a checkpoint has one predictor, its own")
    return mode == "on"


def parse_reuse(period: int | None, window: int | None, policy: str | None) -> "Reuse | None":
    """Return how to reuse neurons, if at all. Raises UserError."""
    from relufy.engine.reuse import Reuse

    chosen: dict[str, Any] = {"window": window, "policy": policy}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    if period is None and chosen:
        raise UserError(f"--reuse-{min(chosen)} is for --reuse; give a period")
    reuse = None if period is None else Reuse(period, **chosen)
    if reuse and window is not None and reuse.policy not in ("window", "adaptive"):
        raise UserError(f"the policy {reuse.policy} has no window; leave out --reuse-window")
    return reuse


def parse_speculation(
    draft: str | None, gamma: int | None, min_probability: float | None, adaptive: bool
) -> "Speculation | None":
    """Return how to speculate, if at all. Raises UserError."""
    from relufy.engine.speculation import Speculation

    if draft is None:
        given = {"--gamma": gamma, "--min-probability": min_probability, "--adaptive": adaptive or None}
        if unused := [name for name, value in given.items() if value is not None]:
            raise UserError(f"{unused[0]} is for --speculative; name a draft, or lookup")
        return None
    chosen = {} if gamma is None else {"gamma": gamma}
    return Speculation(draft, **chosen, min_probability=min_probability, adaptive=adaptive)


def whole_numbers(text: str, option: str) -> list[int]:
    """Return the numbers of a list such as `1,2,4`. Raises UserError."""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise UserError(f"{option} takes whole numbers with commas, as 1,2,4, found {text!r}") from None


def parse_logit_bias(entries: list[str] | None) -> dict[int, float]:
    """Return token ids and biases of `ID=BIAS` entries. Raises UserError."""
    found: dict[int, float] = {}
    for entry in entries or ():
        token, _, bias = entry.partition("=")
        try:
            found[int(token)] = float(bias)
        except ValueError:
            raise UserError(
                f"--logit-bias takes a token's id and a number, as 42=-1.5, found {entry!r}"
            ) from None
    return found
