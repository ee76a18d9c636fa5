"""What makes a model another kind than a dense decoder, told from its module tree.

Such models are refused by name, before their blocks are looked at as those of a dense decoder.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

EXPERTS_PER_TOKEN = (
    *("num_experts_per_tok", "num_experts_per_token", "top_k_experts"),
    *("moe_topk", "moe_top_k", "moe_k"),
)
"""What configurations call the number of experts that a token is sent to."""

STATES = ("A_log", "time_decay", "slope_rate", "rg_lru", "igate_preact")
"""What a module with a state holds: Mamba and delta rules, RWKV, lightning attention, RG-LRU, xLSTM."""

LATENTS = ("kv_a_proj_with_mqa", "kv_b_proj")
CROSS_ATTENTIONS = ("encoder_attn", "crossattention", "cross_attn")


@dataclass(frozen=True)
class Kind:
    """Parts of one sort that no dense decoder has."""

    word: str
    """One of "mixture of experts", "recurrent mixer", "latent attention" and "cross-attention"."""
    details: str
    """What they are, in how many blocks, and where the first one is."""
    modules: tuple[str, ...]
    """Dotted names of them all."""


def other_kinds(model: nn.Module) -> list[Kind]:
    """Return what blocks have beside, or instead of, one attention and one MLP each."""
    lists = block_lists(model)
    within, total = (lists[0][0], len(lists[0][1])) if len(lists) == 1 else ("", None)
    parts = [(name, part) for name, part in model.named_modules() if name.startswith(within)]
    parts = [(name, part) for name, part in parts if re.search(r"\.\d+\.", name.removeprefix(within))]
    found = [(word, _outermost(n for n, part in parts if has(n, part))) for word, has in _KINDS.items()]
    return [Kind(word, _details(model, word, names, total), tuple(names)) for word, names in found if names]


def block_lists(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """Return the lists that have as many modules as the model has layers, without those in others."""
    count = num_layers(model)
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    found = [(name, m) for name, m in lists if count and len(m) == count]
    return [(name, m) for name, m in found if not any(name.startswith(f"{other}.") for other, _ in found)]


def num_layers(model: nn.Module) -> int | None:
    """Return the number of layers that the configuration has, None if it has no such number."""
    return getattr(getattr(model, "config", None), "num_hidden_layers", None)


def pattern_of(name: str) -> str:
    """Return a module's dotted name with `*` for the numbers in it."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _details(model: nn.Module, word: str, names: Sequence[str], total: int | None) -> str:
    first = model.get_submodule(names[0])
    blocks = len({_block_of(name) for name in names})
    where = f"in {blocks}{f' of {total}' if total else ''} block{'s' * ((total or blocks) > 1)}: {names[0]}"
    if word != "mixture of experts":
        return f"{type(first).__name__} {where}"
    per_token = _experts_per_token(getattr(model, "config", None))
    return (
        f"{_num_experts(names[0], first)} experts{f', {per_token} per token,' if per_token else ''} {where}"
    )


def _num_experts(name: str, module: nn.Module) -> int:
    """Return how many experts a module holds: as a list, or stacked in the weights of a class of its own."""
    own = name.rpartition(".")[2]
    if own.startswith("shared") or not (own == "experts" or type(module).__name__.endswith("Experts")):
        return 0
    if isinstance(module, nn.ModuleList):
        return len(module)
    stacked = (weight.shape[0] for weight in module.parameters() if weight.ndim == 3)
    count = getattr(module, "num_experts", None)
    return count if isinstance(count, int) else next(stacked, 0)


def _experts_per_token(config: Any) -> int | None:
    """Return the number that the configuration, or a part of it, has; None if it has none."""
    places = (
        [config, *(value for value in vars(config).values() if hasattr(value, "to_dict"))] if config else []
    )
    values = (getattr(place, key, None) for place in places for key in EXPERTS_PER_TOKEN)
    return next((value for value in values if isinstance(value, int) and value > 0), None)


def _is_recurrent(_name: str, module: nn.Module) -> bool:
    """Return whether the module itself holds a state's weights, or a convolution over time."""
    return _holds(module, STATES) or any(isinstance(child, nn.Conv1d) for child in module.children())


def _holds(module: nn.Module, names: Iterable[str]) -> bool:
    held = {**module._parameters, **module._buffers, **module._modules}
    return any(name in held for name in names)


_KINDS: dict[str, Callable[[str, nn.Module], object]] = {
    "mixture of experts": _num_experts,
    "recurrent mixer": _is_recurrent,
    "latent attention": lambda _name, module: _holds(module, LATENTS),
    "cross-attention": lambda name, _module: name.rpartition(".")[2] in CROSS_ATTENTIONS,
}


def _block_of(name: str) -> str:
    match = re.search(r"\.\d+\.", name)
    return name[: match.end()] if match else name


def _outermost(names: Iterable[str]) -> list[str]:
    """Return the names that lie in none of the others; what holds a module comes before it."""
    found: list[str] = []
    for name in names:
        if not found or not name.startswith(f"{found[-1]}."):
            found.append(name)
    return found
