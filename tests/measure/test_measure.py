"""What `measure` says of a whole checkpoint: the bytes of its packing, and what it could not see."""

import json
from dataclasses import replace

import pytest

import relufy
from relufy.activation_sparsity import Sparsifier
from relufy.measure.measure import measure

WORDS = "It was a dark and stormy night; the old man sat by the fire. "


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(WORDS * 10)
    return path


def low_rank(phase="all"):
    return Sparsifier(("q", "o", "down"), "threshold", threshold=0.3, correction="low_rank", phase=phase)


@pytest.mark.parametrize("dtype", ["f32", "int4"])
def test_bytes_are_near_those_of_a_generation(dtype, make_checkpoint, text):
    folder = make_checkpoint(sparsifiers=(low_rank(),))
    found = measure(folder, text, window=32, max_windows=8)
    engine = relufy.Engine(folder, dtype=dtype)
    stats = engine.generate(WORDS[:16], max_new_tokens=16).run().stats
    counted = stats.weight_bytes_per_token + stats.kv_bytes_per_token
    assert found.bytes_engine
    assert found.bytes_engine[dtype].sparse == pytest.approx(counted, rel=0.1)
    assert not any("prompt" in note for note in found.notes)


def test_zeros_of_decoding_alone_are_not_seen_and_that_is_said(make_checkpoint, text):
    found = measure(make_checkpoint(sparsifiers=(low_rank("decode"),)), text, window=32, max_windows=2)
    assert set(found.sparsity["o"]) == {0.0}
    assert any("q o down" in note for note in found.notes)


def test_the_wing_is_the_function(text):
    found = relufy.measure("bundled", text, window=64, max_windows=1)
    assert isinstance(found, relufy.measure.Measurement) and found.tokens == 64
    assert relufy.measure.perplexity is relufy.measure.quality.perplexity
    assert found == measure("bundled", [str(text)], window=64, max_windows=1)


def test_a_loaded_model_is_measured_as_its_checkpoint(make_checkpoint, text):
    folder = make_checkpoint(sparsifiers=(low_rank(),))
    loaded = relufy.load_model(folder)
    found = measure(loaded, text, window=32, tokenizer=relufy.load_tokenizer(folder))
    expected = measure(folder, text, window=32)
    assert replace(found, model="") == replace(expected, model="")
    with pytest.raises(relufy.UserError, match="give the model's, or windows of token ids"):
        measure(loaded, text)


def test_what_was_left_out_is_said(make_checkpoint, text):
    assert any("tokens at the end" in note for note in measure(make_checkpoint(), text, window=33).notes)


def test_the_dense_model_is_its_own_reference(make_checkpoint, text):
    folder = make_checkpoint("stage1")
    dense = measure(make_checkpoint(), text, window=32)
    assert dense.dense_perplexity == dense.perplexity
    assert measure(folder, text, window=32, dense=make_checkpoint()).dense_perplexity == dense.perplexity
    alone = measure(folder, text, window=32)
    assert alone.dense_perplexity is None and any("dense_perplexity" in note for note in alone.notes)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"window": 129}, "longer than the 128"),
        ({"batch_size": 0}, "at least one window"),
        ({"precision": "f8"}, "f32, bf16"),
        ({"text": []}, "no window to measure"),
        ({"text": [[1.5, 2.0]]}, "windows of token ids"),
        ({"text": [[3]]}, "window 0 has fewer than 2 tokens"),
        ({"text": [[3, 513]]}, "do not fit a vocabulary of 513"),
    ],
    ids=str,
)
def test_what_cannot_be_measured_is_refused(make_checkpoint, text, options, said):
    with pytest.raises(relufy.UserError, match=said):
        measure(make_checkpoint(), **{"text": text} | options)


def test_the_document_is_json_and_says_what_it_means(make_checkpoint, text):
    found = measure(make_checkpoint("stage1"), text, window=32)
    document = json.loads(json.dumps(found.to_json(shifts=(0.3,), targets=(0.9,)), allow_nan=False))
    assert document["kind"] == "relufy.measure" and document["versions"]["relufy"]
    assert document["sites"]["down"]["mean"] == document["sparsity"]["down"]
    assert set(document["definitions"]) >= {"sites", "unions", "macs_paper", "model_level_sparsity"}
    assert set(document["bytes_engine"]) == {"f32", "bf16", "int8", "int4"}
    for cost in (document["macs_paper"], document["bytes_engine"]["int8"]):
        parts = [part["sparse"] for part in cost["parts"].values()]
        assert sum(parts) == pytest.approx(cost["sparse"])
        assert cost["without_head"]["sparse"] == pytest.approx(
            cost["sparse"] - cost["parts"]["head"]["sparse"]
        )
    predicted, suggested = (document["preactivations"][name] for name in ("predicted", "suggested"))
    assert predicted == [{"shift": 0.3, "sparsity": list(found.preactivations.sparsity(0.3))}]
    assert suggested[0]["shift"] == found.preactivations.shift_for(0.9)
