"""Runs a packed model. Imports no torch."""

from relufy.engine.engine import Engine
from relufy.engine.generate import Generation, GenerationStats
from relufy.engine.pack import pack

__all__ = ["Engine", "Generation", "GenerationStats", "pack"]
