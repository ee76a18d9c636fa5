"""The energy of a token on an event-driven processor (Explore Activation Sparsity in Recurrent LLMs, arXiv
2501.16337).

    E = sum over linear layers of (1 - s) in out (E_mac + E_weight_read) + (1 - s) in E_event

s is the share of zeros in the layer's input: a zero causes no event, and no weight of its column is read. A
dense run has s = 0. The constants are a chip's own and are parameters; the defaults only say that a weight
read and a product cost one unit together and an event nothing, so that the ratio is that of the weights read.
What a zero neuron saves of up's rows is no event saved, and does not count.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from relufy.errors import UserError

if TYPE_CHECKING:
    from relufy.model.structure import BlockSites

DEFINITION = (
    "energy of a token in linear layers, without the head: (1 - s) in out (mac + weight_read) + (1 - s) in "
    "event, s the zeros of each layer's input, dense s = 0 (arXiv 2501.16337); in the unit of the constants"
)


@dataclass(frozen=True)
class EnergyConstants:
    """What a multiply-accumulate, the read of a weight and an event cost, in any one unit."""

    mac: float = 0.5
    weight_read: float = 0.5
    event: float = 0.0

    def __post_init__(self) -> None:
        if min(self.mac, self.weight_read, self.event) < 0 or self.mac + self.weight_read == 0:
            raise UserError(
                "energies are 0 or more, and a product or a weight's read costs something; found mac "
                f"{self.mac:g}, weight_read {self.weight_read:g}, event {self.event:g}"
            )


@dataclass(frozen=True)
class Linear:
    """A linear layer and the share of zeros in its input."""

    outputs: float
    inputs: int
    sparsity: float = 0.0


@dataclass(frozen=True)
class Energy:
    """The energy of a token, in the unit of the constants."""

    dense: float
    sparse: float
    constants: EnergyConstants

    @property
    def ratio(self) -> float:
        """How many times less the sparse model takes."""
        return self.dense / self.sparse

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"ratio": self.ratio}


def energy(layers: Sequence[Linear], constants: EnergyConstants | None = None) -> Energy:
    """Return the energy of a token through linear layers, dense and sparse (arXiv 2501.16337)."""
    constants = constants or EnergyConstants()
    dense = [layer.inputs * _of_entry(layer, constants) for layer in layers]
    sparse = [(1 - layer.sparsity) * e for layer, e in zip(layers, dense, strict=True)]
    return Energy(sum(dense), sum(sparse), constants)


def linears(blocks: Sequence["BlockSites"], sparsity: Mapping[str, Sequence[float]]) -> list[Linear]:
    """Return the linear layers of decoder blocks, with the zeros at each site: one share per block.

    A fused projection is divided evenly among the sites that it serves.
    """
    found = []
    for block in blocks:
        projections = block.projections()
        served = Counter(projection.name for projection in projections.values())
        for site, projection in projections.items():
            outputs, inputs = projection.shape
            found.append(Linear(outputs / served[projection.name], inputs, sparsity[site][block.index]))
    return found


def mean_sparsity(layers: Sequence[Linear]) -> float:
    """Return the mean over linear layers, each by its number of weights (in RWKV the channel-mix's key and
    value weigh 4)."""
    weights = [layer.outputs * layer.inputs for layer in layers]
    return sum(w * layer.sparsity for w, layer in zip(weights, layers, strict=True)) / sum(weights)


def _of_entry(layer: Linear, constants: EnergyConstants) -> float:
    """Return what one non-zero input costs."""
    return layer.outputs * (constants.mac + constants.weight_read) + constants.event
