"""`relufy bench crossover`: from which share of rows on this machine had better read all of them.

A product with listed rows of random matrices is timed from a great share down, until it is faster than the
same with all rows. It is measured once and kept (engine/crossover.py); engines that open later take it.
"""

from collections.abc import Callable, Mapping
from typing import Any

from relufy.bench.lock import bench_lock
from relufy.bench.machine import PACKAGES, BusyWatch, machine_facts
from relufy.bench.probe import measurement
from relufy.document import heading
from relufy.engine.cpu import own_isa, usable_cores
from relufy.engine.crossover import DTYPES, KERNELS, TOKENS, Crossover, load_crossover, save_crossover

ROWS, COLUMNS = 2048, 2048
"""Of the matrices that are measured."""
LEAST = 0.3
"""The least share that is measured: where listed rows are slower even there, fewer may still be faster."""
SECONDS = 0.05
"""For each kernel, type, number of tokens, and share of the rows."""


def bench_crossover(
    threads: int | None = None, again: bool = False, progress: Callable[[str, int, int], None] | None = None
) -> dict[str, Any]:
    """Return the crossover of this machine, measured now if it was not before, or if it is asked for again.

    `is_new` says which. Raises UserError if another benchmark is running.
    """
    count = threads or usable_cores()
    measurement("measure_crossover")
    found, busy = None if again else load_crossover(count, own_isa()), {"was_busy": False}
    is_new = found is None
    if found is None:
        with bench_lock():
            watch = BusyWatch(())
            found = measure(count, progress or (lambda task, done, total: None))
            busy = watch.stop()
        save_crossover(found, count, own_isa())
    return {
        **heading("relufy.bench", packages=PACKAGES),
        "benchmark": "crossover",
        "threads": count,
        "is_new": is_new,
        "crossover": {k: {d: _by_name(shares) for d, shares in rows.items()} for k, rows in found.items()},
        "machine": machine_facts() | {"isa": own_isa()} | busy,
    }


def _by_name(shares: Mapping[int, float]) -> dict[str, float]:
    return {str(tokens): share for tokens, share in shares.items()}


def measure(threads: int, progress: Callable[[str, int, int], None]) -> Crossover:
    """Return the share of rows, by kernel, type and tokens, above which all rows are read faster."""
    crossover: dict[str, dict[str, dict[int, float]]] = {}
    share_of = measurement("measure_crossover")
    total = len(KERNELS) * len(DTYPES)
    for done, (kernel, dtype) in enumerate((kernel, dtype) for kernel in KERNELS for dtype in DTYPES):
        progress("measuring", done, total)
        crossover.setdefault(kernel, {})[dtype] = {
            tokens: max(LEAST, share_of(kernel, dtype, ROWS, COLUMNS, tokens, threads, SECONDS))
            for tokens in TOKENS
        }
    progress("measuring", total, total)
    return crossover
