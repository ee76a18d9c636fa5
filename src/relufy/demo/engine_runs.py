"""The demo's last steps, on the engine: pack each variant, take turns in generating, continue the prompt."""

from collections.abc import Sequence
from pathlib import Path

from relufy.demo.result import Variant
from relufy.demo.watch import Watch
from relufy.engine import Engine, pack

ROUNDS = 25
"""Timed runs of each variant."""
TIMED_TOKENS = 96
SHOWN_TOKENS = 60


def pack_variant(variant: Variant, checkpoint: Path, packed: Path) -> None:
    """Pack a checkpoint and note the file's name in the variant."""
    pack(checkpoint, packed)
    variant.packed = packed.name


def take_turns(variants: Sequence[Variant], folder: Path, prompt: str, watch: Watch) -> None:
    """Let each variant continue the prompt, then time them in turns, so that noise hits all alike."""
    engines = [Engine(folder / variant.packed) for variant in variants]
    for turn in range(ROUNDS + 1):
        for variant, engine in zip(variants, engines, strict=True):
            generation = engine.generate(prompt, max_new_tokens=TIMED_TOKENS if turn else SHOWN_TOKENS)
            text = "".join(generation)
            if turn:
                variant.tokens_per_second.append(generation.stats.decode_tokens_per_second)
            else:
                variant.text = text
        watch.progress("generating in turns", turn, ROUNDS)
