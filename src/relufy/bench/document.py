"""What every benchmark of a model says beside its figures: what was asked, where, of which files."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from relufy.bench.machine import PACKAGES, machine_facts
from relufy.bench.models import BenchFiles
from relufy.bench.options import BenchOptions
from relufy.bench.result import DENSE, LLAMA_CPP, SPARSE, memory_figures
from relufy.bench.turns import KV_DTYPE, Rows
from relufy.document import heading
from relufy.engine.packed_file import read_header


def document(
    benchmark: str,
    options: BenchOptions,
    files: BenchFiles,
    figures: Mapping[str, Any],
    facts: Mapping[str, Mapping[str, Any]],
    busy: Mapping[str, Any],
    turns: Rows,
) -> dict[str, Any]:
    """Return the JSON document of a benchmark: its figures first, then what they depend on, then all turns.

    `facts` are the contenders', and `busy` says who else used the machine.
    """
    asked = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(options).items()}
    own, header = facts[SPARSE], read_header(files.sparse)
    return {
        **heading("relufy.bench", packages=PACKAGES),
        "benchmark": benchmark,
        "label": options.label,
        "options": asked | {"threads": own["threads"], "kv_dtype": KV_DTYPE},
        **figures,
        **memory_figures(header, own["peak_resident_bytes"], options.sequences * options.positions),
        "huge_page_share": own["huge_page_share"],
        "file_bytes_by_contender": _file_bytes(files),
        "machine": machine_facts() | {"isa": own["isa"]} | dict(busy),
        "facts": facts,
        "turns": turns,
    }


def _file_bytes(files: BenchFiles) -> dict[str, int]:
    named = {SPARSE: files.sparse, DENSE: files.dense}
    named |= {LLAMA_CPP + kind: path for kind, path in files.llama_cpp.items()}
    return {name: path.stat().st_size for name, path in named.items()}
