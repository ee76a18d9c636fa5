"""From the raw figures of all turns to those that are quoted: medians, ratios, and the bound by bytes."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from relufy.engine.packed_file import BUNDLE, COLUMNS, ROWS, Header

SPARSE, DENSE, PROBE, BLAS = "sparse", "dense", "probe", "blas"
EXACT = "exact"
"""The sparse contender's file without reuse, where that has it."""
LLAMA_CPP = "llama.cpp "
"""Begins the name of each of llama.cpp's contenders; its type follows."""

Turn = Mapping[str, Any]
Turns = Mapping[str, Sequence[Turn]]
"""Contender -> its turns (see contenders.py), the first of which is the warm-up."""


def summarize(turns: Turns) -> dict[str, Any]:
    """Return the figures of a decode benchmark. The warm-up counts for nothing.

    `bound_vs_dense` is how many times fewer bytes the sparse pack read for a token than the dense one:
    weights with their scales, lists of active entries, keys and values. `fraction_of_bound` is how much of
    that became speed.
    """
    counted = without_warm_up(turns)
    speeds = speed_figures(counted)
    sparse_bytes, dense_bytes = (bytes_per_token(counted[name]) for name in (SPARSE, DENSE))
    bound, machine = dense_bytes / sparse_bytes, probed(counted)
    dense_gb_per_second = dense_bytes * speeds["dense_tokens_per_second"] / 1e9
    return (
        speeds
        | reuse_figures(counted)
        | predictor_figures(counted)
        | {
            "bound_vs_dense": bound,
            "fraction_of_bound": speeds["speedup_vs_dense"] / bound,
            "bytes_per_token": sparse_bytes,
            "dense_bytes_per_token": dense_bytes,
            "gb_per_second": sparse_bytes * speeds["tokens_per_second"] / 1e9,
            "dense_gb_per_second": dense_gb_per_second,
            "machine_gb_per_second": machine,
            "dense_fraction_of_machine": dense_gb_per_second / machine if machine else None,
            "density": mean_density(counted[SPARSE]),
        }
    )


def predictor_figures(turns: Turns) -> dict[str, Any]:
    """Return what the predictor named of the neurons, and what of it was active; nothing without one."""
    rows = [turn["predictor"] for turn in turns[SPARSE] if "predictor" in turn]
    return (
        {"predictor": {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}} if rows else {}
    )


def reuse_figures(turns: Turns) -> dict[str, Any]:
    """Return what reuse computed of the neurons, and the exact mode's speed beside it; nothing without it."""
    if EXACT not in turns:
        return {}
    rows = [turn["reuse"] for turn in turns[SPARSE]]
    means = {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}
    exact = tokens_per_second(turns[EXACT])
    return {
        "reuse": means,
        "exact_tokens_per_second": exact,
        "exact_bytes_per_token": bytes_per_token(turns[EXACT]),
    }


def without_warm_up(turns: Turns) -> dict[str, list[Turn]]:
    """Return all turns but the first of each contender."""
    return {name: list(rows)[1:] for name, rows in turns.items()}


def speed_figures(turns: Turns) -> dict[str, Any]:
    """Return tokens per second of each contender, medians over turns, and their ratios.

    llama.cpp's first type is the one that ratios are to.
    """
    sparse, dense = tokens_per_second(turns[SPARSE]), tokens_per_second(turns[DENSE])
    llama_cpp = {
        name.removeprefix(LLAMA_CPP): tokens_per_second(rows)
        for name, rows in turns.items()
        if name.startswith(LLAMA_CPP)
    }
    baseline = next(iter(llama_cpp.values()), None)
    return {
        "tokens_per_second": sparse,
        "dense_tokens_per_second": dense,
        "llama_cpp_tokens_per_second": baseline,
        "llama_cpp_tokens_per_second_by_type": llama_cpp,
        "speedup_vs_dense": sparse / dense,
        "speedup_vs_llama_cpp": sparse / baseline if baseline else None,
        "dense_speedup_vs_llama_cpp": dense / baseline if baseline else None,
    }


def tokens_per_second(turns: Sequence[Turn]) -> float:
    """Return the median over turns."""
    return statistics.median(turn["tokens"] / turn["seconds"] for turn in turns)


def bytes_per_token(turns: Sequence[Turn]) -> float:
    """Return what the engine counted, over all turns: weights and scales, lists, keys and values."""
    read = sum(turn["weight_bytes"] + turn["kv_bytes"] for turn in turns)
    return read / sum(turn["tokens"] for turn in turns)


def probed(turns: Turns) -> float | None:
    """Return the memory's GB/s, the median over the probe's turns, or None without a probe."""
    rows = turns.get(PROBE)
    return statistics.median(turn["gb_per_second"] for turn in rows) if rows else None


def mean_density(turns: Sequence[Turn], key: str = "density") -> dict[str, float]:
    """Return the share that was used at each site with zeros, over all layers and turns."""
    sites = turns[0][key]
    return {
        site: statistics.fmean(value for turn in turns for value in turn[key].get(site, [1.0]))
        for site in sites
    }


def macs_per_token(header: Header) -> int:
    """Return the multiply-adds of a token in the layers' matrices, were none left out.

    The head is not counted, which a prompt's last token alone goes through, nor is attention.
    """
    layers = [entry for name, entry in header.tensors.items() if name.startswith("layers.")]
    return sum(entry.parameters for entry in layers if entry.layout in (ROWS, COLUMNS, BUNDLE))


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
