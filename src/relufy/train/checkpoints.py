"""A run's checkpoints: where they lie, which one is whole, and whether they belong to the run at hand.

OUT.checkpoints/run.json          what is trained on what
                checkpoint-100/   whole, for it got its name when all of it was written
                unfinished/       where the Trainer writes the next one
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from relufy.errors import UserError
from relufy.files import replacing
from relufy.processes import is_main, wait_for_all

RUN_FILE = "run.json"
UNFINISHED = "unfinished"
KEPT_CHECKPOINTS = 2
"""The second is for the case that the last one turns out damaged."""


def checkpoint_folder(output: Path) -> Path:
    """Return where a run's checkpoints lie: beside `output`, so that `output` itself is whole or absent."""
    return output.with_name(f"{output.name}.checkpoints")


def remove_checkpoints(output: Path) -> None:
    """Remove the checkpoints of a finished run towards `output`, if there are any."""
    if is_main():
        shutil.rmtree(checkpoint_folder(output), ignore_errors=True)


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest whole checkpoint of a run, or None."""
    return max((path for path in folder.glob("checkpoint-*") if _is_whole(path)), key=step_of, default=None)


def step_of(checkpoint: Path | None) -> int:
    """Return how many steps had been taken; none without a checkpoint."""
    return 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])


def finish_checkpoint(written: Path) -> None:
    """Move a checkpoint out of the folder of unfinished ones, and remove those that it makes superfluous."""
    folder = written.parent.parent
    shutil.rmtree(folder / written.name, ignore_errors=True)
    written.rename(folder / written.name)
    for old in sorted(folder.glob("checkpoint-*"), key=step_of)[:-KEPT_CHECKPOINTS]:
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def run_folder(
    output: Path | None, run: Mapping[str, Any], resume: bool
) -> Iterator[tuple[Path, Path | None]]:
    """Give the folder for the Trainer to write checkpoints to, and the one to resume from, or None.

    `run` is plain data that says what is trained on what. Raises UserError if there is nothing to resume,
    if it is another run, and if an unfinished run would be overwritten.
    """
    if output is None:
        if resume:
            raise UserError("there is nothing to resume without an output folder")
        with TemporaryDirectory(prefix="relufy-") as folder:
            yield Path(folder), None
        return
    folder, run = checkpoint_folder(Path(output)), json.loads(json.dumps(run))
    last = last_checkpoint(folder)
    if resume:
        _refuse_other_run(folder, run, last)
    elif last is not None:
        raise UserError(f"{folder} holds checkpoints of an unfinished run; resume it, or remove the folder")
    wait_for_all()  # no process looks after the main one has begun to write
    if is_main():
        shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
        with replacing(folder / RUN_FILE) as temporary:
            temporary.write_text(json.dumps(run, indent=2) + "\n")
    yield folder / UNFINISHED, last


def _is_whole(checkpoint: Path) -> bool:
    """Return whether what the Trainer writes last can be read: it could not after a loss of power."""
    try:
        return json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == step_of(
            checkpoint
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _refuse_other_run(folder: Path, run: Mapping[str, Any], last: Path | None) -> None:
    if last is None or not (folder / RUN_FILE).is_file():
        raise UserError(f"there is no checkpoint to resume from in {folder}; start the run without resuming")
    recorded = json.loads((folder / RUN_FILE).read_text())
    for key in run:
        if run[key] != recorded.get(key):
            is_short = not isinstance(run[key], dict)
            found = f"{key} {recorded.get(key)!r}, not {run[key]!r}" if is_short else f"another {key}"
            raise UserError(f"{folder} holds a run with {found}; resume with that")
