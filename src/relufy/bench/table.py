"""The rows that `relufy bench decode` shows of a result."""

from collections.abc import Mapping
from typing import Any


def contender_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """Return tokens/s, the ratio to own dense, MB a token, GB/s and its share of the probe, by contender."""
    dense, machine = found["dense_tokens_per_second"], found["machine_gb_per_second"]

    def row(name: str, speed: float, read: float | None = None) -> list[str]:
        rates = ["-"] * 3
        if read is not None:
            gb_per_second = read * speed / 1e9
            share = f"{gb_per_second / machine:.0%}" if machine else "-"
            rates = [f"{read / 1e6:.1f}", f"{gb_per_second:.1f}", share]
        return [name, f"{speed:.2f}", f"{speed / dense:.2f}", *rates]

    others = found["llama_cpp_tokens_per_second_by_type"]
    return [
        row("relufy, sparse", found["tokens_per_second"], found["bytes_per_token"]),
        row("relufy, own dense", dense, found["dense_bytes_per_token"]),
        *(row(f"llama.cpp {kind}", speed) for kind, speed in others.items()),
    ]


def fact_rows(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what belongs beside the speeds: the bound, the checks, memory and the machine, in words."""
    machine = found["machine"]
    density = ", ".join(f"{site} {value:.3f}" for site, value in found["density"].items()) or "all of 1"
    bound, reached = found["bound_vs_dense"], found["fraction_of_bound"]
    rows = {
        "bound by bytes": f"{bound:.2f}x own dense, {reached:.3f} of it reached",
        "x llama.cpp": _ratio(found["speedup_vs_llama_cpp"]),
        "own dense x llama.cpp": _ratio(found["dense_speedup_vs_llama_cpp"]),
        "density": density,
        "logits, relative error to the naive path": f"{found['logits_error']:.2g}",
        "bits per weight": f"{found['bits_per_weight']:.2f}",
        "peak memory / (file + keys and values)": _ratio(found["peak_resident_share"]),
        "in huge pages": f"{found['huge_page_share']:.0%}",
        "cold start to first token": f"{found['cold_start_seconds']:.2f} s",
        "probe": _rate(found["machine_gb_per_second"]),
        "machine": f"{machine['processor']}, {machine['cores']} cores, {machine['isa']}",
        "fits in the cache": "yes, so this says nothing about memory" if found["fits_in_cache"] else "no",
        "busy": "yes" if machine["was_busy"] else "no",
    }
    return list(rows.items())


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} GB/s"
