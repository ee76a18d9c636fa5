"""The files that a benchmark runs: one model, packed twice, and its GGUFs."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from relufy.bench.llama_cpp import MATCHING, gguf_files
from relufy.bench.machine import available_bytes
from relufy.bench.options import BenchOptions
from relufy.bench.probe import PROBE_BYTES
from relufy.bench.random_model import Progress, bench_folder, dense_model, open_weights, sparse_model
from relufy.bench.shapes import find_shape
from relufy.engine.cache import packed_model
from relufy.engine.packed_file import read_header
from relufy.errors import UserError
from relufy.hub import model_folder

WORKING_SHARE = 0.9
"""How much of the free memory the files may fill; beyond it the disk would be measured."""


@dataclass(frozen=True)
class BenchFiles:
    """`sparse` skips what zeros allow; `dense` holds the same weights with every row side by side by output
    and reads all of them; `llama_cpp` maps llama.cpp's types to files."""

    sparse: Path
    dense: Path
    llama_cpp: dict[str, Path]

    @property
    def vocab_size(self) -> int:
        return int(read_header(self.sparse).numbers["vocab_size"])


def prepare_files(options: BenchOptions, progress: Progress) -> BenchFiles:
    """Make what is not there yet, and refuse what would not fit into memory side by side."""
    if options.shape is not None:
        shape = find_shape(options.shape)
        weights = dense_model(shape, options.seed)
        checkpoint = sparse_model(shape, options.densities, options.density_context, options.seed, progress)
    else:
        checkpoint = weights = model_folder(options.model or "")
    kinds = MATCHING[options.dtype] if options.against == "llama.cpp" else ()
    if kinds:  # before our own, so that the file that it quantises from is gone when they are made
        progress(f"writing {', '.join(kinds)} for llama.cpp", 0, 1)
    llama_cpp = gguf_files(weights, bench_folder() / "gguf", kinds) if kinds else {}
    packs = {}
    for index, mode in enumerate((options.pack_for, "dense")):
        progress("packing", index, 2)
        packs[mode] = packed_model(checkpoint, options.dtype, for_=mode, weights=open_weights(checkpoint))
    files = BenchFiles(packs[options.pack_for], packs["dense"], llama_cpp)
    refuse_few_positions(files.sparse, options.positions)
    refuse_more_than_memory([files.sparse, files.dense, *llama_cpp.values()])
    return files


def refuse_few_positions(file: Path, positions: int) -> None:
    """Raise UserError if a model has fewer positions than a benchmark needs."""
    most = int(read_header(file).numbers["max_context"])
    if positions > most:
        raise UserError(f"this takes {positions} positions, the model has {most}; ask for fewer tokens")


def refuse_more_than_memory(files: Iterable[Path]) -> None:
    """Raise UserError if the files can't all stay in memory while their owners take turns."""
    sizes = [path.stat().st_size for path in files]
    needed, free = sum(sizes) + PROBE_BYTES, available_bytes()
    if free is not None and needed > WORKING_SHARE * free:
        raise UserError(
            f"{len(sizes)} contenders need {needed / 1e9:.1f} GB side by side, {free / 1e9:.1f} GB are free; "
            "give a smaller --dtype or --shape, or --against none"
        )
