"""Facts of the machine and versions, to print beside every number that depends on them."""

import os
import platform

from relufy.bench.machine import processor
from relufy.document import versions


def machine_facts() -> dict[str, str]:
    """Return processor, cores, system and the versions that matter, as words."""
    facts = {"processor": processor(), "cores": str(_num_cores()), "system": platform.platform(terse=True)}
    return facts | versions()


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
