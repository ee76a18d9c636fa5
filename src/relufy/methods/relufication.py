"""Relufication: ReLU Strikes Back (Mirzadeh et al., arXiv 2310.04564, ICLR 2024).

Stage 1: the MLP's activation becomes `relu(z - shift)`, z the gate's (in a plain MLP the up projection's)
output, or another activation that makes exact zeros. The shift is the paper's shifted ReLU (section 5.3): it
is given, or taken from the distribution of z on a text so that a wanted share lies below it. That
distribution barely moves in a fine-tune (section 5.1), so the share is what the trained model will have.
Stage 2: `h = x + Attn(relu(Norm1(x)))`, `y = h + FFN(relu(Norm2(h)))`; where one norm feeds both, as in
Falcon, one ReLU does. On a model that stage 1 made, the activations of that stay.
"""

from collections.abc import Sequence
from dataclasses import replace

from relufy.activation_sparsity import Sparsifier
from relufy.errors import UserError
from relufy.measure.sketch import Sketch, common_value_at
from relufy.method import Relufication
from relufy.methods.calibrate import PRE_ACTIVATION, Probe, collect
from relufy.methods.setting import Found, Setting
from relufy.model.configuration import sparsity_of

NEURON = ("neuron",)


def relufication(method: Relufication, setting: Setting) -> Found:
    """Return the sparsifiers of a relufied model. Raises UserError for drelu without a gate."""
    stage1 = _stage1(method, setting)
    if method.stage == 1:
        return stage1
    mlp_inputs = ("gate", "up") if setting.is_gated else ("up",)
    inputs = (Sparsifier(("q", "k", "v"), "relu"), Sparsifier(mlp_inputs, "relu"))
    return replace(stage1, sparsifiers=(*stage1.sparsifiers, *inputs))


def _stage1(method: Relufication, setting: Setting) -> Found:
    if method.activation == "drelu" and not setting.is_gated:
        raise UserError(
            f"drelu needs a gate, and {type(setting.model).__name__} has a plain MLP, where it would be "
            "relu; set sparsify.activation=relu"
        )
    if method.sparsity is not None:
        return _with_measured_shift(method, method.sparsity, setting)
    if method.stage == 2 and method == Relufication(stage=2) and (kept := _activations(setting)):
        return Found(kept)
    return Found((_activation(method, method.shift),))


def _activation(method: Relufication, shift: float, layers: tuple[int, ...] | None = None) -> Sparsifier:
    return Sparsifier(NEURON, method.activation, shift=shift, width=method.width, layers=layers)


def _activations(setting: Setting) -> tuple[Sparsifier, ...]:
    """Return the activations with zeros that the model has, if every layer has one."""
    present = sparsity_of(setting.model)
    found = [present.at("neuron", block.index) for block in setting.blocks]
    if any(neuron is None or neuron.is_selection for neuron in found):
        return ()
    return tuple(replace(s, sites=NEURON) for s in present.sparsifiers if "neuron" in s.sites)


def _with_measured_shift(method: Relufication, sparsity: float, setting: Setting) -> Found:
    windows = setting.text("a shift for a sparsity")
    sketches = [Sketch() for _ in setting.blocks]
    probes = [Probe(layer, PRE_ACTIVATION, sketch.add) for layer, sketch in enumerate(sketches)]
    collected = collect(setting, windows, probes, "calibrating")
    if method.per_layer:
        shifts = [sketch.value_at(sparsity) for sketch in sketches]
        found = tuple(_activation(method, shift, (layer,)) for layer, shift in enumerate(shifts))
    else:
        shifts = [common_value_at(sketches, sparsity)] * len(sketches)
        found = (_activation(method, shifts[0]),)
    return Found(found, notes=(collected.note(), *_notes(sparsity, shifts, sketches)))


def _notes(sparsity: float, shifts: Sequence[float], sketches: Sequence[Sketch]) -> list[str]:
    """Say which shifts were chosen, what they promise, and what no shift would."""
    predicted = [sketch.share_at_most(shift) for sketch, shift in zip(sketches, shifts, strict=True)]
    plain = [sketch.share_at_most(0.0) for sketch in sketches]
    chosen = f"shift {_range(shifts, '{:.4g}')} for {100 * sparsity:g} %"
    lines = [f"{chosen}: predicted sparsity {_percent(predicted)}; without a shift {_percent(plain)}"]
    if min(shifts) < 0:
        layers = [str(layer) for layer, shift in enumerate(shifts) if shift < 0]
        lines.append(
            f"a shift below zero makes fewer zeros than a plain ReLU (layers {', '.join(layers)}); ask for "
            "more sparsity to keep those"
        )
    return lines


def _percent(shares: Sequence[float]) -> str:
    mean = sum(shares) / len(shares)
    return f"{100 * mean:.2f} % (layers {_range([100 * share for share in shares], '{:.1f}')} %)"


def _range(values: Sequence[float], form: str) -> str:
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"
