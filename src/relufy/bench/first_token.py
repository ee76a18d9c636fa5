"""Cold start: from nothing to the first token, in a new process.

    python -m relufy.bench.first_token FILE THREADS

opens a packed file, takes one token in, prints the likeliest next one, and ends.
"""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from relufy.errors import UserError

CONTEXT = 256
STARTS = 4


def cold_start_seconds(file: Path, threads: int) -> list[float]:
    """Return what each of three new processes took from its start to its first token; the file is in the
    page cache, since a start before them is not counted."""
    return [_start(file, threads) for _ in range(STARTS)][1:]


def _start(file: Path, threads: int) -> float:
    start = time.perf_counter()
    command = [sys.executable, "-m", "relufy.bench.first_token", str(file), str(threads)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdout and process.stderr
        line = process.stdout.readline()
        seconds = time.perf_counter() - start
        if not line:
            words = process.stderr.read().strip().splitlines()
            raise UserError(f"a cold start of {file} failed: {words[-1] if words else 'no word why'}")
    return seconds


def main(file: str, threads: str) -> None:
    from relufy.engine.cpu import CpuEngine

    engine = CpuEngine(file, int(threads), CONTEXT)
    logits = engine.step([(engine.new_sequence(), [0])])
    print(int(logits[0].argmax()), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
