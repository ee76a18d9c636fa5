"""`relufy bench decode`: tokens per second of the sparse engine beside its own dense pack and llama.cpp.

All contenders take turns in one run, each in a process of its own, at the same context, one token at a time;
a probe of the memory's bandwidth takes turns with them. See result.py for what the figures mean.
"""

import shlex
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from relufy.bench.first_token import cold_start_seconds
from relufy.bench.llama_cpp import require_llama_cpp
from relufy.bench.lock import bench_lock
from relufy.bench.machine import BusyWatch, last_level_cache_bytes, machine_facts, versions
from relufy.bench.models import BenchFiles, prepare_files
from relufy.bench.options import DecodeOptions
from relufy.bench.probe import measurement
from relufy.bench.random_model import Progress
from relufy.bench.result import (
    DENSE,
    LLAMA_CPP,
    PROBE,
    SPARSE,
    memory_figures,
    relative_error,
    summarize,
)
from relufy.bench.worker import Worker
from relufy.engine.cpu import usable_cores
from relufy.engine.naive import NaiveDecoder
from relufy.engine.packed_file import read_header

KV_DTYPE = "f16"
"""llama.cpp's default, so that all contenders read as much of the past."""
CHECKED_TOKENS = 8
"""How many tokens' logits are compared with the naive path's."""
REST_SECONDS = 0.03
"""Between turns, so that the last contender's threads have parked before the next one starts."""

Workers = dict[str, Worker]


def bench_decode(options: DecodeOptions, progress: Progress | None = None) -> dict[str, Any]:
    """Run a decode benchmark and return its result as plain data.

    Raises UserError if another benchmark is running or the contenders do not fit into memory, and ImportError
    if llama.cpp is asked for and not installed.
    """
    report = progress or (lambda task, done, total: None)
    if options.against == "llama.cpp":
        require_llama_cpp()
    measurement("read_bandwidth")
    threads = options.threads or usable_cores()
    with bench_lock():
        files = prepare_files(options, report)
        cold_starts = cold_start_seconds(files.sparse, threads)
        checks = check_logits(files, threads, options.seed)
        with contenders(files, threads, options) as workers:
            turns, busy = run_turns(workers, options, _vocab_size(files), report)
            facts = {name: worker.call("facts") for name, worker in workers.items()}
    figures, cache_bytes = summarize(turns), last_level_cache_bytes() or 0
    return {
        "benchmark": "decode",
        "label": options.label,
        "options": asdict(options) | {"threads": threads, "kv_dtype": KV_DTYPE},
        **figures,
        "fits_in_cache": figures["dense_bytes_per_token"] <= cache_bytes,
        **checks,
        **memory_figures(
            read_header(files.sparse), facts[SPARSE]["peak_resident_bytes"], _positions(options)
        ),
        "huge_page_share": facts[SPARSE]["huge_page_share"],
        "file_bytes_by_contender": _file_bytes(files),
        "cold_start_seconds": statistics.median(cold_starts),
        "cold_start_samples": cold_starts,
        "machine": machine_facts() | {"isa": facts[SPARSE]["isa"]} | busy,
        "versions": versions(),
        "command": shlex.join(["relufy", *sys.argv[1:]]),
        "facts": facts,
        "turns": turns,
    }


@contextmanager
def contenders(files: BenchFiles, threads: int, options: DecodeOptions) -> Iterator[Workers]:
    """Start the contenders' processes, and end them."""
    with ExitStack() as stack:

        def start(contender: str, **arguments: Any) -> Worker:
            target = f"relufy.bench.contenders:{contender}"
            return stack.enter_context(Worker(target, threads=threads, **arguments))

        shared: dict[str, Any] = {"positions": _positions(options)}
        workers = {PROBE: start("ProbeContender")}
        for name, path in ((SPARSE, files.sparse), (DENSE, files.dense)):
            own = {"path": str(path), "kv_dtype": KV_DTYPE, "load": options.load}
            workers[name] = start("EngineContender", **own, **shared)
        for kind, path in files.llama_cpp.items():
            workers[LLAMA_CPP + kind] = start("LlamaCppContender", path=str(path), **shared)
        yield workers


def check_logits(files: BenchFiles, threads: int, seed: int) -> dict[str, float]:
    """Compare the sparse engine's logits with the naive path's on its file, and with the dense pack's.

    Keys and values are in f32 here, as they are in the naive path.
    """
    tokens = np.random.default_rng([seed, 0]).integers(0, _vocab_size(files), CHECKED_TOKENS).tolist()

    def logits(path: Path) -> list[list[float]]:
        shared: dict[str, Any] = {"threads": threads, "positions": CHECKED_TOKENS, "kv_dtype": "f32"}
        with Worker("relufy.bench.contenders:EngineContender", path=str(path), **shared) as worker:
            return worker.call("logits", tokens=tokens)

    sparse, dense = logits(files.sparse), logits(files.dense)
    naive = NaiveDecoder(files.sparse, emulate=True).logits(tokens)
    return {
        "logits_error": relative_error(sparse, naive),
        "logits_difference_from_dense": relative_error(sparse, dense),
    }


def run_turns(
    workers: Workers, options: DecodeOptions, vocab_size: int, progress: Progress
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Any]]:
    """Give all contenders the same prompt, let them take turns, and say who else was busy meanwhile.

    All write from the same token, another one each turn, in an order that turns round each time.
    """
    random = np.random.default_rng([options.seed, 1])
    prompt = random.integers(0, vocab_size, options.context).tolist()
    for name in workers.keys() - {PROBE}:
        progress(f"reading {options.context} tokens", 0, 1)
        workers[name].call("read", tokens=prompt)
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    watch = BusyWatch([worker.pid for worker in workers.values()])
    for index, token in enumerate(random.integers(0, vocab_size, options.turns + 1).tolist()):
        for name in list(workers)[:: -1 if index % 2 else 1]:
            time.sleep(REST_SECONDS)
            turns[name].append(workers[name].call("turn", token=token, count=options.tokens))
        progress("taking turns", index, options.turns)
    return turns, watch.stop()


def _positions(options: DecodeOptions) -> int:
    return options.context + options.tokens


def _vocab_size(files: BenchFiles) -> int:
    return int(read_header(files.sparse).numbers["vocab_size"])


def _file_bytes(files: BenchFiles) -> dict[str, int]:
    named = {SPARSE: files.sparse, DENSE: files.dense}
    named |= {LLAMA_CPP + kind: path for kind, path in files.llama_cpp.items()}
    return {name: path.stat().st_size for name, path in named.items()}
