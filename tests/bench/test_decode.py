"""The decode benchmark as a whole: what its JSON holds, its tables and plot, and what it refuses.

Contenders are made up where the subject is the course of a run; no test says anything about speed.
"""

import json
from pathlib import Path

import pytest
from tests.bench.made_up import DOCUMENT_KEYS, MACHINE_KEYS, SPEED_KEYS, FakeWorker, turns_of

from relufy.bench import models
from relufy.bench.decode import bench_decode
from relufy.bench.options import BatchOptions, DecodeOptions, PrefillOptions
from relufy.bench.table import show_decode
from relufy.cli.main import run
from relufy.engine.packed_file import read_header
from relufy.engine.reuse import Reuse
from relufy.errors import UserError

KEYS = {
    *SPEED_KEYS,
    *DOCUMENT_KEYS,
    "bound_vs_dense",
    "fraction_of_bound",
    "gb_per_second",
    "dense_gb_per_second",
    "dense_fraction_of_machine",
    "density",
    "cold_start_seconds",
    "fits_in_cache",
}


@pytest.fixture(autouse=True)
def _own_lock(own_lock: None) -> None: ...


def tiny(**options: object) -> DecodeOptions:
    return DecodeOptions(**{"shape": "tiny", "context": 16, "turns": 3, "tokens": 4} | options)  # type: ignore[arg-type]


def test_keys(made_up: type[FakeWorker]) -> None:
    found = bench_decode(tiny())
    assert found.keys() >= KEYS
    assert found["machine"].keys() >= MACHINE_KEYS
    assert json.loads(json.dumps(found)) == found
    assert found["fits_in_cache"]
    assert found["speedup_vs_dense"] == 2.0
    assert found["speedup_vs_llama_cpp"] == 4.0
    assert found["logits_error"] == 0.0
    assert found["cold_start_seconds"] == 0.2
    assert {len(rows) for rows in found["turns"].values()} == {4}


def test_a_real_run(quick_probe: None) -> None:
    found = bench_decode(tiny(input_density=0.5, context=64, against="none", turns=1))
    assert found["logits_error"] < 1e-3
    assert found["logits_tokens_compared"] > 0
    assert 1 < found["bound_vs_dense"] < 4
    assert found["bytes_per_token"] < found["dense_bytes_per_token"] < found["file_bytes"]
    wanted = {"q": 0.5, "o": 0.5, "gate": 0.5, "neuron": 0.1}
    assert {site: found["density"][site] for site in wanted} == pytest.approx(wanted, abs=0.1)


def test_reuse_is_measured_beside_the_exact_mode(quick_probe: None) -> None:
    options = {"tokens": 8, "context": 64, "turns": 1, "against": "none", "input_density": 0.5}
    found = bench_decode(tiny(reuse=Reuse(4), window_union=0.3, **options))
    assert found["reuse"]["frozen_tokens"] == 6
    assert found["reuse"]["candidate_share"] == pytest.approx(0.3, abs=0.03)
    assert found["bytes_per_token"] < found["exact_bytes_per_token"] < found["dense_bytes_per_token"]
    assert "window 32, period 4" in found["label"] and found["exact_tokens_per_second"] > 0
    assert json.loads(json.dumps(found)) == found
    shown = show_decode(found)
    assert [row[0] for row in shown.rows] == ["relufy, sparse", "relufy, exact", "relufy, own dense"]


def test_contenders_take_turns(made_up: type[FakeWorker]) -> None:
    bench_decode(tiny())
    names = ["probe", "sparse", "dense", "llama.cpp Q8_0"]
    assert turns_of(made_up.calls, "decode") == [*names, *names[::-1], *names, *names[::-1]]


def test_without_llama_cpp(made_up: type[FakeWorker]) -> None:
    assert bench_decode(tiny(against="none"))["speedup_vs_llama_cpp"] is None


def test_dense_pack_reads_every_row() -> None:
    files = models.prepare_files(tiny(input_density=0.5, against="none"), lambda *_: None)
    layouts = {name: entry.layout for name, entry in read_header(files.dense).tensors.items()}
    assert {layouts[f"layers.0.{name}"] for name in ("q", "k", "v", "o", "gate", "up", "down")} == {2}
    sparse = read_header(files.sparse).tensors
    assert {sparse[f"layers.0.{name}"].layout for name in ("q", "o", "gate")} == {3}
    assert "layers.0.up_down" in sparse


def test_command(made_up: type[FakeWorker], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, plot = tmp_path / "result.json", tmp_path / "plot.svg"
    options = ["--context", "16", "--turns", "2", "--tokens", "4", "-o", str(output), "--plot", str(plot)]
    assert run(["bench", "decode", "--shape", "tiny", *options, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(output.read_text())
    assert "own dense" in plot.read_text()
    assert run(["bench", "decode", "--shape", "tiny", *options]) == 0
    text = capsys.readouterr().out
    assert "relufy, sparse" in text
    assert "llama.cpp Q8_0" in text
    both = tmp_path / "both.png"
    assert run(["bench", "plot", str(output), str(output), "--plot", str(both)]) == 0
    assert both.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["decode"], "either --shape or --model"),
        (["prefill"], "either --shape or --model"),
        (["batch", "--shape", "tiny", "--model", "bundled"], "either --shape or --model"),
        (["decode", "--shape", "13b"], "did you mean '1.3b'"),
        (["decode", "--shape", "tiny", "--dtype", "int3"], "--dtype must be one of f32, bf16, int8, int4"),
        (["decode", "--shape", "tiny", "--against", "vllm"], "--against must be one of"),
        (["decode", "--shape", "tiny", "--mlp-density", "0"], "above 0"),
        (["decode", "--model", "bundled", "--input-density", "0.5"], "densities are for --shape"),
        (["decode", "--shape", "tiny", "--context", "9000"], "9032 positions, random models have 8192"),
        (["decode", "--model", "bundled", "--against", "none", "--context", "9000"], "the model has"),
        (["decode", "--shape", "tiny", "--plot", "a.jpg"], "--plot writes .svg, .png, .pdf, not a.jpg"),
        (["batch", "--shape", "tiny", "--batch", "1,two"], "such as 1,2,4, found '1,two'"),
        (["batch", "--shape", "tiny", "--batch", "0,1"], "such as 1,2,4, found '0,1'"),
        (["batch", "--shape", "tiny", "--batch", "2,2"], "such as 1,2,4, found '2,2'"),
        (["kernels", "--dtype", "int3"], "no kernels for 'int3'"),
        (["kernels", "--shape", "13b"], "did you mean '1.3b'"),
        (["plot", "missing.json", "--plot", "a.svg"], "missing.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.splitlines()[-1].startswith("relufy: ")


def test_plot_of_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.json").write_text('{"benchmark": "decode"}')
    assert run(["bench", "plot", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.svg")]) == 2
    assert "is not a result of `relufy bench decode" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["decode", "prefill", "batch"])
def test_missing_llama_cpp_is_one_line(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("relufy.bench.llama_cpp.find_spec", lambda name: None)
    assert run(["bench", command, "--shape", "tiny"]) == 2
    assert capsys.readouterr().err == 'relufy: this needs llama_cpp: pip install "relufy[bench]"\n'


def test_more_than_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "available_bytes", lambda: 1 << 30)
    (tmp_path / "file").write_bytes(bytes(1000))
    with pytest.raises(UserError, match=r"2 contenders need 1\.1 GB side by side, 1\.1 GB are free"):
        models.refuse_more_than_memory([tmp_path / "file"] * 2)


def test_labels() -> None:
    decode = DecodeOptions(shape="1.3b", input_density=0.5)
    assert decode.label == "1.3b int8, MLP 0.1, inputs 0.5, context 256"
    assert DecodeOptions(model="/some/model", dtype="int4").label == "model int4, context 256"
    assert PrefillOptions(shape="7b", dtype="bf16").label == "7b bf16, MLP 0.1, 512 tokens"
    assert BatchOptions(model="bundled", context=64).label == "bundled int8, context 64"


def test_a_predictor_names_the_candidates_of_a_shape(quick_probe: None) -> None:
    """Rows of gates outside of the candidates are not read, and the active share is as wanted."""
    options = tiny(
        predictor=16, candidate_density=0.2, input_density=0.5, context=64, turns=1, against="none"
    )
    found = bench_decode(options)
    assert found["predictor"]["candidate_share"] == pytest.approx(0.2, abs=0.03)
    assert found["predictor"]["fired_share"] == pytest.approx(0.1, abs=0.02)
    assert found["predictor"]["predicted_tokens"] == options.tokens
    exact = bench_decode(tiny(mlp_density=0.1, input_density=0.5, context=64, turns=1, against="none"))
    assert found["bytes_per_token"] < exact["bytes_per_token"]
    assert "predictor of rank 16, candidates 0.2" in found["label"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"predictor": 0}, "rank=N for --shape"),
        ({"candidate_density": 0.2}, "with --predictor"),
        ({"predictor": 8, "candidate_density": 0.05}, "below --mlp-density"),
    ],
)
def test_refused_predictors(options: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        _ = tiny(**options).densities
