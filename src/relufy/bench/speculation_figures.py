"""From the turns of a speculation benchmark to its figures: what was measured, beside what theory says.

Theory is that of measure/speculation_theory.py, where reading is all the work; its shares are of a dense
token's bytes, as the engine counted them, so that they hold for any kind of sparsity.
"""

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from relufy.bench.result import (
    DENSE,
    SPARSE,
    Turn,
    Turns,
    bytes_per_token,
    mean_density,
    probed,
    tokens_per_second,
    without_warm_up,
)
from relufy.measure.speculation_theory import (
    Costs,
    best_gamma,
    gains,
    interpolated,
    most_from_drafts,
    random_union_sparsity,
)


def speculation_figures(turns: Turns, gammas: Sequence[int]) -> dict[str, Any]:
    """Return the figures of plain decoding and, under `by_gamma`, of each gamma.

    The turns of a round are plain, then one for each gamma; a contender without a draft has None for those.
    """
    kinds = 1 + len(gammas)
    by_place = {
        name: [list(turns[name])[place::kinds][1:] for place in range(kinds)] for name in (SPARSE, DENSE)
    }
    plain = _plain(by_place[SPARSE][0], by_place[DENSE][0])
    by_gamma = {
        str(gamma): _figures(gamma, place, by_place, plain) for place, gamma in enumerate(gammas, start=1)
    }
    return {
        **plain,
        "by_gamma": by_gamma,
        "best_gamma": _best(by_gamma, plain),
        "machine_gb_per_second": probed(without_warm_up(turns)),
    }


def _plain(sparse: Sequence[Turn], dense: Sequence[Turn]) -> dict[str, Any]:
    speed, dense_speed = tokens_per_second(sparse), tokens_per_second(dense)
    density = mean_density(sparse)
    return {
        "tokens_per_second": speed,
        "dense_tokens_per_second": dense_speed,
        "speedup_vs_dense": speed / dense_speed,
        "bytes_per_token": bytes_per_token(sparse),
        "dense_bytes_per_token": bytes_per_token(dense),
        "bytes_skipped": _skipped(bytes_per_token(sparse), bytes_per_token(dense)),
        "density": density,
        "neuron_sparsity": 1 - density.get("neuron", 1.0),
    }


def _figures(gamma: int, place: int, by_place: dict[str, Any], plain: dict[str, Any]) -> dict[str, Any]:
    """Return what was measured at one gamma, and what theory says of it."""
    rows = by_place[SPARSE][place]
    dense_rows = [row for row in by_place[DENSE][place] if row is not None]
    counts, size = _counts(rows), gamma + 1
    speed = tokens_per_second(rows)
    dense_speed = tokens_per_second(dense_rows) if dense_rows else None
    dense_read = _counts(dense_rows)["bytes_by_size"].get(size) if dense_rows else None
    read = counts["bytes_by_size"].get(size)
    found = {
        **{key: counts[key] for key in ("acceptance", "acceptance_by_place", "tokens_per_round")},
        "proposals_per_round": counts["drafted"] / counts["rounds"],
        "union_sparsity": counts["union_sparsity"].get(size),
        "random_union_sparsity": random_union_sparsity(plain["neuron_sparsity"], size),
        "bytes_skipped": None
        if read is None
        else _skipped(read, dense_read or plain["dense_bytes_per_token"]),
        "bytes_per_token": bytes_per_token(rows),
        "draft_cost": _draft_cost(counts, plain),
        "draft_bytes": counts["draft_bytes"] / max(1, counts["drafted"]) / plain["dense_bytes_per_token"],
        "verify_cost": counts["verify_seconds"] / counts["rounds"] * plain["dense_tokens_per_second"],
        "tokens_per_second": speed,
        "dense_tokens_per_second": dense_speed,
        "speedup_vs_sparse": speed / plain["tokens_per_second"],
        "speedup_vs_dense": speed / plain["dense_tokens_per_second"],
        "speedup_vs_dense_speculation": speed / dense_speed if dense_speed else None,
        "bound_vs_sparse": plain["bytes_per_token"] / bytes_per_token(rows),
        "same_texts": _share_of_same(rows, by_place[SPARSE][0]),
    }
    return found | {
        "theory": _theory(gamma, found, plain, found["bytes_skipped"]),
        "random_theory": _theory(gamma, found, plain, _random_skipped(size, plain)),
    }


def _counts(rows: Sequence[Turn]) -> dict[str, Any]:
    """Return the counts of all turns together."""
    stats = [row["speculation"] for row in rows]
    total: Counter[str] = Counter()
    for each in stats:
        names = ("rounds", "drafted", "accepted", "chosen", "tested", "draft_seconds", "verify_seconds")
        total.update({name: each[name] for name in names})
        total["draft_bytes"] += each["draft_weight_bytes"] + each["draft_kv_bytes"]
    by_place = [
        [sum(values) for values in zip(*(each[name] for each in stats), strict=True)]
        for name in ("accepted_by_place", "tested_by_place")
    ]
    return {
        **{name: total[name] for name in total},
        "acceptance": total["accepted"] / total["tested"] if total["tested"] else 0.0,
        "acceptance_by_place": [a / t for a, t in zip(*by_place, strict=True) if t],
        "tokens_per_round": total["chosen"] / total["rounds"],
        "union_sparsity": _by_size(stats, "union_sparsity"),
        "bytes_by_size": _by_size(stats, "bytes_by_size"),
    }


def _by_size(stats: Sequence[Turn], name: str) -> dict[int, float]:
    """Return means over all rounds of a size, by that size. (JSON made its keys texts.)"""
    sums: Counter[int] = Counter()
    rounds: Counter[int] = Counter()
    for each in stats:
        for size, count in each["rounds_by_size"].items():
            sums[int(size)] += each[name][size] * count
            rounds[int(size)] += count
    return {size: sums[size] / rounds[size] for size in sorted(rounds)}


def _skipped(read: float, dense: float) -> float:
    return max(0.0, 1 - read / dense)


def _random_skipped(size: int, plain: dict[str, Any]) -> float:
    """Return what independent tokens would skip: phi s^n, phi being the share that zeros can save."""
    sparsity = plain["neuron_sparsity"]
    phi = plain["bytes_skipped"] / sparsity if sparsity else 0.0
    return min(1.0, phi * random_union_sparsity(sparsity, size))


def _draft_cost(counts: dict[str, Any], plain: dict[str, Any]) -> float:
    """Return c: the time of a proposed token over that of a token of the dense model."""
    return counts["draft_seconds"] / max(1, counts["drafted"]) * plain["dense_tokens_per_second"]


def _theory(
    gamma: int, found: dict[str, Any], plain: dict[str, Any], skipped: float | None
) -> dict[str, float] | None:
    """Return the formulas' gains, or None where no verification of gamma + 1 tokens was seen."""
    if skipped is None:
        return None
    share = min(1.0, found["proposals_per_round"] / gamma)
    costs = Costs(found["draft_cost"])
    expected = gains(costs, found["acceptance"], gamma, plain["bytes_skipped"], skipped, share)
    return {
        "speedup_vs_sparse": expected.over_sparse,
        "speedup_vs_dense": expected.over_dense,
        "speedup_vs_dense_speculation": expected.over_dense_speculation,
    }


def _best(by_gamma: dict[str, dict[str, Any]], plain: dict[str, Any]) -> dict[str, float | None]:
    """Return what theory takes for the best gamma, its gain over plain sparse decoding, and the limit."""
    costs = Costs(statistics.fmean(found["draft_cost"] for found in by_gamma.values()))
    alpha = statistics.fmean(found["acceptance"] for found in by_gamma.values())
    seen = [
        (int(gamma) + 1, found["bytes_skipped"])
        for gamma, found in by_gamma.items()
        if found["bytes_skipped"] is not None
    ]
    union = interpolated([(1, plain["bytes_skipped"]), *seen])
    gamma, gain = best_gamma(costs, alpha, plain["bytes_skipped"], union)
    most = most_from_drafts(costs, plain["bytes_skipped"])
    return {"gamma": gamma, "speedup_vs_sparse": gain, "limit_vs_sparse": most if costs.draft else None}


def _share_of_same(rows: Sequence[Turn], plain: Sequence[Turn]) -> float:
    """Return the share of turns whose text is that of plain decoding, token for token."""
    return statistics.fmean(a["text"] == b["text"] for a, b in zip(rows, plain, strict=True))
