"""CHESS: channel-wise thresholding and selective sparsification (He et al., arXiv 2409.01366, EMNLP 2024).

Zeroing `g_i = act(x W_gate)_i` changes the MLP's output by `g_i u_i W_down[:, i]`. The importance `|g_i u_i|`
would need the very u that is to be skipped, so its mean stands in for it, `m_i = E|u_i|`:

    T = quantile of |g_i| m_i over the layer's neurons and tokens,   t_i = T / m_i,   skip i where |g_i| < t_i

With `attention`, the inputs of q and o get one magnitude threshold each, while k and v, and so the KV cache,
stay clean.

Where this differs from the released code: there, means and quantiles are computed for each document, in
bfloat16, and averaged over documents whatever their length; here one quantile and one mean is of all tokens.
The means are divided by the layer's greatest, which changes no t_i, and makes equal means CATS bit for bit.
"""

from collections.abc import Iterator

import torch

from relufy.activation_sparsity import Sparsifier
from relufy.measure.sketch import Sketch
from relufy.method import Chess
from relufy.methods.calibrate import UP_OUTPUT, Probe, collect
from relufy.methods.neurons import refuse_own_zeros, refuse_plain_mlp
from relufy.methods.setting import Found, Setting

LARGEST_THRESHOLD = torch.finfo(torch.float16).max
"""For neurons whose mean |up| is next to nothing: finite in every type that a model may be cast to."""

FUSED_NOTE = "q, k and v are one projection, so q cannot have a mask of its own: only o has, in the attention"


def chess(method: Chess, setting: Setting) -> Found:
    """Return a threshold for each neuron, and those of q and o if wanted. Raises UserError for a model
    without a gate, and for one whose activation makes zeros of its own."""
    refuse_plain_mlp(setting, "chess")
    refuse_own_zeros(setting, "chess")
    windows = setting.text("chess")
    inputs = {place: Sketch() for place in _attention_inputs(setting)} if method.attention else {}
    means = {block.index: _Mean() for block in setting.blocks}
    probes = [Probe(layer, site, sketch.add) for (layer, site), sketch in inputs.items()]
    probes += [Probe(layer, UP_OUTPUT, mean.add) for layer, mean in means.items()]
    collected = collect(setting, windows, probes, "means of up")
    scores = {layer: _Scores(mean.relative()) for layer, mean in means.items()}
    probes = [Probe(layer, "neuron", score.add) for layer, score in scores.items()]
    collect(setting, windows, probes, "scores of neurons")
    sparsifiers = [Sparsifier(("neuron",), "threshold", per_channel=("threshold",))]
    sparsifiers += [
        Sparsifier((site,), "threshold", threshold=sketch.quantile(method.sparsity), layers=(layer,))
        for (layer, site), sketch in inputs.items()
    ]
    thresholds = {(n, "neuron", "threshold"): s.thresholds(method.sparsity) for n, s in scores.items()}
    notes = (collected.note(), FUSED_NOTE * (method.attention and _is_fused(setting)))
    return Found(tuple(sparsifiers), thresholds, tuple(filter(None, notes)))


def _attention_inputs(setting: Setting) -> Iterator[tuple[int, str]]:
    sites = ("o",) if _is_fused(setting) else ("q", "o")
    return ((block.index, site) for block in setting.blocks for site in sites)


def _is_fused(setting: Setting) -> bool:
    return any(block.q == block.k for block in setting.blocks)


class _Mean:
    """The mean magnitude of each channel, in float64."""

    def __init__(self) -> None:
        self._sum: torch.Tensor | None = None
        self._count = 0

    def add(self, rows: torch.Tensor) -> None:
        total = rows.float().abs().sum(0).double().cpu()
        self._sum = total if self._sum is None else self._sum + total
        self._count += len(rows)

    def relative(self) -> torch.Tensor:
        """Return the means divided by the greatest of them, f32; ones if all are 0."""
        assert self._sum is not None, "nothing was added"
        greatest = self._sum.max()
        return (self._sum / greatest if greatest > 0 else torch.ones_like(self._sum)).float()


class _Scores:
    """The scores `|g_i| m_i` of a layer's neurons."""

    def __init__(self, means: torch.Tensor) -> None:
        self._means = means
        self._sketch = Sketch()

    def add(self, rows: torch.Tensor) -> None:
        self._sketch.add(rows.float() * self._means.to(rows.device))

    def thresholds(self, sparsity: float) -> torch.Tensor:
        """Return each neuron's threshold, f32 `[neurons]`."""
        cut = torch.tensor(self._sketch.quantile(sparsity), dtype=torch.float64)
        return (cut / self._means.double()).clamp_max(LARGEST_THRESHOLD).float()
