"""Contenders that take turns: one process each, in an order that turns round each time."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from relufy.bench.llama_cpp import require_llama_cpp
from relufy.bench.machine import BusyWatch
from relufy.bench.models import BenchFiles
from relufy.bench.options import BenchOptions
from relufy.bench.probe import PROBE_BYTES, PROBE_SECONDS, measurement
from relufy.bench.random_model import Progress
from relufy.bench.result import BLAS, DENSE, EXACT, LLAMA_CPP, PROBE, SPARSE
from relufy.bench.worker import Worker
from relufy.engine.cpu import usable_cores

KV_DTYPE = "f16"
"""llama.cpp's default, so that all contenders read as much of the past."""
REST_SECONDS = 0.2
"""Between turns, so that the last contender's threads have parked before the next one starts."""

Workers = dict[str, Worker]
Rows = dict[str, list[dict[str, Any]]]
"""Contender -> its turns, in their order."""


def prerequisites(options: BenchOptions) -> int:
    """Check what a benchmark needs before any work, and return how many threads it is for.

    Raises ImportError if llama.cpp is asked for and not installed.
    """
    if options.against == "llama.cpp":
        require_llama_cpp()
    measurement("read_bandwidth")
    return options.threads or usable_cores()


@contextmanager
def contenders(
    files: BenchFiles, threads: int, options: BenchOptions, has_blas: bool = False
) -> Iterator[Workers]:
    """Start the contenders' processes, and end them."""
    with ExitStack() as stack:

        def start(contender: str, **arguments: Any) -> Worker:
            return stack.enter_context(Worker(f"relufy.bench.{contender}", threads=threads, **arguments))

        shared: dict[str, Any] = {"positions": options.positions, "sequences": options.sequences}
        workers = {PROBE: start("contenders:ProbeContender", num_bytes=PROBE_BYTES, seconds=PROBE_SECONDS)}
        if has_blas:
            workers[BLAS] = start("blas:BlasContender")
        reuse = getattr(options, "reuse", None)
        named = {SPARSE: files.sparse, DENSE: files.dense} | ({EXACT: files.sparse} if reuse else {})
        for name, path in named.items():
            own = {"path": str(path), "kv_dtype": KV_DTYPE, "load": options.load}
            if name == SPARSE and getattr(options, "predictor", None) is not None:
                own["predictor"] = True
            own |= {"reuse": reuse.document()} if reuse and name == SPARSE else {}
            workers[name] = start("contenders:EngineContender", **own, **shared)
        for kind, path in files.llama_cpp.items():
            workers[LLAMA_CPP + kind] = start("contenders:LlamaCppContender", path=str(path), **shared)
        yield workers


def read_prompts(workers: Workers, prompts: Sequence[Sequence[int]], progress: Progress) -> None:
    """Give all contenders the same prompts, one for each sequence."""
    total = sum(len(prompt) for prompt in prompts)
    for done, worker in enumerate(workers.values()):
        progress(f"reading {total} tokens", done, len(workers))
        worker.call("read", prompts=prompts)
    progress(f"reading {total} tokens", len(workers), len(workers))


def take_turns(
    workers: Workers, kind: str, rounds: Sequence[Sequence[Mapping[str, Any]]], progress: Progress
) -> tuple[Rows, dict[str, Any]]:
    """Let all contenders take the turns of each round, and say who else was busy meanwhile.

    `kind` is the contenders' method, and a round holds the arguments of one turn or several, of which the
    probe takes the first alone. The first round is the warm-up.
    """
    rows: Rows = {name: [] for name in workers}
    watch = BusyWatch([worker.pid for worker in workers.values()])
    for index, turns in enumerate(rounds):
        names = list(workers)[:: -1 if index % 2 else 1]
        for place, arguments in enumerate(turns):
            for name in names if place == 0 else [name for name in names if name != PROBE]:
                time.sleep(REST_SECONDS)
                rows[name].append(workers[name].call(kind, **arguments))
        progress("taking turns", index, len(rounds) - 1)
    return rows, watch.stop()
