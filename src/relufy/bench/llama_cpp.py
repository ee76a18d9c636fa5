"""llama.cpp, through llama-cpp-python: its quantised files of our weights, and its decode loop."""

import ctypes
import hashlib
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from relufy.bench.gguf_file import UNQUANTIZED, llama_spec, source_kind, write_gguf
from relufy.errors import UserError
from relufy.files import replacing
from relufy.hub import read_config, weight_files

MATCHING = {"f32": ("F32",), "bf16": ("BF16",), "int8": ("Q8_0",), "int4": ("Q4_0", "Q4_K_M")}
"""llama.cpp's types of our precision, the first of which is the baseline."""

FILE_TYPES = {"Q4_0": 2, "Q8_0": 7, "Q4_K_M": 15}
"""llama.cpp's numbers (llama_ftype) of the kinds that it quantises to."""

MAX_BATCH = 512


def require_llama_cpp() -> None:
    """Raise ImportError, which names the missing package, if llama.cpp can't be used."""
    for package in ("llama_cpp", "gguf"):
        if find_spec(package) is None:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)


def gguf_of(checkpoint: Path, folder: Path, kind: str) -> Path:
    """Return the GGUF of a Llama checkpoint, of a kind such as Q4_0, written into `folder` on first use.

    Raises UserError for a checkpoint that is none.
    """
    llama_spec(checkpoint)
    path = folder / f"{checkpoint.resolve().name}-{_key(checkpoint)}-{kind}.gguf"
    if path.is_file():
        return path
    if kind in UNQUANTIZED:
        return write_gguf(checkpoint, path, kind)
    source = gguf_of(checkpoint, folder, source_kind(checkpoint))
    return quantize_gguf(source, path, kind)


def _key(checkpoint: Path) -> str:
    """Hash what a GGUF depends on. Weights are told apart by name, size and time of change."""
    files = [path.resolve() for path in weight_files(checkpoint)]
    weights = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr([weights, read_config(checkpoint)]).encode()).hexdigest()[:16]


def quantize_gguf(source: Path, output: Path, kind: str) -> Path:
    """Quantise a GGUF with llama.cpp's own quantiser, its defaults for head and embedding included."""
    llama_cpp = _library()
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = FILE_TYPES[kind]
    with replacing(output) as temporary:
        names = (str(source).encode(), str(temporary).encode())
        if llama_cpp.llama_model_quantize(*names, ctypes.byref(settings)):
            raise UserError(f"llama.cpp could not quantise {source} to {kind}")
    return output


class LlamaCpp:
    """One sequence of tokens in llama.cpp, with its own defaults: keys and values in f16, weights repacked.

    `context` is the number of positions. Raises UserError if it can't load the file.
    """

    def __init__(self, path: str | Path, threads: int, context: int):
        llama_cpp = self._library = _library()
        llama_cpp.llama_backend_init()
        settings = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
        if not self._model:
            raise UserError(f"llama.cpp could not load {path}")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.no_perf = context, MAX_BATCH, True
        settings.n_threads = settings.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        if not self._context:
            raise UserError(f"llama.cpp could not open {path} with {context} positions")
        self._batch = llama_cpp.llama_batch_init(MAX_BATCH, 0, 1)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self.length = 0

    def extend(self, tokens: Sequence[int]) -> None:
        """Add tokens without asking for logits."""
        for start in range(0, len(tokens), MAX_BATCH):
            self._step(tokens[start : start + MAX_BATCH], wanted=False)

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Add at most 512 tokens and return their logits, float32 `[tokens, vocab_size]`."""
        self._step(tokens, wanted=True)
        pointer = self._library.llama_get_logits(self._context)
        return np.ctypeslib.as_array(pointer, (len(tokens), self._vocab_size)).copy()

    def decode(self, token: int, count: int) -> list[int]:
        """Add `token` and then the likeliest ones, one at a time; return the `count` likeliest."""
        written: list[int] = []
        for _ in range(count):
            self._step((token,), wanted=True)
            pointer = self._library.llama_get_logits(self._context)
            token = int(np.argmax(np.ctypeslib.as_array(pointer, (self._vocab_size,))))
            written.append(token)
        return written

    def truncate(self, length: int) -> None:
        """Forget all positions from `length` on."""
        memory = self._library.llama_get_memory(self._context)
        self._library.llama_memory_seq_rm(memory, 0, length, -1)
        self.length = length

    def close(self) -> None:
        """Give the memory back; nothing can be asked afterwards."""
        self._library.llama_batch_free(self._batch)
        self._library.llama_free(self._context)
        self._library.llama_model_free(self._model)

    def _step(self, tokens: Sequence[int], wanted: bool) -> None:
        batch = self._batch
        batch.n_tokens = len(tokens)
        for index, token in enumerate(tokens):
            batch.token[index], batch.pos[index] = token, self.length + index
            batch.n_seq_id[index], batch.seq_id[index][0], batch.logits[index] = 1, 0, wanted
        if self._library.llama_decode(self._context, batch):
            raise UserError(f"llama.cpp could not decode {len(tokens)} tokens at position {self.length}")
        self.length += len(tokens)


@cache
def _library() -> Any:
    """Return the package, silenced. Imported by name, so that nothing but these figures needs it."""
    library: Any = import_module("llama_cpp")
    library.relufy_log = library.llama_log_callback(
        lambda level, text, data: None
    )  # must outlive the library
    library.llama_log_set(library.relufy_log, None)
    return library
