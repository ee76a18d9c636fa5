"""The whole examination: its document, its table of expectations, and the command."""

import json
from pathlib import Path

import pytest
from patients import llama, patient_of
from tests.families import family

from relufy.cli.main import run
from relufy.doctor.expectation import weights_unread
from relufy.doctor.expectations import expectations
from relufy.measure.site_weights import site_weights

CHECKS = ["activation", "layers", "prediction", "heads", "keys_and_values", "sweep", "generation"]
CHECKS += ["first_tokens"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(
        "".join(f"It was the {n}th dark night, and the rain fell on {n % 7} old men. " for n in range(400))
    )
    return path


def test_the_document_has_every_check(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "bundled", "--text", str(text), "--quick", "--window", "32", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["kind"] == "relufy.doctor" and "relufy" in document["versions"]
    assert [finding["check"] for finding in document["findings"]] == CHECKS
    assert all(finding["status"] != "unchecked" for finding in document["findings"])
    assert all(finding["verdict"] and finding["figures"] for finding in document["findings"])
    assert {"as it is", "stage 1", "stage 2", "TEAL 50 %", "CATS 50 %"} <= {
        row["method"] for row in document["expectations"]
    }
    assert any("relufy sparsify bundled" in step for step in document["next_steps"])


def test_the_terminal_says_the_same(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "bundled", "--text", str(text), "--quick", "--window", "32"]) == 0
    printed = capsys.readouterr()
    assert "silu makes no exact zeros" in printed.out and "What to expect" in printed.out
    assert "passes over text" in printed.err


def test_too_little_text_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "short.txt").write_text("It was a dark night. " * 20)
    assert run(["doctor", "bundled", "--text", str(tmp_path / "short.txt")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_half_of_the_gate_is_a_fifth_of_llama() -> None:
    """methods.md 0.4: gate-only 50 % leaves d f of 4 d d + 3 d f unread."""
    patient = patient_of(llama())
    weights = site_weights(patient.blocks[0])
    expected = 0.5 * (weights["up"] + weights["down"]) / sum(weights.values())
    assert weights_unread(patient, {"neuron": (0.5, 0.5)}) == pytest.approx(expected)


def test_a_plain_mlp_saves_columns_of_down_alone() -> None:
    patient = patient_of(family("gpt2"))
    weights = site_weights(patient.blocks[0])
    expected = 0.5 * weights["down"] / sum(weights.values())
    assert weights_unread(patient, {"neuron": (0.5, 0.5)}) == pytest.approx(expected)


def test_expectations_come_from_this_model() -> None:
    patient = patient_of(llama())
    rows = {row.method: row for row in expectations(patient)}
    assert rows["stage 1"].neuron_zeros == pytest.approx(patient.preactivations.mean_sparsity())
    assert rows["TEAL 40 %"].weights_unread == pytest.approx(0.4)
    assert rows["TEAL 25 %"].perplexity_rise is not None and rows["stage 1"].perplexity_rise is None
    assert all(row.source for row in rows.values())


def test_a_sparse_model_is_not_sent_to_stage_1() -> None:
    rows = {row.method for row in expectations(patient_of(llama(hidden_act="relu")))}
    assert "stage 1" not in rows and "as it is" in rows
