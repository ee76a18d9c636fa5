"""What a figure depends on: the machine, and who else was busy while it was measured."""

import os
import platform
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from relufy.engine.cpu import usable_cores
from relufy.engine.crossover import processor

PACKAGES = ("relufy", "numpy", "llama-cpp-python", "gguf")
"""Whose versions matter here."""
BUSY_CORES = 0.1
STOLEN_SHARE = 0.02
"""With more cores of others, or a larger share stolen by the hypervisor, the machine was busy."""


def machine_facts() -> dict[str, Any]:
    """Return processor, cores, caches, memory and system."""
    return {
        "processor": processor(),
        "cores": usable_cores(),
        "caches": _caches(),
        "last_level_cache_bytes": last_level_cache_bytes(),
        "memory_bytes": _memory("MemTotal"),
        "huge_pages": _first_line("/sys/kernel/mm/transparent_hugepage/enabled"),
        "system": platform.platform(terse=True),
    }


def available_bytes() -> int | None:
    """Return the memory that could be used without swapping, or None where the system does not say."""
    return _memory("MemAvailable")


def last_level_cache_bytes() -> int | None:
    """Return the size of the greatest cache, or None where the system does not say."""
    sizes = [size for size in _caches().values() if size.endswith("K")]
    return max((int(size[:-1]) << 10 for size in sizes), default=None)


class BusyWatch:
    """Counts, from its making to `stop`, the processor time of processes other than the named ones."""

    def __init__(self, ours: Collection[int]):
        self._ours = {os.getpid(), *ours}
        self._load = _load()
        self._start, self._ticks, self._stolen = time.monotonic(), self._others(), _stolen_ticks()

    def stop(self) -> dict[str, Any]:
        """Return the load before and after, and what others took: cores, by process, and stolen share."""
        wall = max(time.monotonic() - self._start, 1e-9) * os.sysconf("SC_CLK_TCK")
        now = self._others()
        cores = {who: (ticks - self._ticks.get(who, 0)) / wall for who, ticks in now.items()}
        busiest = sorted(cores.items(), key=lambda item: -item[1])[:5]
        others = sum(cores.values())
        stolen = (_stolen_ticks() - self._stolen) / wall / (os.cpu_count() or 1)
        return {
            "was_busy": others > BUSY_CORES or stolen > STOLEN_SHARE,
            "other_cores": others,
            "stolen_share": stolen,
            "other_processes": [
                {"process": who[1], "pid": who[0], "cores": share} for who, share in busiest if share > 0.01
            ],
            "load_before": self._load,
            "load_after": _load(),
        }

    def _others(self) -> dict[tuple[int, str], int]:
        return {who: ticks for who, ticks in _process_ticks().items() if who[0] not in self._ours}


def _process_ticks() -> dict[tuple[int, str], int]:
    """Return the processor time of every process that can be seen, by its id and name."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = stat.read_text().partition("(")[2].rpartition(")")
        except OSError:
            continue
        fields = rest.split()
        found[int(stat.parent.name), name] = int(fields[11]) + int(fields[12])
    return found


def _stolen_ticks() -> int:
    fields = _first_line("/proc/stat").split()
    return int(fields[8]) if len(fields) > 8 else 0


def _load() -> list[float]:
    return [round(value, 2) for value in os.getloadavg()]


def _caches() -> dict[str, str]:
    """Return the sizes of the first core's caches, as the system words them."""
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        kind = _first_line(index / "type")
        if kind != "Instruction":
            found[f"L{_first_line(index / 'level')}"] = _first_line(index / "size")
    return found


def _memory(key: str) -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(f"{key}:")), None)


def _first_line(path: str | Path) -> str:
    try:
        return Path(path).read_text().partition("\n")[0]
    except OSError:
        return ""
