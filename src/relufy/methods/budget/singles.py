"""The single methods under the same budget: each one's own sparsity, raised until the selection text says no.

The automatic search starts from the best of them, so it can only be better.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from relufy.errors import UserError
from relufy.method import Cats, Chess, FatRelu, RSparse, Scap, Teal, Wina
from relufy.methods.budget.clock import Clock, TimeUp
from relufy.methods.budget.frontier import Climb, Frontier, climb
from relufy.methods.setting import Found, Setting
from relufy.methods.sparsify import find

SINGLES: dict[str, Any] = {
    "teal-uniform": Teal(allocation="uniform"),
    "wina-uniform": Wina(allocation="uniform"),
    "chess": Chess(),
    "cats": Cats(),
    "scap": Scap(),
    "fatrelu": FatRelu(),
    "chess-mlp": Chess(attention=False),
    "rsparse": RSparse(channels=0.9, search=False),
    "teal": Teal(),
    "wina": Wina(),
}
"""What is tried, in this order while there is time: greedy allocations last, they take longest. R-Sparse is
without its search of the split, which takes hundreds of times as long."""
LEAST, MOST = 0.02, 0.9
WAY = Climb(start=0.25, least=LEAST, most=MOST, power=3.0, tolerance=0.01, tries=9)


@dataclass(frozen=True)
class Untried:
    """A single method that was not tried, or not to its end, and why."""

    method: str
    reason: str


def try_singles(frontier: Frontier, setting: Setting, clock: Clock) -> list[Untried]:
    """Climb each single method into the frontier; return those that this model or the time did not allow."""
    untried = []
    quiet = replace(setting, progress=lambda _task, _done, _total: clock.check())
    for name, method in SINGLES.items():
        try:
            climb(frontier, name, _finder(method, quiet), WAY)
        except UserError as error:
            untried.append(Untried(name, str(error)))
        except TimeUp:
            untried.append(Untried(name, "no time left"))
    return untried


def _finder(method: Any, setting: Setting) -> Callable[[float], Found]:
    return lambda sparsity: find(replace(method, **dict(_parameters(method, sparsity))), setting)


def _parameters(method: Any, sparsity: float) -> Iterator[tuple[str, float]]:
    """Yield the sparsities of a method: those beside the first stay in proportion."""
    yield "sparsity", sparsity
    if isinstance(method, Scap):
        yield "sparsity_down", min(sparsity * method.sparsity_down / method.sparsity, 0.95)
