"""Which sparsifiers a model can have, given its blocks and the zeros that it makes already."""

from collections.abc import Sequence

from relufy.activation_sparsity import SITES, ActivationSparsity, Sparsifier
from relufy.errors import UserError
from relufy.model.structure import BlockSites


def check_sparsity(blocks: Sequence[BlockSites], sparsity: ActivationSparsity) -> None:
    """Raise UserError if a model with these blocks cannot have these sparsifiers."""
    for sparsifier in sparsity.sparsifiers:
        if beyond := [layer for layer in sparsifier.layers or () if not 0 <= layer < len(blocks)]:
            raise UserError(
                f"a sparsifier names layer {beyond[0]}, the model has layers 0 to {len(blocks) - 1}"
            )
    for block in blocks:
        _check_block(block, {site: s for site in SITES if (s := sparsity.at(site, block.index))})


def adds_zeros(num_layers: int, present: ActivationSparsity, wanted: ActivationSparsity) -> bool:
    """Return whether `wanted` has a site that `present` lacks. Raises UserError if they contradict."""
    adds = False
    for layer in range(num_layers):
        for site in SITES:
            old, new = _function(present.at(site, layer)), _function(wanted.at(site, layer))
            if old and old != new:
                raise UserError(
                    f"the model already has {_described(old)} at {site!r} of layer {layer}, "
                    f"which would become {_described(new)}; start from a model without it"
                )
            adds = adds or old != new
    return adds


def _check_block(block: BlockSites, wanted: dict[str, Sparsifier]) -> None:
    where = f"layer {block.index} ({block.name})"
    if "gate" in wanted and block.gate is None:
        raise UserError(f"{where} has no gate: in a plain MLP the input is read by 'up' alone")
    if "down" in wanted and "neuron" in wanted and block.gate is None:
        raise UserError(f"{where}: in a plain MLP 'neuron' and 'down' are one site; set 'neuron' alone")
    if unsupported := [site for site in ("o", "down") if site in wanted]:
        raise UserError(
            f"{where}: a {wanted[unsupported[0]].function} at {unsupported[0]!r} is not supported"
        )
    if "neuron" not in wanted:
        raise UserError(f"{where}: sparsifiers need the site 'neuron' in every layer, which this layer lacks")
    for norm, readers in block.shared_inputs():
        _check_shared_input(where, norm is not None, {site: wanted.get(site) for site in readers})


def _check_shared_input(where: str, has_norm: bool, wanted: dict[str, Sparsifier | None]) -> None:
    functions = {_function(sparsifier) for sparsifier in wanted.values()}
    readers = " ".join(wanted)
    if functions == {None}:
        return
    if not has_norm:
        raise UserError(
            f"{where}: no norm makes the input of {readers} and nothing else, so no ReLU can go there"
        )
    if len(functions) > 1:
        raise UserError(
            f"{where}: {readers} read one norm's output, so they need the same sparsifier or none"
        )


def _function(sparsifier: Sparsifier | None) -> tuple[str, float] | None:
    return (sparsifier.function, sparsifier.shift) if sparsifier else None


def _described(function: tuple[str, float] | None) -> str:
    name, shift = function or ("dense", 0.0)
    return f"{name} with shift {shift:g}" if shift else name
