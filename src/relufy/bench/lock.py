"""One benchmark at a time: two would measure each other."""

import fcntl
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from relufy.errors import UserError


def lock_path() -> Path:
    """Return the file that all of this user's benchmarks on this machine lock."""
    return Path(tempfile.gettempdir()) / f"relufy-bench-{os.getuid()}.lock"


@contextmanager
def bench_lock(path: Path | None = None) -> Iterator[None]:
    """Hold the machine's benchmark lock. Raises UserError, saying who holds it, if another process does.

    The lock goes with the process that holds it, so that a killed benchmark leaves none behind.
    """
    with open(path or lock_path(), "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise UserError(f"a benchmark is running already ({holder}); wait for it, or end it") from None
        file.truncate(0)
        file.write(f"process {os.getpid()}: {' '.join(sys.argv)}")
        file.flush()
        yield
        file.truncate(0)
