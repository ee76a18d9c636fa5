"""The benchmark of speculative decoding: its figures from made-up turns, and real runs on a tiny model."""

import json

import pytest
from tests.bench.made_up import MACHINE_KEYS

import relufy
from relufy.bench.options import SpeculativeOptions
from relufy.bench.speculation_figures import speculation_figures
from relufy.bench.speculative import bench_speculative
from relufy.cli.main import run
from relufy.measure.speculation_theory import Costs, speedup_over_sparse

GAMMAS = (2, 4)


@pytest.fixture(autouse=True)
def _quick(own_lock: None, quick_probe: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relufy.bench.turns.REST_SECONDS", 0.0)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("It was a dark night, and the wind was in the trees.\n" * 40)
    return str(path)


@pytest.fixture
def options(make_checkpoint, text):
    def make(**values: object) -> SpeculativeOptions:
        given = {"model": str(make_checkpoint("stage1")), "text": text, "draft": "lookup", "gammas": GAMMAS}
        return SpeculativeOptions(
            **(given | {"context": 20, "tokens": 12, "turns": 2, "dtype": "f32"} | values)
        )

    return make


def plain(seconds: float, read: int) -> dict:
    read_all = {"weight_bytes": 10 * read, "kv_bytes": 0, "density": {"neuron": [0.2, 0.4]}}
    return {"seconds": seconds, "tokens": 10, "text": [1, 2], **read_all}


def speculative(seconds: float, gamma: int, read: int, text: tuple[int, ...] = (1, 2)) -> dict:
    counts = {"rounds": 4, "drafted": 4 * gamma, "accepted": 6, "tested": 8, "chosen": 10}
    by_size = {"union_sparsity": {str(gamma + 1): 0.4}, "bytes_by_size": {str(gamma + 1): float(read)}}
    stats = counts | by_size | {"rounds_by_size": {str(gamma + 1): 4}}
    stats |= {"draft_seconds": 0.4 * gamma, "verify_seconds": seconds - 0.4 * gamma}
    stats |= {"accepted_by_place": [4, 2] + [0] * (gamma - 2), "tested_by_place": [4, 4] + [0] * (gamma - 2)}
    stats |= {"draft_weight_bytes": 8 * gamma, "draft_kv_bytes": 32 * gamma}
    weights = {"weight_bytes": 4 * read, "kv_bytes": 0}
    return {"seconds": seconds, "tokens": 10, "text": list(text), "speculation": stats, **weights}


def made_up_turns(dense_drafts: bool = True) -> dict:
    """Two counted rounds after a warm-up that would spoil every mean."""
    sparse = [plain(5.0, 60), speculative(4.0, 2, 80), speculative(2.0, 4, 90, (1, 3))]
    dense = [plain(10.0, 100), *(speculative(8.0, gamma, 100) if dense_drafts else None for gamma in GAMMAS)]
    warm_up = [plain(1e6, 1), speculative(1e6, 2, 1), speculative(1e6, 4, 1)]
    probe = [{"gb_per_second": 10.0, "seconds": 0.1}] * 3
    return {"probe": probe, "sparse": warm_up + 2 * sparse, "dense": warm_up + 2 * dense}


def test_figures_by_hand():
    found = speculation_figures(made_up_turns(), GAMMAS)
    assert found["tokens_per_second"] == 2 and found["speedup_vs_dense"] == 2
    assert found["bytes_skipped"] == pytest.approx(0.4) and found["neuron_sparsity"] == pytest.approx(0.7)
    two, four = found["by_gamma"]["2"], found["by_gamma"]["4"]
    assert two["speedup_vs_sparse"] == 1.25 and two["speedup_vs_dense"] == 2.5
    assert two["speedup_vs_dense_speculation"] == 2 and four["speedup_vs_sparse"] == 2.5
    assert two["acceptance"] == 0.75 and two["acceptance_by_place"] == [1.0, 0.5]
    assert two["tokens_per_round"] == 2.5 and two["union_sparsity"] == 0.4
    assert two["random_union_sparsity"] == pytest.approx(0.7**3)
    assert two["draft_cost"] == pytest.approx(0.1) and two["verify_cost"] == pytest.approx(0.8)
    assert two["draft_bytes"] == pytest.approx(0.1)
    assert two["bound_vs_sparse"] == pytest.approx(60 / 32)
    assert (two["same_texts"], four["same_texts"]) == (1, 0)
    assert two["bytes_skipped"] == pytest.approx(0.2)
    expected = speedup_over_sparse(Costs(0.1), 0.75, 2, 0.4, 0.2)
    assert two["theory"]["speedup_vs_sparse"] == pytest.approx(expected)
    at_random = speedup_over_sparse(Costs(0.1), 0.75, 2, 0.4, 0.4 * 0.7**2)
    assert two["random_theory"]["speedup_vs_sparse"] == pytest.approx(at_random)
    assert found["best_gamma"]["limit_vs_sparse"] == pytest.approx(6)
    assert json.loads(json.dumps(found)) == found


def test_a_dense_contender_that_cannot_draft_is_left_out():
    found = speculation_figures(made_up_turns(dense_drafts=False), GAMMAS)
    assert found["by_gamma"]["2"]["speedup_vs_dense_speculation"] is None
    assert found["by_gamma"]["2"]["theory"]["speedup_vs_sparse"] > 0


def test_a_real_run(options, make_checkpoint):
    found = bench_speculative(options(draft=str(make_checkpoint("dense")), turns=1))
    assert found["kind"] == "relufy.bench" and found["benchmark"] == "speculative"
    assert found["machine"].keys() >= MACHINE_KEYS
    assert list(found["by_gamma"]) == ["2", "4"]
    for figures in found["by_gamma"].values():
        assert figures["same_texts"] == 1
        assert 0 < figures["union_sparsity"] < found["neuron_sparsity"]
        assert figures["speedup_vs_dense_speculation"] > 0 and figures["draft_cost"] > 0
    assert [len(rows) for rows in found["turns"].values()] == [2, 6, 6]


def test_command(options, tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    made, output = options(), tmp_path / "a.json"
    arguments = ["--draft", "lookup", "--gammas", "2", "--text", made.text, "--dtype", "f32"]
    arguments += ["--context", "20", "--tokens", "12", "--turns", "1", "-o", str(output)]
    assert run(["bench", "speculative", made.model, *arguments, "--temperature", "0.5"]) == 0
    shown = capsys.readouterr().out
    assert "best gamma by theory" in shown and "texts equal to plain decoding's: 2: 100%" in shown
    assert json.loads(output.read_text())["options"]["gammas"] == [2]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gammas": (2, 2)}, "--gammas takes different numbers"),
        ({"gammas": (0,)}, "gamma must be"),
        ({"model": None, "shape": "tiny"}, "random weights agree with no draft"),
        ({"against": "llama.cpp"}, "leave --against out"),
        ({"context": 5000}, "the model has 128"),
        ({"text": "nonesuch.txt"}, "there is no text file"),
        ({"context": 110, "turns": 4000}, "too few for 4001 passages"),
        ({"draft": "nonesuch"}, "there is no checkpoint folder"),
    ],
    ids=str,
)
def test_refusals(options, values, message):
    with pytest.raises(relufy.UserError, match=message):
        bench_speculative(options(**values))
