"""The specification of the engine: a packed file run in float64 with numpy, every weight read.

`emulate` rounds the inputs of integer matrices to 16 bits as the engine does (docs/format.md, "Arithmetic");
without it, the products are those of the dequantised weights. One tensor is decoded at a time, in blocks, so
that large files can be checked on a few tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from relufy.engine import naive_attention, naive_masks
from relufy.engine.naive_predictor import NaivePrediction
from relufy.engine.naive_products import multiply, multiply_by_input
from relufy.engine.naive_reuse import NaiveReuse, opens_by_period
from relufy.engine.packed_numbers import rope_tensor
from relufy.engine.packed_tensors import PackedTensors
from relufy.engine.reuse import Reuse


def _gelu(z: np.ndarray) -> np.ndarray:
    return 0.5 * z * (1 + np.vectorize(math.erf, otypes=[float])(z / math.sqrt(2)))


def _gelu_tanh(z: np.ndarray) -> np.ndarray:
    return 0.5 * z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


ACTIVATIONS = (
    lambda z, cutoff: z / (1 + np.exp(-z)),
    lambda z, cutoff: np.maximum(z, 0),
    lambda z, cutoff: np.maximum(z, 0) ** 2,
    lambda z, cutoff: _gelu(z),
    lambda z, cutoff: _gelu_tanh(z),
    lambda z, cutoff: np.where(z >= cutoff, z, 0),
)
"""By the file's number: silu, relu, relu2, gelu, gelu_tanh, fatrelu."""


@dataclass(frozen=True)
class NaiveResult:
    """Logits, float64 `[tokens, vocab]`, and how near each token's closest score came to the cut of its mask.

    Below 1e-5 or so (relative to the cut), rounding alone may decide whether an entry is kept.
    """

    logits: np.ndarray
    margins: np.ndarray


class NaiveDecoder:
    """Gives the logits of a text. `path` is a packed file."""

    def __init__(self, path: Path | str, emulate: bool = True):
        self._tensors = PackedTensors(path)
        self._numbers = self._tensors.header.numbers
        self._emulate = emulate
        self._prediction: NaivePrediction | None = None

    def logits(self, tokens: Sequence[int], prompt_length: int = 0) -> np.ndarray:
        """Return float64 logits `[tokens, vocab]`; the first `prompt_length` tokens are the prompt."""
        return self.run(tokens, prompt_length).logits

    def run_predicted(
        self, tokens: Sequence[int], prompt_length: int = 0, num_open: int | None = None
    ) -> tuple[NaiveResult, NaivePrediction]:
        """Return what prediction gives after `num_open` tokens, by default the prompt, and its candidates."""
        num_open = prompt_length if num_open is None else num_open
        found = NaivePrediction(max(num_open, int(self.number("predictor_dense_first"))))
        self._prediction = found
        try:
            return self.run(tokens, prompt_length), found
        finally:
            self._prediction = None

    def run_reusing(
        self, tokens: Sequence[int], reuse: Reuse, prompt_length: int = 0, num_open: int | None = None
    ) -> tuple[NaiveResult, NaiveReuse]:
        """Return what reuse gives after `num_open` tokens, by default the prompt, and what it went by."""
        num_open = prompt_length if num_open is None else num_open
        found = NaiveReuse(reuse, num_open, opens_by_period(reuse, num_open, len(tokens)))
        if reuse.policy == "adaptive":
            for token in range(num_open + 1, len(tokens)):
                self.run(tokens[:token], prompt_length, found)
                found.opens[token] = found.opens_next(token)
        return self.run(tokens, prompt_length, found), found

    def run(
        self, tokens: Sequence[int], prompt_length: int = 0, reuse: NaiveReuse | None = None
    ) -> NaiveResult:
        """Return logits and margins."""
        margins = np.full(len(tokens), np.inf)
        hidden = self._embedding("embedding", np.asarray(tokens)) * self.number("embedding_scale", 1.0)
        if self._numbers["position_kind"] == 1:
            hidden = hidden + self._embedding("position_embedding", np.arange(len(tokens)))
        for layer in range(self._whole("num_layers")):
            prediction = self._prediction if f"layers.{layer}.predictor_in" in self._tensors else None
            block, prefix = _Layer(self, layer, prompt_length, margins, reuse, prediction), f"layers.{layer}."
            before = hidden
            attended = block.attention(self.norm(hidden, prefix + "attention_norm"))
            hidden = hidden + self.norm(attended, prefix + "attention_output_norm")
            read = before if self.number("parallel") else hidden
            made = block.mlp(self.norm(read, prefix + "mlp_norm"))
            hidden = hidden + self.norm(made, prefix + "mlp_output_norm")
        head = "head" if "head" in self._tensors else "embedding"
        logits = self.product(head, self.norm(hidden, "final_norm"))
        return NaiveResult(naive_attention.soft_cap(logits, self.number("final_softcap")), margins)

    def number(self, name: str, default: float = 0.0) -> float:
        return self._numbers.get(name, default)

    def cut(self, name: str, scores: np.ndarray) -> float:
        """Return the number that scores `[tokens, channels]` are held against."""
        return self.number(name)

    def _whole(self, name: str) -> int:
        return int(self._numbers[name])

    def vector(self, name: str, default: float = 0.0) -> np.ndarray | float:
        return self._tensors.vector(name).astype(np.float64) if name in self._tensors else default

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        """Return the norm over the last axis; what has no norm of this name stays as it is."""
        if name not in self._tensors:
            return x
        if self._numbers["norm_kind"] == 1:
            x = x - x.mean(-1, keepdims=True)
        scaled = x / np.sqrt((x**2).mean(-1, keepdims=True) + self._numbers["norm_eps"])
        return scaled * self.vector(name) + self.vector(name + ".bias")

    def product(self, name: str, x: np.ndarray, partition: int | None = None) -> np.ndarray:
        """Return `x W^T` of float64 `[tokens, inputs]`; inputs are rounded apart in each partition."""
        matrix = self._tensors.matrix(name)
        if matrix.by_input:
            return multiply_by_input(matrix, x, self._emulate, partition or x.shape[1])
        return multiply(matrix, x, self._emulate)

    def has(self, name: str) -> bool:
        return name in self._tensors

    def _embedding(self, name: str, rows: np.ndarray) -> np.ndarray:
        return self._tensors.matrix(name).rows(rows).astype(np.float64)


class _Layer:
    """One layer of the decoder, on the inputs of all tokens. Lowers `margins` to those of its masks."""

    def __init__(
        self,
        decoder: NaiveDecoder,
        index: int,
        prompt_length: int,
        margins: np.ndarray,
        reuse: NaiveReuse | None,
        prediction: NaivePrediction | None,
    ):
        self._decoder, self._prefix, self._prompt_length = decoder, f"layers.{index}.", prompt_length
        self._margins, self._reuse, self._prediction, self._index = margins, reuse, prediction, index

    def attention(self, x: np.ndarray) -> np.ndarray:
        heads, kv_heads, width = (
            int(self._decoder.number(name)) for name in ("num_heads", "num_kv_heads", "head_dim")
        )
        queries = self._heads("q", x, heads, width)
        keys = self._heads("k", x, kv_heads, width)
        values = self._project("v", x).reshape(len(x), kv_heads, width)
        scale = self._decoder.number("attention_scale", 1 / np.sqrt(width))
        scores = naive_attention.scores(queries, keys) * scale
        scores = naive_attention.soft_cap(scores, self._decoder.number("attention_softcap"))
        if self._decoder.has("alibi_slopes"):
            rounds = bool(self._decoder.number("alibi_rounds"))
            biases = naive_attention.alibi(np.asarray(self._decoder.vector("alibi_slopes")), len(x), rounds)
            scores = scores + biases * (scale if rounds else 1.0)
        attended = naive_attention.attend(scores, values, int(self._number("window")))
        return self._project("o", attended.reshape(len(x), -1))

    def _heads(self, site: str, x: np.ndarray, count: int, width: int) -> np.ndarray:
        """Return queries or keys `[tokens, count, width]`, normalised and rotated where the layer does so."""
        heads, name = self._project(site, x).reshape(len(x), count, width), f"{self._prefix}{site}_norm"
        is_whole = self._decoder.number("query_norm") == 2
        flat = self._decoder.norm(heads.reshape(len(x), -1) if is_whole else heads, name)
        heads = flat.reshape(heads.shape)
        is_rotary = self._decoder.number("position_kind") == 0
        table = int(self._decoder.number(f"{self._prefix}rope", float(is_rotary)))
        if table == 0:
            return heads
        frequencies = np.asarray(self._decoder.vector(rope_tensor(table - 1)))
        scale = self._decoder.number(f"ropes.{table - 1}.scale", 1.0)
        return naive_attention.rotate(heads, frequencies, scale)

    def mlp(self, x: np.ndarray) -> np.ndarray:
        is_gated = self._number("gated") == 1
        neurons = self._activate(self._project("gate" if is_gated else "up", x))
        neurons, _ = self._mask("neuron", neurons)
        if self._prediction is not None:
            neurons = self._predicted(neurons, self._mask("gate" if is_gated else "up", x)[0])
        if is_gated:
            up = self._project("up", x)
            neurons = neurons * (np.maximum(up, 0) if self._number("up_relu") else up)
        if self._reuse:
            neurons = self._reuse.limit(self._index, neurons, lambda a: self._mask("down", a)[0])
        return self._project("down", neurons, int(self._decoder.number("neurons_per_partition")))

    def _predicted(self, neurons: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Return what the predictor lets through of the neurons, given the first matrix's masked input."""
        assert self._prediction is not None
        name = self._prefix + "predictor_"
        scores = self._decoder.product(name + "out", self._decoder.product(name + "in", x))
        thresholds = np.asarray(self._decoder.vector(name + "threshold"))
        self._lower_margins(self._prediction.margins(scores, thresholds))
        return self._prediction.limit(self._index, neurons, scores, thresholds)

    def _activate(self, z: np.ndarray) -> np.ndarray:
        z = z - self._number("shift")
        if self._number("statistical"):
            deviations = self._number("deviations") * z.std(-1, keepdims=True)
            z = np.maximum(z - (z.mean(-1, keepdims=True) + deviations), 0)
        cutoff = self._decoder.cut(self._prefix + "cutoff", z)
        if cutoff:
            self._lower_margins(naive_masks.relative_distance(z, cutoff))
        return ACTIVATIONS[int(self._number("activation"))](z, cutoff)

    def _lower_margins(self, margins: np.ndarray) -> None:
        np.minimum(self._margins, margins, out=self._margins)

    def _project(self, site: str, x: np.ndarray, partition: int | None = None) -> np.ndarray:
        """Return the projection of the masked input, with its bias and its low-rank correction."""
        kept, left_out = self._mask(site, x)
        y = self._decoder.product(self._prefix + site, kept, partition)
        y = y + self._decoder.vector(f"{self._prefix}{site}.bias")
        name = f"{self._prefix}{site}.low_rank_"
        if self._decoder.has(name + "in"):
            y = y + self._decoder.product(name + "out", self._decoder.product(name + "in", left_out))
        return y

    def _mask(self, site: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return what the site lets pass, and the rest of x."""
        name = f"{self._prefix}{site}."
        vectors = {key: self._decoder.vector(name + key, default) for key, default in naive_masks.DEFAULTS}
        if not self._decoder.has(name + "thresholds"):
            scores = vectors["weight"] * np.abs(x - vectors["centre"])
            vectors["thresholds"] = self._decoder.cut(name + "threshold", scores)
        select, k = int(self._number(site + ".select")), int(self._number(site + ".k"))
        is_dense = self._is_dense(site, len(x))
        self._lower_margins(np.where(is_dense, np.inf, naive_masks.margin(x, select, k, **vectors)))
        is_kept = naive_masks.keep(x, select, k, **vectors) | is_dense[:, None]
        kept = np.where(is_kept, x - vectors["centre"], 0)
        return kept, x - kept

    def _is_dense(self, site: str, tokens: int) -> np.ndarray:
        positions = np.arange(tokens)
        is_prompt = (positions < self._prompt_length) & bool(self._number(site + ".decode_only"))
        return is_prompt | (positions < self._number(site + ".dense_first"))

    def _number(self, name: str) -> float:
        return self._decoder.number(self._prefix + name)
