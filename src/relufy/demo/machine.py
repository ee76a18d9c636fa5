"""Facts of the machine and versions, to print beside every number that depends on them."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("relufy", "torch", "transformers", "numpy")


def machine_facts() -> dict[str, str]:
    """Return processor, cores, memory, system and the versions that matter, as words."""
    facts = {"processor": _processor(), "cores": str(_num_cores()), "system": platform.platform(terse=True)}
    facts["python"] = platform.python_version()
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            continue
    return facts


def cache_bytes() -> int | None:
    """Return the size of the last-level cache, or None where the system does not say."""
    sizes = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    words = [path.read_text().strip() for path in sizes]
    return max((int(word[:-1]) << 10 for word in words if word.endswith("K")), default=None)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
