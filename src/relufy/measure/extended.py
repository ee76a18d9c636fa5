"""`relufy measure extended`: what takes many runs of a text: how many neurons could be left out, whether they
can be predicted, who fires with whom, and an event-driven processor's energy."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relufy.document import heading
from relufy.errors import UserError
from relufy.hub import context_length, model_folder, read_config
from relufy.measure import coactivation, energy, predictivity
from relufy.measure.coactivation import CoActivation, CoActivationCounts
from relufy.measure.energy import Energy, EnergyConstants
from relufy.measure.predictivity import Predictivity
from relufy.measure.traces import batches_of, watch_traces
from relufy.model.structure import find_blocks
from relufy.schema import suggest
from relufy.text import read_windows, refuse_long_windows

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel

    from relufy.measure.cett import CettSparsity
    from relufy.measure.ppl_sparsity import PplSparsity

KIND = "relufy.measure.extended"
PARTS = ("cett", "ppl_sparsity", "predictivity", "coactivation", "energy")
MAX_WINDOWS = 16
DEFINITIONS = {
    "cett": "share of neurons that can be left out, the least ones first by |a_i| times the norm of down's "
    "column, until each layer's mean error is the target (ReLU2 Wins), an oracle; error_p95 over tokens",
    "ppl_sparsity": "that share at perplexity grown by `percent`: criterion cett leaves out at equal CETT in "
    "every layer, universal below one contribution, fat below one |a_i|, topk as many in each (Sparsing Law)",
    "energy": energy.DEFINITION,
} | (predictivity.DEFINITIONS | coactivation.DEFINITIONS)


@dataclass(frozen=True)
class ExtendedOptions:
    """What is measured, and how."""

    parts: tuple[str, ...] = PARTS
    cett_target: float = 0.2
    percents: tuple[float, ...] = (1.0,)
    criteria: tuple[str, ...] = ("cett", "universal", "fat", "topk")
    rank: int = predictivity.RANK
    """Of predictors."""
    constants: EnergyConstants = field(default_factory=EnergyConstants)
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        for part in self.parts:
            if part not in PARTS:
                raise UserError(f"there is no part {part!r}{suggest(part, list(PARTS))}")


@dataclass(frozen=True)
class Extended:
    """What was found; a part that was not asked for, or has its reason in `notes`, is None."""

    cett: "CettSparsity | None"
    ppl_sparsity: "tuple[PplSparsity, ...] | None"
    predictivity: Predictivity | None
    coactivation: CoActivation | None
    energy: Energy | None
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain data by part; a part without a result is None."""
        cett = self.cett
        return {
            "cett": None if cett is None else asdict(cett) | {"mean": cett.mean},
            "ppl_sparsity": None
            if self.ppl_sparsity is None
            else [asdict(found) | {"mean": found.mean} for found in self.ppl_sparsity],
            "predictivity": None if self.predictivity is None else self.predictivity.to_json(),
            "coactivation": None if self.coactivation is None else self.coactivation.to_json(),
            "energy": None if self.energy is None else self.energy.to_json(),
            "notes": self.notes,
        }


@dataclass(frozen=True)
class ExtendedMeasurement:
    """`Extended`, with what it was measured on."""

    model: str
    tokens: int
    windows: int
    window: int
    found: Extended

    def to_json(self) -> dict[str, Any]:
        """Return the document."""
        own = {name: getattr(self, name) for name in ("model", "tokens", "windows", "window")}
        return heading(KIND) | own | self.found.to_json() | {"definitions": DEFINITIONS}


def extended(
    model: str | Path,
    text: Sequence[str | Path] | str | Path,
    window: int = 256,
    max_windows: int | None = MAX_WINDOWS,
    options: ExtendedOptions | None = None,
) -> ExtendedMeasurement:
    """Measure the extended metrics of a checkpoint on text files, cut into windows as `measure` cuts them.

    The text is run some hundred times, so a few thousand tokens are the default. Raises UserError.
    """
    from relufy.model.checkpoint import load_model, load_tokenizer

    folder = model_folder(model)
    refuse_long_windows(window, context_length(read_config(folder)))
    files = [text] if isinstance(text, str | Path) else list(text)
    tokenizer = load_tokenizer(folder)
    windows = read_windows(files, tokenizer, window)[:max_windows]
    skip = int(tokenizer.bos_token_id is not None)
    found = measure_extended(load_model(folder), windows, options, skip)
    return ExtendedMeasurement(str(model), windows.size, len(windows), window, found)


def measure_extended(
    model: "PreTrainedModel", windows: "np.ndarray", options: ExtendedOptions | None = None, skip: int = 0
) -> Extended:
    """Measure the extended metrics of a model on windows, int64 `[windows, length]`.

    `skip` leaves each window's first tokens out of the co-activation. What the model cannot have (nothing to
    predict without zeros) is None, with a note.
    """
    options = options or ExtendedOptions()
    notes: list[str] = []

    def part(name: str, measure: Callable[..., Any]) -> Any:
        if name not in options.parts:
            return None
        try:
            return measure(model, windows, options)
        except UserError as error:
            if options.parts == (name,):
                raise
            notes.append(f"{name}: {error}")
            return None

    found = {name: part(name, measure) for name, measure in _measures(skip).items()}
    return Extended(**found, notes=tuple(notes))


def _measures(skip: int) -> Mapping[str, Callable[..., Any]]:
    def coactive(model: "PreTrainedModel", windows: "np.ndarray", options: ExtendedOptions) -> CoActivation:
        counts = CoActivationCounts(model.config.num_hidden_layers, seed=options.seed)
        batches = batches_of(windows, options.batch_size, model.config.vocab_size)
        watch_traces(model, batches, "neuron", counts.add, skip)
        return counts.result()

    return {
        "cett": _cett,
        "ppl_sparsity": _ppl_sparsity,
        "predictivity": _predictivity,
        "coactivation": coactive,
        "energy": _energy,
    }


def _cett(model: "PreTrainedModel", windows: "np.ndarray", options: ExtendedOptions) -> "CettSparsity":
    from relufy.measure.cett import cett_sparsity

    return cett_sparsity(model, windows, target=options.cett_target, batch_size=options.batch_size)


def _ppl_sparsity(
    model: "PreTrainedModel", windows: "np.ndarray", options: ExtendedOptions
) -> "tuple[PplSparsity, ...]":
    from relufy.measure.ppl_sparsity import ppl_sparsity

    return tuple(
        ppl_sparsity(model, windows, percent, criterion, options.batch_size)
        for percent in options.percents
        for criterion in options.criteria
    )


def _predictivity(model: "PreTrainedModel", windows: "np.ndarray", options: ExtendedOptions) -> Predictivity:
    return predictivity.predictivity(
        model, windows, rank=options.rank, batch_size=options.batch_size, seed=options.seed
    )


def _energy(model: "PreTrainedModel", windows: "np.ndarray", options: ExtendedOptions) -> Energy:
    from relufy.measure.sparsity import measure_sparsity

    sites = measure_sparsity(model, windows, options.batch_size).sparsity
    return energy.energy(energy.linears(find_blocks(model), sites), options.constants)
