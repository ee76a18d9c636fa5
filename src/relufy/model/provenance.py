"""Where a checkpoint came from: the base model's name, a hash of its weights, and the versions used."""

import hashlib
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from relufy import document

DECISIVE = ("relufy", "torch", "transformers")


def base_provenance(model: PreTrainedModel) -> dict[str, Any]:
    """Return `base` and `base_sha256` of the folder that the model was loaded from; empty if it was not."""
    folder = Path(model.name_or_path or "")
    files = sorted(folder.glob("*.safetensors")) if model.name_or_path else []
    if not files:
        return {}
    return {"base": _model_name(folder), "base_sha256": _sha256(files)}


def versions() -> dict[str, str]:
    """Return the versions of what decides a checkpoint's numbers."""
    found = document.versions(DECISIVE)
    return {package: found.get(package, "unknown") for package in DECISIVE}


def _model_name(folder: Path) -> str:
    """Return the folder's name; for a folder of the hub's cache, `owner/model@revision`."""
    folder = folder.absolute()
    if folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--"):
        return f"{folder.parents[1].name.removeprefix('models--').replace('--', '/')}@{folder.name}"
    return folder.name


def _sha256(files: list[Path]) -> str:
    """Hash one file as `sha256sum` does, several as the hash of their hashes in the order of their names."""
    digests = []
    for file in files:
        with file.open("rb") as stream:
            digests.append(hashlib.file_digest(stream, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
