"""What the methods that cut the activation's output off ask of a model."""

from relufy.errors import UserError
from relufy.methods.setting import Setting
from relufy.model.configuration import sparsity_of


def refuse_plain_mlp(setting: Setting, method: str) -> None:
    """Raise UserError if the MLP has no gate."""
    if not setting.is_gated:
        raise UserError(
            f"{method} needs a gate, and {type(setting.model).__name__} has a plain MLP; try teal or scap"
        )


def refuse_own_zeros(setting: Setting, method: str) -> None:
    """Raise UserError if an activation makes zeros already: a mask on its output would have to keep them."""
    present = sparsity_of(setting.model)
    for block in setting.blocks:
        neuron = present.at("neuron", block.index)
        if neuron is not None:
            more = "fatrelu" if neuron.function in ("relu", "helu", "fatrelu") else "teal or scap"
            raise UserError(
                f"{method} is for activations without zeros of their own, and layer {block.index} has "
                f"{neuron.function} at 'neuron' already; {more} can make it sparser"
            )
