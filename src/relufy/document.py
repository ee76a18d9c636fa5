"""What every result that is written as JSON says of itself: its kind, how it was made, and with what."""

import json
import platform
import shlex
import sys
from collections.abc import Collection
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from relufy.errors import UserError

PACKAGES = ("relufy", "torch", "transformers", "numpy")
VERSION = 1


def heading(kind: str, version: int = VERSION, packages: Collection[str] = PACKAGES) -> dict[str, Any]:
    """Return what a document begins with: `kind` ("relufy.measure"), `version`, `command`, `versions`.

    It goes on with its figures and with `definitions`, what each name in them means.
    """
    return {"kind": kind, "version": version, "command": command_line(), "versions": versions(packages)}


def command_line() -> str:
    """Return the running command as a shell takes it: `relufy ...`, or the program that imports relufy."""
    program, *arguments = sys.argv or [""]
    path = Path(program)
    is_ours = path.name in ("relufy", "relufy.exe") or path.parent.name == "relufy"
    return shlex.join(["relufy" if is_ours else path.name, *arguments])


def versions(packages: Collection[str] = PACKAGES) -> dict[str, str]:
    """Return the versions of Python and of those of the packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def read_document(path: Path | str, kind: str = "") -> dict[str, Any]:
    """Return a document that relufy wrote, of this kind if one is named. Raises UserError."""
    try:
        found = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"there is no result {path}") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {' '.join(str(error).split())}") from None
    own = found.get("kind") if isinstance(found, dict) else None
    if not isinstance(own, str) or not own.startswith("relufy.") or (kind and own != kind):
        raise UserError(f"{path} is no result of {kind or 'a relufy command'}; its kind is {own!r}")
    return found
