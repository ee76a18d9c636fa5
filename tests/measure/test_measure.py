"""What `measure` says of a whole checkpoint: the bytes of its packing, and what it could not see."""

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
    found = measure(folder, text, window=32, max_windows=8, dtype=dtype)
    engine = relufy.Engine(folder, dtype=dtype)
    stats = engine.generate(WORDS[:16], max_new_tokens=16).run().stats
    counted = stats.weight_bytes_per_token + stats.kv_bytes_per_token
    assert found.bytes_engine and found.dtype == dtype
    assert found.bytes_engine.sparse == pytest.approx(counted, rel=0.1)
    assert not any("prompt" in note for note in found.notes)


def test_zeros_of_decoding_alone_are_not_seen_and_that_is_said(make_checkpoint, text):
    found = measure(make_checkpoint(sparsifiers=(low_rank("decode"),)), text, window=32, max_windows=2)
    assert set(found.sparsity["o"]) == {0.0}
    assert any("q o down" in note for note in found.notes)


def test_an_unknown_dtype_is_refused_before_the_work(make_checkpoint, text):
    with pytest.raises(relufy.UserError, match="int3"):
        measure(make_checkpoint(), text, dtype="int3")
