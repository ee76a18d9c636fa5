"""What a sparsified model costs on the engine: the bytes that it reads for a token, and its tokens/s."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedModel

from relufy.activation_sparsity import ACTIVATION_KEYS, BLOCK_KEY
from relufy.engine.pack import pack
from relufy.engine.spec import decoder_spec
from relufy.errors import UserError
from relufy.hub import read_config
from relufy.measure.bytes_read import Packing, bytes_engine
from relufy.measure.cost import DenseSparse
from relufy.measure.speed import Speed, speed_beside
from relufy.model.checkpoint import save_checkpoint
from relufy.model.structure import find_blocks

if TYPE_CHECKING:
    from relufy.methods.compare import CompareOptions

Sites = Mapping[str, Sequence[float]]


class EngineCosts:
    """Prices variants of the model of a folder. `notes` says why there are no figures at all, if so."""

    def __init__(self, folder: Path, options: "CompareOptions", window: np.ndarray) -> None:
        self._folder, self._options = folder, options
        self._prompt = window[: len(window) // 2].tolist()
        self._config = read_config(folder)
        self._scratch: TemporaryDirectory[str] | None = None
        self._dense: Path | None = None
        self.notes: tuple[str, ...] = ()
        try:
            decoder_spec(self._config)
        except UserError as error:
            self.notes = (f"no bytes_engine, no speed: {error}",)

    def bytes_read(self, model: PreTrainedModel, sites: Sites) -> DenseSparse | None:
        """Return `bytes_engine` with the zeros at the sites, or None if the engine can't run the model."""
        if self.notes:
            return None
        spec = decoder_spec(_config_of(model, self._config))
        packing = Packing(self._options.dtype, ranks=_ranks(model))
        return bytes_engine(spec, sites, self._options.window // 2, packing)

    def of_variant(
        self, model: PreTrainedModel, sites: Sites
    ) -> tuple[DenseSparse | None, Speed | None, tuple[str, ...]]:
        """Return bytes and speed of a variant, and why one is missing."""
        if self.notes:
            return None, None, ()
        try:
            read = self.bytes_read(model, sites)
            return read, self._speed(model) if self._options.speed_tokens else None, ()
        except UserError as error:
            return None, None, (f"no fast path on the engine: {error}",)

    def _speed(self, model: PreTrainedModel) -> Speed:
        options = self._options
        with TemporaryDirectory(prefix="relufy-compare-") as scratch:
            checkpoint = save_checkpoint(model, None, Path(scratch) / "checkpoint")
            packed = pack(checkpoint, Path(scratch) / "sparse.relufy", options.dtype)
            tokens, turns = options.speed_tokens, options.speed_turns
            return speed_beside(self._packed_dense(), packed, self._prompt, tokens, turns, options.threads)

    def _packed_dense(self) -> Path:
        if self._dense is None:
            self._scratch = TemporaryDirectory(prefix="relufy-compare-")
            self._dense = pack(self._folder, Path(self._scratch.name) / "dense.relufy", self._options.dtype)
        return self._dense


def _config_of(model: PreTrainedModel, base: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config.json that the model would be saved with, as far as the engine cares."""
    own = model.config.to_dict()
    changed = {key: own[key] for key in (*ACTIVATION_KEYS, BLOCK_KEY) if own.get(key) is not None}
    return {**base, **changed}


def _ranks(model: PreTrainedModel) -> dict[tuple[int, str], int]:
    """Return the rank of each low-rank branch, by layer and site."""
    ranks = {}
    for block in find_blocks(model):
        for site, projection in block.projections().items():
            factor: Any = getattr(getattr(projection.module, "sparsifier", None), "low_rank_in", None)
            if factor is not None:
                ranks[block.index, site] = factor.shape[0]
    return ranks
