"""SCAP: statistical calibrated activation pruning (Chua et al., arXiv 2412.07174).

Activations that gather around some other value than 0 are shifted before they are cut off:

    x ~ m + h_t(x - m),   y = h_t(x - m) W + m (1 W),   h_t(v) = v where |v| >= t, else 0

so an entry near m counts as m, and the second term is a bias. The centre m is one number for each input of a
layer: 0, the median, or the mode (the peak of a kernel density estimate), whichever moves the projections'
outputs least on a few windows; t is the quantile of |x - m|. Inputs are those of the MLP's projections: gate
and up read one tensor and get one mask, down its own. In a plain MLP they are up's and down's; down's is left
out where the activation makes zeros of its own, for there it is the site of these.

Where this differs from the paper: a centre must lower the squared output error by a hundredth to be preferred
to 0, since stock transformers can run a model without centres, and no other.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch.nn import functional as F

from relufy.activation_sparsity import Sparsifier
from relufy.errors import UserError
from relufy.measure.sketch import Sketch
from relufy.method import Scap
from relufy.methods.calibrate import Probe, collect
from relufy.methods.inputs import maskable_groups
from relufy.methods.setting import Found, Setting
from relufy.model.configuration import find_activation_key, sparsity_of
from relufy.model.structure import BlockSites

ERROR_TOKENS = 2048
"""Positions that the candidates' output errors are measured on."""
WORTHWHILE = 0.99
"""The share of the error without a centre that the error with one must stay below."""
LEAST_THRESHOLD = float(np.finfo(np.float32).tiny)

Input = tuple[int, tuple[str, ...]]
"""A layer, and the sites that read one tensor."""
Sketches = Mapping[Input, Mapping[float, Sketch]]
"""Of each input, what is known of |x - m| for each centre m that it may get."""


def scap(method: Scap, setting: Setting) -> Found:
    """Return thresholds around centres. Raises UserError for a centre that the model cannot have, and for
    one with a ReLU on the MLP's input."""
    windows = setting.text("scap")
    _refuse_rectified(setting)
    choice, note = _possible_centres(method, setting)
    values = {place: Sketch() for block in setting.blocks for place in _inputs(setting, block)}
    probes = [Probe(layer, sites[0], sketch.add) for (layer, sites), sketch in values.items()]
    collected = collect(setting, windows, probes, "calibrating")
    sketches = _around_centres(setting, windows, values, choice)
    shares = {place: method.sparsity_down if "down" in place[1] else method.sparsity for place in sketches}
    thresholds = {
        place: {centre: sketch.quantile(shares[place]) for centre, sketch in of_input.items()}
        for place, of_input in sketches.items()
    }
    centres = _best_centres(setting, windows, thresholds)
    sparsifiers, tensors = [], {}
    for place, centre in centres.items():
        sparsifiers += _masks(setting, place, thresholds[place][centre], bool(centre))
        tensors |= _centre_tensors(setting, place, centre)
    return Found(tuple(sparsifiers), tensors, tuple(filter(None, (collected.note(), note))))


def _refuse_rectified(setting: Setting) -> None:
    present = sparsity_of(setting.model)
    for block in setting.blocks:
        if (found := present.at("up", block.index)) is not None:
            raise UserError(
                f"scap masks the MLP's input, where layer {block.index} has {found.function} already; start "
                "from a model without it"
            )


def _possible_centres(method: Scap, setting: Setting) -> tuple[str, str]:
    """Return the kind of centre to look for, and a note if it is not what was asked for.

    A model with centres has to have an activation that stock transformers does not know, by name.
    """
    if method.centre == "zero":
        return "zero", ""
    try:
        find_activation_key(setting.model, [block.activation.name for block in setting.blocks])
    except UserError:
        if method.centre != "best":
            raise
        return "zero", "no centres: no key of the config.json says which activation the model has"
    return method.centre, ""


def _inputs(setting: Setting, block: BlockSites) -> Iterator[Input]:
    yield block.index, ("up",) if block.gate is None else ("gate", "up")
    if ("down",) in maskable_groups(setting, block):
        yield block.index, ("down",)


def _around_centres(
    setting: Setting, windows: np.ndarray, values: Mapping[Input, Sketch], choice: str
) -> Sketches:
    """Return the distances from each centre that an input may get; 0 comes first."""
    sketches = {place: _candidates(values[place], choice) for place in values}
    probes = [
        Probe(place[0], place[1][0], lambda rows, c=centre, s=sketch: s.add(rows.float() - c))
        for place, of_input in sketches.items()
        for centre, sketch in of_input.items()
        if centre
    ]
    if probes:
        collect(setting, windows, probes, "distances from centres")
    return sketches


def _candidates(values: Sketch, choice: str) -> dict[float, Sketch]:
    centres = {"zero": 0.0}
    if choice in ("best", "median"):
        centres["median"] = _as_stored(values.median())
    if choice in ("best", "mode"):
        centres["mode"] = _as_stored(values.mode())
    wanted = centres.values() if choice == "best" else [centres[choice]]
    return {centre: Sketch() if centre else values for centre in wanted}


def _as_stored(centre: float) -> float:
    return float(np.float32(centre))


def _best_centres(
    setting: Setting, windows: np.ndarray, thresholds: Mapping[Input, Mapping[float, float]]
) -> dict[Input, float]:
    """Return the centre of each input that moves the outputs of its readers least."""
    errors = {
        place: {centre: _OutputError(setting, place, centre, t) for centre, t in of_input.items()}
        for place, of_input in thresholds.items()
        if len(of_input) > 1
    }
    probes = [Probe(place[0], place[1][0], e.add) for place, of in errors.items() for e in of.values()]
    if probes:
        count = max(1, ERROR_TOKENS // windows.shape[1])
        spread = np.linspace(0, len(windows) - 1, min(count, len(windows))).round().astype(int)
        collect(setting, windows[spread], probes, "output errors")
    return {place: _best(errors.get(place, {}), tuple(thresholds[place])) for place in thresholds}


def _best(errors: Mapping[float, "_OutputError"], centres: Sequence[float]) -> float:
    if not errors:
        return centres[0]
    best = min(errors, key=lambda centre: errors[centre].total)
    return best if errors[best].total < WORTHWHILE * errors[0.0].total else 0.0


class _OutputError:
    """How far a mask moves the outputs of the projections behind it: a sum of squares."""

    def __init__(self, setting: Setting, place: Input, centre: float, threshold: float) -> None:
        layer, sites = place
        projections = {p.name: p for site, p in setting.blocks[layer].projections().items() if site in sites}
        self._weights = [projection.matrix() for projection in projections.values()]
        self._centre = centre
        self._threshold = threshold
        self.total = 0.0

    def add(self, rows: torch.Tensor) -> None:
        distance = rows.float() - self._centre
        left_out = torch.where(distance.abs() < self._threshold, distance, 0)
        for weight in self._weights:
            self.total += float(F.linear(left_out, weight.float()).square().sum())


def _masks(setting: Setting, place: Input, threshold: float, has_centre: bool) -> Iterator[Sparsifier]:
    """Yield one sparsifier for the readers of an input if it is made by a norm, one for each if not; none
    where the input has enough zeros of its own."""
    if not threshold and not has_centre:
        return
    layer, sites = place
    block = setting.blocks[layer]
    # What equals its centre is left out too, be it all of the share that was asked for.
    threshold = max(threshold, LEAST_THRESHOLD)
    is_shared = block.mlp_norm is not None or sites == ("down",)
    for group in [sites] if is_shared else [g for g in block.groups() if set(g) <= set(sites)]:
        per_channel = ("centre",) if has_centre else ()
        yield Sparsifier(group, "threshold", threshold=threshold, per_channel=per_channel, layers=(layer,))


def _centre_tensors(
    setting: Setting, place: Input, centre: float
) -> dict[tuple[int, str, str], torch.Tensor]:
    layer, sites = place
    if not centre:
        return {}
    projections = setting.blocks[layer].projections()
    return {(layer, s, "centre"): torch.full((projections[s].shape[1],), centre) for s in sites}
