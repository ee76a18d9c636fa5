"""Benchmarks with made-up contenders: the course of a run without its speed, in milliseconds."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from relufy.bench import batch, decode, lock, logits, models, prefill, turns
from relufy.bench.models import BenchFiles
from relufy.bench.options import BenchOptions
from relufy.bench.random_model import open_weights
from relufy.engine.naive import NaiveDecoder

SPEEDS = {"sparse": 0.5, "dense": 1.0, "llama.cpp Q8_0": 2.0}
"""Seconds that a token takes."""
MACHINE_KEYS = {
    "processor",
    "cores",
    "caches",
    "memory_bytes",
    "isa",
    "was_busy",
    "other_cores",
    "stolen_share",
    "load_before",
    "load_after",
    "other_processes",
}
SPEED_KEYS = {
    "tokens_per_second",
    "dense_tokens_per_second",
    "llama_cpp_tokens_per_second",
    "speedup_vs_dense",
    "speedup_vs_llama_cpp",
    "dense_speedup_vs_llama_cpp",
}
DOCUMENT_KEYS = {
    "kind",
    "version",
    "benchmark",
    "label",
    "options",
    "logits_error",
    "logits_tokens_compared",
    "logits_tokens_in_doubt",
    "machine_gb_per_second",
    "bits_per_weight",
    "peak_resident_share",
    "machine",
    "versions",
    "command",
    "facts",
    "turns",
}
"""The keys of every benchmark of a model."""


class FakeWorker:
    """Answers as a contender does, from a table of seconds."""

    calls: list[tuple[str, str, dict[str, Any]]] = []  # noqa: RUF012 (shared on purpose: it records the order)

    def __init__(self, target: str, path: str = "", **arguments: Any):
        self._path, self.pid = Path(path), 0
        self.name = next((name for name in ("probe", "blas") if name in target.lower()), self._path.stem)

    def __enter__(self) -> "FakeWorker":
        return self

    def __exit__(self, *_: object) -> None: ...

    def call(self, method: str, **arguments: Any) -> Any:
        FakeWorker.calls.append((self.name, method, arguments))
        return getattr(self, method)(**arguments)

    def read(self, prompts: Sequence[Sequence[int]]) -> None: ...

    def decode(self, token: int, count: int) -> dict[str, Any]:
        return self._turn(count, count)

    def prefill(self, tokens: Sequence[int]) -> dict[str, Any]:
        return self._turn(len(tokens), 1)

    def batch(self, steps: Sequence[Sequence[int]]) -> dict[str, Any]:
        slower = 3 if len(steps[0]) == 4 and self.name == "sparse" else 1
        found = self._turn(len(steps) * len(steps[0]), len(steps))
        return found | {"seconds": found["seconds"] * slower}

    def logits(self, tokens: list[int], **step: Any) -> list[list[float]]:
        return NaiveDecoder(self._path).logits(tokens).tolist()

    def facts(self) -> dict[str, Any]:
        return {"isa": "portable", "threads": 1, "peak_resident_bytes": 1 << 27, "huge_page_share": 0.5}

    def _turn(self, num_tokens: int, steps: int) -> dict[str, Any]:
        if self.name == "probe":
            return {"seconds": 0.1, "gb_per_second": 10.0}
        if self.name == "blas":
            return {"seconds": 0.1, "gmacs_per_second": 100.0}
        densities = {"density": {"neuron": [0.1]}, "union_density": {"neuron": [0.3]}}
        read = {"weight_bytes": 100 * num_tokens, "kv_bytes": 0, "steps": steps, **densities}
        return {"seconds": SPEEDS[self.name] * num_tokens, "tokens": num_tokens, **read}


@pytest.fixture
def own_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lock a file of the test's own, not that of the benchmarks that users run."""
    monkeypatch.setattr(lock, "lock_path", lambda: tmp_path / "bench.lock")


@pytest.fixture
def quick_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the probe of a real run read a megabyte for a moment."""
    monkeypatch.setattr(turns, "PROBE_BYTES", 1 << 20)
    monkeypatch.setattr(turns, "PROBE_SECONDS", 0.01)


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, own_lock: None) -> type[FakeWorker]:
    """Give every benchmark the tiny shape's files, and contenders that are made up."""
    for module in (turns, logits):
        monkeypatch.setattr(module, "Worker", FakeWorker)
    monkeypatch.setattr(turns, "measurement", lambda name: None)
    monkeypatch.setattr(turns, "require_llama_cpp", lambda: None)
    monkeypatch.setattr(decode, "cold_start_seconds", lambda file, threads: [0.3, 0.1, 0.2])
    for module in (decode, prefill, batch):
        monkeypatch.setattr(module, "prepare_files", lambda *arguments: named_files(tmp_path, *arguments))
    FakeWorker.calls.clear()
    return FakeWorker


def named_files(folder: Path, options: BenchOptions, progress: Callable[..., None]) -> BenchFiles:
    """Return the files of a run without llama.cpp, under the contenders' names, and a made-up GGUF."""
    without = type(options)(shape="tiny", tokens=8, dtype=options.dtype, against="none")
    made = models.prepare_files(without, progress)
    sparse, dense = folder / "sparse.relufy", folder / "dense.relufy"
    gguf = folder / "llama.cpp Q8_0.gguf"
    sparse.write_bytes(made.sparse.read_bytes())
    dense.write_bytes(made.dense.read_bytes())
    gguf.write_bytes(b"GGUF")
    return BenchFiles(sparse, dense, {"Q8_0": gguf} if options.against == "llama.cpp" else {})


def turns_of(calls: Sequence[tuple[str, str, dict[str, Any]]], kind: str) -> list[str]:
    """Return the names of those that took a kind of turn, in their order."""
    return [name for name, method, _ in calls if method == kind]


def written(model: Path, folder: Path) -> Path:
    """Write the checkpoint of a random model into a folder, for those who can't draw its weights."""
    weights = open_weights(model)
    tensors = {name: torch.from_numpy(weights.read(name)).bfloat16() for name in weights.names()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_bytes((model / "config.json").read_bytes())
    return folder
