"""From what a user calls a model to a folder on disk."""

from pathlib import Path

from relufy.errors import UserError

BUNDLED = "bundled"
"""The name of the model that comes with relufy: llama-prose-3m, 3.4 M parameters, trained on old novels."""


def bundled_model() -> Path:
    """Return the folder of the model that comes with relufy."""
    return Path(__file__).parent / "assets" / "llama-prose-3m"


def model_folder(name: str | Path) -> Path:
    """Return the checkpoint folder that `name` means: a folder, "bundled", or an id on the Hugging Face hub.

    A hub model is downloaded into the hub's own cache. Raises UserError if it is none of these.
    """
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{path} holds no config.json, so it is not a checkpoint")
        return path
    if str(name) in (BUNDLED, bundled_model().name):
        return bundled_model()
    if path.exists() or path.is_absolute() or str(name).count("/") != 1 or str(name).startswith("."):
        raise UserError(
            f"there is no checkpoint folder {name} (or give {BUNDLED!r}, or a hub id like owner/model)"
        )
    return _download(str(name))


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"no folder {hub_id} here, and the hub did not give it: {reason}") from None
