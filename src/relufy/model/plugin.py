"""How transformers loads a relufied checkpoint by itself.

There, a checkpoint can ask for code while it is loaded in one place only: the quantisers. Ours puts the
sparsifiers on the model and takes itself off again, so that what was loaded is an ordinary model that trains,
takes adapters, and saves.
"""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel
from transformers.activations import ACT2CLS, ACT2FN
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer

from relufy.activation_sparsity import FATRELU, RELUFY_ACT
from relufy.errors import UserError
from relufy.model.activations import Placeholder
from relufy.model.beta_silu import register_beta_silu
from relufy.model.configuration import POINTER_METHOD, Pointer, has_block
from relufy.model.fingerprints import check_files
from relufy.model.sparsifiers import install_sparsity


class RelufyQuantizer(HfQuantizer):
    """Gives a model its sparsifiers before its weights are read. It quantises nothing."""

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if not has_block(model):
            raise UserError("config.json points at relufy, but has no block 'activation_sparsity'")
        files = _safetensors(kwargs.get("checkpoint_files") or ())
        install_sparsity(model, files)
        if files:
            check_files(model, files)
        return model

    def postprocess_model(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        """Leave an ordinary model: nothing in it says quantised but the pointer, which saving needs."""
        self.remove_quantization_config(model)
        model.config.quantization_config = Pointer()
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def register() -> None:
    """Tell transformers of our pointer and of the activations' names. Doing it twice is harmless."""
    AUTO_QUANTIZATION_CONFIG_MAPPING[POINTER_METHOD] = Pointer
    AUTO_QUANTIZER_MAPPING[POINTER_METHOD] = RelufyQuantizer
    for name in (RELUFY_ACT, FATRELU):
        ACT2FN[name] = Placeholder
        ACT2CLS[name] = Placeholder
    register_beta_silu()


def _safetensors(files: Sequence[str]) -> list[str]:
    return [file for file in files if str(file).endswith(".safetensors")]
