"""One target for all methods: the share of the blocks' linear weights that is not read.

Every paper has its own knob: of all inputs (TEAL, WINA, R-Sparse, LaRoSA), of the neurons (CATS, FATReLU), of
the neurons and the inputs of q and o (CHESS), of the MLP's inputs (SCAP). Here the knob is turned until the
same share of weights is not read, in model-level terms. Whoever leaves a part of the weights dense has to
skip more of the rest, and cannot go beyond the share that is left.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from relufy.errors import UserError
from relufy.measure.site_weights import site_weights
from relufy.method import METHODS, Scap
from relufy.model.structure import BlockSites
from relufy.schema import suggest

WITHOUT_TARGET = {
    "relufication": "relufication needs a fine-tune, so it is not compared with what needs none",
    "auto": "auto searches under a budget of perplexity (relufy sparsify --budget), not at a target",
    "greedy": "greedy goes as far as a loss on the calibration text allows, so it has no target of its own",
}
"""The methods that cannot be compared at a share, and why."""

Zeros = Mapping[str, Sequence[float]]
"""Site -> the share of zeros, one value per layer."""
NO_ZEROS: Zeros = {}

GATED = ("cats", "chess")
"""The methods that need a gate."""


class Unreachable(UserError):
    """A target that a method cannot reach. `most` is the share that it stays below."""

    def __init__(self, message: str, most: float) -> None:
        super().__init__(message)
        self.most = most


def check_method(name: str) -> None:
    """Raise UserError for the name of no method, or of one that has no target."""
    if name in WITHOUT_TARGET:
        raise UserError(f"{WITHOUT_TARGET[name]}; known: {', '.join(comparable_methods())}")
    if name not in METHODS:
        raise UserError(f"there is no method {name!r}{suggest(name, comparable_methods())}")


def comparable_methods() -> list[str]:
    """Return the names of the methods that `method_at` knows."""
    return [name for name in METHODS if name not in WITHOUT_TARGET]


def method_at(name: str, target: float, blocks: Sequence[BlockSites], own: Zeros = NO_ZEROS) -> Any:
    """Return a method's parameters so that `target` of the blocks' linear weights is not read.

    A skipped neuron counts with its row of up and its column of down. `own` are the zeros that the model
    makes by itself, as they were measured. Raises Unreachable, naming the most that can be reached, and
    UserError for a target outside (0, 1), below what the model's own zeros reach, or an unknown method.
    """
    check_method(name)
    check_target(target)
    if name in GATED and blocks[0].gate is None:
        raise UserError(f"{name} needs a gate, and this model has a plain MLP")
    least, most = (unread_share(name, share, blocks, own) for share in (0.0, 1.0))
    if target >= most:
        raise Unreachable(
            f"{name} cannot leave {target:.0%} of the blocks' weights unread: it skips "
            f"{SKIPS.get(name, 'columns of all projections')}, which are {most:.1%} of them",
            most,
        )
    if target <= least and least > 0:
        raise UserError(f"{target:.0%} is not more than the {least:.1%} that the model's own zeros save")
    return _with_share(name, _bisect(lambda share: unread_share(name, share, blocks, own), target))


def method_with(name: str, value: float) -> Any:
    """Return a method's parameters with the paper's own knob at a value; SCAP's two both have it."""
    check_method(name)
    check_target(value)
    return _with_share(name, value)


def unread_share(name: str, share: float, blocks: Sequence[BlockSites], own: Zeros = NO_ZEROS) -> float:
    """Return the share of the blocks' linear weights that is not read with a method's knob at a share.

    Where the model makes zeros of its own, a mask adds what it leaves out beyond them.
    """
    weights = [site_weights(block) for block in blocks]
    unread = 0.0
    for block, of in zip(blocks, weights, strict=True):
        zeros = {site: values[block.index] for site, values in own.items()}
        if "neuron" in zeros and block.gate is not None:
            zeros["up"] = zeros["neuron"]
        masked = set(_PARTS.get(name, _everything)(block)) - (_taken(name, block) if zeros else set())
        unread += sum(of[s] * max(share * (s in masked), zeros.get(s, 0.0)) for s in of)
    return unread / sum(sum(of.values()) for of in weights)


def _taken(name: str, block: BlockSites) -> set[str]:
    """Return what masks of inputs cannot make sparser where neurons have zeros of their own: the rows of up
    that these skip, or in a plain MLP the columns of down."""
    if _PARTS.get(name) in (_by_neuron, _by_neuron_q_and_o):
        return set()
    return {"up"} if block.gate is not None else {"down"}


def _bisect(function: Callable[[float], float], target: float) -> float:
    """Return where a function that grows from 0 to 1 reaches the target."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < target else (low, middle)
    return high


def check_target(target: float) -> None:
    if not 0 < target < 1:
        raise UserError(f"a target is a share between 0 and 1, found {target:g}")


def _with_share(name: str, share: float) -> Any:
    if name == "scap":
        return Scap(sparsity=share, sparsity_down=share)
    return METHODS[name](sparsity=share)


def _everything(block: BlockSites) -> Sequence[str]:
    return list(block.projections())


def _by_neuron(block: BlockSites) -> Sequence[str]:
    """Zeros of a gate's activation make rows of up unnecessary; in a plain MLP up is what makes the zeros."""
    return ("up", "down") if block.gate is not None else ("down",)


def _by_neuron_q_and_o(block: BlockSites) -> Sequence[str]:
    """Where one projection makes q, k and v, q has no mask of its own."""
    return (*_by_neuron(block), *(("o",) if block.q == block.k else ("q", "o")))


def _mlp(block: BlockSites) -> Sequence[str]:
    return [site for site in block.projections() if site in ("gate", "up", "down")]


_PARTS: dict[str, Callable[[BlockSites], Sequence[str]]] = {
    "cats": _by_neuron,
    "fatrelu": _by_neuron,
    "chess": _by_neuron_q_and_o,
    "scap": _mlp,
}
SKIPS = {
    "cats": "rows of up and columns of down",
    "fatrelu": "rows of up and columns of down",
    "chess": "rows of up, columns of down, and columns of q and o",
    "scap": "columns of the MLP's projections",
}
