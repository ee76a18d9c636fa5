"""What the demo says of the model it works on."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from relufy.hub import BUNDLED

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BUNDLED_WORDS = (
    "The bundled model is llama-prose-3m, a SiLU Llama of 3.4 million parameters that we trained from "
    "scratch on public-domain novels. It is small: it shows the road, not what a good "
    "model can do."
)


def describe_model(name: str, folder: Path, model: "PreTrainedModel") -> dict[str, Any]:
    """Return the model's name, a sentence on it, and its dimensions."""
    config = model.config
    parameters = sum(p.numel() for p in model.parameters())
    kind = (config.architectures or [type(model).__name__])[0]
    words = (
        BUNDLED_WORDS
        if name == BUNDLED
        else f"{name} is a {kind} of {parameters / 1e6:.1f} million parameters."
    )
    return {
        "name": folder.resolve().name,
        "description": words,
        "architecture": kind,
        "parameters": parameters,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        "vocabulary": config.vocab_size,
    }
