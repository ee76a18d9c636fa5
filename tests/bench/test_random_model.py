"""Random models: what transformers expects, the same again for a seed, and as dense as was asked for."""

import json
from pathlib import Path

import numpy as np
import pytest
from tests.bench.made_up import written
from transformers import AutoModelForCausalLM

from relufy.bench.densities import Densities
from relufy.bench.random_model import dense_model, open_weights, sparse_model
from relufy.bench.shapes import SHAPES, find_shape
from relufy.engine import naive
from relufy.engine.cache import packed_model
from relufy.engine.cpu import CpuEngine
from relufy.engine.reuse import Reuse, reuse_stats
from relufy.engine.safetensors_folder import SafetensorsFolder
from relufy.errors import UserError

TINY = SHAPES["tiny"]
CONTEXT = 96


def no_progress(task: str, done: int, total: int) -> None: ...


@pytest.fixture
def dense() -> Path:
    return dense_model(TINY, 0)


@pytest.mark.parametrize(
    ("name", "weights"), [("1.3b", 1.3475e9), ("7b", 6.738e9)], ids=["1.3b", "Llama-2-7B"]
)
def test_shapes_have_their_size(name: str, weights: float) -> None:
    assert sum(np.prod(size, dtype=np.int64) for size in SHAPES[name].tensors().values()) == pytest.approx(
        weights, rel=1e-3
    )


def test_unknown_shape() -> None:
    with pytest.raises(UserError, match=r"no shape '13b' \(did you mean '1.3b'"):
        find_shape("13b")


def test_transformers_loads_the_checkpoint(dense: Path, tmp_path: Path) -> None:
    state = AutoModelForCausalLM.from_pretrained(written(dense, tmp_path)).state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == TINY.tensors()


def test_weights_are_scaled_and_seeded(dense: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    first, other = open_weights(dense).read(name), open_weights(dense_model(TINY, 1)).read(name)
    assert first.std() == pytest.approx(TINY.intermediate_size**-0.5, rel=0.02)
    assert not np.array_equal(first, other)
    assert np.array_equal(first, open_weights(dense).read(name))
    assert open_weights(dense).read("model.norm.weight").mean() == pytest.approx(1, abs=0.05)


def test_weights_are_those_of_the_written_checkpoint(dense: Path, tmp_path: Path) -> None:
    folder = SafetensorsFolder(written(dense, tmp_path))
    drawn = open_weights(dense)
    assert sorted(folder.names()) == sorted(drawn.names())
    assert all(np.array_equal(folder.read(name), drawn.read(name)) for name in drawn.names())


def test_a_sparse_model_has_the_same_weights(dense: Path) -> None:
    sparse = sparse_model(TINY, Densities(0.1, 0.5), CONTEXT, 0, no_progress)
    heads = [open_weights(folder).read("lm_head.weight") for folder in (sparse, dense)]
    assert np.array_equal(*heads)
    config = json.loads((sparse / "config.json").read_text())
    assert config["hidden_act"] == "relufy"
    assert config["quantization_config"]["quant_method"] == "relufy"


def test_nothing_but_configurations_is_written(dense: Path) -> None:
    sparse_model(TINY, Densities(0.1), CONTEXT, 0, no_progress)
    assert {path.name for path in dense.parent.rglob("*") if path.is_file()} == {"config.json"}


@pytest.mark.parametrize("densities", [Densities(0.1), Densities(0.1, 0.5), Densities(0.3, 0.25)], ids=str)
def test_densities_hold_on_fresh_tokens(densities: Densities, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = sparse_model(TINY, densities, CONTEXT, 0, no_progress)
    packed = packed_model(folder, weights=open_weights(folder))
    found: dict[str, list[float]] = {}
    mask = naive._Layer._mask

    def counted(layer: naive._Layer, site: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        kept, rest = mask(layer, site, x)
        found.setdefault(site, []).append(float(np.mean(kept[CONTEXT - 32 :] != 0)))
        return kept, rest

    monkeypatch.setattr(naive._Layer, "_mask", counted)
    fresh = np.random.default_rng(99).integers(0, TINY.vocab_size, CONTEXT + 32)
    naive.NaiveDecoder(packed).logits(fresh.tolist())
    wanted = dict.fromkeys(("q", "k", "v", "o", "gate"), densities.inputs or 1.0)
    wanted |= {"neuron": densities.neurons, "up": 1.0}
    for site, density in wanted.items():
        assert len(found[site]) == TINY.num_layers
        assert np.mean(found[site]) == pytest.approx(density, abs=0.05), site


def test_a_union_silences_the_same_gates_for_every_token(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = sparse_model(TINY, Densities(0.1, union=0.3), CONTEXT, 0, no_progress)
    packed = packed_model(folder, weights=open_weights(folder))
    engine = CpuEngine(packed)
    tokens = np.random.default_rng(99).integers(0, TINY.vocab_size, CONTEXT + 33)
    sequence = engine.new_sequence(CONTEXT, Reuse(1000, window=CONTEXT))
    engine.step([(sequence, tokens)], "none")
    stats = reuse_stats(engine.stats(), TINY.intermediate_size)
    assert stats.candidate_share == pytest.approx(0.3, abs=0.02)
    assert stats.fired_share == pytest.approx(0.1, abs=0.02)
    with pytest.raises(UserError, match="more than twice"):
        Densities(0.2, union=0.3)


@pytest.mark.parametrize("densities", [(0.0, None), (1.5, None), (0.1, 0.0), (0.1, -1.0)], ids=str)
def test_impossible_densities(densities: tuple[float, float | None]) -> None:
    with pytest.raises(UserError, match="must be above 0 and at most 1"):
        Densities(*densities)
