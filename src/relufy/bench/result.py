"""From the raw figures of all turns to those that are quoted: medians, ratios, and the bound by bytes."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from relufy.engine.packed_file import Header

SPARSE, DENSE, PROBE = "sparse", "dense", "probe"
LLAMA_CPP = "llama.cpp "
"""Begins the name of each of llama.cpp's contenders; its type follows."""

Turns = Mapping[str, Sequence[Mapping[str, Any]]]
"""Contender -> its turns (see contenders.py), the first of which is the warm-up."""


def summarize(turns: Turns) -> dict[str, Any]:
    """Return the figures of a decode benchmark. The warm-up counts for nothing.

    `bound_vs_dense` is how many times fewer bytes the sparse pack read for a token than the dense one:
    weights with their scales, lists of active entries, keys and values. `fraction_of_bound` is how much of
    that became speed.
    """
    counted = {name: list(rows)[1:] for name, rows in turns.items()}
    speed = {name: tokens_per_second(rows) for name, rows in counted.items() if name != PROBE}
    sparse_bytes, dense_bytes = (bytes_per_token(counted[name]) for name in (SPARSE, DENSE))
    speedup, bound = speed[SPARSE] / speed[DENSE], dense_bytes / sparse_bytes
    machine = _machine(counted.get(PROBE, []))
    dense_gb_per_second = dense_bytes * speed[DENSE] / 1e9
    llama_cpp = {name.removeprefix(LLAMA_CPP): value for name, value in speed.items() if LLAMA_CPP in name}
    baseline = next(iter(llama_cpp.values()), None)
    return {
        "tokens_per_second": speed[SPARSE],
        "dense_tokens_per_second": speed[DENSE],
        "llama_cpp_tokens_per_second": baseline,
        "llama_cpp_tokens_per_second_by_type": llama_cpp,
        "speedup_vs_dense": speedup,
        "speedup_vs_llama_cpp": speed[SPARSE] / baseline if baseline else None,
        "dense_speedup_vs_llama_cpp": speed[DENSE] / baseline if baseline else None,
        "bound_vs_dense": bound,
        "fraction_of_bound": speedup / bound,
        "bytes_per_token": sparse_bytes,
        "dense_bytes_per_token": dense_bytes,
        "gb_per_second": sparse_bytes * speed[SPARSE] / 1e9,
        "dense_gb_per_second": dense_gb_per_second,
        "machine_gb_per_second": machine,
        "dense_fraction_of_machine": dense_gb_per_second / machine if machine else None,
        "density": mean_density(counted[SPARSE]),
    }


def tokens_per_second(turns: Sequence[Mapping[str, Any]]) -> float:
    """Return the median over turns."""
    return statistics.median(turn["tokens"] / turn["seconds"] for turn in turns)


def bytes_per_token(turns: Sequence[Mapping[str, Any]]) -> float:
    """Return what the engine counted, over all turns: weights and scales, lists, keys and values."""
    read = sum(turn["weight_bytes"] + turn["kv_bytes"] for turn in turns)
    return read / sum(turn["tokens"] for turn in turns)


def mean_density(turns: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the share that was used at each site with zeros, over all layers and turns."""
    sites = turns[0]["density"]
    return {
        site: statistics.fmean(value for turn in turns for value in turn["density"].get(site, [1.0]))
        for site in sites
    }


def relative_error(found: Any, reference: Any) -> float:
    """Return the largest of the positions' ||found - reference|| / ||reference||."""
    found, reference = np.asarray(found, np.float64), np.asarray(reference, np.float64)
    errors = np.linalg.norm(found - reference, axis=-1) / np.linalg.norm(reference, axis=-1)
    return float(errors.max())


def memory_figures(header: Header, peak_resident_bytes: int | None, positions: int) -> dict[str, Any]:
    """Return bits per weight, and the sparse contender's peak memory beside what it has to hold: the file,
    and keys and values of two bytes."""
    shape = header.numbers
    keys_and_values = 2 * 2 * shape["num_layers"] * shape["num_kv_heads"] * shape["head_dim"] * positions
    needed = header.file_bytes + int(keys_and_values)
    return {
        "bits_per_weight": header.bits_per_weight(),
        "file_bytes": header.file_bytes,
        "kv_cache_bytes": int(keys_and_values),
        "peak_resident_bytes": peak_resident_bytes,
        "peak_resident_share": peak_resident_bytes / needed if peak_resident_bytes else None,
    }


def _machine(turns: Sequence[Mapping[str, Any]]) -> float | None:
    return statistics.median(turn["gb_per_second"] for turn in turns) if turns else None
