"""`relufy bench kernels`: how much of the memory's bandwidth each kernel gets."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from relufy.bench.lock import bench_lock
from relufy.bench.machine import PACKAGES, BusyWatch, machine_facts
from relufy.bench.probe import measurement, read_bandwidth
from relufy.bench.shapes import find_shape
from relufy.document import heading
from relufy.engine.cpu import usable_cores
from relufy.errors import UserError

KERNELS = ("dot", "scatter")
"""dot: rows of a matrix, each multiplied with the input. scatter: stored columns added to the outputs."""
DTYPES = ("f32", "bf16", "int8", "int4")
DENSITIES = (1.0, 0.5, 0.1)
KERNEL_SECONDS = 0.3


@dataclass(frozen=True)
class KernelOptions:
    """What to measure: the matrices are the gates of a shape, as many as fill memory beyond the caches."""

    shape: str = "1.3b"
    dtypes: tuple[str, ...] = DTYPES
    threads: int | None = None
    turns: int = 5


def bench_kernels(
    options: KernelOptions, progress: Callable[[str, int, int], None] | None = None
) -> dict[str, Any]:
    """Return each kernel's GB/s at each density, medians of interleaved turns, beside the probe's."""
    shape, threads = find_shape(options.shape), options.threads or usable_cores()
    if unknown := [dtype for dtype in options.dtypes if dtype not in DTYPES]:
        raise UserError(f"there are no kernels for {unknown[0]!r}; there are {', '.join(DTYPES)}")
    cases = [(k, dtype, density) for k in KERNELS for dtype in options.dtypes for density in DENSITIES]
    kernel_bandwidth = measurement("kernel_bandwidth")
    samples: dict[Any, list[float]] = {case: [] for case in cases}
    probes: list[float] = []
    with bench_lock():
        watch = BusyWatch(())
        for turn in range(options.turns):
            probes.append(read_bandwidth(threads))
            for case in cases:
                kernel, dtype, density = case
                rows, columns = shape.intermediate_size, shape.hidden_size
                found = kernel_bandwidth(kernel, dtype, rows, columns, density, threads, KERNEL_SECONDS)
                samples[case].append(found)
            if progress:
                progress("measuring", turn + 1, options.turns)
        busy = watch.stop()
    machine = statistics.median(probes)
    return {
        **heading("relufy.bench", packages=PACKAGES),
        "benchmark": "kernels",
        "shape": shape.name,
        "threads": threads,
        "machine_gb_per_second": machine,
        "kernels": [_row(case, samples[case], machine) for case in cases],
        "probe_samples": probes,
        "machine": machine_facts() | busy,
    }


def _row(case: tuple[str, str, float], samples: list[float], machine: float) -> dict[str, Any]:
    kernel, dtype, density = case
    middle = statistics.median(samples)
    return {
        "kernel": kernel,
        "dtype": dtype,
        "density": density,
        "gb_per_second": middle,
        "fraction_of_machine": middle / machine,
        "samples": samples,
    }
