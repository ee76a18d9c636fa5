"""Writing that never leaves half a file, and the folder for what can be made again."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from relufy.errors import UserError


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Give a temporary sibling path to write (file or folder) and rename it to `target` if all went well.

    An existing file is replaced; an existing folder is only replaced if it is empty. On any error the
    temporary is removed and `target` is as it was.
    """
    target = Path(target)
    refuse_occupied(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if target.is_dir():
            target.rmdir()
        os.replace(temporary, target)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        elif temporary.exists():
            temporary.unlink()


def refuse_occupied(folder: Path) -> None:
    """Raise UserError if the folder exists and is not empty: to be asked before any long work towards it."""
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} exists and is not empty; name another folder or remove it")


def cache_folder() -> Path:
    """Return `$RELUFY_CACHE`, else `relufy` in the user's cache folder (`$XDG_CACHE_HOME` or `~/.cache`)."""
    if os.environ.get("RELUFY_CACHE"):
        return Path(os.environ["RELUFY_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "relufy"
