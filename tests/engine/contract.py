"""What the tests of the engine's contract share: texts, ways to run them, and how far two results differ."""

import numpy as np
import torch

import relufy


def tokens_of(vocab_size: int, count: int, seed: int = 0) -> list[int]:
    return [0, *np.random.default_rng(seed).integers(2, vocab_size, count - 1).tolist()]


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the worst ||a - b|| / ||b|| over positions."""
    return (np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)).max()


def hf_logits(folder, tokens: list[int]) -> np.ndarray:
    model = relufy.load_model(folder)
    with torch.inference_mode():
        return model(input_ids=torch.tensor([tokens])).logits[0].numpy()


def all_at_once(engine: relufy.Engine, tokens: list[int], prompt_length: int = 0) -> np.ndarray:
    return in_steps(engine, tokens, len(tokens), prompt_length)


def in_steps(engine: relufy.Engine, tokens: list[int], size: int, prompt_length: int = 0) -> np.ndarray:
    sequence = engine.new_sequence(prompt_length)
    parts = [tokens[i : i + size] for i in range(0, len(tokens), size)]
    logits = np.concatenate([engine.step([(sequence, part)], "all") for part in parts])
    engine.free(sequence)
    return logits


def assert_close(
    found: np.ndarray, expected: np.ndarray, margins: np.ndarray, cut: float = 1e-5, bound: float = 1e-4
) -> int:
    """Assert errors of at most `bound` per position, until a score lies within `cut` of its cut.

    That is contract (a) to (c): from there on masks may differ, and the past that later tokens attend to.
    Returns how many positions were compared.
    """
    ambiguous = np.flatnonzero(margins < cut)
    certain = int(ambiguous[0]) if len(ambiguous) else len(found)
    if certain:
        error = relative_error(found[:certain], expected[:certain])
        assert error < bound, f"{error} with margins of at least {margins[:certain].min()}"
    return certain


def bits(logits: np.ndarray) -> bytes:
    return logits.tobytes()
