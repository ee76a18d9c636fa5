"""The contract: equality (a), (b), (d), and the same bits whatever threads, steps, neighbours, skipping."""

import numpy as np
import pytest
from tests.checkpoints import RECIPES
from tests.engine.contract import all_at_once, bits, hf_logits, in_steps, relative_error, tokens_of

import relufy
from relufy.engine.naive import NaiveDecoder
from relufy.engine.pack import pack

CONFIGS = {
    "odd": {},
    "untied": {"tie_word_embeddings": False, "num_key_value_heads": 3, "intermediate_size": 129},
    "tied-gqa": {
        "tie_word_embeddings": True,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 18,
    },
    "llama3-rope": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("config", CONFIGS)
def test_equals_the_specification_and_transformers(config, recipe, make_checkpoint, tmp_path):
    folder = make_checkpoint(recipe, **CONFIGS[config])
    tokens = tokens_of(513, 75)
    path = pack(folder, tmp_path / "model.relufy")
    engine = relufy.Engine(path, threads=2)
    for logits in (all_at_once(engine, tokens), in_steps(engine, tokens, 1)):
        assert relative_error(logits, NaiveDecoder(path).logits(tokens)) < 1e-4
        assert relative_error(logits, hf_logits(folder, tokens)) < 1e-4


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_bits_depend_on_nothing_but_the_tokens(recipe, isa, make_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("RELUFY_ISA", isa)
    path = pack(make_checkpoint(recipe), tmp_path / "model.relufy")
    tokens = tokens_of(513, 70)
    try:
        reference = bits(in_steps(relufy.Engine(path, threads=1), tokens, 1))
    except relufy.UserError:
        pytest.skip(f"this processor has no {isa}")
    for threads in (1, 2, 3):
        for skip in (True, False):
            engine = relufy.Engine(path, threads=threads, skip=skip)
            assert engine.isa == isa
            assert bits(all_at_once(engine, tokens)) == reference
            for size in (1, 2, 3, 17, 33):
                assert bits(in_steps(engine, tokens, size)) == reference, (threads, skip, size)


@pytest.mark.parametrize("recipe", ["dense", "stage1", "stage2"])
def test_bits_do_not_depend_on_the_neighbours(recipe, make_checkpoint, tmp_path):
    engine = relufy.Engine(pack(make_checkpoint(recipe), tmp_path / "m.relufy"), threads=2, context=1000)
    texts = [tokens_of(513, length, seed) for seed, length in enumerate((5, 40, 1, 66))]
    alone = [bits(all_at_once(engine, text)) for text in texts]
    sequences = [engine.new_sequence() for _ in texts]
    together = engine.step(list(zip(sequences, texts, strict=True)), "all")
    ends = np.cumsum([len(text) for text in texts])
    assert [bits(part) for part in np.split(together, ends[:-1])] == alone


@pytest.mark.parametrize("recipe", ["dense", "stage1", "stage2"])
def test_the_bundled_model(recipe, bundled, sparsified, tmp_path):
    folder = sparsified(bundled, recipe)
    _check_real_model(folder, tmp_path, vocab_size=4096)


@pytest.mark.parametrize("recipe", ["dense", "stage1", "stage2"])
def test_a_model_trained_by_others(recipe, kit, sparsified, tmp_path):
    folder = sparsified(kit / "models" / "llama-stories260k", recipe)
    _check_real_model(folder, tmp_path, vocab_size=512)


def _check_real_model(folder, tmp_path, vocab_size: int) -> None:
    tokens = tokens_of(vocab_size, 100)
    path = pack(folder, tmp_path / "model.relufy")
    engines = [
        relufy.Engine(path, threads, skip=skip) for threads, skip in ((1, True), (3, True), (2, False))
    ]
    results = [in_steps(engines[0], tokens, 1), *(all_at_once(engine, tokens) for engine in engines)]
    assert len({bits(result) for result in results}) == 1
    assert relative_error(results[0], NaiveDecoder(path).logits(tokens)) < 1e-4
    assert relative_error(results[0], hf_logits(folder, tokens)) < 1e-4


@pytest.mark.parametrize("recipe", ["dense", "stage1", "stage2"])
def test_greedy_text_equals_transformers_until_the_margin_is_gone(recipe, bundled, sparsified):
    folder = sparsified(bundled, recipe)
    engine = relufy.Engine(folder)
    generation = engine.generate("The old man", max_new_tokens=120).run()
    prompt = engine.tokenizer.encode("The old man")
    logits = hf_logits(folder, prompt + generation.token_ids)[len(prompt) - 1 : -1]
    best = np.sort(logits, axis=1)[:, -2:]
    error = 1e-4 * np.linalg.norm(logits, axis=1)
    is_decided = best[:, 1] - best[:, 0] > error
    assert is_decided.sum() > 60
    assert np.array_equal(logits.argmax(1)[is_decided], np.array(generation.token_ids)[is_decided])


def test_a_shift_is_not_a_plain_relu(make_checkpoint, tmp_path):
    tokens = tokens_of(513, 20)
    plain, shifted = (
        all_at_once(relufy.Engine(pack(make_checkpoint(r), tmp_path / r)), tokens)
        for r in ("stage1", "shifted")
    )
    assert relative_error(shifted, plain) > 1e-3
