"""Writing that never leaves half a file, and the folder for what can be made again."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from relufy.errors import UserError


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Give a temporary sibling path to write (file or folder) and rename it to `target` if all went well.

    An existing file is replaced; an existing folder is only replaced if it is empty, and by a folder. On any
    error the temporary is removed and `target` is as it was.
    """
    target = Path(target).resolve()
    refuse_occupied(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid4().hex[:12]}.tmp")
    try:
        yield temporary
        refuse_occupied(target, by_folder=temporary.is_dir())
        if target.is_dir():
            target.rmdir()
        os.replace(temporary, target)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        elif temporary.exists():
            temporary.unlink()


def refuse_occupied(path: Path, by_folder: bool | None = None) -> None:
    """Raise UserError if something is there that must not be replaced: to be asked before any long work.

    `by_folder` says what would take the place, if that is known: a folder or a file.
    """
    if path.is_dir() and any(path.iterdir()):
        raise UserError(f"{path} exists and is not empty; name another folder or remove it")
    if path.exists() and not path.is_dir() and not path.is_file():
        raise UserError(f"{path} is neither a file nor a folder; name another output")
    if by_folder is not None and path.exists() and path.is_dir() != by_folder:
        kinds = ("a file", "a folder") if by_folder else ("a folder", "a file")
        raise UserError(f"{path} is {kinds[0]}, and the output is {kinds[1]}; name another output")


def cache_folder() -> Path:
    """Return `$RELUFY_CACHE`, else `relufy` in the user's cache folder (`$XDG_CACHE_HOME` or `~/.cache`)."""
    if os.environ.get("RELUFY_CACHE"):
        return Path(os.environ["RELUFY_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "relufy"
