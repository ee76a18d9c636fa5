"""A stream is one endless order of windows: the same in any process, from any start, over any shards."""

import hashlib
import pickle
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.data_loader import IterableDatasetShard
from transformers import PreTrainedTokenizerFast

from relufy.errors import UserError
from relufy.model.checkpoint import load_tokenizer
from relufy.train import stream as stream_module
from relufy.train.data import open_windows
from relufy.train.stream import StoredWindows, WindowStream, shuffled

WINDOW = 9


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return load_tokenizer("bundled")  # type: ignore[return-value]


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Return two text files of 30 to 60 windows, and one of rows."""
    for name, words in ("a.txt", 90), ("b.txt", 150):
        (tmp_path / name).write_text("".join(f"{name[0]} word {n}.\n" for n in range(words)))
    (tmp_path / "c.jsonl").write_text("".join(f'{{"text": "c row {n}"}}\n' for n in range(70)))
    return [str(tmp_path / name) for name in ("a.txt", "b.txt", "c.jsonl")]


def stored(num_windows: int, bos: int | None = 0, seed: int = 0) -> WindowStream:
    ids = 1 + np.arange(num_windows * 3, dtype=np.uint16).reshape(-1, 3)
    return WindowStream((StoredWindows(ids, bos),), (1.0,), 3 + (bos is not None), seed)


@pytest.fixture(params=["stored", "streamed", "mixture", "mixture streamed"])
def stream(request: pytest.FixtureRequest, files, tokenizer, monkeypatch) -> WindowStream:
    monkeypatch.setattr(stream_module, "DRAWS", 16)
    monkeypatch.setattr(stream_module, "SHUFFLE_TOKENS", 10 * WINDOW)
    is_mixture = request.param.startswith("mixture")
    sources = [f"{file}={n}" for n, file in enumerate(files, start=1)] if is_mixture else files
    return open_windows(sources, tokenizer, WINDOW, 3, stream="streamed" in request.param)


def test_a_stored_source_comes_in_complete_epochs():
    windows = np.insert(1 + np.arange(33).reshape(11, 3), 0, 0, axis=1)
    shuffles = [np.random.default_rng([5, epoch]).permutation(11) for epoch in range(4)]
    assert np.array_equal(stored(11, seed=5).take(40), windows[np.concatenate(shuffles)[:40]])
    first = np.random.default_rng([0, 0]).permutation(11)
    assert np.array_equal(stored(11, bos=None).take(11), windows[first, 1:])


def test_skipping_leads_where_iterating_leads(stream: WindowStream):
    windows = stream.take(200)
    assert windows.shape == (200, WINDOW) and windows.dtype == np.int64
    assert len(np.unique(windows, axis=0)) > 60
    for start in (0, 1, 15, 16, 17, 100):
        assert np.array_equal(stream.skip(start).take(200 - start), windows[start:])
    assert np.array_equal(stream.skip(20).skip(30).take(9), windows[50:59])
    assert np.array_equal(stream.take(200), windows), "iterating changed it"


def test_a_streamed_source_comes_in_complete_epochs(files, tokenizer, monkeypatch):
    monkeypatch.setattr(stream_module, "SHUFFLE_TOKENS", 10 * WINDOW)
    for name in files[0], files[2]:
        kept = open_windows([name], tokenizer, WINDOW, 0)
        epoch = kept.num_windows or 0
        text = sorted(kept.take(epoch).tolist())
        windows = open_windows([name], tokenizer, WINDOW, 0, stream=True).take(2 * epoch).tolist()
        assert sorted(windows[:epoch]) == text == sorted(windows[epoch:])
        assert windows[:epoch] != windows[epoch:] and windows[:epoch] != text


def test_a_buffer_gives_all_rows_and_reads_no_more_than_it_holds():
    read = []
    rows = (read.append(n) or np.array([n]) for n in range(1000))
    found = []
    for row in shuffled(rows, 32, np.random.default_rng(0)):
        found.append(int(row[0]))
        assert len(read) - len(found) <= 32
    assert sorted(found) == list(range(1000)) != found


def test_sources_are_drawn_by_weight(files, tokenizer):
    mixture = open_windows([f"{files[0]}=3", f"{files[1]}=1"], tokenizer, WINDOW, 0)
    num_drawn = Counter(islice(mixture._lanes(), 10_000))
    assert abs(num_drawn[0] - 7500) < 5 * (10_000 * 0.75 * 0.25) ** 0.5
    both = open_windows([f"{files[0]}=0.75", f"{files[1]}=0.25"], tokenizer, WINDOW, 0)
    assert np.array_equal(both.take(50), mixture.take(50)) and both.about() == mixture.about()
    other = WindowStream(mixture.sources, mixture.weights, WINDOW, seed=1)
    assert list(islice(other._lanes(), 50)) != list(islice(mixture._lanes(), 50))


def test_each_source_of_a_mixture_comes_in_epochs_of_its_own(files, tokenizer):
    alone = open_windows([files[0]], tokenizer, WINDOW, 0)
    mixture = open_windows([f"{files[0]}=1", f"{files[1]}=1"], tokenizer, WINDOW, 0)
    from_first = mixture.take(300)[np.array(list(islice(mixture._lanes(), 300))) == 0]
    assert np.array_equal(from_first, alone.take(len(from_first)))


@pytest.mark.parametrize("num_processes", [2, 3])
def test_shards_of_several_processes_make_up_the_batches_of_one(stream: WindowStream, num_processes: int):
    batch, steps = 4, 5
    shards = [
        IterableDatasetShard(stream, batch_size=batch, num_processes=num_processes, process_index=index)
        for index in range(num_processes)
    ]
    parts = [[row["input_ids"] for row in islice(shard, batch * steps)] for shard in shards]
    joined = [
        row for step in range(steps) for part in parts for row in part[step * batch : (step + 1) * batch]
    ]
    assert np.array_equal(torch.stack(joined).numpy(), stream.take(batch * steps * num_processes))


def test_a_data_loader_makes_batches_of_it(stream: WindowStream):
    batch = next(iter(torch.utils.data.DataLoader(stream, batch_size=4)))
    assert np.array_equal(batch["input_ids"].numpy(), stream.take(4))


def test_several_workers_are_refused(monkeypatch):
    several = type("Info", (), {"num_workers": 2})()
    monkeypatch.setattr(stream_module, "get_worker_info", lambda: several)
    with pytest.raises(UserError, match="each worker of the data loader would give the same windows"):
        next(iter(stored(4)))


def test_windows_belong_to_who_gets_them():
    windows = stored(2)
    for row in islice(windows, 4):
        row["input_ids"][:] = 0
    assert windows.take(2)[:, 1:].min() == 1


def test_a_pickled_stream_gives_the_same(stream: WindowStream):
    copy = pickle.loads(pickle.dumps(stream.skip(7)))
    assert np.array_equal(copy.take(80), stream.skip(7).take(80)) and copy.about() == stream.about()


def test_another_process_makes_the_same(files, tokenizer, tmp_path):
    here = open_windows([f"{files[0]}=1", f"{files[2]}=2"], tokenizer, WINDOW, 3, stream=True)
    (tmp_path / "stream.pickle").write_bytes(pickle.dumps(here))
    program = (
        "import hashlib, pickle, sys; stream = pickle.load(open(sys.argv[1], 'rb'))\n"
        "print(hashlib.sha256(stream.take(100).tobytes()).hexdigest(), stream.about())"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "stream.pickle")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{hashlib.sha256(here.take(100).tobytes()).hexdigest()} {here.about()}"


@pytest.mark.parametrize("streams", [False, True])
def test_what_a_stream_is_about_tells_texts_apart(files, tokenizer, streams: bool):
    def about(sources: list[str], window: int = WINDOW, seed: int = 0) -> dict:
        return open_windows(sources, tokenizer, window, seed, stream=streams).about()

    first = about(files)
    assert first == about(files) == pickle.loads(pickle.dumps(first))
    others = [about(files[:2]), about(files, window=8), about(files, seed=1), about(files[::-1])]
    others += [about([f"{files[0]}=1", f"{files[1]}={weight}"]) for weight in (1, 2)]
    Path(files[0]).write_text("Something else. " * 50)
    others.append(about(files))
    assert first not in others
    assert all(one not in others[:place] for place, one in enumerate(others))


def test_a_text_moved_elsewhere_is_the_same_text(files, tokenizer, tmp_path):
    before = open_windows(files[:1], tokenizer, WINDOW, 0).about()
    moved = Path(files[0]).rename(tmp_path / "moved.txt")
    assert open_windows([str(moved)], tokenizer, WINDOW, 0).about() == before


def test_windows_must_fit_the_vocabulary(files, tokenizer):
    size = len(tokenizer)
    kept = open_windows([files[0]], tokenizer, WINDOW, 0)
    highest = int(kept.take(kept.num_windows or 0).max())
    kept.check(highest + 1)
    with pytest.raises(
        UserError, match=f"token ids from .* to {highest} do not fit a vocabulary of {highest}"
    ):
        kept.check(highest)
    streamed = open_windows([files[0]], tokenizer, WINDOW, 0, stream=True)
    streamed.check(size)
    with pytest.raises(UserError, match=f"do not fit a vocabulary of {size - 1}"):
        streamed.check(size - 1)
