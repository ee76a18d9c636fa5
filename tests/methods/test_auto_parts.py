"""The parts of the automatic search: texts, bound, clock, speeds, and the arithmetic of scores."""

import numpy as np
import pytest
import torch
from auto_models import own_texts, sharp

from relufy.activation_sparsity import Sparsifier
from relufy.engine.spec import decoder_spec
from relufy.errors import UserError
from relufy.measure.bytes_read import bytes_engine
from relufy.measure.sketch import Sketch
from relufy.measure.sparsity import measure_sparsity
from relufy.method import Auto, Calibration, Teal
from relufy.methods.budget.allocate import as_found
from relufy.methods.budget.bound import parse_budget, rise, student_t
from relufy.methods.budget.clock import Clock, TimeUp
from relufy.methods.budget.cost import CostModel, Shares
from relufy.methods.budget.options import Chosen, find_options
from relufy.methods.budget.speed import TABLE, ReadingSpeeds
from relufy.methods.budget.texts import Texts, split
from relufy.methods.budget.trial import trials
from relufy.methods.setting import Found
from relufy.methods.sparsify import find, install, make_setting
from relufy.model.configuration import sparsity_of
from relufy.recipe import Recipe


def numbered(count: int) -> np.ndarray:
    """Return windows that tell where in the stream they stood."""
    windows = np.zeros((count, 5), dtype=np.int64)
    windows[:, 1] = np.arange(count)
    return windows


def test_the_three_texts_are_disjoint_and_together_the_stream() -> None:
    texts = split(numbered(100), seed=1)
    parts = [set(part[:, 1].tolist()) for part in (texts.calibration, texts.selection, texts.test)]
    assert [len(part) for part in parts] == [30, 40, 30]
    assert set.union(*parts) == set(range(100))


def test_neighbours_mostly_stay_together() -> None:
    places = split(numbered(300), seed=1).selection[:, 1]
    assert (np.diff(places) == 1).mean() > 0.8


def test_the_seed_decides_the_deal() -> None:
    first, same, other = (split(numbered(90), seed).test for seed in (1, 1, 2))
    assert np.array_equal(first, same)
    assert not np.array_equal(first, other)


def test_windows_that_repeat_are_in_one_text() -> None:
    texts = split(np.concatenate([numbered(60), numbered(60)]), seed=0)
    assert len(texts.calibration) + len(texts.selection) + len(texts.test) == 60
    texts.check(vocab_size=100)


def test_too_little_text_says_how_much_is_needed() -> None:
    with pytest.raises(UserError, match=r"has 20 different windows of 5 tokens; .* takes 28 or more"):
        split(numbered(20), seed=0)
    with pytest.raises(UserError, match="the selection text has 7 windows"):
        Texts(numbered(20), numbered(7), numbered(9)).check(100)


def test_texts_that_share_a_window_are_refused() -> None:
    windows = numbered(40)
    with pytest.raises(UserError, match="the selection and the test text share 2 windows"):
        Texts(windows[:10], windows[10:22], windows[20:]).check(100)


@pytest.mark.parametrize(("degrees", "expected"), [(7, 1.895), (10, 1.812), (30, 1.697), (100, 1.660)])
def test_quantiles_of_students_t(degrees: int, expected: float) -> None:
    assert student_t(degrees) == pytest.approx(expected, abs=1e-3)


def test_the_bound_is_mean_plus_t_standard_errors() -> None:
    found = rise([0.0, 0.01, 0.02, 0.01, 0.0, 0.03, 0.01, 0.0])
    assert found.nats == pytest.approx(0.01)
    assert found.bound == pytest.approx(0.01 + 1.895 * found.standard_error, rel=1e-3)


@pytest.mark.parametrize(
    ("text", "share"), [("1%", 0.01), ("0.01", 0.01), (" 0.5 % ", 0.005), ("5e-3", 0.005)]
)
def test_budgets(text: str, share: float) -> None:
    assert parse_budget(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["0", "-1%", "0%", "much", "", "nan", "2000%"])
def test_budgets_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="--budget"):
        parse_budget(text)


@pytest.mark.parametrize("wrong", [{"budget": 0.0}, {"budget": -0.1}, {"minutes": 0.0}, {"seed": -1}])
def test_wrong_parameters_are_refused(wrong: dict) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        Auto(**wrong)


def test_the_clock_ends_at_its_share() -> None:
    now = [0.0]
    clock = Clock(1.0, now=lambda: now[0])
    clock.until(0.5)
    now[0] = 29.0
    clock.check()
    now[0] = 30.0
    with pytest.raises(TimeUp):
        clock.check()
    clock.until(1.0)
    clock.check()


def test_squares_below_a_threshold() -> None:
    values = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    sketch = Sketch()
    sketch.add(values)
    edges, shares, squares = sketch.curves()
    for threshold in (0.0, 0.1, 0.7, 3.0):
        below = values[values.abs() < threshold]
        assert np.interp(threshold, edges, shares) == pytest.approx(len(below) / len(values), abs=2e-3)
        expected = float(below.square().sum()) / len(values)
        assert np.interp(threshold, edges, squares) == pytest.approx(expected, rel=0.02, abs=1e-9)


def test_nothing_is_gained_above_the_crossover() -> None:
    costs = CostModel(sharp(), ReadingSpeeds(10, 10, {1.0: 10.0}, most_columns=0.8), context=12)
    found = Found((Sparsifier(("o",), "threshold", threshold=1.0),))
    dense = costs.dense.seconds
    for share, saves in ((0.9, False), (0.7, True)):
        read = costs.speeds.read_share("columns", share)
        shares = {(layer, "o"): share for layer in range(2)}
        cost = costs.cost(found, Shares(shares, dict.fromkeys(shares, read)))
        assert cost.bytes < costs.dense.bytes
        assert (cost.seconds < dense - 1e-12) == saves


def test_bytes_are_those_of_measure() -> None:
    model = sharp()
    found = Found((Sparsifier(("neuron",), "threshold", threshold=1.0),))
    shares = {(0, "neuron"): 0.5, (1, "neuron"): 0.25}
    cost = CostModel(model, TABLE, context=12).cost(found, Shares(shares, shares))
    config = model.config.to_dict() | {"activation_sparsity": {"version": 1, "sparsifiers": [
        {"sites": ["neuron"], "function": "threshold", "threshold": 1.0}]}}  # fmt: skip
    expected = bytes_engine(decoder_spec(config), {"neuron": [0.5, 0.75]}, 12)
    assert cost.bytes == pytest.approx(expected.sparse)


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "falcon"])
def test_a_candidate_costs_what_the_installed_model_does(name: str) -> None:
    """Fused projections too: one mask there serves several sites."""
    model, method = sharp(name), Teal(sparsity=0.5, allocation="uniform")
    texts = own_texts(model, 100)
    recipe = Recipe("x", sparsify=method, calibrate=Calibration(tokens=10**6))
    setting = make_setting(model, recipe, texts.calibration)
    found, costs = find(method, setting), CostModel(model, TABLE, context=12)
    with trials(setting, costs, texts.selection, Clock(10)) as running:
        predicted = running.outcome(found).cost.bytes
    zeros = measure_sparsity(install(setting, recipe, found), texts.selection).sparsity
    spec = decoder_spec(model.config.to_dict())
    assert predicted == pytest.approx(bytes_engine(spec, zeros, 12).sparse, rel=0.01)


def test_scores_foresee_the_kl_of_a_mask() -> None:
    model = sharp()
    texts = own_texts(model, 400)
    setting = make_setting(
        model, Recipe("x", sparsify=Auto(), calibrate=Calibration(tokens=10**6)), texts.calibration
    )
    costs, clock = CostModel(model, TABLE, context=12), Clock(10)
    options = find_options(setting, costs, 0, clock)
    with trials(setting, costs, texts.selection, clock) as running:
        for place in ((0, "v"), (0, "gate"), (0, "neuron"), (1, "o"), (1, "up")):
            scores = options[place].ways[0]
            threshold = scores.sketch.quantile(0.2)
            nats, _cost = running.kl(as_found([Chosen(options[place], scores, threshold)]))
            assert nats == pytest.approx(scores.nats_below(threshold), rel=0.5), place
    assert not sparsity_of(model).sparsifiers
