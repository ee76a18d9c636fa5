"""Every training-free method under one protocol: the same tokens, targets of one meaning, and controls.

A target is the share of the blocks' linear weights that is not read (targets.py); what is realised on the
held-out text is reported beside it. The dense model is loaded once: every variant is a copy of its modules
that shares its weights.
"""

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from relufy.activation_sparsity import Sparsifier
from relufy.engine.pack import check_choice
from relufy.errors import UserError
from relufy.hub import context_length, model_folder, read_config
from relufy.measure.cett import CETT_TARGET, cett_sparsity
from relufy.measure.costs import model_macs
from relufy.measure.definitions import measure_zeros
from relufy.measure.domain import compare_domains
from relufy.measure.modes import MODES, Scored, WindowLosses, window_losses
from relufy.measure.overlap import overlap
from relufy.method import METHODS, Calibration, method_name
from relufy.methods.comparison import Comparison, Control, Outcome, Row
from relufy.methods.controls import CONTROLS, masked_shares, put_controls
from relufy.methods.setting import Progress, no_progress
from relufy.methods.sparsify import find, install, make_setting
from relufy.methods.targets import check_method, check_target, method_at, method_with
from relufy.methods.variant_costs import EngineCosts
from relufy.model.checkpoint import load_model, load_tokenizer
from relufy.model.configuration import sparsity_of
from relufy.model.empty import refuse_without_sites
from relufy.model.provenance import versions
from relufy.model.sites import find_sites
from relufy.model.trial import trial_masks
from relufy.recipe import Recipe
from relufy.schema import from_mapping, suggest, to_mapping
from relufy.text import read_windows, refuse_long_windows
from relufy.text_sample import sample_windows

CETT_TOKENS = 1024
"""Positions that CETT is measured on: the first windows'."""
DECIDED = {"sparsity", "sparsity_down", "phase", "dense_first_tokens"}
"""The parameters that the target and the mode decide."""
Files = Sequence[str | Path]


@dataclass(frozen=True)
class CompareOptions:
    """How methods are compared. `window` and `max_windows` are of the evaluation text."""

    mode: str = "all"
    """Which tokens are sparsified and scored: all, second-half or decode (measure/modes.py)."""
    own_targets: bool = False
    """Targets are each paper's own `sparsity`, not the share of weights that is not read."""
    window: int = 256
    max_windows: int | None = None
    calibrate: Calibration = field(default_factory=Calibration)
    has_controls: bool = True
    speed_tokens: int = 0
    """Tokens that the engine decodes in a turn; 0 measures no speed."""
    speed_turns: int = 5
    threads: int | None = None
    dtype: str = "f32"
    seed: int = 0
    """Of the random control; the calibration has its own."""
    allow_same_text: bool = False
    batch_size: int = 16
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Other values of methods' parameters, by method, such as {"teal": {"allocation": "uniform"}}."""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UserError(f"there is no mode {self.mode!r}{suggest(self.mode, list(MODES))}")
        check_choice(self.dtype, "exact")


DEFAULTS = CompareOptions()


def compare(
    model: str | Path,
    methods: Sequence[str],
    targets: Sequence[float],
    text: Files,
    calibration: Files,
    options: CompareOptions = DEFAULTS,
    progress: Progress = no_progress,
    command: str = "",
) -> Comparison:
    """Calibrate each method at each target on the one text, and measure all on the other.

    What a method cannot do on this model is a row with the reason. Raises UserError for unknown methods,
    unfit targets, texts or models, and if there is no row with a result.
    """
    _check_wanted(methods, targets, options)
    if not options.allow_same_text:
        _refuse_same_files(text, calibration)
    folder = model_folder(model)
    study = _Study(folder, text, calibration, options, progress)
    wanted = [(name, target) for name in methods for target in targets]
    rows = []
    for done, (name, target) in enumerate(wanted):
        progress("variants", done, len(wanted))
        rows.append(study.row(name, target))
    progress("variants", len(wanted), len(wanted))
    if not any(row.outcome for row in rows):
        raise UserError(f"no method gave a result: {'; '.join(dict.fromkeys(row.reason for row in rows))}")
    return Comparison(
        model=str(model),
        dense=study.dense,
        rows=tuple(rows),
        windows=len(study.windows),
        window=options.window,
        overlap=overlap(study.calibrating, study.windows),
        domains=compare_domains(study.calibrating, study.windows),
        settings=to_mapping(options) | {"methods": list(methods), "targets": list(targets)},
        texts={"text": _described(text), "calibration": _described(calibration)},
        versions=versions(),
        command=command,
        notes=study.notes,
    )


class _Study:
    """The dense model, the two texts, and what every row is measured by."""

    def __init__(
        self, folder: Path, text: Files, calibration: Files, options: CompareOptions, progress: Progress
    ) -> None:
        self.options, self.progress = options, progress
        refuse_without_sites(folder)
        _refuse_long_windows(folder, options)
        tokenizer = load_tokenizer(folder)
        self.windows = read_windows(text, tokenizer, options.window)[: options.max_windows]
        sampled = sample_windows(calibration, tokenizer, *_sample_size(options.calibrate))
        self.model = load_model(folder)
        recipe = Recipe("compare", sparsify=method_with("teal", 0.5), calibrate=options.calibrate)
        self.setting = make_setting(self.model, recipe, sampled, progress)
        self.calibrating = self.setting.text("compare")
        self.scored = Scored(options.mode, options.window)
        self.costs = EngineCosts(folder, options, self.windows[0])
        self.dense_losses, self.dense = self._measure_dense()
        self.notes = self.costs.notes

    def row(self, name: str, target: float) -> Row:
        """Return the row of a method at a target."""
        try:
            method = self._method(name, target)
        except UserError as error:
            return Row(name, target, reason=str(error), most=getattr(error, "most", None))
        parameters = {"method": method_name(method)} | to_mapping(method)
        started = time.monotonic()
        try:
            found = find(method, self.setting)
            variant = self._variant(method, found)
        except UserError as error:
            return Row(name, target, parameters, reason=str(error))
        seconds = time.monotonic() - started
        outcome, notes = self._outcome(variant, found.sparsifiers)
        return Row(name, target, parameters, outcome, notes=(*found.notes, *notes), seconds=seconds)

    def _method(self, name: str, target: float) -> Any:
        make = method_with(name, target) if self.options.own_targets else None
        has_own = bool(sparsity_of(self.model).sparsifiers)
        own = self.dense.zeros.sites if has_own else {}
        method = make or method_at(name, target, self.setting.blocks, own)
        changes = {
            "all": {},
            "second-half": {"dense_first_tokens": self.scored.first},
            "decode": {"phase": "decode"},
        }[self.options.mode]
        wanted = to_mapping(method) | changes | self.options.changes.get(name, {})
        return from_mapping(type(method), wanted, name)

    def _variant(self, method: Any, found: Any) -> PreTrainedModel:
        model = shared_copy(self.model)
        setting = replace(self.setting, model=model, blocks=find_sites(model))
        return install(setting, Recipe(method_name(method), sparsify=method), found)

    def _measure_dense(self) -> tuple[WindowLosses, Outcome]:
        self.progress("dense model", 0, 1)
        zeros, losses = measure_zeros(self.model, self.windows, self.scored, self.options.batch_size)
        if not np.isfinite(losses.per_window).all():
            raise UserError("the dense model's losses are no numbers (NaN or infinite); check the checkpoint")
        macs, read = model_macs(self.model, zeros.sites), self.costs.bytes_read(self.model, zeros.sites)
        cett = self._cett(self.model)
        self.progress("dense model", 1, 1)
        difference = losses.minus(losses)
        return losses, Outcome(zeros, cett, losses.perplexity(), difference, macs, read)

    def _outcome(
        self, variant: PreTrainedModel, sparsifiers: Sequence[Sparsifier]
    ) -> tuple[Outcome, tuple[str, ...]]:
        zeros, losses = measure_zeros(variant, self.windows, self.scored, self.options.batch_size)
        shares = masked_shares(self.setting.blocks, sparsifiers, zeros.sites)
        read, speed, notes = self.costs.of_variant(variant, zeros.sites)
        return (
            Outcome(
                zeros=zeros,
                cett_sparsity=self._cett(variant),
                perplexity=losses.perplexity(),
                difference=losses.minus(self.dense_losses),
                macs_paper=model_macs(variant, zeros.sites),
                bytes_engine=read,
                controls=self._controls(shares) if self.options.has_controls else {},
                speed=speed,
            ),
            notes,
        )

    def _cett(self, model: PreTrainedModel) -> float:
        count = max(1, CETT_TOKENS // self.windows.shape[1])
        options = self.options
        return cett_sparsity(model, self.windows[:count], options.mode, CETT_TARGET, options.batch_size).mean

    def _controls(self, shares: dict[tuple[int, str], float]) -> dict[str, Control]:
        found = {}
        with trial_masks(self.setting.blocks) as trial:
            for kind in CONTROLS:
                put_controls(kind, trial, self.setting.blocks, shares, self.scored, self.options.seed)
                losses = window_losses(self.model, self.windows, self.scored, self.options.batch_size)
                found[kind] = Control(losses.perplexity(), losses.minus(self.dense_losses))
        return found


def shared_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of a model's modules and configuration, with the very same parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _check_wanted(methods: Sequence[str], targets: Sequence[float], options: CompareOptions) -> None:
    if not methods or not targets:
        raise UserError("name one method and one target at least")
    for name in methods:
        check_method(name)
    for target in targets:
        check_target(target)
    for values in (methods, targets):
        if twice := [value for value in values if list(values).count(value) > 1]:
            raise UserError(f"{twice[0]} is named twice")
    for name, values in options.changes.items():
        if name not in methods:
            raise UserError(f"other values are given for {name!r}, which is not compared")
        if taken := sorted(DECIDED & set(values)):
            raise UserError(f"{name}.{taken[0]} follows from the target or the mode, and cannot be set")
        from_mapping(METHODS[name], values, name)


def _refuse_same_files(text: Files, calibration: Files) -> None:
    hashes = {_hash(path): path for path in calibration if Path(path).is_file()}
    for path in text:
        if Path(path).is_file() and (other := hashes.get(_hash(path))) is not None:
            raise UserError(
                f"{path} and the calibration text {other} are the same file, so methods would be measured on "
                "what they were calibrated on; give another one, or --allow-same-text"
            )


def _refuse_long_windows(folder: Path, options: CompareOptions) -> None:
    for window in (options.window, options.calibrate.window):
        refuse_long_windows(window, context_length(read_config(folder)))


def _sample_size(calibrate: Calibration) -> tuple[int, int, int]:
    """Return the length of windows, their number and the seed that they are drawn by."""
    return calibrate.window, max(1, calibrate.tokens // calibrate.window), calibrate.seed


def _described(files: Files) -> list[dict[str, str]]:
    return [{"file": str(path), "sha256": _hash(path)} for path in files]


def _hash(path: str | Path) -> str:
    with Path(path).open("rb") as stream:
        digest = sha256()
        while part := stream.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()
