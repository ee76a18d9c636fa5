"""Methods under one protocol: same tokens, honest rows, and refusals before any work."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import families
import relufy
from relufy.activation_sparsity import Sparsifier
from relufy.errors import UserError
from relufy.measure.quality import perplexity
from relufy.method import Calibration, Teal
from relufy.methods.compare import CompareOptions, compare, shared_copy
from relufy.methods.sparsify import sparsify
from relufy.text import read_windows

Files = tuple[Path, Path]
QUICK = CompareOptions(window=32, max_windows=6, calibrate=Calibration(tokens=1024, window=32), batch_size=6)


def prose(seed: int, words: int = 700) -> str:
    generator = np.random.default_rng(seed)
    known = ["".join(generator.choice(list("abcdefghij"), 4)) for _ in range(60)]
    return " ".join(generator.choice(known, words))


@pytest.fixture
def texts(tmp_path: Path) -> Files:
    files = tmp_path / "test.txt", tmp_path / "calibration.txt"
    for seed, file in enumerate(files):
        file.write_text(prose(seed))
    return files


def run(model: Any, texts: Files, methods: str = "cats,scap", targets: tuple = (0.2, 0.35), **changes: Any):
    options = CompareOptions(**{**vars(QUICK), **changes})
    return compare(model, methods.split(","), targets, texts[:1], texts[1:], options)


@pytest.fixture(scope="module")
def found(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("texts")
    files = folder / "test.txt", folder / "calibration.txt"
    for seed, file in enumerate(files):
        file.write_text(prose(seed))
    return run(make_checkpoint(), files), make_checkpoint(), files


def test_there_is_a_row_for_each_method_and_target(found) -> None:
    rows = found[0].rows
    assert [(r.method, r.target) for r in rows] == [
        ("cats", 0.2),
        ("cats", 0.35),
        ("scap", 0.2),
        ("scap", 0.35),
    ]
    assert all(row.outcome for row in rows)


def test_dense_is_what_measure_reports_on_the_same_windows(found) -> None:
    comparison, folder, files = found
    windows = read_windows(files[:1], relufy.load_tokenizer(folder), 32)[:6]
    expected = perplexity(relufy.load_model(folder), windows)
    assert comparison.dense.perplexity.nats_per_token == pytest.approx(expected.nats_per_token, rel=1e-6)
    assert comparison.dense.difference.mean == 0


def test_realised_sparsity_is_near_the_target_on_held_out_text(found) -> None:
    for row in found[0].rows:
        assert row.outcome.zeros.model_level_sparsity == pytest.approx(row.target, abs=0.05)


def test_a_row_is_the_method_alone_on_a_fresh_model(found) -> None:
    """Nothing is left behind by the rows before: the last row equals sparsify on its own."""
    comparison, folder, files = found
    row, tokenizer = comparison.rows[-1], relufy.load_tokenizer(folder)
    from relufy.text_sample import sample_windows

    calibrating = sample_windows(files[1:], tokenizer, 32, 32, 0)
    parameters = {k: v for k, v in row.parameters.items() if k != "method"}
    recipe = relufy.Recipe("alone", sparsify=relufy.method.Scap(**parameters), calibrate=QUICK.calibrate)
    model = sparsify(relufy.load_model(folder), recipe, calibrating)
    alone = perplexity(model, read_windows(files[:1], tokenizer, 32)[:6])
    assert row.outcome.perplexity.nats_per_token == pytest.approx(alone.nats_per_token, rel=1e-6)


def test_controls_are_of_the_same_ratio_and_the_difference_is_paired(found) -> None:
    comparison = found[0]
    for row in comparison.rows:
        assert set(row.outcome.controls) == {"random", "oracle"}
        nats = row.outcome.perplexity.nats_per_token - comparison.dense.perplexity.nats_per_token
        assert row.outcome.difference.mean == pytest.approx(nats)


def test_costs_fall_with_the_target(found) -> None:
    dense, rows = found[0].dense, found[0].rows
    for cost in ("macs_paper", "bytes_engine"):
        values = [getattr(outcome, cost).sparse for outcome in (dense, rows[2].outcome, rows[3].outcome)]
        assert values == sorted(values, reverse=True) and values[0] > values[-1]


def test_the_document_has_everything_and_is_json(found) -> None:
    document = json.loads(json.dumps(found[0].to_json(), allow_nan=False))
    row = document["rows"][0]
    names = ("intrinsic_zero_fraction", "cett_sparsity", "gate_only_sparsity", "model_level_sparsity")
    assert all(0 <= row[name] <= 1 and name in document["definitions"] for name in names)
    assert row["parameters"]["method"] == "cats" and row["tokens"] == 6 * 31
    assert document["settings"]["calibrate"]["seed"] == 0 and document["versions"]["relufy"]
    assert len(document["texts"]["text"][0]["sha256"]) == 64


def test_the_markdown_names_definitions_in_its_columns(found) -> None:
    text = found[0].to_markdown()
    for word in ("model_level_sparsity", "gate_only_sparsity", "cett_sparsity", "| scap | 35% |", "oracle"):
        assert word in text


@pytest.mark.parametrize("mode", ["second-half", "decode"])
def test_the_other_modes_score_the_second_half(make_checkpoint, texts: Files, mode: str) -> None:
    comparison = run(make_checkpoint(), texts, "scap", (0.5,), mode=mode, has_controls=False)
    outcome = comparison.rows[0].outcome
    assert outcome.perplexity.tokens == outcome.zeros.tokens == 6 * 15
    assert outcome.zeros.model_level_sparsity == pytest.approx(0.5, abs=0.06)
    assert not outcome.controls


def test_the_engine_s_speed_is_beside_dense_in_turns(make_checkpoint, texts: Files) -> None:
    options = {"speed_tokens": 4, "speed_turns": 2, "threads": 1, "dtype": "int8", "has_controls": False}
    speed = run(make_checkpoint(), texts, "cats", (0.2,), **options).rows[0].outcome.speed
    assert speed.tokens_per_second > 0 and speed.dense_tokens_per_second > 0 and speed.ratio > 0


def test_what_cannot_be_reached_is_a_row_with_the_most(make_checkpoint, texts: Files) -> None:
    comparison = run(make_checkpoint(), texts, "cats", (0.2, 0.8), has_controls=False)
    assert comparison.rows[0].outcome and comparison.rows[1].outcome is None
    assert 0.2 < comparison.rows[1].most < 0.8 and "cannot leave 80%" in comparison.rows[1].reason
    assert comparison.rows[1].reason in comparison.to_markdown()


def test_a_method_that_the_model_cannot_have_does_not_stop_the_others(make_checkpoint, texts: Files) -> None:
    comparison = run(make_checkpoint(family="opt"), texts, "cats,scap", (0.3,), has_controls=False)
    assert "gate" in comparison.rows[0].reason and comparison.rows[1].outcome


@pytest.mark.parametrize("family", ["opt", "llama-relu"])
def test_own_zeros_of_the_model_are_part_of_the_target(make_checkpoint, texts: Files, family: str) -> None:
    row = run(make_checkpoint(family=family), texts, "scap", (0.4,), has_controls=False).rows[0]
    assert row.outcome.zeros.model_level_sparsity == pytest.approx(0.4, abs=0.04)


def test_own_targets_are_the_paper_s_knob(make_checkpoint, texts: Files) -> None:
    row = run(make_checkpoint(), texts, "cats", (0.7,), own_targets=True, has_controls=False).rows[0]
    assert row.parameters["sparsity"] == 0.7
    assert row.outcome.zeros.gate_only_sparsity == pytest.approx(0.7, abs=0.08)


def test_other_values_of_a_method_are_taken(make_checkpoint, texts: Files) -> None:
    changes = {"scap": {"centre": "zero"}}
    row = run(make_checkpoint(), texts, "scap", (0.2,), changes=changes, has_controls=False).rows[0]
    assert row.parameters["centre"] == "zero"


def test_a_copy_shares_weights_and_nothing_else() -> None:
    model = families.family("llama")
    windows = np.random.default_rng(0).integers(3, 53, (40, 16))
    logits = model(torch.from_numpy(windows[:2])).logits
    twin = shared_copy(model)
    assert {p.data_ptr() for p in twin.parameters()} == {p.data_ptr() for p in model.parameters()}
    sparsify(twin, Teal(allocation="uniform"), windows)
    assert torch.equal(model(torch.from_numpy(windows[:2])).logits, logits)
    assert not hasattr(model.config, "activation_sparsity")
    assert not torch.equal(twin(torch.from_numpy(windows[:2])).logits, logits)


def test_one_file_for_both_is_refused_unless_allowed_and_then_flagged(make_checkpoint, texts: Files) -> None:
    texts[1].write_bytes(texts[0].read_bytes())
    with pytest.raises(UserError, match=r"same file.*--allow-same-text"):
        run(make_checkpoint(), texts)
    changes = {"allow_same_text": True, "has_controls": False, "calibrate": Calibration(8192, 32)}
    comparison = run(make_checkpoint(), texts, "cats", (0.2,), **changes)
    assert comparison.is_same_text and comparison.overlap.identical_windows == 6
    assert "SAME TEXT" in comparison.to_markdown()


def test_shared_passages_are_flagged(make_checkpoint, texts: Files) -> None:
    texts[1].write_text(prose(7, 100) + " " + texts[0].read_text()[:60] + " " + prose(8))
    assert run(make_checkpoint(), texts, "cats", (0.2,), has_controls=False).is_same_text


def test_too_little_text_tells_no_domain(found) -> None:
    comparison = found[0]
    assert comparison.is_same_domain is None and "too little text" in comparison.to_markdown()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"methods": "teel"}, "did you mean 'teal'"),
        ({"methods": "cats,cats"}, "cats is named twice"),
        ({"targets": (1.5,)}, "between 0 and 1"),
        ({"targets": (0.9,), "methods": "cats"}, "no method gave a result: cats cannot leave 90%"),
        ({"mode": "half"}, "no mode 'half'"),
        ({"dtype": "int3"}, "can't be packed as 'int3'"),
        ({"changes": {"teal": {"step": 0.1}}}, "'teal', which is not compared"),
        ({"changes": {"cats": {"steps": 0.1}}}, "cats: unknown key 'steps'"),
        ({"changes": {"cats": {"sparsity": 0.1}}}, "follows from the target"),
        ({"window": 4096}, "longer than the 128"),
    ],
)
def test_bad_wishes_are_refused(make_checkpoint, texts: Files, changes: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        run(make_checkpoint(), texts, **changes)


def test_too_little_text_is_refused(make_checkpoint, texts: Files) -> None:
    texts[1].write_text(prose(1, 20))
    with pytest.raises(UserError, match="compare needs 512"):
        run(make_checkpoint(), texts)
    texts[0].write_text("too short")
    with pytest.raises(UserError, match="fewer than one window"):
        run(make_checkpoint(), texts)


def test_a_model_with_masks_is_refused(make_checkpoint, texts: Files) -> None:
    masked = make_checkpoint(sparsifiers=(Sparsifier(("o",), "threshold", threshold=0.1),))
    with pytest.raises(UserError, match="has masks already"):
        run(masked, texts)


def test_a_model_that_computes_no_numbers_is_refused(make_checkpoint, texts: Files, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    for file in make_checkpoint().iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="logits hold NaN"):
        run(folder, texts)
