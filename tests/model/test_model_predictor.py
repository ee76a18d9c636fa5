"""Predictors on a model: exact by default, kept by checkpoints, refused where they make no sense."""

import json

import numpy as np
import pytest
import torch

import relufy
from relufy.activation_sparsity import ActivationSparsity, Predictor, Sparsifier, read_activation_sparsity
from relufy.errors import UserError
from relufy.method import Relufication
from relufy.methods.predictor import PredictorOptions, add_predictor, measure_predictor, split_text
from relufy.methods.sparsify import sparsify
from relufy.model.checkpoint import load_model, save_checkpoint
from relufy.model.configuration import sparsity_of
from relufy.model.predicting import predicting
from relufy.model.predictor import cuts, predictable_layers, present_predictor
from relufy.model.sites import find_sites
from relufy.model.sparsifiers import apply_sparsity

RANK = 7


def windows(count: int = 12, length: int = 24, vocab: int = 513) -> np.ndarray:
    return np.random.default_rng(0).integers(2, vocab, (count, length))


def predicted(folder, **options):
    model = load_model(folder)
    report = add_predictor(model, split_text(windows()), PredictorOptions(rank=RANK, **options))
    return model, report


def logits(model, ids=None):
    with torch.inference_mode():
        return model(input_ids=torch.from_numpy(windows() if ids is None else ids)).logits


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "phi3"])
def test_exact_by_default_and_zero_outside_of_candidates(family, make_checkpoint):
    neuron = (Sparsifier(("neuron",), "relu", shift=0.05),)
    folder = make_checkpoint(family=family, sparsifiers=() if family == "opt" else neuron)
    plain = load_model(folder)
    vocab = plain.config.vocab_size
    model = load_model(folder)
    report = add_predictor(model, split_text(windows(vocab=vocab)), PredictorOptions(rank=RANK, recall=0.7))
    ids = windows(vocab=vocab)
    assert torch.equal(logits(model, ids), logits(plain, ids))
    layers = predictable_layers(find_sites(model), sparsity_of(model))
    seen = {}
    hooks = [
        layer.block.down.module.register_forward_pre_hook(
            lambda _m, args, index=layer.index: seen.update({index: (args[0] != 0).float().mean().item()})
        )
        for layer in layers
    ]
    exact = logits(model, ids)
    before = dict(seen)
    with predicting(model):
        limited = logits(model, ids)
    assert all(seen[index] < before[index] for index in before)
    assert not torch.equal(limited, exact)
    assert torch.equal(logits(model, ids), exact)
    assert all(0 < quality.recall < 1 for quality in report.layers.values())
    for hook in hooks:
        hook.remove()


def test_all_candidates_are_exact(make_checkpoint):
    model, _ = predicted(make_checkpoint(recipe="shifted"))
    for layer in predictable_layers(find_sites(model), sparsity_of(model)):
        layer.predictor().threshold.fill_(-np.inf)
    exact = logits(model)
    with predicting(model):
        assert torch.equal(logits(model), exact)
    report = measure_predictor(model, windows())
    assert report.difference == 0 and report.mean("recall") == report.mean("density") == 1


@pytest.mark.parametrize("recipe", ["shifted", "stage2"])
def test_a_checkpoint_keeps_its_predictor(recipe, make_checkpoint, tmp_path):
    model, report = predicted(make_checkpoint(recipe=recipe), recall=0.9)
    save_checkpoint(model, None, tmp_path / "saved")
    loaded = load_model(tmp_path / "saved")
    kept, own = present_predictor(find_sites(loaded)), present_predictor(find_sites(model))
    assert kept.keys() == own.keys() and all(torch.equal(kept[name], own[name]) for name in own)
    again = measure_predictor(loaded, split_text(windows()).test)
    assert (again.predicted.perplexity, again.layers) == (report.predicted.perplexity, report.layers)
    save_checkpoint(loaded, None, tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert read_activation_sparsity(config).predictor == Predictor("svd", RANK, 0.9)


def test_a_changed_gate_is_refused(make_checkpoint, tmp_path):
    model, _ = predicted(make_checkpoint(recipe="shifted"))
    save_checkpoint(model, None, tmp_path / "saved")
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight.mul_(1.5)
    with pytest.raises(UserError, match=r"layers.1.mlp.gate_proj.weight has changed.*relufy predictor"):
        save_checkpoint(model, None, tmp_path / "changed")


def test_other_zeros_take_the_predictor_off(make_checkpoint):
    model, _ = predicted(make_checkpoint(recipe="stage1"))
    more = (*sparsity_of(model).sparsifiers, Sparsifier(("down",), "threshold", threshold=0.1))
    with pytest.warns(UserWarning, match="predictor was for other zeros"):
        apply_sparsity(model, ActivationSparsity(more))
    assert not present_predictor(find_sites(model))
    with pytest.raises(UserError, match="no predictor"), predicting(model):
        pass


def test_cuts_are_where_neurons_become_active(make_checkpoint):
    folder = make_checkpoint(sparsifiers=(Sparsifier(("neuron",), "relu", shift=-0.3),))
    model = load_model(folder)
    (first, *_) = predictable_layers(find_sites(model), sparsity_of(model))
    assert torch.allclose(cuts(first), torch.tensor(-0.3), atol=1e-6)
    masked = make_checkpoint(sparsifiers=(Sparsifier(("neuron",), "threshold", threshold=0.2),))
    model = load_model(masked)
    (first, *_) = predictable_layers(find_sites(model), sparsity_of(model))
    z = cuts(first)
    assert torch.allclose(torch.nn.functional.silu(z), torch.tensor(0.2), atol=1e-5)


@pytest.mark.parametrize(
    ("sparsifiers", "message"),
    [
        ((), "no layer has zeros at its neurons"),
        ((Sparsifier(("neuron",), "topk", k=20),), "can't choose among the neurons of a topk"),
        ((Sparsifier(("neuron",), "statistical_topk", sparsity=0.9),), "of a statistical_topk"),
        ((Sparsifier(("neuron",), "threshold", threshold=0.1, phase="decode"),), "leaves some tokens dense"),
    ],
)
def test_refused_models(sparsifiers, message, make_checkpoint):
    with pytest.raises(UserError, match=message):
        predicted(make_checkpoint(sparsifiers=sparsifiers))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"rank": 69}, "rank 68 at most"), ({"recall": 0.0}, "recall must"), ({"kind": "tree"}, "tree")],
)
def test_refused_options(options, message, make_checkpoint):
    with pytest.raises(UserError, match=message):
        add_predictor(
            load_model(make_checkpoint(recipe="stage1")), split_text(windows()), PredictorOptions(**options)
        )


def test_a_recipe_without_zeros_has_no_predictor_in_its_block():
    model = relufy.load_model("bundled")
    sparsify(model, Relufication(stage=1))
    assert "predictor" not in sparsity_of(model).to_block()
