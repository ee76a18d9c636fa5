"""`relufy bench speculative`: drafts that the sparse engine verifies, in turns with others.

The sparse pack and our own dense pack of the same weights take turns, each plainly and at each gamma, with
the same draft; a turn continues a passage of the text, the same for all in a round. Passages are read before
the clock starts. See speculation_figures.py for what the figures mean.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from relufy.bench import turns as turning
from relufy.bench.document import document
from relufy.bench.lock import bench_lock
from relufy.bench.machine import last_level_cache_bytes
from relufy.bench.models import BenchFiles, prepare_files, refuse_few_positions
from relufy.bench.options import SpeculativeOptions
from relufy.bench.random_model import Progress
from relufy.bench.result import DENSE, PROBE, SPARSE
from relufy.bench.speculation_figures import speculation_figures
from relufy.bench.turns import KV_DTYPE, Workers, prerequisites, take_turns
from relufy.bench.worker import Worker
from relufy.engine.cache import packed_model
from relufy.engine.pack import purpose_of
from relufy.engine.packed_file import is_packed_file, read_header
from relufy.engine.speculation import LOOKUP, SELF
from relufy.engine.tokenizer import ModelTokenizer
from relufy.errors import UserError
from relufy.text import read_text


def bench_speculative(options: SpeculativeOptions, progress: Progress | None = None) -> dict[str, Any]:
    """Run a benchmark of speculative decoding and return its result as plain data.

    Raises UserError if another benchmark is running, the draft can't draft for it, or the text is short.
    """
    report = progress or (lambda task, done, total: None)
    threads = prerequisites(options)
    with bench_lock():
        files = _files(options, report)
        draft = _draft_file(options)
        prompts = _passages(options, files)
        with _contenders(files, draft, threads, options) as workers:
            for worker in workers.values():
                worker.call("read", prompts=prompts)
            rounds = [
                [{"prompt": index, "gamma": gamma, "count": options.tokens} for gamma in (0, *options.gammas)]
                for index in range(len(prompts))
            ]
            turns, busy = take_turns(workers, "write", rounds, report)
            facts = {name: worker.call("facts") for name, worker in workers.items()}
    figures = speculation_figures(turns, options.gammas)
    figures["fits_in_cache"] = figures["dense_bytes_per_token"] <= (last_level_cache_bytes() or 0)
    return document("speculative", options, files, figures, facts, busy, turns)


def _files(options: SpeculativeOptions, report: Progress) -> BenchFiles:
    """Return the model's packs; for a draft by itself, the sparse one is packed for reuse."""
    files = prepare_files(options, report)
    if options.draft != SELF or options.model is None:
        return files
    purpose = purpose_of(options.model, has_candidates=True)
    return replace(files, sparse=packed_model(options.model, options.dtype, for_=purpose))


def _draft_file(options: SpeculativeOptions) -> str:
    """Return the draft's packed file, "lookup" or "self"."""
    if options.draft in (LOOKUP, SELF):
        return options.draft
    path = Path(options.draft)
    file = path if is_packed_file(path) else packed_model(options.draft, options.dtype)
    refuse_few_positions(file, options.positions)
    return str(file)


def _passages(options: SpeculativeOptions, files: BenchFiles) -> list[list[int]]:
    """Return a passage of the text for each round, drawn from all of it."""
    tokens = ModelTokenizer(read_header(files.sparse)).encode(read_text([options.text]))
    room = len(tokens) - options.context
    if room < options.turns + 1:
        raise UserError(
            f"{options.text} has {len(tokens)} tokens, too few for {options.turns + 1} passages of "
            f"{options.context}; give a longer text, or a smaller --context"
        )
    starts = np.random.default_rng([options.seed, 5]).choice(room, options.turns + 1, replace=False)
    return [tokens[start : start + options.context] for start in starts.tolist()]


@contextmanager
def _contenders(
    files: BenchFiles, draft: str, threads: int, options: SpeculativeOptions
) -> Iterator[Workers]:
    """Start the processes: the probe, the sparse pack and the dense one, both with the draft."""
    with ExitStack() as stack:

        def start(contender: str, **arguments: Any) -> Worker:
            return stack.enter_context(Worker(f"relufy.bench.{contender}", threads=threads, **arguments))

        probe = {"num_bytes": turning.PROBE_BYTES, "seconds": turning.PROBE_SECONDS}
        workers = {PROBE: start("contenders:ProbeContender", **probe)}
        shared = {"positions": options.positions, "kv_dtype": KV_DTYPE, "load": options.load}
        shared["temperature"] = options.temperature
        dense_draft = None if draft == SELF else draft  # which has no zeros to be limited to
        for name, path, own in ((SPARSE, files.sparse, draft), (DENSE, files.dense, dense_draft)):
            contender = "speculation_contender:SpeculationContender"
            workers[name] = start(contender, path=str(path), draft=own, **shared)
        yield workers
