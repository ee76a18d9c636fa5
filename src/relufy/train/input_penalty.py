"""The penalty on the inputs that stage 2 makes sparse: what q k v, gate and up read behind their ReLU."""

from collections.abc import Iterator

import torch
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from relufy.errors import UserError
from relufy.model.sites import find_sites
from relufy.model.sparse_modules import SparseOutput
from relufy.recipe import Penalty
from relufy.train.penalty import SparsityPenalty


class InputPenalty(SparsityPenalty):
    """On the sparse outputs of norms. Raises UserError for a model that has none."""

    def __init__(self, model: PreTrainedModel, penalty: Penalty, steps: int) -> None:
        super().__init__(model, penalty, steps)
        shared = [norm for block in find_sites(model) for norm, _ in block.shared_inputs()]
        norms = [norm.module for norm in shared if norm and isinstance(norm.module, SparseOutput)]
        self._norms = list(dict.fromkeys(norms))
        self._num_places = len(self._norms)
        if not self._norms:
            raise UserError("input_penalty needs the sparse inputs of stage 2, and this model has none")

    def _attach(self) -> Iterator[RemovableHandle]:
        for norm in self._norms:
            yield norm.register_forward_hook(lambda _module, _args, output: self._see(output))  # type: ignore[attr-defined]

    def _see(self, output: torch.Tensor) -> None:
        self._penalise(output)
        self._count_active(output)
