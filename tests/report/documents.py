"""Small results of every kind, as the commands write them."""

import json
from pathlib import Path
from typing import Any

LAYERS = 3
SITES = ("q", "k", "v", "o", "gate", "up", "neuron", "down")


def heading(kind: str) -> dict[str, Any]:
    return {"kind": kind, "version": 1, "command": f"relufy {kind} <x> & y", "versions": {"relufy": "0.1.0"}}


def perplexity(value: float, error: float | None = 0.01) -> dict[str, Any]:
    return {"perplexity": value, "nats_per_token": 3.0, "standard_error": error, "tokens": 1000}


def measure(layers: int = LAYERS) -> dict[str, Any]:
    zeros = {site: [0.1 + 0.8 * layer / layers for layer in range(layers)] for site in SITES}
    details = ("mean", "p5", "p95", "first_token", "first_percent", "rest")
    edges = [-2.0, -1.0, 0.0, 1.0, 2.0]
    union = {"neuron": {str(2**k): [min(1.0, 0.2 * (k + 1))] * layers for k in range(6)}}
    return heading("relufy.measure") | {
        "model": "folder/my-model",
        "tokens": 4096,
        "windows": 16,
        "window": 256,
        "model_level_sparsity": 0.31,
        "sparsity": zeros,
        "sites": {site: dict.fromkeys(details, values) for site, values in zeros.items()},
        "neurons": {"neuron": {"tokens": 4096, "dead": [0.0] * layers, "live_sparsity": zeros["neuron"]}},
        "unions": {"consecutive": union, "batches": union},
        "hidden": {name: [12.0] * layers for name in ("first_token", "first_percent", "rest", "median")},
        "preactivations": {"layers": [{"edges": edges, "counts": [5, 30, 40, 2]} for _ in range(layers)]},
        "perplexity": perplexity(40.25),
        "dense_perplexity": None,
        "macs_paper": {"dense": 4e6, "sparse": 2e6},
        "bytes_engine": {"f32": {"dense": 16e6, "sparse": 9e6}, "int8": {"dense": 4e6, "sparse": 3e6}},
        "context": 128,
        "notes": ["a note with <angles>"],
        "definitions": {"sparsity": "share of exact zeros"},
    }


def overtime() -> dict[str, Any]:
    tokens = list(range(1, 17))
    curve = {"mean": [0.9**t for t in tokens], "layers": [[0.9**t for t in tokens]] * LAYERS}
    aggregated = {name: curve for name in ("measured", "shuffled", "independent", "uniform")}
    shares = {"mean": [0.5, 0.7], "layers": [[0.5, 0.7]] * LAYERS}
    points = [
        {
            "gamma": gamma,
            "kind": kind,
            "perplexity": perplexity(41.0 + gamma * (kind == "random")),
            "difference": {"mean": 0.02, "standard_error": 0.001},
            "loaded_share": 0.8,
            "dropped_share": 0.1,
        }
        for kind in ("reuse", "random")
        for gamma in (1, 4)
    ]
    return heading("relufy.measure.overtime") | {
        "model": "my-model",
        "tokens": 512,
        "windows": 4,
        "aggregated": {"tokens": tokens, "windows": [4] * 16, "standard_error": [None] * 16} | aggregated,
        "reuse": {"windows": [1, 2], "tokens": [100] * LAYERS, "measured": shares, "shuffled": shares},
        "gamma": {"warmup": 8, "windows": 4, "perplexity": perplexity(40.0), "points": points},
        "definitions": {},
    }


def reuse() -> dict[str, Any]:
    rows = [
        {
            "label": f"{policy}, period {period}",
            "reuse": {"policy": policy, "period": period, "is_control": policy == "blocks"},
            "perplexity": 41.0 + period,
            "bytes_per_token": 8e6 - 1e5 * period,
            "bytes_vs_exact": 0.9,
            "tokens_per_second": None,
        }
        for policy in ("window", "blocks")
        for period in (2, 8)
    ]
    return heading("relufy.measure.reuse") | {
        "model": "my-model",
        "tokens": 512,
        "windows": 4,
        "exact": {"perplexity": 40.0, "bytes_per_token": 8e6},
        "settings": rows,
        "definitions": {"period": "tokens"},
    }


def compare() -> dict[str, Any]:
    def outcome(sparsity: float, value: float | None) -> dict[str, Any]:
        names = ("intrinsic_zero_fraction", "cett_sparsity", "gate_only_sparsity", "model_level_sparsity")
        return dict.fromkeys(names, sparsity) | {
            "perplexity": perplexity(value) if value else {"perplexity": None, "standard_error": None},
            "difference": {"mean": 0.05, "standard_error": 0.004},
            "bytes_engine": {"dense": 16e6, "sparse": 16e6 * (1 - sparsity)},
            "controls": {"random": {"perplexity": perplexity(900.0)}},
        }

    rows = [
        {"method": m, "target": t, "reason": "", **outcome(t, 40.0 + 20 * t * k)}
        for k, m in enumerate(("teal", "wina"), start=1)
        for t in (0.25, 0.5)
    ]
    rows.append({"method": "cats", "target": 0.5, "reason": "cats cannot"})
    return heading("relufy.compare") | {
        "model": "my-model",
        "windows": 4,
        "window": 256,
        "settings": {"dtype": "f32"},
        "dense": outcome(0.0, 40.0),
        "rows": rows,
        "notes": [],
        "definitions": {"random": "control"},
    }


def evaluation() -> dict[str, Any]:
    def score(value: float) -> dict[str, Any]:
        return {"value": value, "standard_error": 0.02, "is_above_chance": True}

    row = {"group": None, "difference": -0.01, "standard_error": 0.005, "p": 0.04, "num_docs": 500}
    text = row | {"name": "text", "metric": "perplexity per token", "chance": None, "verdict": "worse"}
    task = row | {"name": "blimp", "metric": "acc", "chance": 0.5, "verdict": "no difference seen"}
    return heading("relufy.eval") | {
        "model": "sparse",
        "before": "dense",
        "run": {"backend": "hf"},
        "run_before": {"backend": "hf"},
        "text": {
            "tokens": 1000, "windows": 4, "window": 256,
            "rows": [text | {"before": score(40.0), "after": score(41.0)}],
        },
        "tasks": [task | {"before": score(0.58), "after": score(0.57)}],
        "notes": [],
        "definitions": {},
    }  # fmt: skip


def bench() -> dict[str, Any]:
    return heading("relufy.bench") | {
        "benchmark": "decode",
        "label": "1.3b int8",
        "tokens_per_second": 54.8,
        "dense_tokens_per_second": 33.2,
        "llama_cpp_tokens_per_second_by_type": {"Q8_0": 26.7},
        "speedup_vs_dense": 1.65,
        "bound_vs_dense": 1.87,
        "density": {"neuron": 0.1},
        "machine": {"processor": "a processor", "cores": 2},
    }


def doctor() -> dict[str, Any]:
    """Return what examining a tiny model writes."""
    from relufy.doctor.doctor import Diagnosis
    from relufy.doctor.finding import Finding

    sweep = {"levels": [0.5, 0.9], "rise": [0.01, 0.2], "rise_of_random": [4.0, None]}
    sweep |= {"knee": 0.5, "own_zeros": 0.0, "control": {"model": "relu", "rise": [0.0, 0.1]}}
    names = ("sparsity_at_universal_epsilon", "sparsity_at_equal_cett", "dead_share")
    balance: dict[str, Any] = dict.fromkeys(names, [0.5] * 3) | {"cett_target": 0.2}
    written: dict[str, Any] = {
        "new_tokens": 3,
        "prompts": 2,
        "compared": "a and b",
        "same_so_far": [1.0, 0.5, 0.5],
    }
    findings = (
        Finding("layers", "Balance", "bad", "Layer 1 is dead", balance, ("try", "this")),
        Finding("sweep", "Sparsity and quality", "watch", "A knee", sweep),
        Finding("generation", "Writing", "good", "Same", written | {"expected_same_so_far": [0.9, 0.8, 0.7]}),
        Finding("first_tokens", "First", "good", "No sink", {"attention_on_first": [0.1, 0.2, 0.3]}),
        Finding("keys_and_values", "Keys", "unchecked", "Not checked on MptForCausalLM"),
    )
    about = ("my-model", "LlamaForCausalLM", "silu", None, 8, 64, 40.0)
    found = Diagnosis(*about, findings, (), ("relufy compare",), (), 1.0, {})
    return json.loads(json.dumps(found.to_json()))


def training() -> str:
    reports = [
        {
            "step": step,
            "loss": 3.0 / step,
            "learning_rate": 1e-3,
            "sparsity": {"neuron": [0.5, 0.6]},
            "dead": [0.0, 0.1],
        }
        for step in range(1, 6)
    ]
    return "".join(json.dumps(report) + "\n" for report in reports) + '{"step": 6, "lo'


def write_all(folder: Path) -> list[Path]:
    """Write one result of each kind, and return the files."""
    made = {f.__name__: f() for f in (measure, overtime, reuse, compare, evaluation, bench, doctor)}
    for name, document in made.items():
        (folder / f"{name}.json").write_text(json.dumps(document))
    (folder / "run").mkdir()
    (folder / "run" / "log.jsonl").write_text(training())
    return [*(folder / f"{name}.json" for name in made), folder / "run"]
