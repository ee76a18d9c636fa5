"""`relufy bench measure`: how much longer the default metrics take than the passes that they look at."""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from relufy.bench.lock import bench_lock
from relufy.bench.machine import BusyWatch, machine_facts
from relufy.bench.shapes import find_shape
from relufy.document import heading

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class OverheadOptions:
    """A model, or random weights of a shape, and `stage` to relufy it in memory (0: as it is)."""

    model: str = "bundled"
    shape: str | None = None
    stage: int = 2
    windows: int = 16
    window: int = 256
    batch_size: int = 16
    turns: int = 5
    device: str = "cpu"


def bench_overhead(options: OverheadOptions, progress: Progress | None = None) -> dict[str, Any]:
    """Time plain forward passes with losses and `relufy measure`'s pass in turns, on random tokens.

    Raises UserError if another benchmark is running.
    """
    import torch

    model = _model(options)
    ids = np.random.default_rng(0).integers(3, model.config.vocab_size, (options.windows, options.window))
    runs = {"plain": _plain, "measure": _measure}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    with bench_lock():
        watch = BusyWatch(())
        for turn in range(options.turns + 1):
            for name, run in runs.items():
                seconds[name].append(_timed(run, model, ids, options.batch_size))
            if progress:
                progress("measuring", turn + 1, options.turns + 1)
        busy = watch.stop()
    plain, measured = (times[1:] for times in seconds.values())  # the first turn warms up
    return {
        **heading("relufy.bench"),
        "benchmark": "measure",
        "label": options.shape or options.model,
        "options": asdict(options),
        "threads": torch.get_num_threads(),
        "parameters": model.num_parameters(),
        "plain_tokens_per_second": ids.size / statistics.median(plain),
        "tokens_per_second": ids.size / statistics.median(measured),
        "overhead": statistics.median(m / p for m, p in zip(measured, plain, strict=True)),
        "seconds": seconds,
        "machine": machine_facts() | busy,
    }


def _model(options: OverheadOptions) -> "PreTrainedModel":
    from relufy.method import Relufication
    from relufy.methods.sparsify import sparsify
    from relufy.model.checkpoint import load_model

    model = load_model(options.model) if options.shape is None else _random_model(options.shape)
    if options.stage:
        sparsify(model, Relufication(stage=2 if options.stage == 2 else 1))
    return model.to(options.device).eval()  # type: ignore[arg-type]


def _random_model(shape: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**find_shape(shape).config()), dtype=torch.float32)


def _timed(run: Callable[..., None], model: "PreTrainedModel", ids: np.ndarray, batch_size: int) -> float:
    from relufy.measure.batches import dealt_batches

    start = time.perf_counter()
    run(model, dealt_batches(iter(ids), batch_size, model.config.vocab_size))
    return time.perf_counter() - start


def _plain(model: "PreTrainedModel", batches: Any) -> None:
    from relufy.measure.counting_pass import logits_of
    from relufy.measure.losses import LossCounts
    from relufy.measure.quality import evaluating

    losses = LossCounts()
    with evaluating(model):
        for batch in batches:
            losses.add(batch, logits_of(model, batch))


def _measure(model: "PreTrainedModel", batches: Any) -> None:
    from relufy.measure.counting_pass import CountingPass

    CountingPass(model).run(batches, lambda task, done, total: None)
