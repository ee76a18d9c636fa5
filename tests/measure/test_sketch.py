"""A sketch's shares, thresholds, medians and modes against the values themselves, and the papers' oracles."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from relufy.measure.sketch import RELATIVE_ERROR, Sketch, common_value_at, cuts, merged
from relufy.model.activations import ReLU

torch.set_num_threads(1)


def sketch_of(values: torch.Tensor) -> Sketch:
    sketch = Sketch()
    sketch.add(values)
    return sketch


def draw(kind: str, count: int = 400_000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    if kind == "normal":
        return torch.randn(count, generator=generator)
    uniform = torch.rand(count, generator=generator, dtype=torch.float64) - 0.5
    return (-uniform.sign() * torch.log1p(-2 * uniform.abs())).float()  # Laplace, scale 1


@pytest.mark.parametrize(
    ("kind", "share", "threshold", "error"),
    [
        ("normal", 0.25, 0.3186, 0.091),
        ("normal", 0.40, 0.5244, 0.188),
        ("normal", 0.50, 0.6745, 0.267),
        ("normal", 0.65, 0.9346, 0.410),
        ("laplace", 0.25, 0.2877, 0.057),
        ("laplace", 0.40, 0.5108, 0.123),
        ("laplace", 0.50, 0.6931, 0.182),
        ("laplace", 0.65, 1.0498, 0.300),
    ],
)
def test_thresholds_and_errors_of_known_distributions(
    kind: str, share: float, threshold: float, error: float
) -> None:
    """TEAL's closed forms: the threshold of a share, and the relative L2 error of what it leaves."""
    values = draw(kind)
    found = sketch_of(values).quantile(share)
    assert found == pytest.approx(threshold, rel=0.01)
    left_out = values[values.abs() < found]
    assert float((left_out.square().sum() / values.square().sum()).sqrt()) == pytest.approx(error, abs=0.004)


@given(
    values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=60),
    share=st.floats(0.0, 1.0),
)
def test_a_quantile_lies_within_the_stated_error(values: list[float], share: float) -> None:
    magnitudes = torch.tensor(values).abs().sort().values
    found = sketch_of(torch.tensor(values)).quantile(share)
    below = magnitudes < found * (1 - RELATIVE_ERROR) - 1e-37  # all subnormals share bins
    up_to = magnitudes <= found * (1 + RELATIVE_ERROR) + 1e-37
    assert below.sum() <= share * len(values) + 1e-6
    assert up_to.sum() >= share * len(values) - 1e-6


def test_share_below_undoes_quantile() -> None:
    sketch = sketch_of(draw("normal", 10_000))
    for share in (0.01, 0.25, 0.5, 0.9, 0.999):
        assert sketch.share_below(sketch.quantile(share)) == pytest.approx(share, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_dtype_is_counted(dtype: torch.dtype) -> None:
    sketch = sketch_of(torch.tensor([[-2.0, 0.0], [1.0, -0.0]], dtype=dtype))
    assert sketch.count == 4
    assert sketch.share_below(0.5) == 0.5


def test_parts_add_up_to_the_whole_exactly() -> None:
    values = draw("laplace", 10_001)
    whole = sketch_of(values)
    for parts in (values.split(997), values.split(64), values.flip(0).split(5000)):
        together = merged(sketch_of(part) for part in parts)
        assert torch.equal(together._counts, whole._counts)


@given(
    values=st.lists(st.floats(-1e6, 1e6, width=32, allow_subnormal=False), min_size=1, max_size=60),
    share=st.floats(0.01, 0.99),
)
def test_signed_values_are_split_exactly_at_cuts(values: list[float], share: float) -> None:
    sketch, signed = sketch_of(torch.tensor(values)), torch.tensor(values, dtype=torch.float64)
    found = sketch.value_at(share)
    assert sketch.share_at_most(found) == pytest.approx(float((signed <= found).double().mean()), abs=1e-12)
    assert (signed <= found).sum() >= share * len(values) - 1e-9
    before = cuts()[np.searchsorted(cuts(), found) - 1]
    assert (signed <= before).sum() < share * len(values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shifting_by_a_cut_makes_exactly_the_zeros_that_were_counted(dtype: torch.dtype) -> None:
    values = (draw("normal", 5_000) * 0.3 - 0.1).to(dtype)
    sketch = sketch_of(values)
    for share in (0.1, 0.5, 0.9):
        shift = sketch.value_at(share)
        zeros = float((ReLU(shift)(values) == 0).double().mean())
        assert zeros == sketch.share_at_most(shift) == pytest.approx(share, abs=0.02)


def test_a_common_value_is_a_mean_over_sketches_not_over_values() -> None:
    few, many = sketch_of(torch.arange(1.0, 11.0)), sketch_of(torch.arange(101.0, 201.0))
    value = common_value_at([few, many], 0.5)
    assert few.share_at_most(value) == 1.0 and many.share_at_most(value) == 0.0
    assert few.share_at_most(0.0) == 0.0 and sketch_of(torch.tensor([-0.0, 0.0])).share_at_most(0.0) == 1.0


@pytest.mark.parametrize("shift", [-3.0, 0.0, 0.17])
def test_median_and_mode_of_a_shifted_distribution(shift: float) -> None:
    values = draw("normal", 100_000) * 0.1 + shift
    sketch = sketch_of(values)
    assert sketch.median() == pytest.approx(float(values.median()), rel=RELATIVE_ERROR, abs=2e-3)
    assert sketch.mode() == pytest.approx(shift, abs=0.03)


def test_the_mode_is_not_the_mean() -> None:
    values = torch.cat([draw("normal", 60_000) * 0.05 - 0.2, draw("normal", 40_000) * 0.5 + 1.0])
    assert sketch_of(values).mode() == pytest.approx(-0.2, abs=0.03)


def test_a_constant_has_itself_as_median_and_mode() -> None:
    sketch = sketch_of(torch.full((1000,), -0.3))
    assert sketch.median() == pytest.approx(-0.3, rel=RELATIVE_ERROR)
    assert sketch.mode() == pytest.approx(-0.3, rel=RELATIVE_ERROR)


@pytest.mark.parametrize("layer", [0, 8, 16, 24, 31])
@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_thresholds_of_real_activations(kit: Path, layer: int, share: float) -> None:
    """Samples of Llama-2-7B's measured histograms, through the sketch: within 0.5 points of the target."""
    histograms = torch.load(kit / "activations" / "llama2-7b" / f"layer-{layer}-mlp.pt", map_location="cpu")
    for name in ("h1", "h2"):
        counts, centres = histograms[name].double(), histograms[f"{name}_centers"].double()
        width = (centres[2:-1] - centres[1:-2]).median()
        generator = torch.Generator().manual_seed(layer)
        drawn = torch.multinomial(counts[1:-1], 200_000, replacement=True, generator=generator)
        inside = torch.rand(len(drawn), generator=generator, dtype=torch.float64) - 0.5
        values = centres[1:-1][drawn] + width * inside
        found = Sketch()
        for part in values.float().split(4096):
            found.add(part)
        assert float((values.abs() < found.quantile(share)).double().mean()) == pytest.approx(
            share, abs=0.005
        )
