"""What a token costs in each variant: both accounts of `relufy measure`, on the demo's windows."""

from pathlib import Path
from typing import TYPE_CHECKING

from relufy.demo.result import Cost
from relufy.engine.spec import decoder_spec
from relufy.hub import read_config
from relufy.measure.bytes_read import bytes_by_kind
from relufy.measure.cost import Sparsity
from relufy.measure.costs import model_macs

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def cost_of(model: "PreTrainedModel", checkpoint: Path, sparsity: Sparsity, context: int) -> Cost:
    """Return the costs of a token at `context` positions, of a model that is saved as `checkpoint`."""
    read = bytes_by_kind(decoder_spec(read_config(checkpoint)), sparsity, context)
    return Cost(model_macs(model, sparsity).sparse, bytes_engine=sum(read.values()), bytes_by_kind=read)
