"""Calibration: what is counted and what is left out; parts agree with the whole, and memory stays flat."""

import tracemalloc

import numpy as np
import pytest
import torch

import families
from relufy.errors import UserError
from relufy.measure.sketch import Sketch
from relufy.method import Calibration, Teal
from relufy.methods.calibrate import UP_OUTPUT, Probe, collect, is_massive
from relufy.methods.inputs import InputSketches
from relufy.methods.setting import Setting
from relufy.methods.sparsify import sparsify
from relufy.model.sites import find_sites

torch.set_num_threads(1)


def windows_of(count: int, length: int = 16, seed: int = 0) -> np.ndarray:
    windows = np.random.default_rng(seed).integers(3, 53, (count, length))
    windows[:, 0] = 0
    return windows


def setting_of(name: str = "llama", windows: np.ndarray | None = None, **calibration) -> Setting:
    model = families.family(name)
    return Setting(model, find_sites(model), windows, Calibration(**calibration))


def rows_at(setting: Setting, windows: np.ndarray, layer: int, site: str) -> torch.Tensor:
    rows: list[torch.Tensor] = []
    collect(setting, windows, [Probe(layer, site, lambda values: rows.append(values.clone()))], "")
    return torch.cat(rows)


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "phi3", "falcon"])
@pytest.mark.parametrize("site", ["q", "o", "up", "down", "neuron", UP_OUTPUT])
def test_every_position_but_the_first_is_shown(name: str, site: str) -> None:
    setting, windows = setting_of(name, batch_size=2), windows_of(3)
    rows = rows_at(setting, windows, 1, site)
    block = setting.blocks[1]
    widths = {"q": block.q.shape[1], "o": block.o.shape[1], "up": block.up.shape[1]}
    assert rows.shape == (3 * 15, widths.get(site, block.down.shape[1]))


def test_the_first_position_is_the_one_left_out() -> None:
    setting, windows = setting_of(), windows_of(2)
    before = rows_at(setting, windows, 0, "q")
    windows[:, 0] = 7
    assert torch.equal(rows_at(setting, windows, 0, "q"), before)  # layer 0's inputs know no neighbours


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_down_reads_neuron_times_up(name: str) -> None:
    setting, windows = setting_of(name), windows_of(2)
    neuron, up, down = (rows_at(setting, windows, 1, site) for site in ("neuron", UP_OUTPUT, "down"))
    assert torch.equal(neuron * up, down)


def test_massive_positions_are_left_out_and_reported() -> None:
    setting, windows = setting_of(), windows_of(4)
    windows[windows == 9] = 8
    windows[2, 5] = 9
    with torch.no_grad():
        setting.model.get_input_embeddings().weight[9] = torch.eye(24)[0] * 5000  # type: ignore[union-attr,index,operator]
    rows: list[torch.Tensor] = []
    collected = collect(setting, windows, [Probe(0, "q", lambda values: rows.append(values))], "")
    assert collected.massive[0] == 1 and len(torch.cat(rows)) == 4 * 15 - 1
    assert "up to 1 with massive activations (layers 0 to" in collected.note()
    kept = Setting(setting.model, setting.blocks, windows, Calibration(keep_massive=True))
    assert len(rows_at(kept, windows, 0, "q")) == 4 * 15


def test_massive_is_a_matter_of_size_and_ratio() -> None:
    hidden = torch.full((3, 5), 0.05)
    hidden[0, 1], hidden[1, 1], hidden[2, 1] = 99.0, -101.0, 101.0
    hidden[2] += 0.2
    assert is_massive(hidden).tolist() == [False, True, False]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_batch_sizes_and_shards_agree(batch_size: int) -> None:
    windows = windows_of(12)
    whole = InputSketches(setting_of(batch_size=4))
    collect(setting_of(batch_size=4), windows, whole.probes(), "")
    shards = [InputSketches(setting_of(batch_size=batch_size)) for _ in range(4)]
    for sketches, part in zip(shards, np.split(windows, 4), strict=True):
        collect(setting_of(batch_size=batch_size), part, sketches.probes(), "")
    for shard in shards[1:]:
        shards[0].merge(shard)
    for layer in range(2):
        for group in (("q",), ("o",), ("gate",), ("down",)):
            expected = whole.threshold(layer, group, 0.5)
            assert shards[0].threshold(layer, group, 0.5) == pytest.approx(expected, rel=2.0**-7)


def test_memory_does_not_grow_with_the_text() -> None:
    def peak(count: int) -> int:
        setting, windows, sketch = setting_of(), windows_of(count), Sketch()
        tracemalloc.start()
        collect(setting, windows, [Probe(0, "down", sketch.add)], "")
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(16)
    assert peak(512) < peak(16) + 200_000


def test_nothing_of_the_model_changes() -> None:
    setting = setting_of()
    setting.model.train()
    before = setting.model.state_dict()
    collect(setting, windows_of(2), [Probe(0, "q", lambda values: None)], "")
    assert setting.model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in setting.model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in setting.model.modules())


def test_what_is_no_number_is_refused_with_its_place() -> None:
    setting = setting_of()
    with torch.no_grad():
        setting.blocks[1].up.module.weight[0, 0] = torch.nan  # type: ignore[index,operator]
    with pytest.raises(UserError, match="layer 1: the activations at 'down' hold NaN"):
        rows_at(setting, windows_of(2), 1, "down")


def test_a_head_that_is_no_number_is_refused_too() -> None:
    model = families.family("llama")
    with torch.no_grad():
        model.lm_head.weight[7, 0] = torch.nan
    with pytest.raises(UserError, match="logits hold NaN"):
        sparsify(model, Teal(), windows_of(60))


def test_too_little_text_is_refused() -> None:
    with pytest.raises(UserError, match="has 30 positions, teal needs 512"):
        sparsify(families.family("llama"), Teal(), windows_of(2))
    with pytest.raises(UserError, match="teal needs text to calibrate on"):
        sparsify(families.family("llama"), Teal())
    with pytest.raises(UserError, match="vocabulary of 53"):
        sparsify(families.family("llama"), Teal(), windows_of(40) + 50)
