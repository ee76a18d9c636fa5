"""Stored rows: byte for byte what the format says, within the error that it promises, at any size."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import relufy
from relufy.engine.quantize import (
    CHUNK,
    DTYPES,
    decode,
    encode,
    encode_blocks,
    integers,
    rounded_to_bfloat16,
    row_bytes,
)
from relufy.engine.safetensors_folder import SafetensorsFolder
from relufy.measure.quality import perplexity
from relufy.text import read_text, token_windows

Q4_0_INCREASE = 0.06138
"""Of the bundled model's perplexity on `novel_windows`, by the Q4_0 of the package gguf 0.19.0; the embedding
in Q8_0, as llama.cpp's quantiser has it by default."""


def read_back(values: np.ndarray, dtype: str) -> np.ndarray:
    encoded = encode(values, dtype)
    assert encoded.raw.dtype == np.uint8
    assert encoded.raw.shape == (len(values), row_bytes(values.shape[1], dtype))
    return decode(encoded.raw, dtype, values.shape[1], encoded.scales)


def squared_error(values: np.ndarray, dtype: str) -> float:
    return float(((values - read_back(values, dtype)) ** 2).sum(dtype=np.float64))


def q4_0_error(values: np.ndarray) -> float:
    """llama.cpp's Q4_0: groups of 32 side by side, d = the entry of largest magnitude / -8, as float16."""
    groups = values.reshape(-1, 32)
    largest = groups[np.arange(len(groups)), np.abs(groups).argmax(1)]
    step = largest / np.float32(-8)
    inverse = np.divide(1, step, out=np.zeros_like(step), where=step != 0)
    whole = np.clip(np.floor(groups * inverse[:, None] + 8.5), 0, 15) - 8
    return float(((groups - whole * step.astype(np.float16)[:, None]) ** 2).sum(dtype=np.float64))


def test_f32_is_kept_and_padded():
    values = np.arange(1, 18, dtype=np.float32)[None]
    raw = encode(values, "f32").raw
    assert raw.shape == (1, 128)
    assert np.array_equal(raw.view("<f4")[0], [*range(1, 18), *[0] * 15])


def test_bf16_words_hold_weights_that_lie_16_apart():
    words = encode(np.arange(1, 34, dtype=np.float32)[None], "bf16").raw.view("<u4")[0]
    assert len(words) == 32
    assert words[0] == 0x3F80 | 0x4188 << 16  # 1.0 and 17.0
    assert words[15] == 0x4180 | 0x4200 << 16  # 16.0 and 32.0
    assert words[16] == 0x4204 and not words[17:].any()  # 33.0


@pytest.mark.parametrize(
    ("value", "bits"),
    [
        (0x3F800000, 0x3F80),
        (0x3F808000, 0x3F80),
        (0x3F808001, 0x3F81),
        (0x3F818000, 0x3F82),
        (0x7F7FFFFF, 0x7F7F),
    ],
    ids=hex,
)
def test_bf16_rounds_to_nearest_even_and_stays_finite(value, bits):
    values = np.array([[value]], np.uint32).view(np.float32)
    assert encode(values, "bf16").raw.view("<u2")[0, 0] == bits


def test_int8_bytes():
    encoded = encode(np.array([[127, -127, 1, 0], [0, 0, 0, 0]], np.float32) / 4, "int8")
    assert encoded.raw.shape == (2, 64)
    assert encoded.raw[0, :5].tolist() == [255, 1, 129, 128, 128]
    assert (encoded.raw[1] == 128).all() and encoded.scales.tolist() == [0.25, 0.0]


def test_int4_bytes():
    """One chunk with k of 25, -50, 127 and -1, and every weight a multiple of its group's."""
    e = (4 * (np.arange(128) // 8) + np.arange(128) % 4) % 16 - 8  # each group has -8 and 7
    multiples = np.array([25, -50, 127, -1])[2 * (np.arange(128) // 64) + np.arange(128) // 4 % 2]
    values = (multiples * e).astype(np.float32)[None] / 1024
    encoded = encode(values, "int4")
    assert encoded.raw.shape == (1, 128)
    expected = (e[:64] + 8) | (e[64:] + 8) << 4
    assert encoded.raw[0, :64].tolist() == expected.tolist()
    assert encoded.raw[0, 64:68].tolist() == [25, 206, 127, 255] and not encoded.raw[0, 68:].any()
    assert encoded.scales[0] == pytest.approx(1 / 1024, rel=1e-6)
    whole, k = integers(encoded.raw, "int4", 128)
    assert np.array_equal(whole[0], e) and np.array_equal(k[0], multiples)


def test_padding_weighs_nothing():
    for dtype in ("int8", "int4"):
        raw = encode(np.full((1, 3), 5.0, np.float32), dtype).raw
        assert not integers(raw, dtype, CHUNK[dtype])[0][0, 3:].any()


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 300), st.integers(-20, 20), st.integers(0, 2**32 - 1))
def test_what_is_read_back_is_near(dtype, rows, count, exponent, seed):
    values = np.random.default_rng(seed).normal(size=(rows, count)).astype(np.float32) * np.float32(
        2.0**exponent
    )
    error = np.abs(read_back(values, dtype) - values)
    largest = np.abs(values).max(1, keepdims=True)
    bounds = {"f32": 0 * values, "bf16": np.abs(values) / 256, "int8": largest / 60, "int4": largest / 4}
    assert (error <= bounds[dtype]).all()


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-3.0000000054977558e38, 3.0000000054977558e38, width=32), min_size=1, max_size=150))
def test_any_finite_row_is_read_back_finite_and_no_worse_than_zeros(dtype, row):
    values = np.array([row], np.float32)
    found = read_back(values, dtype).astype(np.float64)
    assert np.isfinite(found).all()
    assert ((found - values) ** 2).sum() <= (values.astype(np.float64) ** 2).sum() * (1 + 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_depend_on_their_neighbours(dtype):
    values = np.random.default_rng(0).normal(size=(7, 200)).astype(np.float32)
    values[3] = 0
    together = encode(values, dtype).raw
    assert np.array_equal(together, np.concatenate([encode(row[None], dtype).raw for row in values]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_are_the_whole_in_order(dtype):
    values = np.random.default_rng(0).normal(size=(1500, 333)).astype(np.float32)
    blocks = list(encode_blocks([values, -values], dtype))
    assert len(blocks) > 1
    whole = np.concatenate([encode(values, dtype).raw, encode(-values, dtype).raw], axis=1)
    assert np.array_equal(np.concatenate([raw for raw, _ in blocks]), whole)


@pytest.mark.parametrize("count", [64, 512, 2048])
def test_int4_errs_less_than_q4_0_on_gaussian_rows(count):
    values = np.random.default_rng(0).normal(size=(64, count)).astype(np.float32)
    assert squared_error(values, "int4") < q4_0_error(values)


def test_int4_errs_less_than_q4_0_on_a_real_model(bundled):
    weights = SafetensorsFolder(bundled)
    matrices = [weights.read(name) for name in weights.names() if len(weights.shape(name)) == 2]
    ours, theirs = (sum(map(error, matrices)) for error in (lambda w: squared_error(w, "int4"), q4_0_error))
    assert ours < theirs


def test_an_outlier_costs_its_own_group_most():
    """50 times the other weights: the row's scale follows it, and the other groups keep enough multiples."""
    values = np.random.default_rng(0).normal(size=(16, 1024)).astype(np.float32)
    plain = squared_error(values, "int4") / values.size
    values[:, 5] = 50
    rest = np.ones(1024, bool)
    rest[:64] = False
    error = ((values - read_back(values, "int4")) ** 2)[:, rest].mean()
    assert error < 1.25 * plain


@pytest.fixture(scope="module")
def novel_windows(kit: Path, bundled: Path) -> np.ndarray:
    """Return 2 x 78 windows of 256 tokens: the first 20,000 tokens of each text that the model never saw."""
    tokenizer = relufy.load_tokenizer(bundled)

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False).input_ids[:20_000]

    texts = (read_text([kit / "text" / "novels" / f"{part}.txt"])[:160_000] for part in ("test", "valid"))
    return np.concatenate([token_windows(text, encode, 256, 0) for text in texts])


@pytest.mark.slow
@torch.no_grad()
def test_the_bundled_model_loses_less_than_with_q4_0(bundled, novel_windows):
    """One text alone can't tell: which way the weights happen to round shifts each by half a percent."""
    model = relufy.load_model(bundled)
    original = {name: p.numpy().copy() for name, p in model.named_parameters() if p.ndim == 2}
    dense = perplexity(model, novel_windows).perplexity
    increase = {}
    for dtype in ("int8", "int4"):
        for name, weight in original.items():
            stored = "int8" if "embed" in name else dtype
            model.get_parameter(name).copy_(torch.from_numpy(read_back(weight, stored)))
        increase[dtype] = perplexity(model, novel_windows).perplexity / dense - 1
    assert abs(increase["int8"]) < 0.001
    assert 0 < increase["int4"] < Q4_0_INCREASE


def test_bfloat16_rounds_to_nearest_even():
    values = np.array([1.0, 1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-7, 1 + 2**-8 + 2**-20], np.float32)
    assert rounded_to_bfloat16(values).tolist() == [1.0, 1.0, 1 + 2**-6, -1 - 2**-7, 1 + 2**-7]
