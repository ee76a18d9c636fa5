"""The cache packs once, notices changes, and forgets the least recently used."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest

import relufy
from relufy.engine.cache import clear, entries, packed_model
from relufy.engine.packed_file import verify


@pytest.fixture
def checkpoint(make_checkpoint, tmp_path):
    return shutil.copytree(make_checkpoint("stage1"), tmp_path / "checkpoint")


def test_a_checkpoint_is_packed_once(checkpoint):
    path = packed_model(checkpoint)
    file = path.stat().st_ino
    assert packed_model(checkpoint) == path and path.stat().st_ino == file
    assert [(e.path, e.model) for e in entries()] == [(path, "checkpoint")]


def test_changed_weights_or_settings_are_packed_again(checkpoint):
    paths = {packed_model(checkpoint)}
    weights = checkpoint / "model.safetensors"
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1))
    paths.add(packed_model(checkpoint))
    settings = checkpoint / "generation_config.json"
    settings.write_text(settings.read_text().replace('"eos_token_id": 1', '"eos_token_id": 2'))
    paths.add(packed_model(checkpoint))
    assert len(paths) == 3


def test_every_type_and_purpose_has_a_file_of_its_own(checkpoint):
    choices = [("f32", "exact"), ("f32", "dense"), ("int8", "exact"), ("int8", "dense")]
    paths = [packed_model(checkpoint, *choice) for choice in choices]
    assert len(set(paths)) == 4
    assert [packed_model(checkpoint, *choice) for choice in choices] == paths
    assert packed_model(checkpoint) == paths[0]


def test_beyond_the_limit_the_least_recently_used_goes(make_checkpoint, monkeypatch):
    first = packed_model(make_checkpoint("stage1"))
    second = packed_model(make_checkpoint("stage2"))
    os.utime(first, (1, 1))
    monkeypatch.setenv("RELUFY_CACHE_LIMIT_GB", str(2.5 * second.stat().st_size / 1e9))
    third = packed_model(make_checkpoint("dense"))
    assert {entry.path for entry in entries()} == {second, third}


def test_what_was_just_packed_stays_even_beyond_the_limit(make_checkpoint, monkeypatch):
    monkeypatch.setenv("RELUFY_CACHE_LIMIT_GB", "0")
    size = packed_model(make_checkpoint("stage1")).stat().st_size
    assert clear() == size
    assert entries() == []


def test_a_limit_that_is_no_number_is_refused(checkpoint, monkeypatch):
    monkeypatch.setenv("RELUFY_CACHE_LIMIT_GB", "lots")
    with pytest.raises(relufy.UserError, match="RELUFY_CACHE_LIMIT_GB"):
        packed_model(checkpoint)


def test_a_file_that_is_not_packed_is_refused(checkpoint):
    with pytest.raises(relufy.UserError, match="not a packed file"):
        relufy.Engine(checkpoint / "config.json")


def test_threads_that_pack_at_once_get_one_whole_file(checkpoint):
    with ThreadPoolExecutor(6) as threads:
        paths = set(threads.map(packed_model, [checkpoint] * 6))
    assert len(paths) == 1
    assert verify(paths.pop()) > 0


def test_a_damaged_entry_is_packed_again(checkpoint):
    path = packed_model(checkpoint)
    whole = path.read_bytes()
    path.write_bytes(whole[:5000])
    assert packed_model(checkpoint).read_bytes() == whole


def test_clear_removes_what_was_never_finished(checkpoint):
    unfinished = packed_model(checkpoint).with_name(".x.relufy.123.tmp")
    unfinished.write_bytes(b"half")
    clear()
    assert not unfinished.exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"\xff"),
        ("generation_config.json", b"[1"),
        ("generation_config.json", b"[1]"),
        ("config.json", b"\xff"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": 5}}'),
        ("model.safetensors.index.json", b"[1]"),
    ],
)
def test_damaged_side_files_are_refused(checkpoint, name, content):
    (checkpoint / name).write_bytes(content)
    with pytest.raises(relufy.UserError):
        relufy.Engine(checkpoint).generate("a")
