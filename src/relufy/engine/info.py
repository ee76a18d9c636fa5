"""What a checkpoint or a packed file is, read from headers and configuration alone."""

from collections import Counter
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from relufy.activation_sparsity import activation_name, read_activation_sparsity
from relufy.engine.packed_file import DTYPES, LAYOUTS, RAW, VERSION, is_packed_file, read_header
from relufy.engine.safetensors_folder import SafetensorsFolder
from relufy.engine.spec import decoder_spec
from relufy.engine.support import engine_support, num_parameters
from relufy.errors import UserError
from relufy.fingerprint import DERIVED_FROM, recorded
from relufy.hub import CONTEXT_KEYS, config_folder, read_config, refuse_gguf, weight_files

SIZES = {
    "layers": ("num_hidden_layers", "n_layer"),
    "hidden_size": ("hidden_size", "n_embd"),
    "intermediate_size": ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner"),
    "heads": ("num_attention_heads", "n_head"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads"),
    "vocab_size": ("vocab_size",),
    "context": CONTEXT_KEYS,
}
"""What a model's dimensions are called here, and in the configurations of its families."""


def info(model: str | Path) -> dict[str, Any]:
    """Describe a packed file, a checkpoint folder, "bundled" or a hub id. Raises UserError."""
    path = Path(model)
    return _packed_info(path) if is_packed_file(path) else _checkpoint_info(_folder(model))


def _folder(model: str | Path) -> Path:
    refuse_gguf(Path(model))
    if Path(model).is_file():
        raise UserError(f"{model} is neither a packed file of relufy nor a checkpoint folder")
    return config_folder(model)


def _checkpoint_info(folder: Path) -> dict[str, Any]:
    config = read_config(folder)
    return {
        "kind": "checkpoint",
        "path": str(folder),
        "parameters": _parameters(folder, config),
        **_config_info(config),
    }


def _parameters(folder: Path, config: Mapping[str, Any]) -> int | None:
    """Count the weights that are here, or else those that the configuration asks for, if it is understood."""
    try:
        weight_files(folder)
    except UserError:
        return _expected_parameters(config)
    weights = SafetensorsFolder(folder)
    return sum(prod(weights.shape(name)) for name in weights.names())


def _expected_parameters(config: Mapping[str, Any]) -> int | None:
    try:
        return num_parameters(decoder_spec(config))
    except UserError:
        return None


def _config_info(config: Mapping[str, Any]) -> dict[str, Any]:
    text = config.get("text_config")
    described = {**config, **text} if isinstance(text, Mapping) else config
    sparsity = read_activation_sparsity(described)
    return {
        "model_type": config.get("model_type"),
        "dtype": described.get("dtype") or described.get("torch_dtype"),
        "activation": activation_name(described),
        "sizes": {n: described[k] for n, keys in SIZES.items() for k in keys if described.get(k) is not None},
        "sparsifiers": sparsity.to_block()["sparsifiers"],
        "recipe": sparsity.recipe.get("name"),
        "provenance": _provenance(sparsity.provenance),
        "engine": engine_support(config),
    }


def _provenance(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return a provenance with the number of its fingerprints instead of them."""
    found = recorded(provenance)
    return {**provenance, DERIVED_FROM: f"{len(found)} weights"} if found else dict(provenance)


def _packed_info(path: Path) -> dict[str, Any]:
    header = read_header(path)
    metadata = header.metadata()
    stored = [entry for entry in header.tensors.values() if entry.layout != RAW]
    return {
        "kind": "packed file",
        "path": str(path),
        "format_version": VERSION,
        "bytes": header.file_bytes,
        "parameters": header.parameters(),
        "bits_per_weight": header.bits_per_weight(),
        "packed_for": metadata.get("for"),
        "weight_bytes": {DTYPES[dtype]: size for dtype, size in _bytes_by(stored, "dtype").items()},
        "layout_bytes": {LAYOUTS[layout]: size for layout, size in _bytes_by(stored, "layout").items()},
        "model": metadata.get("model"),
        **_config_info(metadata.get("config", {})),
        "dtype": metadata.get("dtype"),
    }


def _bytes_by(entries: list, key: str) -> dict[int, int]:
    sizes: Counter[int] = Counter()
    for entry in entries:
        sizes[getattr(entry, key)] += entry.bytes
    return dict(sizes)
