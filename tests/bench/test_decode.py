"""The decode benchmark as a whole: what its JSON holds, its tables and plot, and what it refuses.

Contenders are made up where the subject is the course of a run; no test says anything about speed.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from relufy.bench import decode, lock, models
from relufy.bench.decode import bench_decode
from relufy.bench.models import BenchFiles
from relufy.bench.options import DecodeOptions
from relufy.cli.main import run
from relufy.engine.naive import NaiveDecoder
from relufy.engine.packed_file import read_header
from relufy.errors import UserError

KEYS = [
    "tokens_per_second",
    "dense_tokens_per_second",
    "llama_cpp_tokens_per_second",
    "speedup_vs_dense",
    "speedup_vs_llama_cpp",
    "bound_vs_dense",
    "fraction_of_bound",
    "gb_per_second",
    "dense_gb_per_second",
    "machine_gb_per_second",
    "dense_fraction_of_machine",
    "logits_error",
    "bits_per_weight",
    "density",
    "peak_resident_share",
    "cold_start_seconds",
    "machine",
    "versions",
    "command",
    "turns",
    "label",
    "fits_in_cache",
    "options",
]
MACHINE_KEYS = [
    "processor",
    "cores",
    "caches",
    "memory_bytes",
    "isa",
    "was_busy",
    "other_cores",
    "stolen_share",
    "load_before",
    "load_after",
    "other_processes",
]
SPEEDS = {"sparse": 0.5, "dense": 1.0, "llama.cpp Q8_0": 2.0}


@pytest.fixture(autouse=True)
def own_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lock a file of the test's own, not that of the benchmarks that users run."""
    monkeypatch.setattr(lock, "lock_path", lambda: tmp_path / "bench.lock")


class FakeWorker:
    """Answers as a contender does, from a table of seconds."""

    calls: list[tuple[str, str]] = []  # noqa: RUF012 (shared on purpose: it records the order)

    def __init__(self, target: str, path: str = "", **arguments: Any):
        self._path, self._is_probe, self.pid = Path(path), "Probe" in target, 0
        self.name = "probe" if self._is_probe else self._path.stem

    def __enter__(self) -> "FakeWorker":
        return self

    def __exit__(self, *_: object) -> None: ...

    def call(self, method: str, **arguments: Any) -> Any:
        FakeWorker.calls.append((self.name, method))
        return getattr(self, method)(**arguments)

    def read(self, tokens: list[int]) -> None: ...

    def turn(self, token: int, count: int) -> dict[str, Any]:
        if self._is_probe:
            return {"seconds": 0.1, "gb_per_second": 10.0}
        read = {"weight_bytes": 100 * count, "kv_bytes": 0, "density": {"neuron": [0.1]}}
        return {"seconds": SPEEDS[self.name] * count, "tokens": count, **read}

    def logits(self, tokens: list[int]) -> list[list[float]]:
        return NaiveDecoder(self._path).logits(tokens).tolist()

    def facts(self) -> dict[str, Any]:
        return {"isa": "portable", "peak_resident_bytes": 1 << 27, "huge_page_share": 0.5}


@pytest.fixture
def fake_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Return a function that runs a benchmark of the tiny shape with made-up contenders."""
    monkeypatch.setattr(decode, "Worker", FakeWorker)
    monkeypatch.setattr(decode, "measurement", lambda name: None)
    monkeypatch.setattr(decode, "require_llama_cpp", lambda: None)
    monkeypatch.setattr(decode, "cold_start_seconds", lambda file, threads: [0.3, 0.1, 0.2])
    monkeypatch.setattr(decode, "prepare_files", lambda *arguments: named_files(tmp_path, *arguments))
    FakeWorker.calls.clear()
    return lambda **options: bench_decode(
        DecodeOptions(shape="tiny", context=16, turns=3, tokens=4, **options)
    )


def named_files(folder: Path, options: DecodeOptions, progress: Any) -> BenchFiles:
    """Return the files of a run without llama.cpp, under the contenders' names, and a made-up GGUF."""
    made = models.prepare_files(
        DecodeOptions(shape="tiny", context=16, dtype=options.dtype, against="none"), progress
    )
    sparse = (folder / "sparse").with_suffix(".relufy")
    dense, gguf = folder / "dense.relufy", folder / "llama.cpp Q8_0.gguf"
    sparse.write_bytes(made.sparse.read_bytes())
    dense.write_bytes(made.dense.read_bytes())
    gguf.write_bytes(b"GGUF")
    return BenchFiles(sparse, dense, {"Q8_0": gguf} if options.against == "llama.cpp" else {})


def test_keys(fake_run: Callable[..., dict[str, Any]]) -> None:
    found = fake_run()
    assert set(KEYS) <= found.keys()
    assert set(MACHINE_KEYS) <= found["machine"].keys()
    assert json.loads(json.dumps(found)) == found
    assert found["fits_in_cache"]
    assert found["speedup_vs_dense"] == 2.0
    assert found["speedup_vs_llama_cpp"] == 4.0
    assert found["logits_error"] == 0.0
    assert found["logits_difference_from_dense"] < 0.1
    assert found["cold_start_seconds"] == 0.2
    assert {len(rows) for rows in found["turns"].values()} == {4}


def test_a_real_run() -> None:
    options = DecodeOptions(
        shape="tiny", dtype="int8", input_density=0.5, context=64, against="none", turns=1, tokens=4
    )
    found = bench_decode(options)
    assert found["logits_error"] < 1e-2
    assert 1 < found["bound_vs_dense"] < 4
    assert found["bytes_per_token"] < found["dense_bytes_per_token"] < found["file_bytes"]
    wanted = {"q": 0.5, "o": 0.5, "gate": 0.5, "neuron": 0.1}
    assert {site: found["density"][site] for site in wanted} == pytest.approx(wanted, abs=0.1)


def test_contenders_take_turns(fake_run: Callable[..., dict[str, Any]]) -> None:
    fake_run()
    order = [name for name, method in FakeWorker.calls if method == "turn"]
    names = ["probe", "sparse", "dense", "llama.cpp Q8_0"]
    assert order == [*names, *names[::-1], *names, *names[::-1]]


def test_without_llama_cpp(fake_run: Callable[..., dict[str, Any]]) -> None:
    assert fake_run(against="none")["speedup_vs_llama_cpp"] is None


def test_dense_pack_reads_every_row() -> None:
    options = DecodeOptions(shape="tiny", context=16, input_density=0.5, against="none")
    files = models.prepare_files(options, lambda *_: None)
    layouts = {name: entry.layout for name, entry in read_header(files.dense).tensors.items()}
    assert {layouts[f"layers.0.{name}"] for name in ("q", "k", "v", "o", "gate", "up", "down")} == {2}
    sparse = read_header(files.sparse).tensors
    assert {sparse[f"layers.0.{name}"].layout for name in ("q", "o", "gate")} == {3}
    assert "layers.0.up_down" in sparse


def test_command(
    fake_run: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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
        (["decode", "--shape", "tiny", "--model", "bundled"], "either --shape or --model"),
        (["decode", "--shape", "13b"], "did you mean '1.3b'"),
        (["decode", "--shape", "tiny", "--dtype", "int3"], "--dtype must be one of f32, bf16, int8, int4"),
        (["decode", "--shape", "tiny", "--against", "vllm"], "--against must be one of"),
        (["decode", "--shape", "tiny", "--mlp-density", "0"], "above 0"),
        (["decode", "--model", "bundled", "--input-density", "0.5"], "densities are for --shape"),
        (["decode", "--shape", "tiny", "--plot", "a.jpg"], "--plot writes .svg, .png, .pdf, not a.jpg"),
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
    assert error.count("\n") == 1


def test_plot_of_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.json").write_text('{"benchmark": "decode"}')
    assert run(["bench", "plot", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.svg")]) == 2
    assert "is not a result of `relufy bench decode --json`" in capsys.readouterr().err


def test_missing_llama_cpp_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("relufy.bench.llama_cpp.find_spec", lambda name: None)
    assert run(["bench", "decode", "--shape", "tiny"]) == 2
    assert capsys.readouterr().err == 'relufy: this needs llama_cpp: pip install "relufy[bench]"\n'


def test_more_than_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "available_bytes", lambda: 1 << 30)
    (tmp_path / "file").write_bytes(bytes(1000))
    with pytest.raises(UserError, match=r"2 contenders need 1\.1 GB side by side, 1\.1 GB are free"):
        models.refuse_more_than_memory([tmp_path / "file"] * 2)


def test_labels() -> None:
    assert (
        DecodeOptions(shape="1.3b", input_density=0.5).label == "1.3b int8, MLP 0.1, inputs 0.5, context 256"
    )
    assert DecodeOptions(model="/some/model", dtype="int4").label == "model int4, context 256"
