"""The table of what each method may give this model, each row from a measurement of it or a paper's figure.

Training-free rows are tried out (thresholds from the fit windows, perplexity on the test windows, one share
for all sites). Rows that take a fine-tune say what the zeros would be: the quality is the fine-tune's.
"""

from collections.abc import Iterator

from relufy.doctor.expectation import Expectation, Shares, bytes_saved, weights_unread
from relufy.doctor.finding import rise
from relufy.doctor.patient import Patient
from relufy.measure.sketch import Sketch
from relufy.method import Calibration
from relufy.methods.calibrate import Probe, collect
from relufy.methods.inputs import InputSketches, maskable_groups
from relufy.methods.setting import Setting
from relufy.model.trial import keep_at_least, trial_masks

TEAL_SHARES = (0.25, 0.4, 0.5)
WANTED = 0.9
CATS_SHARE = 0.5


def expectations(patient: Patient) -> list[Expectation]:
    """Return the rows, those that apply to the model's architecture and activation."""
    rows = [_as_it_is(patient)]
    if patient.zeros.gate_only_sparsity < WANTED:
        rows += _relufied(patient)
    return [*rows, *_training_free(patient)]


def _as_it_is(patient: Patient) -> Expectation:
    sites = patient.zeros.sites
    saved = bytes_saved(patient, sites) if patient.zeros.model_level_sparsity > 0 else 0.0
    return Expectation(
        "as it is", patient.zeros.gate_only_sparsity, patient.zeros.model_level_sparsity, saved, 0.0,
        "nothing", "exact zeros, measured here", f"relufy pack {patient.name} -o model.relufy",
    )  # fmt: skip


def _relufied(patient: Patient) -> Iterator[Expectation]:
    name, pre = patient.name, patient.preactivations
    layers = len(patient.blocks)
    finetune = f"relufy finetune {name} -o sparse --recipe"
    swap, shift = {"neuron": pre.sparsity()}, pre.shift_for(WANTED)
    if patient.zeros.gate_only_sparsity < pre.mean_sparsity() - 0.02:
        yield _row(
            patient, "stage 1", swap, "fine-tune",
            "share of this model's pre-activations <= 0 (ReLU Strikes Back, 5.1)",
            f"{finetune} relufy-stage1 --data self",
        )  # fmt: skip
    yield _row(
        patient, f"shift of {shift:.3g}", {"neuron": pre.sparsity(shift)}, "fine-tune",
        "share of this model's pre-activations <= shift (5.3)", f"{finetune} relufy-shifted --data TEXTS",
    )  # fmt: skip
    if all(block.attention_norm and block.mlp_norm for block in patient.blocks):
        yield _row(
            patient, "stage 2", swap | _negative_inputs(patient), "longer fine-tune",
            "shares <= 0 of this model's pre-activations and norms' outputs",
            f"{finetune} relufy-stage2 --data TEXTS",
        )  # fmt: skip
    yield _row(
        patient, "ProSparse 90 %", {"neuron": (WANTED,) * layers}, "fine-tune",
        "the target that its controller holds; the paper's 7B reached 89.3 %",
        f"{finetune} prosparse --target 0.9 --data TEXTS",
    )  # fmt: skip


def _row(patient: Patient, method: str, shares: Shares, takes: str, source: str, command: str) -> Expectation:
    zeros = sum(shares["neuron"]) / len(shares["neuron"])
    masked = [site for site in shares if site != "neuron"]
    saved = bytes_saved(patient, shares, masked)
    return Expectation(method, zeros, weights_unread(patient, shares), saved, None, takes, source, command)


def _negative_inputs(patient: Patient) -> dict[str, tuple[float, ...]]:
    """Return the share of the norms' outputs at or below 0, by the sites that read them."""
    sketches = {(b.index, site): Sketch() for b in patient.blocks for site in ("q", "up")}
    probes = [Probe(layer, site, sketch.add) for (layer, site), sketch in sketches.items()]
    collect(_setting(patient), patient.fit, probes, "norms")
    attention, mlp = (
        tuple(sketches[b.index, site].share_at_most(0.0) for b in patient.blocks) for site in ("q", "up")
    )
    first = "gate" if patient.blocks[0].gate is not None else "up"
    return {"q": attention, "k": attention, "v": attention, first: mlp}


def _training_free(patient: Patient) -> Iterator[Expectation]:
    setting = _setting(patient)
    inputs = InputSketches(setting)
    neurons = [Sketch() for _ in patient.blocks]
    probes = [Probe(layer, "neuron", sketch.add) for layer, sketch in enumerate(neurons)]
    collect(setting, patient.fit, [*inputs.probes(), *probes], "calibrating")
    for done, share in enumerate(TEAL_SHARES):
        patient.progress("training-free", done, len(TEAL_SHARES) + 1)
        yield _teal(patient, setting, inputs, share)
    if patient.blocks[0].gate is not None and patient.zeros.gate_only_sparsity < CATS_SHARE:
        yield _cats(patient, neurons)
    patient.progress("training-free", len(TEAL_SHARES) + 1, len(TEAL_SHARES) + 1)


def _teal(patient: Patient, setting: Setting, inputs: InputSketches, share: float) -> Expectation:
    masked: dict[str, list[float]] = {}
    with trial_masks(patient.blocks) as trial:
        for block in patient.blocks:
            for group in maskable_groups(setting, block):
                threshold = inputs.threshold(block.index, group, share)
                trial.put(block.index, group[0], keep_at_least(threshold))
                for site in group:
                    masked.setdefault(site, [0.0] * len(patient.blocks))[block.index] = share
        cost = rise(patient.nats(patient.run())[0])
    shares = {site: tuple(values) for site, values in masked.items()} | _own_neurons(patient)
    saved = bytes_saved(patient, shares, list(masked))
    return Expectation(
        f"TEAL {100 * share:.0f} %", None, weights_unread(patient, shares), saved, cost, "a text",
        "thresholds of this model's inputs, all alike, tried out here (greedy shares do better)",
        f"relufy sparsify {patient.name} -o thin --recipe teal --sparsity {share:g} --calibration TEXT",
    )  # fmt: skip


def _own_neurons(patient: Patient) -> dict[str, tuple[float, ...]]:
    """Return the zeros that the model's activations make by themselves, if they make any."""
    own = patient.zeros.sites["neuron"]
    return {"neuron": tuple(own)} if max(own) > 0 else {}


def _unread_inputs(patient: Patient, shares: Shares) -> float:
    return weights_unread(patient, shares)


def _cats(patient: Patient, neurons: list[Sketch]) -> Expectation:
    with trial_masks(patient.blocks) as trial:
        for block, sketch in zip(patient.blocks, neurons, strict=True):
            trial.put(block.index, "neuron", keep_at_least(sketch.quantile(CATS_SHARE)))
        cost = rise(patient.nats(patient.run())[0])
    shares = {"neuron": (CATS_SHARE,) * len(patient.blocks)}
    return Expectation(
        f"CATS {100 * CATS_SHARE:.0f} %", CATS_SHARE, weights_unread(patient, shares),
        bytes_saved(patient, shares), cost, "a text",
        "thresholds of this model's activations, tried out here",
        f"relufy sparsify {patient.name} -o thin --recipe cats --calibration TEXT",
    )  # fmt: skip


def _setting(patient: Patient) -> Setting:
    batch = Calibration(batch_size=patient.effort.batch_size)
    return Setting(patient.model, patient.blocks, patient.fit, batch)
