"""What a method is compared with at its own ratio: masks drawn at random, and masks that know everything.

Both keep, at every site that the method masks and in every layer, as many entries of each token as the method
kept on average. "random" draws them; "oracle" takes the greatest by |x_i| ||W[:, i]|| of each projection, and
for neurons by |a_i| ||W_down[:, i]||, which nobody knows before having computed them. They are tried, never
saved.
"""

from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256

import torch

from relufy.activation_sparsity import Sparsifier
from relufy.measure.modes import Scored
from relufy.methods.inputs import same_tensor
from relufy.model.selections import greatest
from relufy.model.structure import BlockSites
from relufy.model.trial import Mask, Trial

CONTROLS = ("random", "oracle")
Shares = Mapping[tuple[int, str], float]
"""Layer and site -> the share of entries that is left out."""


def masked_shares(
    blocks: Sequence[BlockSites],
    sparsifiers: Sequence[Sparsifier],
    sites: Mapping[str, Sequence[float]],
) -> dict[tuple[int, str], float]:
    """Return the share that was measured (`sites`) at each site that has one of the sparsifiers."""
    known = [(block.index, site) for block in blocks for site in (*block.projections(), "neuron")]
    return {
        (layer, site): sites[site][layer]
        for layer, site in known
        if any(site in s.sites and s.applies_to(layer) for s in sparsifiers)
    }


def put_controls(
    kind: str, trial: Trial, blocks: Sequence[BlockSites], shares: Shares, scored: Scored, seed: int
) -> None:
    """Try the masks of a control instead of what is tried, at the positions that count."""
    trial.clear()
    make = _random if kind == "random" else _oracle
    for (layer, site), share in (shares if kind == "random" else _known_at_down(shares)).items():
        if share > 0:
            choose = make(blocks[layer], site, share, seed)
            trial.put(layer, site, _only_scored(choose, scored))


def _known_at_down(shares: Shares) -> dict[tuple[int, str], float]:
    """Return the shares with those of neurons at `down`, where a neuron's whole activation is seen."""
    found = {place: share for place, share in shares.items() if place[1] != "neuron"}
    for (layer, site), share in shares.items():
        if site == "neuron":
            found[layer, "down"] = max(share, found.get((layer, "down"), 0.0))
    return found


def _random(block: BlockSites, site: str, share: float, seed: int) -> Mask:
    """Return a mask of drawn entries that are not zero; projections that read one tensor draw the same."""
    first = same_tensor(block).get(site, site)
    generators: dict[torch.device, torch.Generator] = {}

    def choose(x: torch.Tensor) -> torch.Tensor:
        if x.device not in generators:
            generator = torch.Generator(x.device).manual_seed(own_seed(seed, block.index, first))
            generators[x.device] = generator
        drawn = torch.rand(x.shape, generator=generators[x.device], device=x.device)
        return _keep_greatest(x, torch.where(x == 0, -1.0, drawn), share)

    return choose


def _oracle(block: BlockSites, site: str, share: float, _seed: int) -> Mask:
    norms = block.projections()[site].matrix().float().norm(dim=0)
    return lambda x: _keep_greatest(x, x.float().abs() * norms, share)


def own_seed(seed: int, layer: int, site: str) -> int:
    """Return a seed of its own for a layer and site."""
    return int.from_bytes(sha256(f"{seed} {layer} {site}".encode()).digest()[:7])


def _keep_greatest(x: torch.Tensor, score: torch.Tensor, share: float) -> torch.Tensor:
    count = round((1 - share) * x.shape[-1])
    return torch.where(greatest(score, count), x, 0) if count else torch.zeros_like(x)


def _only_scored(choose: Callable[[torch.Tensor], torch.Tensor], scored: Scored) -> Mask:
    def mask(x: torch.Tensor) -> torch.Tensor:
        dense, masked = scored.split(x, 1)
        if masked.shape[1] == 0:
            return x
        return torch.cat([dense, choose(masked)], dim=1).reshape(x.shape)

    return mask
