"""The files that a decode benchmark runs: one model, packed twice, and its GGUFs."""

from dataclasses import dataclass
from pathlib import Path

from relufy.bench.llama_cpp import MATCHING, gguf_of
from relufy.bench.machine import available_bytes
from relufy.bench.options import DecodeOptions
from relufy.bench.probe import PROBE_BYTES
from relufy.bench.random_model import Progress, bench_folder, dense_model, sparse_model
from relufy.bench.shapes import find_shape
from relufy.engine.cache import packed_model
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


def prepare_files(options: DecodeOptions, progress: Progress) -> BenchFiles:
    """Make what is not there yet, and refuse what would not fit into memory side by side."""
    if options.shape is not None:
        shape = find_shape(options.shape)
        weights = dense_model(shape, options.seed, progress)
        checkpoint = sparse_model(shape, options.densities, options.context, options.seed, progress)
    else:
        checkpoint = weights = model_folder(options.model or "")
    packs = {}
    for index, mode in enumerate(("exact", "dense")):
        progress("packing", index, 2)
        packs[mode] = packed_model(checkpoint, options.dtype, for_=mode)
    llama_cpp = {}
    for kind in MATCHING[options.dtype] if options.against == "llama.cpp" else ():
        progress(f"writing {kind} for llama.cpp", 0, 1)
        llama_cpp[kind] = gguf_of(weights, bench_folder() / "gguf", kind)
    files = BenchFiles(packs["exact"], packs["dense"], llama_cpp)
    refuse_more_than_memory([files.sparse, files.dense, *llama_cpp.values()])
    return files


def refuse_more_than_memory(files: list[Path]) -> None:
    """Raise UserError if the files can't all stay in memory while their owners take turns."""
    needed, free = sum(path.stat().st_size for path in files) + PROBE_BYTES, available_bytes()
    if free is not None and needed > WORKING_SHARE * free:
        raise UserError(
            f"{len(files)} contenders need {needed / 1e9:.1f} GB side by side, {free / 1e9:.1f} GB are free; "
            "give a smaller --dtype or --shape, or --against none"
        )
