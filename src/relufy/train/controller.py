"""Finding the penalty's strength: a controller that steers the share of active neurons to a target.

What a strength does to the zeros depends on the model, its losses, the learning rate and the length of the
run, so a table of strengths for one model says little about the next. But any penalty that is strong enough
lowers the density, and the wanted density is known: on the way from the one at the beginning to the target it
falls by equal factors, as a share p of the way is gone. The logarithm of the strength is a PI controller's
output, its input the smoothed error in log density. Its gains are per share of the run, since a longer run
leaves more time to react. All of it stays on the device: steering a step waits for nothing.
"""

import math

import torch

OPENING = 0.03
"""What the first strength makes of the penalty, in nats: small beside any loss of a language model."""
INTEGRAL_GAIN = 200.0
"""Log strength per log density and run: an error of 0.1 over 5 % of the run multiplies the strength by e."""
FEWEST_STEPS = 300
"""Shorter runs are steered as if of so many: a model answers within steps, not within shares of a run."""
PROPORTIONAL_GAIN = 4.0
"""Log strength per log density. With 8 the strength followed the noise of small batches, up to tenfold."""
LARGEST_ERROR = 0.3
"""What the integral sees of an error, so that a far target does not wind it up."""
SMOOTHING = 0.01
"""The memory of the measured density, as a share of the run; never below two steps."""
RANGE = (-7.0, 9.0)
"""How far the log strength may go from where it began."""


class DensityController:
    """Steers `density` to `1 - target`. `state` is all that it remembers, scalars on the device.

    `strength` is 0 until the way begins; then it starts where the penalty is OPENING nats.
    """

    def __init__(self, target: float, steps: int) -> None:
        self.target = target
        self.steps = steps
        self.state: dict[str, torch.Tensor] = {}

    def strength(self) -> torch.Tensor | None:
        """Return the strength for the next step, None before the way began."""
        log_strength = self.state.get("log_strength")
        return None if log_strength is None else log_strength.exp()

    def wanted_density(self, progress: float) -> torch.Tensor | None:
        """Return the density wanted after this share of the way, None before it began."""
        began = self.state.get("log_began")
        return None if began is None else self._log_wanted(began, progress).exp()

    def measured_density(self) -> torch.Tensor | None:
        """Return the smoothed density, None before anything was measured."""
        measured = self.state.get("log_density")
        return None if measured is None else measured.exp()

    def look(self, density: torch.Tensor, term: torch.Tensor, progress: float) -> None:
        """Take in a step's share of active neurons and its penalty; `progress` is that of the next step."""
        state = self.state
        log_density = density.clamp_min(1e-6).log()
        state["log_density"] = self._smoothed(log_density)
        if "log_began" not in state:
            if progress > 0:
                state["log_began"] = state["log_density"]
                state["log_first"] = math.log(OPENING) - term.clamp_min(1e-12).log()
                state["integral"] = torch.zeros_like(log_density)
                state["log_strength"] = state["log_first"]
            return
        error = state["log_density"] - self._log_wanted(state["log_began"], progress)
        seen = error.clamp(-LARGEST_ERROR, LARGEST_ERROR)
        gain = INTEGRAL_GAIN / max(self.steps, FEWEST_STEPS)
        state["integral"] = (state["integral"] + gain * seen).clamp(*RANGE)
        moved = (state["integral"] + seen * PROPORTIONAL_GAIN).clamp(*RANGE)
        state["log_strength"] = state["log_first"] + moved

    def _smoothed(self, log_density: torch.Tensor) -> torch.Tensor:
        if "log_density" not in self.state:
            return log_density
        memory = max(2.0, SMOOTHING * self.steps)
        return torch.lerp(log_density, self.state["log_density"], math.exp(-1 / memory))

    def _log_wanted(self, log_began: torch.Tensor, progress: float) -> torch.Tensor:
        return (1 - progress) * log_began + progress * math.log(1 - self.target)
