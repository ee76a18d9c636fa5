"""The models that come with relufy: a dense one, and one that is sparse out of the box."""

import numpy as np
import pytest
import torch

import relufy
from relufy.hub import BUNDLED, BUNDLED_SPARSE, is_bundled, model_folder

TEXT = (
    "It was a dark night, and the wind came over the moor with a sound like the sea. The old man put down "
    "his book and looked at the fire; and for some time neither of them said a word."
)


@pytest.fixture(scope="module")
def sparse():
    return relufy.load_model(BUNDLED_SPARSE).float().eval()


def test_both_have_a_short_name_and_their_own() -> None:
    for alias, name in ((BUNDLED, "llama-prose-3m"), (BUNDLED_SPARSE, "llama-prose-3m-sparse")):
        assert model_folder(alias) == model_folder(name) and is_bundled(alias) and is_bundled(name)
    assert not is_bundled("llama-prose")


def test_the_sparse_one_has_nine_zeros_in_ten_neurons(sparse) -> None:
    from relufy.measure.sparsity import measure_sparsity

    ids = np.array(relufy.load_tokenizer(BUNDLED_SPARSE)(TEXT).input_ids)[None]
    zeros = measure_sparsity(sparse, ids, 1).sparsity["neuron"]
    assert 0.85 < np.mean(zeros) < 0.95 and min(zeros) > 0.75


def test_the_sparse_one_runs_on_the_engine_with_the_logits_of_transformers(sparse) -> None:
    ids = relufy.load_tokenizer(BUNDLED_SPARSE)(TEXT).input_ids
    engine = relufy.Engine(BUNDLED_SPARSE, threads=1)
    found = engine.step([(engine.new_sequence(), ids)], logits="all")
    with torch.no_grad():
        expected = sparse(torch.tensor([ids])).logits[0].numpy()
    error = np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert error.max() < 1e-4
