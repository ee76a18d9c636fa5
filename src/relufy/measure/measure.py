"""`relufy measure`: zeros at every site, perplexity, and the two costs of a token, on the user's text."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relufy.activation_sparsity import read_activation_sparsity
from relufy.engine.pack import check_choice
from relufy.engine.safetensors_folder import SafetensorsFolder
from relufy.engine.spec import decoder_spec
from relufy.errors import UserError
from relufy.hub import context_length, model_folder, read_config
from relufy.measure.bytes_read import Packing, bytes_engine, correction_ranks
from relufy.measure.cost import DenseSparse, LayerShapes, Sparsity, macs_paper
from relufy.measure.quality import Perplexity, perplexity
from relufy.measure.sparsity import measure_sparsity
from relufy.text import read_windows, refuse_long_windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from relufy.model.sites import BlockSites

DEFINITIONS = {
    "sparsity": "share of exact zeros over all positions: inputs of q k v o gate up down, behind masks; "
    "neuron is the activation's output",
    "perplexity": "exp of the mean negative log-likelihood per predicted token; "
    "each window is predicted from its second position on",
    "macs_paper": "multiply-accumulates of linear layers and head for one token, "
    "as ReLU Strikes Back counts them (o always dense)",
    "bytes_engine": "bytes that the CPU engine reads for one token: weights packed as `dtype`, with scales "
    "and padding, lists of active entries, keys and values",
}


@dataclass(frozen=True)
class Measurement:
    """What `measure` found. A None has its reason in `notes`. Sparsity: site -> one share per layer."""

    model: str
    tokens: int
    windows: int
    window: int
    sparsity: dict[str, tuple[float, ...]]
    perplexity: Perplexity
    dense_perplexity: Perplexity | None
    macs_paper: DenseSparse
    bytes_engine: DenseSparse | None
    dtype: str
    context: int
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain data, without each window's own perplexity."""
        plain = {**asdict(self), "definitions": DEFINITIONS}
        for found in filter(None, (plain["perplexity"], plain["dense_perplexity"])):
            del found["per_window"]
        return plain


def measure(
    model: str | Path,
    text: Sequence[str | Path] | str | Path,
    dense: str | Path | None = None,
    window: int = 256,
    max_windows: int | None = None,
    batch_size: int = 16,
    dtype: str = "f32",
) -> Measurement:
    """Measure a checkpoint on text files. Raises UserError.

    `dense` is the checkpoint to compare the perplexity with; by default the one that the model was made from,
    where its provenance names a folder that is still there. Text is cut into windows of `window` tokens, each
    opened by the tokenizer's beginning-of-sequence token if it has one; `max_windows` keeps the first ones.
    `bytes_engine` is at half a window of context, the mean over a window's positions, for a file packed as
    `dtype` (zeros are those of the unpacked model).
    """
    from relufy.model.checkpoint import load_model, load_tokenizer

    check_choice(dtype, "exact")
    folder = model_folder(model)
    tokenizer = load_tokenizer(folder)
    files = [text] if isinstance(text, str | Path) else list(text)
    config = read_config(folder)
    refuse_long_windows(window, context_length(config))
    windows = read_windows(files, tokenizer, window)[:max_windows]
    loaded = load_model(folder)
    sites = measure_sparsity(loaded, windows, batch_size)
    engine_bytes, engine_note = _bytes_engine(folder, sites.sparsity, window // 2, dtype)
    own = perplexity(loaded, windows, batch_size)
    macs = model_macs(loaded, sites.sparsity)
    dense_folder, dense_note = _dense_folder(folder, config, dense)
    reference = own if dense_folder == folder else None
    if dense_folder is not None and reference is None:
        reference = perplexity(load_model(dense_folder), windows, batch_size)
    return Measurement(
        model=str(model),
        tokens=sites.tokens,
        windows=len(windows),
        window=window,
        sparsity=sites.sparsity,
        perplexity=own,
        dense_perplexity=reference,
        macs_paper=macs,
        bytes_engine=engine_bytes,
        dtype=dtype,
        context=window // 2,
        notes=tuple(note for note in (engine_note, dense_note, _phase_note(config)) if note),
    )


def model_macs(model: "PreTrainedModel", sparsity: Sparsity) -> DenseSparse:
    """Return `macs_paper` of a model with the zeros measured at its sites."""
    from relufy.model.sites import find_blocks
    from relufy.model.sparsifiers import sparsity_of

    layers = [_projection_shapes(block) for block in find_blocks(model)]
    head: Any = model.get_output_embeddings()
    has_sparse_inputs = any("up" in s.sites for s in sparsity_of(model).sparsifiers)
    return macs_paper(layers, tuple(head.weight.shape), sparsity, has_sparse_inputs)


def _projection_shapes(block: "BlockSites") -> LayerShapes:
    """Return (out, in) at each site; a fused projection is divided evenly among the sites that it serves."""
    projections = block.projections()
    served = Counter(projection.name for projection in projections.values())
    return {site: (p.shape[0] / served[p.name], p.shape[1]) for site, p in projections.items()}


def _bytes_engine(
    folder: Path, sparsity: Sparsity, context: int, dtype: str
) -> tuple[DenseSparse | None, str]:
    try:
        spec = decoder_spec(read_config(folder))
        ranks = correction_ranks(spec, SafetensorsFolder(folder))
        return bytes_engine(spec, sparsity, context, Packing(dtype, ranks=ranks)), ""
    except UserError as error:
        return None, f"bytes_engine: {error}"


def _phase_note(config: dict) -> str:
    sparsifiers = read_activation_sparsity(config).sparsifiers
    sites = [site for sparsifier in sparsifiers if sparsifier.phase == "decode" for site in sparsifier.sites]
    if not sites:
        return ""
    return (
        f"windows are read as prompts, which stay dense at {' '.join(sites)}: decoding reads less than this"
    )


def _dense_folder(folder: Path, config: dict, dense: str | Path | None) -> tuple[Path | None, str]:
    """Return the dense model to compare with, or None and the reason why there is none."""
    if dense is not None:
        return model_folder(dense), ""
    block = config.get("activation_sparsity")
    if block is None:
        return folder, ""
    base = block.get("provenance", {}).get("base")
    if base is None:
        return (
            None,
            "dense_perplexity: the checkpoint does not say what it was made from; name it with --dense",
        )
    try:
        return model_folder(base), ""
    except (UserError, TypeError):
        return None, f"dense_perplexity: the base model {base!r} is not here; name it with --dense"
