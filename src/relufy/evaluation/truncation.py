"""Requests of the harness that are longer than a model's positions: cut at the left, and counted."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class Truncation:
    """How many requests there were, and how many of them lost their beginning."""

    longest: int
    requests: int = 0
    cut: int = 0

    def fitted(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[int, ...]:
        """Return the context's end that fits with the continuation, as HFLM cuts it: one token at least."""
        self._count(len(context) + len(continuation) > self.longest + 1)
        whole = [*context, *continuation][-(self.longest + 1) :]
        return tuple(whole[: len(whole) - len(continuation)])

    def prompt(self, tokens: Sequence[int], max_new_tokens: int) -> tuple[int, ...]:
        """Return a prompt's end that leaves room for the new tokens."""
        room = self.longest - max_new_tokens
        self._count(len(tokens) > room)
        return tuple(tokens[-room:])

    def note(self) -> str:
        """Return what was cut, in a sentence, or nothing."""
        if not self.cut:
            return ""
        return (
            f"{self.cut} of {self.requests} requests were longer than the {self.longest} positions of the "
            "model and lost their beginning"
        )

    def _count(self, is_cut: bool) -> None:
        self.requests += 1
        self.cut += is_cut
