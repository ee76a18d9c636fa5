"""The paper's own figures as oracles for one account, the engine's own counters for the other."""

import numpy as np
import pytest

import relufy
from relufy.engine.pack import pack
from relufy.engine.spec import decoder_spec
from relufy.hub import read_config
from relufy.measure.cost import bytes_by_kind, bytes_engine, macs_paper

OPT = {2.7: (2560, 32), 6.7: (4096, 32)}


def plain(d: int, layers: int, kv: int | None = None) -> list[dict]:
    kv = kv or d
    shapes = {"q": (d, d), "k": (kv, d), "v": (kv, d), "o": (d, d), "up": (4 * d, d), "down": (d, 4 * d)}
    return [shapes] * layers


def gated(d: int, f: int, layers: int) -> list[dict]:
    projections = {site: (d, d) for site in "qkvo"}
    return [{**projections, "gate": (f, d), "up": (f, d), "down": (d, f)}] * layers


LLAMA_7B = (gated(4096, 11008, 32), (32000, 4096))
FALCON_7B = (plain(4544, 32, 64), (0, 4544))  # the paper's figures leave Falcon's head out


def opt(size: float):
    d, layers = OPT[size]
    return plain(d, layers), (50272, d)


@pytest.mark.parametrize(
    ("model", "qkv", "up", "down", "printed"),
    [
        (LLAMA_7B, 0, 0, 0, 6.6),
        (LLAMA_7B, 0, 0, 0.62, 4.8),
        (LLAMA_7B, 0.51, 0.67, 0.65, 2.9),
        (FALCON_7B, 0, 0, 0.01, 6.6),
        (FALCON_7B, 0, 0, 0.94, 4.1),
        (FALCON_7B, 0.56, 0.56, 0.95, 2.2),
        (opt(6.7), 0, 0, 0.97, 4.5),
        (opt(6.7), 0.50, 0.40, 0.97, 2.8),
        (opt(2.7), 0, 0, 0.96, 1.8),
        (opt(2.7), 0.50, 0.35, 0.96, 1.1),
    ],
    ids=lambda value: str(value) if isinstance(value, float) else "",
)
def test_the_papers_table(model, qkv, up, down, printed):
    layers, head = model
    sites = {"q": qkv, "k": qkv, "v": qkv, "gate": up, "up": up, "down": down, "neuron": down}
    sparsity = {site: [share] * len(layers) for site, share in sites.items()}
    cost = macs_paper(layers, head, sparsity, has_sparse_inputs=up > 0)
    assert cost.sparse / 1e9 == pytest.approx(printed, abs=0.15)
    assert macs_paper(layers, head, {}, False).sparse == cost.dense


@pytest.mark.parametrize("recipe", ["dense", "stage1", "stage2"])
@pytest.mark.parametrize(
    "config", [{}, {"num_key_value_heads": 3, "intermediate_size": 129, "tie_word_embeddings": True}]
)
def test_bytes_are_those_that_the_engine_counts(recipe, config, make_checkpoint, tmp_path):
    folder = make_checkpoint(recipe, **config)
    engine = relufy.Engine(pack(folder, tmp_path / "model.relufy"))
    sequence = engine.new_sequence()
    engine.step([(sequence, list(range(2, 60)))])
    for token in range(100, 110):
        before = engine.stats()
        engine.step([(sequence, [token])])
        after = engine.stats()
        spec = decoder_spec(read_config(folder))
        kinds = bytes_by_kind(spec, engine.sparsity(before, after), engine.length(sequence))
        keys_and_values = kinds.pop("keys and values")
        assert keys_and_values == after["kv_bytes"] - before["kv_bytes"]
        assert sum(kinds.values()) == pytest.approx(after["weight_bytes"] - before["weight_bytes"], rel=1e-12)


def test_dense_bytes_are_those_of_a_dense_pack(make_checkpoint, tmp_path):
    engine = relufy.Engine(pack(make_checkpoint("dense"), tmp_path / "dense.relufy"))
    engine.step([(engine.new_sequence(), [5])])
    counted = engine.stats()["weight_bytes"] + engine.stats()["kv_bytes"]
    spec = decoder_spec(read_config(make_checkpoint("stage2")))
    cost = bytes_engine(spec, {site: [0.5, 0.5] for site in ("q", "gate", "neuron")}, 1)
    assert cost.dense == counted
    assert cost.sparse < 0.75 * cost.dense and cost.ratio == cost.dense / cost.sparse


def test_a_relufied_model_reads_fewer_bytes(bundled, sparsified, tmp_path):
    read = []
    for recipe in ("dense", "stage1", "stage2"):
        engine = relufy.Engine(sparsified(bundled, recipe))
        stats = engine.generate("The sea was calm", max_new_tokens=30).run().stats
        read.append(stats.weight_bytes_per_token)
        assert (
            set(stats.sparsity)
            == {"dense": set(), "stage1": {"neuron"}, "stage2": {"q", "gate", "neuron"}}[recipe]
        )
        assert all(0.2 < np.mean(layers) < 0.9 for layers in stats.sparsity.values())
    assert read[0] > 1.1 * read[1] > 1.1 * 1.1 * read[2]
