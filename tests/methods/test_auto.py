"""The automatic search: within its budget, no worse than single methods, repeatable, honest when it fails."""

from pathlib import Path

import auto_models
import pytest
import torch

from relufy.errors import UserError
from relufy.measure.quality import evaluating, log_likelihood
from relufy.method import Auto, Teal
from relufy.methods.auto import Search, search
from relufy.methods.budget import search as budget_search
from relufy.methods.budget import singles, trial
from relufy.methods.budget.bound import Rise, rise
from relufy.methods.sparsify import install, sparsify
from relufy.model.checkpoint import load_model, save_checkpoint
from relufy.model.configuration import sparsity_of

BUDGET = 0.05


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


def hurry(patch: pytest.MonkeyPatch) -> None:
    """Leave one single method and one round of corrections."""
    patch.setattr(singles, "SINGLES", {"teal-uniform": Teal(allocation="uniform")})
    patch.setattr(budget_search, "ROUNDS", 1)


@pytest.fixture(scope="module")
def outcome() -> Search:
    with pytest.MonkeyPatch.context() as patch:
        hurry(patch)
        model = auto_models.with_idle_layer(auto_models.sharp(), 1)
        return search(model, auto_models.own_texts(model), Auto(budget=BUDGET))


def losses(model, windows) -> torch.Tensor:
    ids = torch.from_numpy(windows)
    with evaluating(model):
        return -log_likelihood(model(input_ids=ids).logits[:, :-1], ids[:, 1:]).double().mean(1)


def test_an_idle_layer_is_left_out_first(outcome: Search) -> None:
    masked = {site for s in outcome.found.sparsifiers if s.layers == (1,) for site in s.sites}
    assert {"q", "k", "v", "o", "gate"} <= masked
    assert outcome.report.chosen.bytes_saved > 0.3


def test_it_keeps_the_budget_on_the_selection_text_once_installed(outcome: Search) -> None:
    model = auto_models.with_idle_layer(auto_models.sharp(), 1)
    texts = auto_models.own_texts(model)
    dense = losses(model, texts.selection)
    sparse = install(outcome.setting, outcome.recipe, outcome.found)
    found = rise((losses(sparse, texts.selection) - dense).tolist())
    assert found.nats == pytest.approx(outcome.report.chosen.nats, abs=1e-4)
    assert found.bound <= torch.log1p(torch.tensor(BUDGET)) + 1e-4


def test_every_accepted_point_is_within_the_budget_and_some_are_refused(outcome: Search) -> None:
    limit = float(torch.log1p(torch.tensor(BUDGET)))
    assert all((p.bound <= limit and p.bytes_saved >= 0.001) == p.is_accepted for p in outcome.frontier)
    assert {p.is_accepted for p in outcome.frontier} == {True, False}


def test_it_saves_no_less_than_the_best_single_method(outcome: Search) -> None:
    single = outcome.report.best_single
    assert single is not None
    assert outcome.report.chosen.bytes <= single.bytes


def test_it_saves_and_loads(outcome: Search, tmp_path: Path) -> None:
    model = auto_models.with_idle_layer(auto_models.sharp(), 1)
    found = search(model, auto_models.own_texts(model), Auto(budget=BUDGET))
    sparse = install(found.setting, found.recipe, found.found)
    save_checkpoint(sparse, None, tmp_path / "m", found.provenance())
    loaded = load_model(tmp_path / "m")
    ids = torch.tensor([[0, 5, 9, 2, 40]])
    assert torch.equal(loaded(ids).logits, sparse(ids).logits)
    block = sparsity_of(loaded)
    assert block.recipe["sparsify"]["method"] == "auto"
    assert block.provenance["search"]["texts"] == found.report.texts
    assert [p.to_json() for p in found.frontier] == [p.to_json() for p in outcome.frontier]


@pytest.mark.parametrize("name", ["falcon", "phi3", "opt"])
def test_fused_plain_and_sparse_models(name: str) -> None:
    model = auto_models.sharp(name)
    found = search(model, auto_models.own_texts(model, 60), Auto(budget=0.5))
    assert found.report.chosen.bytes_saved > 0
    install(found.setting, found.recipe, found.found)
    assert sparsity_of(model).sparsifiers


def test_a_budget_that_no_mask_keeps_names_the_best_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    model = auto_models.sharp()
    monkeypatch.setattr(trial, "rise", lambda losses: Rise(0.015, 0.001, 0.02, len(losses)))
    with pytest.raises(UserError, match=r"within 0\.01 .* the best reached is 0\.02 \(upper 95 % bound\)"):
        search(model, auto_models.own_texts(model, 60), Auto(budget=0.01))


def test_minutes_that_are_over_at_once() -> None:
    model = auto_models.sharp()
    with pytest.raises(UserError, match="the minutes were over before a single candidate was tried"):
        search(model, auto_models.own_texts(model, 60), Auto(minutes=1e-9))
    assert not sparsity_of(model).sparsifiers


def test_a_model_with_masks_is_refused() -> None:
    model = auto_models.sharp()
    texts = auto_models.own_texts(model, 80)
    sparse = sparsify(model, Teal(allocation="uniform"), texts.calibration)
    with pytest.raises(UserError, match="the model has masks already"):
        search(sparse, texts)


def test_it_is_a_method_of_a_recipe_too() -> None:
    model = auto_models.sharp()
    sparse = sparsify(model, Auto(budget=0.2), auto_models.own_windows(model, 100))
    assert all(s.is_selection for s in sparsity_of(sparse).sparsifiers)
