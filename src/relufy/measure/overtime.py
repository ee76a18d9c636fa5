"""`relufy measure overtime`: what consecutive tokens share, which decides what reusing neurons can save."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relufy.document import heading
from relufy.errors import UserError
from relufy.hub import context_length, model_folder, read_config
from relufy.measure import aggregated, gamma_interval, windowed_reuse
from relufy.measure.aggregated import Aggregated, AggregatedCounts
from relufy.measure.gamma_interval import GammaInterval
from relufy.measure.token_sample import SAMPLED_TOKENS, TokenSample
from relufy.measure.traces import Trace, batches_of, check_site, watch_traces
from relufy.measure.windowed_reuse import Reuse, ReuseCounts
from relufy.model.structure import find_blocks
from relufy.text import read_windows, refuse_long_windows

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel

KIND = "relufy.measure.overtime"
DEFINITIONS = aggregated.DEFINITIONS | windowed_reuse.DEFINITIONS | gamma_interval.DEFINITIONS


@dataclass(frozen=True)
class OverTime:
    """What a site's entries do from token to token, over `tokens` of `windows` windows."""

    model: str
    site: str
    tokens: int
    windows: int
    window: int
    skipped: int
    """Tokens at each window's beginning that only gamma's experiment counts."""
    aggregated: Aggregated
    reuse: Reuse
    gamma: GammaInterval

    def to_json(self) -> dict[str, Any]:
        """Return the document; curves are plain lists, by name, in `aggregated`, `reuse` and `gamma`."""
        names = ("model", "site", "tokens", "windows", "window", "skipped")
        parts = {name: getattr(self, name).to_json() for name in ("aggregated", "reuse", "gamma")}
        own = {name: getattr(self, name) for name in names}
        return heading(KIND) | own | parts | {"definitions": DEFINITIONS}


def overtime(
    model: str | Path,
    text: Sequence[str | Path] | str | Path,
    window: int = 256,
    max_windows: int | None = None,
    site: str = "neuron",
    reuse_windows: Sequence[int] = windowed_reuse.WINDOWS,
    gammas: Sequence[int] = gamma_interval.GAMMAS,
    warmup: int = gamma_interval.WARMUP,
    reset: bool = False,
    batch_size: int = 16,
    seed: int = 0,
) -> OverTime:
    """Measure a checkpoint's aggregated sparsity, neuron reuse and gamma-interval perplexity on text files.

    `site` is `neuron` (the activation's output) or `down` (what down reads). Windows are cut as `measure`
    does; a beginning-of-sequence token that the tokenizer puts there is left out of traces. Raises UserError.
    """
    from relufy.model.checkpoint import load_model, load_tokenizer

    folder = model_folder(model)
    refuse_long_windows(window, context_length(read_config(folder)))
    tokenizer = load_tokenizer(folder)
    files = [text] if isinstance(text, str | Path) else list(text)
    windows = read_windows(files, tokenizer, window)[:max_windows]
    loaded, skip = load_model(folder), int(tokenizer.bos_token_id is not None)
    if window - skip <= max(reuse_windows, default=0):
        raise UserError(
            f"no token of a window of {window} has {max(reuse_windows)} before it; take longer windows, or "
            "fewer tokens to reuse neurons from (--reuse-windows)"
        )
    check_site(loaded, site, gamma_interval.NEURON_SITES)
    experiment = gamma_interval.gamma_interval(loaded, windows, gammas, warmup, reset, site, batch_size, seed)
    curves = measure_traces(loaded, windows, site, skip, reuse_windows, batch_size, seed)
    tokens = len(windows) * (window - skip)
    return OverTime(str(model), site, tokens, len(windows), window, skip, *curves, gamma=experiment)


def measure_traces(
    model: "PreTrainedModel",
    windows: "np.ndarray",
    site: str = "neuron",
    skip: int = 0,
    reuse_windows: Sequence[int] = windowed_reuse.WINDOWS,
    batch_size: int = 16,
    seed: int = 0,
    sampled_tokens: int = SAMPLED_TOKENS,
) -> tuple[Aggregated, Reuse]:
    """Return aggregated sparsity and reuse at any site, over windows, int64 `[windows, length]`, in one pass.

    `skip` leaves out each window's first tokens; shuffled curves are of at most `sampled_tokens` tokens.
    """
    layers = len(find_blocks(model))
    sample = TokenSample(layers, sampled_tokens, seed)
    counts, reuse = AggregatedCounts(layers, sample), ReuseCounts(layers, sample, reuse_windows)

    def watch(trace: Trace) -> None:
        for part in (sample, counts, reuse):
            part.add(trace)

    watch_traces(model, batches_of(windows, batch_size, model.config.vocab_size), site, watch, skip)
    return counts.result(), reuse.result()
