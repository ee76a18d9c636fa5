"""Which sparsifiers a model can have, given its blocks and the zeros that it makes already."""

from collections.abc import Sequence

from relufy.activation_sparsity import SITES, ActivationSparsity, Sparsifier
from relufy.errors import UserError
from relufy.model.places import is_shared
from relufy.model.structure import BlockSites

_RELUS = ("relu", "helu", "drelu", "fatrelu")
"""Activations that make every zero that a ReLU makes."""


def check_sparsity(blocks: Sequence[BlockSites], sparsity: ActivationSparsity) -> None:
    """Raise UserError if a model with these blocks cannot have these sparsifiers."""
    for sparsifier in sparsity.sparsifiers:
        if beyond := [layer for layer in sparsifier.layers or () if not 0 <= layer < len(blocks)]:
            raise UserError(
                f"a sparsifier names layer {beyond[0]}, the model has layers 0 to {len(blocks) - 1}"
            )
    needs_neuron = any(_changes_weights_for_good(s) for s in sparsity.sparsifiers)
    for block in blocks:
        wanted = {site: s for site in SITES if (s := sparsity.at(site, block.index))}
        _check_block(block, wanted, needs_neuron)


def adds_zeros(num_layers: int, present: ActivationSparsity, wanted: ActivationSparsity) -> bool:
    """Return whether `wanted` differs from `present`. Raises UserError if they contradict.

    Selections may change: the weights are as good without them. An activation's zeros must stay.
    """
    differs = False
    for layer in range(num_layers):
        for site in SITES:
            old, new = present.at(site, layer), wanted.at(site, layer)
            if old and not old.is_selection and not _keeps_zeros(old, new):
                raise UserError(
                    f"the model already has {_described(old)} at {site!r} of layer {layer}, "
                    f"which would become {_described(new)}; start from a model without it"
                )
            differs = differs or not _is_same(old, new)
    return differs


def _changes_weights_for_good(sparsifier: Sparsifier) -> bool:
    """Return whether a model is fine-tuned for it, so that no layer may have been left out by mistake."""
    return not sparsifier.is_selection and sparsifier.function != "statistical_topk"


def _check_block(block: BlockSites, wanted: dict[str, Sparsifier], needs_neuron: bool) -> None:
    where = f"layer {block.index} ({block.name})"
    if "gate" in wanted and block.gate is None:
        raise UserError(f"{where} has no gate: in a plain MLP the input is read by 'up' alone")
    if "down" in wanted and "neuron" in wanted and block.gate is None:
        raise UserError(f"{where}: in a plain MLP 'neuron' and 'down' are one site; set 'neuron' alone")
    for site in ("o", "down"):
        if site in wanted and not wanted[site].is_selection and not wanted[site].correction:
            raise UserError(f"{where}: a {wanted[site].function} at {site!r} is not supported")
    if needs_neuron and "neuron" not in wanted:
        raise UserError(f"{where}: sparsifiers need the site 'neuron' in every layer, which this layer lacks")
    if neuron := wanted.get("neuron"):
        _check_drelu(where, block, neuron)
    for norm, readers in block.shared_inputs():
        is_one = len({block.projections()[site].name for site in readers}) == 1
        _check_shared_input(where, norm is not None, is_one, {site: wanted.get(site) for site in readers})
    _check_projections(where, block, wanted)


def _check_drelu(where: str, block: BlockSites, neuron: Sparsifier) -> None:
    if neuron.function != "drelu":
        return
    if block.gate is None:
        raise UserError(f"{where} has no gate: in a plain MLP drelu is relu")
    if block.gate == block.up:
        raise UserError(f"{where}: drelu is not supported where one projection makes gate and up")


def _check_shared_input(
    where: str, has_norm: bool, is_one_projection: bool, wanted: dict[str, Sparsifier | None]
) -> None:
    found, sites = [s for s in wanted.values() if s], tuple(wanted)
    activations = [s for s in found if not s.is_selection and not s.correction]
    readers = " ".join(sites)
    if not has_norm and activations:
        raise UserError(
            f"{where}: no norm makes the input of {readers} and nothing else, so no ReLU can go there"
        )
    if not has_norm and found and not is_one_projection and is_shared(found[0], sites):
        raise UserError(
            f"{where}: no norm makes the input of {readers} and nothing else, so they cannot share a mask; "
            "give each a sparsifier of its own"
        )
    if activations and not all(s and s.behaves_like(activations[0]) for s in wanted.values()):
        raise UserError(
            f"{where}: {readers} read one norm's output, so they need the same sparsifier or none"
        )


def _check_projections(where: str, block: BlockSites, wanted: dict[str, Sparsifier]) -> None:
    """Raise UserError for what cannot act on a projection's input: its width, the sites that it serves."""
    projections = block.projections()
    for site, projection in projections.items():
        served = [other for other, p in projections.items() if p.name == projection.name]
        if any(not _is_same(wanted.get(site), wanted.get(other)) for other in served):
            raise UserError(
                f"{where}: {projection.name} serves {' '.join(served)}, so they need the same sparsifier"
            )
    widths = {site: projection.shape[1] for site, projection in projections.items()}
    widths["neuron"] = block.down.shape[1]
    for site, sparsifier in wanted.items():
        if (sparsifier.k or 0) > widths[site]:
            raise UserError(f"{where}: k is {sparsifier.k} at {site!r}, which has {widths[site]} entries")


def _keeps_zeros(old: Sparsifier, new: Sparsifier | None) -> bool:
    """Return whether `new` makes every zero that the activation `old` makes."""
    if new is None or old.behaves_like(new):
        return new is not None
    if "neuron" not in old.sites or "neuron" not in new.sites or old.shift != new.shift:
        return False
    if old.function == new.function == "fatrelu":
        return (old.threshold or 0.0) <= (new.threshold or 0.0)
    return old.function in ("relu", "helu") and new.function in _RELUS


def _is_same(old: Sparsifier | None, new: Sparsifier | None) -> bool:
    if old is None or new is None:
        return old is new
    return old.behaves_like(new)


def _described(sparsifier: Sparsifier | None) -> str:
    if sparsifier is None:
        return "dense"
    shift, threshold = sparsifier.shift, sparsifier.threshold
    name = f"{sparsifier.function} with shift {shift:g}" if shift else sparsifier.function
    return name if threshold is None else f"{name} at {threshold:g}"
