"""FATReLU: ReLU with a positive threshold (ProSparse, Song et al., arXiv 2402.13516, section 3.3).

`z where z >= t, else 0` in the place of `max(z, 0)`: no training, and a ReLU model's small outputs become
zeros too. The paper sets t = 0.01 everywhere (`threshold`); with a `sparsity` each layer has the t that makes
the wanted share of its neurons zero on a text. A layer with as many zeros, or as high a threshold, keeps what
it has.

It belongs to activations that are ReLU but for gradients (relu, helu), or FATReLU with a lower threshold.
A squared ReLU puts out z ** 2, a dReLU gates a second ReLU, a shifted ReLU puts out z - shift: FATReLU in
their place would be another function even where it is not zero, so they are refused.
"""

from dataclasses import replace

from relufy.activation_sparsity import FATRELU, ActivationSparsity, Sparsifier
from relufy.errors import UserError
from relufy.measure.sketch import Sketch
from relufy.method import FatRelu
from relufy.methods.calibrate import Probe, collect
from relufy.methods.setting import Found, Setting
from relufy.model.configuration import sparsity_of


def fatrelu(method: FatRelu, setting: Setting) -> Found:
    """Return the activation of every layer. Raises UserError for a model without ReLU."""
    if (method.phase, method.dense_first_tokens) != ("all", 0):
        raise UserError("fatrelu acts on every token: phase and dense_first_tokens are for masks")
    present = sparsity_of(setting.model)
    relus = {block.index: _relu(present, block.index) for block in setting.blocks}
    if method.threshold is not None:
        return _with_threshold(method.threshold, relus)
    return _with_sparsity(float(method.sparsity or 0), relus, setting)


def _with_sparsity(sparsity: float, relus: dict[int, Sparsifier], setting: Setting) -> Found:
    windows = setting.text("fatrelu")
    sketches = {layer: Sketch() for layer in relus}
    probes = [Probe(layer, "neuron", sketch.add) for layer, sketch in sketches.items()]
    collected = collect(setting, windows, probes, "calibrating")
    sparsifiers = tuple(
        replace(_sparser(relu, sketches[layer], sparsity), sites=("neuron",), layers=(layer,))
        for layer, relu in relus.items()
    )
    return Found(sparsifiers, notes=tuple(filter(None, (collected.note(), _note(sparsity, sketches)))))


def _with_threshold(threshold: float, relus: dict[int, Sparsifier]) -> Found:
    """Return one activation for all layers, unless some have a higher threshold."""
    higher = [layer for layer, relu in relus.items() if (relu.threshold or 0.0) > threshold]
    if not higher:
        return Found((Sparsifier(("neuron",), FATRELU, threshold=threshold),))
    sparsifiers = tuple(
        Sparsifier(("neuron",), FATRELU, threshold=max(threshold, relu.threshold or 0.0), layers=(layer,))
        for layer, relu in relus.items()
    )
    note = f"layers {', '.join(map(str, higher))} had a higher threshold already and stay as they are"
    return Found(sparsifiers, notes=(note,))


def _relu(present: ActivationSparsity, layer: int) -> Sparsifier:
    """Return the ReLU of a layer. Raises UserError if it has none that FATReLU can stand in for."""
    neuron = present.at("neuron", layer)
    if neuron is None:
        raise UserError(
            f"fatrelu needs a ReLU, and the activation of layer {layer} makes no zeros; relufy the model "
            "first (recipe relufy-stage1)"
        )
    if neuron.function not in ("relu", "helu", FATRELU) or neuron.shift:
        shifted = f" with shift {neuron.shift:g}" if neuron.shift else ""
        raise UserError(
            f"fatrelu stands in for a plain ReLU, and layer {layer} has {neuron.function}{shifted} at "
            "'neuron'; teal or scap can make it sparser"
        )
    return neuron


def _sparser(relu: Sparsifier, outputs: Sketch, sparsity: float) -> Sparsifier:
    if outputs.quantile(sparsity) == 0:
        return relu
    # Within the sketch's bin of an old threshold, the quantile may lie below it.
    threshold = max(outputs.quantile(sparsity), relu.threshold or 0.0)
    return Sparsifier(("neuron",), FATRELU, threshold=threshold)


def _note(sparsity: float, sketches: dict[int, Sketch]) -> str:
    kept = [layer for layer, sketch in sketches.items() if sketch.quantile(sparsity) == 0]
    if not kept:
        return ""
    return (
        f"{len(kept)} of {len(sketches)} layers had {100 * sparsity:g} % zeros already and stay "
        f"as they are (layers {', '.join(map(str, kept))})"
    )
