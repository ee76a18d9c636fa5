"""Self-written text: it is the model's own distribution, and it repeats exactly."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf

from families import FAMILIES, LLAMA_LIKE, build, family
from relufy.errors import UserError
from relufy.method import Relufication
from relufy.methods.sparsify import sparsify
from relufy.train import selftext
from relufy.train.selftext import write_windows

BOS = 0


@pytest.fixture
def model():
    return family("llama")


def next_token_probabilities(model, prefix: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([prefix])).logits[0, -1].double().softmax(-1).numpy()


def test_windows_open_with_bos_and_have_the_asked_shape(model) -> None:
    windows = write_windows(model, 5, 9, seed=0, bos=BOS)
    assert windows.shape == (5, 9) and windows.dtype == np.int64
    assert (windows[:, 0] == BOS).all() and windows.min() >= 0 and windows.max() < 53


def test_tokens_follow_the_model_s_own_distribution() -> None:
    """Pearson's chi-square of 20,000 pairs against the exact joint; a correct sampler fails once in 1e6."""
    model = build(hf.LlamaConfig(**(LLAMA_LIKE | {"vocab_size": 5})))
    with torch.no_grad():
        model.lm_head.weight *= 4
    model.generation_config.update(do_sample=True, top_k=1, temperature=0.1, repetition_penalty=9.0)
    windows = write_windows(model, 20_000, 3, seed=3, bos=BOS)
    first = next_token_probabilities(model, [BOS])
    joint = np.concatenate([first[a] * next_token_probabilities(model, [BOS, a]) for a in range(5)])
    counts = np.bincount(windows[:, 1] * 5 + windows[:, 2], minlength=25)
    expected = joint * 20_000
    cells = expected >= 5
    statistic = ((counts - expected)[cells] ** 2 / expected[cells]).sum()
    degrees = cells.sum() - 1
    assert joint.max() < 0.9 and degrees > 3, "the test needs a distribution with some spread"
    assert statistic < degrees + 5 * np.sqrt(2 * degrees) + 16


@pytest.mark.parametrize("name", FAMILIES)
def test_the_cached_steps_of_every_family_are_its_whole_forward_pass(name: str) -> None:
    """With its draws known, every token is what the logits of a forward pass without a cache give."""
    model = family(name)
    windows = write_windows(model, 3, 8, seed=1, bos=BOS)
    draws = np.random.default_rng(1).random((3, 7))
    with torch.no_grad():
        logits = model(torch.from_numpy(windows)).logits
    for position in range(7):
        expected = selftext._sample(logits[:, position], torch.from_numpy(draws[:, position]))
        assert windows[:, position + 1].tolist() == expected.tolist()


def test_an_end_of_sequence_token_does_not_end_a_window(model) -> None:
    eos = model.config.eos_token_id
    windows = write_windows(model, 200, 16, seed=0, bos=BOS)
    after = [window[list(window).index(eos) + 1 :] for window in windows if eos in window[:-3]]
    assert after and any(len(set(rest.tolist())) > 1 for rest in after)


def test_text_repeats_and_does_not_touch_the_global_random_state(model, own_cache: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = write_windows(model, 4, 7, seed=0, bos=BOS)
    assert torch.equal(torch.rand(3), expected)
    next((own_cache / "selftext").iterdir()).unlink()
    assert np.array_equal(first, write_windows(model, 4, 7, seed=0, bos=BOS))
    assert not np.array_equal(first, write_windows(model, 4, 7, seed=1, bos=BOS))


def test_more_windows_begin_with_the_same_ones(model, monkeypatch: pytest.MonkeyPatch) -> None:
    few = write_windows(model, 3, 7, seed=0, bos=BOS)
    monkeypatch.setattr(selftext, "MAX_BATCH", 2)
    assert np.array_equal(few, write_windows(model, 5, 7, seed=0, bos=BOS)[:3])


def test_the_cache_is_used_and_survives_damage(model, own_cache: Path) -> None:
    first = write_windows(model, 4, 7, seed=0, bos=BOS)
    (file,) = (own_cache / "selftext").iterdir()
    np.save(file, first * 0)
    assert not write_windows(model, 4, 7, seed=0, bos=BOS).any()
    file.write_bytes(file.read_bytes()[:50])
    assert np.array_equal(first, write_windows(model, 4, 7, seed=0, bos=BOS))


@pytest.mark.parametrize("change", ["weight", "activation", "config"])
def test_another_model_has_another_cache_entry(model, own_cache: Path, change: str) -> None:
    write_windows(model, 2, 5, seed=0, bos=BOS)
    other = copy.deepcopy(model)
    if change == "weight":
        with torch.no_grad():
            other.model.layers[1].mlp.down_proj.weight[3, 4] += 1e-3
    elif change == "activation":
        sparsify(other, Relufication(stage=2))
    else:
        other.config.rope_parameters["rope_theta"] = 500.0
    write_windows(other, 2, 5, seed=0, bos=BOS)
    assert len(list((own_cache / "selftext").iterdir())) == 2


def test_progress_rises_to_the_end_also_from_the_cache(model) -> None:
    seen: list[tuple[int, int]] = []
    for _ in range(2):
        seen.clear()
        write_windows(model, 6, 5, seed=0, bos=BOS, progress=lambda *call: seen.append(call))
        assert seen == sorted(seen) and seen[-1] == (6, 6)


def test_training_mode_is_restored(model) -> None:
    model.train()
    write_windows(model, 2, 4, seed=0, bos=BOS)
    assert model.training


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bos": None}, "no beginning-of-sequence token"),
        ({"count": 0}, "at least 1 window"),
        ({"window": 1}, "at least 2 tokens"),
        ({"window": 4096}, "longer than the 2048"),
    ],
)
def test_what_cannot_be_written_is_refused(model, own_cache: Path, arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        write_windows(model, **({"count": 2, "window": 4, "seed": 0, "bos": BOS} | arguments))
    assert not (own_cache / "selftext").exists()
