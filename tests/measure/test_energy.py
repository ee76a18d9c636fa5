"""The energy of an event-driven processor: the formula, and RWKV's weights."""

import pytest

import families
from relufy.errors import UserError
from relufy.measure.energy import Energy, EnergyConstants, Linear, energy, linears, mean_sparsity
from relufy.model.sites import find_sites

RWKV_SHARES = {"att.key": 0.4, "att.rec": 0.5, "att.val": 0.6, "att.out": 0.7, "ffn.rec": 0.3}


def rwkv(width: int = 768) -> list[Linear]:
    """Return a block of RWKV-4: five square matrices, the channel-mix's key and value four times as large."""
    square = [Linear(width, width, share) for share in RWKV_SHARES.values()]
    return [*square, Linear(4 * width, width, 0.5), Linear(width, 4 * width, 0.9)]


def test_the_formula() -> None:
    found = energy(
        [Linear(3, 10, 0.5), Linear(2, 4, 0.25)], EnergyConstants(mac=2.0, weight_read=5.0, event=1.0)
    )
    assert found.dense == 10 * (3 * 7 + 1) + 4 * (2 * 7 + 1)
    assert found.sparse == 0.5 * 10 * 22 + 0.75 * 4 * 15
    assert found.ratio == found.dense / found.sparse


def test_the_papers_mean_gives_the_channel_mix_a_weight_of_4() -> None:
    expected = (sum(RWKV_SHARES.values()) + 4 * 0.5 + 4 * 0.9) / 13
    assert mean_sparsity(rwkv()) == pytest.approx(expected)


def test_without_events_the_ratio_is_that_of_the_weights_read() -> None:
    """At the paper's 63 % that is 2.70, and events explain what its simulation reports less."""
    assert energy(rwkv()).ratio == pytest.approx(1 / (1 - mean_sparsity(rwkv())))
    same = [Linear(768, 768, 0.63)] * 5
    assert energy(same).ratio == pytest.approx(2.70, abs=0.005)


def test_constants_scale_and_events_count_for_wide_layers_less() -> None:
    narrow, wide = (
        energy([Linear(n, 100, 0.5), Linear(n, 100)], EnergyConstants(1, 1, 50)) for n in (1, 1000)
    )
    assert narrow.ratio == pytest.approx(wide.ratio)
    assert (
        energy([Linear(10, 10)], EnergyConstants(2, 4)).dense
        == 2 * energy([Linear(10, 10)], EnergyConstants(1, 2)).dense
    )


def test_the_layers_of_a_model() -> None:
    for name in ("llama", "phi3", "opt", "gpt2"):
        blocks = find_sites(families.family(name))
        sites = {site: [0.25, 0.75] for site in (*blocks[0].projections(), "neuron")}
        found = linears(blocks, sites)
        unique = {p.name: p.shape[0] * p.shape[1] for block in blocks for p in block.projections().values()}
        assert sum(layer.outputs * layer.inputs for layer in found) == pytest.approx(sum(unique.values()))
        assert energy(found).ratio == pytest.approx(2.0)


def test_as_plain_data() -> None:
    constants = {"mac": 0.5, "weight_read": 0.5, "event": 0.0}
    assert Energy(4.0, 2.0, EnergyConstants()).to_json() == {
        "dense": 4,
        "sparse": 2,
        "ratio": 2,
        "constants": constants,
    }


@pytest.mark.parametrize("constants", [(-1, 1, 0), (0, 0, 1), (1, 1, -1)])
def test_energies_are_not_negative(constants: tuple[float, ...]) -> None:
    with pytest.raises(UserError, match="0 or more"):
        EnergyConstants(*constants)
