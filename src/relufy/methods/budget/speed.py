"""How fast this machine's engine reads weights in each way: what turns bytes into predicted time.

A stream of rows, rows of a list, and columns of a list are read at different speeds, and above its crossover
the engine reads all instead of a list. Predicted times hold where memory is what a token waits for.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from relufy.engine import _cpu
from relufy.engine.cpu import own_isa
from relufy.engine.crossover import load_crossover
from relufy.errors import UserError
from relufy.methods.setting import Progress, no_progress

DENSITIES = (1.0, 0.7, 0.4, 0.15)
SECONDS = 0.1
"""For each density; each also fills a GiB of memory."""
MOST_ROWS, MOST_COLUMNS = 0.7, 0.9
"""The engine's built-in crossovers for one token (csrc/crossover.cpp)."""
LEAST_EFFICIENCY = 0.3


@dataclass(frozen=True)
class ReadingSpeeds:
    """GB/s of each way of reading. `rows` and `columns` are of lists, columns by the share that is listed."""

    stream: float
    rows: float
    columns: Mapping[float, float]
    most_rows: float = MOST_ROWS
    """Above this share of rows the engine reads all as a stream."""
    most_columns: float = MOST_COLUMNS
    """Above this share of columns the engine lists all."""
    source: str = "table"
    """"table" (this module's), or "measured" on this machine."""

    def read_share(self, how: str, share: Any) -> Any:
        """Return the share of a matrix that is read where this one is needed; also of a tensor of shares."""
        most = self.most_rows if how == "rows" else self.most_columns
        if isinstance(share, float | int):
            return 1.0 if share > most else share
        return share.where(share <= most, 1.0)

    def seconds(self, how: str, num_bytes: float, share: float) -> float:
        """Return what it takes to read bytes that are so large a share of their matrix."""
        if how == "stream" or (how == "rows" and share >= 1):
            return num_bytes / self.stream / 1e9
        speed = self.rows if how == "rows" else _interpolated(self.columns, share)
        return num_bytes / speed / 1e9

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"columns": {str(share): speed for share, speed in self.columns.items()}}


TABLE = ReadingSpeeds(stream=10.0, rows=8.0, columns={1.0: 9.5, 0.7: 9.2, 0.4: 9.0, 0.15: 8.0})
"""Where nothing was measured. Only the ratios matter: they are those of a server core with bf16 weights."""


def measured_speeds(
    dtype: str, hidden_size: int, intermediate_size: int, threads: int, progress: Progress = no_progress
) -> ReadingSpeeds:
    """Measure this machine with matrices of a model's size, in some ten seconds.

    Listed rows are as much slower than a stream as the share at which both take equally long says. Raises
    UserError if the engine was built without its measurements.
    """
    for name in ("kernel_bandwidth", "measure_crossover"):
        if not hasattr(_cpu, name):
            raise UserError(f"the engine was built without {name}; install this relufy again, with pip")
    shape, total = (hidden_size, intermediate_size), len(DENSITIES) + 2
    stream = _cpu.kernel_bandwidth("dot", dtype, *shape, 1.0, threads, SECONDS)
    progress("measuring the machine", 1, total)
    columns = {}
    for done, density in enumerate(DENSITIES):
        columns[density] = _cpu.kernel_bandwidth("scatter", dtype, *shape, density, threads, SECONDS)
        progress("measuring the machine", done + 2, total)
    equal = _cpu.measure_crossover("dot", dtype, intermediate_size, hidden_size, 1, threads, SECONDS / 2)
    progress("measuring the machine", total, total)
    found = load_crossover(threads, own_isa())
    most = {k: found[k][dtype][1] for k in ("dot", "scatter")} if found else {}
    return ReadingSpeeds(
        stream=stream,
        rows=stream * max(equal, LEAST_EFFICIENCY),
        columns=columns,
        most_rows=most.get("dot", MOST_ROWS),
        most_columns=most.get("scatter", MOST_COLUMNS),
        source="measured",
    )


def _interpolated(speeds: Mapping[float, float], share: float) -> float:
    known = sorted(speeds)
    share = min(max(share, known[0]), known[-1])
    upper = next(s for s in known if s >= share)
    lower = max((s for s in known if s <= share), default=upper)
    if upper == lower:
        return speeds[upper]
    weight = (share - lower) / (upper - lower)
    return speeds[lower] * (1 - weight) + speeds[upper] * weight
