"""TEAL: thresholds that make the shares they should, and an allocation that beats equal shares."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import families
from relufy.errors import UserError
from relufy.measure.sparsity import measure_sparsity
from relufy.method import Calibration, Teal
from relufy.methods.allocation import Greedy, Uniform
from relufy.methods.blockwise import recorded_block
from relufy.methods.calibrate import collect
from relufy.methods.inputs import InputSketches, maskable_groups, parameters, same_tensor
from relufy.methods.setting import Found, Setting
from relufy.methods.sparsify import find, install, sparsify
from relufy.model.configuration import sparsity_of
from relufy.model.sites import find_sites
from relufy.model.trial import Mask, keep_at_least, trial_masks
from relufy.recipe import Recipe

torch.set_num_threads(1)

GATED, PLAIN = "llama", "gpt2"


def windows_of(count: int = 48, seed: int = 0) -> np.ndarray:
    windows = np.random.default_rng(seed).integers(3, 53, (count, 16))
    windows[:, 0] = 0
    return windows


def setting_of(name: str) -> Setting:
    model = families.family(name)
    return Setting(model, find_sites(model), windows_of(), Calibration())


def weighted_sparsity(name: str, method: Teal) -> float:
    """Return the realised share of weights not read, on other windows than those of the calibration."""
    model = sparsify(families.family(name), method, windows_of())
    found = measure_sparsity(model, windows_of(seed=1)).sparsity
    blocks = find_sites(families.family(name))
    skipped = sum(found[g[0]][b.index] * parameters(b, g) for b in blocks for g in b.groups())
    return skipped / sum(parameters(b, g) for b in blocks for g in b.groups())


@pytest.mark.parametrize("name", [GATED, PLAIN, "phi3", "olmo2", "falcon"])
@pytest.mark.parametrize("allocation", ["uniform", "greedy"])
def test_the_share_of_weights_is_the_target(name: str, allocation: str) -> None:
    method = Teal(sparsity=0.5, allocation=allocation, step=0.3)  # type: ignore[arg-type]
    assert weighted_sparsity(name, method) == pytest.approx(0.5, abs=0.02)


def test_equal_shares_of_a_shared_input_are_one_mask() -> None:
    model = sparsify(families.family(GATED), Teal(allocation="uniform"), windows_of())
    assert [s.sites for s in sparsity_of(model).sparsifiers if s.applies_to(0)] == [
        ("o",),
        ("down",),
        ("q", "k", "v"),
        ("gate", "up"),
    ]


@pytest.mark.parametrize("name", [GATED, PLAIN, "phi3", "olmo2"])
def test_thresholds_of_0_are_dense_bit_for_bit(name: str) -> None:
    setting = setting_of(name)
    ids = torch.from_numpy(windows_of(3))
    dense = setting.model(ids).logits
    found = find(Teal(allocation="uniform"), setting)
    zero = tuple(replace(sparsifier, threshold=0.0) for sparsifier in found.sparsifiers)
    sparse = install(setting, Recipe("zero", sparsify=Teal()), Found(zero))
    assert torch.equal(sparse(ids).logits, dense)


def block_error(setting: Setting, shares: list[dict]) -> float:
    inputs = InputSketches(setting)
    collect(setting, setting.text("teal"), inputs.probes(), "")
    with recorded_block(setting, windows_of(seed=2), 0) as recorded, trial_masks(setting.blocks) as trial:
        for group, share in shares[0].items():
            trial.put(0, group[0], keep_at_least(inputs.threshold(0, group, share)))
        return recorded.error()


@pytest.mark.parametrize("name", [GATED, PLAIN])
def test_greedy_moves_the_block_less_than_equal_shares(name: str) -> None:
    setting = setting_of(name)
    inputs = InputSketches(setting)
    collect(setting, setting.text("teal"), inputs.probes(), "")

    def mask_at(layer: int, group: tuple[str, ...], share: float) -> Mask:
        return keep_at_least(inputs.threshold(layer, group, share))

    found = Greedy(setting, setting.text("teal"), mask_at, step=0.2, most=0.9).shares(0.5)
    block = setting.blocks[0]
    total = sum(parameters(block, group) for group in block.groups())
    assert sum(parameters(block, g) * s for g, s in found[0].items()) / total == pytest.approx(0.5)
    assert max(found[0].values()) <= 0.9
    assert block_error(setting, found) < block_error(setting, Uniform(setting).shares(0.5))


def test_a_target_after_others_is_what_it_is_alone() -> None:
    together, alone = setting_of(GATED), [setting_of(GATED) for _ in range(3)]
    for share, other in zip((0.5, 0.3, 0.6), alone, strict=True):
        method = Teal(sparsity=share, step=0.2)
        assert find(method, together) == find(method, other)
    assert find(Teal(sparsity=0.3, step=0.4), together) != find(Teal(sparsity=0.3, step=0.2), together)


def test_greedy_spares_what_matters() -> None:
    """Where q k v have no say in the output, they are masked first."""
    setting = setting_of(GATED)
    with torch.no_grad():
        setting.blocks[0].o.module.weight.zero_()  # type: ignore[operator]
    inputs = InputSketches(setting)
    collect(setting, setting.text("teal"), inputs.probes(), "")
    shares = Greedy(
        setting,
        setting.text("teal"),
        lambda layer, group, share: keep_at_least(inputs.threshold(layer, group, share)),
        step=0.1,
        most=0.9,
    ).shares(0.2)
    assert sum(shares[0][(site,)] for site in ("gate", "up", "down")) == 0


def test_a_target_above_what_any_projection_may_get_is_refused() -> None:
    with pytest.raises(UserError, match=r"0\.8 cannot be reached"):
        sparsify(families.family(GATED), Teal(sparsity=0.8, most=0.7), windows_of())


@pytest.mark.parametrize("sparsity", [0.0, 1.0, -0.5, 1.5, float("nan")])
def test_targets_outside_0_and_1_are_refused(sparsity: float) -> None:
    with pytest.raises(UserError, match="sparsity must lie between 0 and 1"):
        Teal(sparsity=sparsity)


def test_masks_on_masks_are_refused() -> None:
    model = sparsify(families.family(GATED), Teal(allocation="uniform"), windows_of())
    with pytest.raises(UserError, match="has masks already"):
        sparsify(model, Teal(), windows_of())


def test_a_relufied_model_keeps_its_activation() -> None:
    model = sparsify(families.family(GATED), "relufy-stage1")
    both = sparsify(model, Teal(allocation="uniform"), windows_of())
    assert sparsity_of(both).sparsifiers[0].function == "relu"
    assert {site for s in sparsity_of(both).sparsifiers for site in s.sites} >= {"neuron", "q", "o", "gate"}


def test_a_plain_relu_model_keeps_down_as_it_is() -> None:
    setting = setting_of("opt")
    assert ("down",) not in maskable_groups(setting, setting.blocks[0])
    model = sparsify(families.family("opt"), Teal(allocation="uniform"), windows_of())
    assert "down" not in {site for s in sparsity_of(model).sparsifiers for site in s.sites}


def test_shared_inputs_are_sketched_once() -> None:
    block = find_sites(families.family(GATED))[0]
    assert same_tensor(block) == {
        **dict.fromkeys(("q", "k", "v"), "q"),
        **dict.fromkeys(("gate", "up"), "gate"),
        "o": "o",
        "down": "down",
    }
