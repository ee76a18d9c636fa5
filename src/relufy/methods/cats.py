"""CATS: contextually-aware thresholding (Lee et al., arXiv 2404.08763, COLM 2024).

With `g = act(x W_gate)`, a neuron is skipped where `|g_i| < t`: its row of up and its column of down are not
read. The threshold t of a layer is the quantile of |g| over all its neurons and a text's tokens; the gate
itself stays dense. The paper takes them from a histogram of 20,000 equal bins, we from a sketch of relative
widths.
"""

from relufy.activation_sparsity import Sparsifier
from relufy.measure.sketch import Sketch
from relufy.method import Cats
from relufy.methods.calibrate import Probe, collect
from relufy.methods.neurons import refuse_own_zeros, refuse_plain_mlp
from relufy.methods.setting import Found, Setting


def cats(method: Cats, setting: Setting) -> Found:
    """Return one threshold for the neurons of each layer. Raises UserError for a model without a gate, and
    for one whose activation makes zeros of its own."""
    refuse_plain_mlp(setting, "cats")
    refuse_own_zeros(setting, "cats")
    windows = setting.text("cats")
    sketches = {block.index: Sketch() for block in setting.blocks}
    probes = [Probe(layer, "neuron", sketch.add) for layer, sketch in sketches.items()]
    collected = collect(setting, windows, probes, "calibrating")
    sparsifiers = (
        Sparsifier(("neuron",), "threshold", threshold=sketch.quantile(method.sparsity), layers=(layer,))
        for layer, sketch in sketches.items()
    )
    return Found(tuple(sparsifiers), notes=(collected.note(),))
