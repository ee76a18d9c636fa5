"""From what a user calls a model to a folder on disk, its config.json and its weight files."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from relufy.errors import UserError

BUNDLED = "bundled"
"""The name of the model that comes with relufy: llama-prose-3m, 3.4 M parameters, trained on old novels."""
BUNDLED_SPARSE = "bundled-sparse"
"""The same, relufied: nine of ten neurons are zero."""

GGUF_MAGIC = b"GGUF"


def bundled_model() -> Path:
    """Return the folder of the model that comes with relufy."""
    return _bundled_folders()[BUNDLED]


def _bundled_folders() -> dict[str, Path]:
    assets = Path(__file__).parent / "assets"
    return {BUNDLED: assets / "llama-prose-3m", BUNDLED_SPARSE: assets / "llama-prose-3m-sparse"}


def is_bundled(name: str | Path) -> bool:
    """Return whether `name` is a model that comes with relufy, by its short or its own name."""
    return any(str(name) in (alias, folder.name) for alias, folder in _bundled_folders().items())


def model_folder(name: str | Path) -> Path:
    """Return the checkpoint folder that `name` means: a folder, "bundled", "bundled-sparse", or a hub id.

    A hub model is downloaded into the hub's own cache. Raises UserError if it is none of these.
    """
    return _local_folder(name) or _download(
        str(name), ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
    )


def config_folder(name: str | Path) -> Path:
    """Return the folder that `name` means, as model_folder; of a hub model only config.json is fetched."""
    return _local_folder(name) or _download(str(name), ("config.json",))


def tokenizer_folder(name: str | Path) -> Path:
    """Return the folder of a tokenizer: any folder, or as model_folder, but no weights of a hub model."""
    if Path(name).is_dir():
        return Path(name)
    return _local_folder(name) or _download(str(name), ("*.json", "*.model", "*.txt", "*.jinja"))


def _local_folder(name: str | Path) -> Path | None:
    """Return the folder, or None if it can only be a hub id. Raises UserError if it can't be that either."""
    path = Path(name)
    refuse_gguf(path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            for file in sorted(path.glob("*.gguf")):
                refuse_gguf(file)
            raise UserError(f"{path} holds no config.json, so it is not a checkpoint")
        return path
    for alias, folder in _bundled_folders().items():
        if str(name) in (alias, folder.name):
            return folder
    if path.exists() or path.is_absolute() or str(name).count("/") != 1 or str(name).startswith("."):
        raise UserError(
            f"there is no checkpoint folder {name} (or give {BUNDLED!r}, {BUNDLED_SPARSE!r} or a hub id like "
            "owner/model)"
        )
    return None


def refuse_gguf(path: Path) -> None:
    """Raise UserError if there is a file in llama.cpp's format, by its name or its first bytes."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        has_magic = file.read(len(GGUF_MAGIC)) == GGUF_MAGIC
    if has_magic or path.suffix.lower() == ".gguf":
        raise UserError(
            f"{path} is a GGUF file, which relufy does not read: take the Hugging Face checkpoint that it "
            "was made from, and `relufy pack` that (or name the checkpoint here)"
        )


def read_config(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's config.json. Raises UserError if it is missing or damaged."""
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"{folder} holds no config.json, so it is not a checkpoint")
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict):
        raise UserError(f"{file} is not a JSON object")
    return config


def weight_files(folder: Path) -> list[Path]:
    """Return a checkpoint's safetensors files, by its index if it has one. Raises UserError."""
    index, names = folder / "model.safetensors.index.json", ["model.safetensors"]
    if index.is_file():
        try:
            names = sorted({str(name) for name in json.loads(index.read_text())["weight_map"].values()})
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{index} is damaged: {' '.join(str(error).split())}") from None
    for name in names:
        if not (folder / name).is_file():
            raise UserError(f"{folder} lacks the weights file {name}; only safetensors checkpoints are read")
    return [folder / name for name in names]


def _download(hub_id: str, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"no folder {hub_id} here, and the hub did not give it: {reason}") from None


CONTEXT_KEYS = ("max_position_embeddings", "n_positions")
"""What configurations call the number of positions that a model has."""


def context_length(config: Mapping[str, Any]) -> int | None:
    """Return the positions that a config.json says the model has, by whichever name, or None."""
    return next((config[key] for key in CONTEXT_KEYS if config.get(key)), None)
