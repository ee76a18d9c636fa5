"""What becomes of the zeros while a model trains: sparsity by site, dead neurons, unions over tokens.

Everything is counted on the device, in whole numbers, and fetched in one go when a report is due.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from relufy.model.configuration import sparse_sites
from relufy.model.counting import count_columns, count_rows, in_whole_runs
from relufy.model.observe import observe_sites
from relufy.model.structure import find_blocks
from relufy.processes import num_processes, sum_over_processes

DEAD_POSITIONS = 65_536
"""A neuron that was active at none of at least so many positions is dead."""
UNION_TOKENS = 8
"""Consecutive tokens of a window whose active neurons are united."""


class Monitor:
    """Counts at the model's sparse sites, in forward passes over windows without padding."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._blocks = find_blocks(model)
        self._sites = sparse_sites(model)
        self._shape: tuple[int, ...] = ()
        """Windows and their length in the running pass."""
        self._positions = 0
        self._zeros: dict[str, list[Any]] = {site: [0] * len(self._blocks) for site in self._sites}
        self._widths: dict[str, list[int]] = {site: [0] * len(self._blocks) for site in self._sites}
        self._neurons = [NeuronCounts() for _ in self._blocks if "neuron" in self._sites]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count in the model's forward passes while this context lasts, but not in recomputed ones."""
        if not self._sites:
            yield
            return
        with observe_sites(self._model, self._add_zeros, self._see, self._see_neurons):
            yield

    def metrics(self) -> dict[str, Any]:
        """Return what was counted since the last call, as plain data; all processes must call this.

        `sparsity` by site, `live_sparsity` of the neurons that are not dead, `dead` (the share of neurons
        active at none of the last `dead_positions`), `union_density` of UNION_TOKENS tokens: lists over
        layers. Empty if nothing was watched, or nothing is sparse. Waits for the device.
        """
        if not self._positions:
            return {}
        lists: dict[str, Any] = {site: self._shares(site) for site in self._sites}
        names = list(lists)
        if self._neurons:
            found = [neurons.report() for neurons in self._neurons]
            lists |= {name: [layer[name] for layer in found] for name in found[0]}
        first = next(iter(lists.values()))[0].device
        table = torch.stack([value.to(first) for values in lists.values() for value in values]).tolist()
        rows = {
            name: table[i * len(self._blocks) : (i + 1) * len(self._blocks)] for i, name in enumerate(lists)
        }
        self._forget()
        report: dict[str, Any] = {"sparsity": {name: rows.pop(name) for name in names}} | rows
        if self._neurons:
            report["dead_positions"] = self._neurons[0].remembered * num_processes()
        return report

    def _forget(self) -> None:
        self._positions = 0
        self._zeros = {site: [0] * len(self._blocks) for site in self._sites}

    def _shares(self, site: str) -> list[torch.Tensor]:
        zeros = torch.stack([layer.to(self._zeros[site][0].device) for layer in self._zeros[site]])
        entries = [self._positions * num_processes() * width for width in self._widths[site]]
        return [z / n for z, n in zip(sum_over_processes(zeros).unbind(), entries, strict=True)]

    def _add_zeros(self, site: str, layer: int, zeros: torch.Tensor) -> None:
        if site in self._zeros:
            self._zeros[site][layer] = self._zeros[site][layer] + zeros.sum()

    def _see(self, site: str, layer: int, values: torch.Tensor) -> None:
        if site == "q":  # comes as [windows, length, channels] in every family, which neurons do not
            self._shape = tuple(values.shape[:-1])
            self._positions += values.shape[:-1].numel() if layer == 0 else 0
        if site in self._widths:
            self._widths[site][layer] = values.shape[-1]

    def _see_neurons(self, site: str, layer: int, is_zero: torch.Tensor) -> None:
        if site == "neuron" and self._neurons:
            self._neurons[layer].see(is_zero.reshape(*self._shape, -1))


class NeuronCounts:
    """Where the neurons of one layer were active."""

    def __init__(self) -> None:
        self._active: Any = 0
        """How often each neuron was active since the last report, `[neurons]`."""
        self._united: Any = 0
        self._positions, self._chunks = 0, 0
        self._recent: Any = False
        self._before: Any = False
        """Which neurons were active at all: in this stretch of DEAD_POSITIONS, and in the one before."""
        self._recent_positions, self._before_positions = 0, 0

    @property
    def remembered(self) -> int:
        """How many positions a dead neuron was active at none of, in this process."""
        return self._recent_positions + self._before_positions

    def see(self, is_zero: torch.Tensor) -> None:
        """Count where neurons were active, given where they were not, bool `[windows, length, neurons]`."""
        if self._recent_positions * num_processes() >= DEAD_POSITIONS:
            self._before, self._before_positions = self._recent, self._recent_positions
            self._recent, self._recent_positions = False, 0
        windows, length, _ = is_zero.shape
        counts = windows * length - count_columns(is_zero.flatten(0, 1))
        self._active = self._active + counts
        self._recent = (counts > 0) | self._recent
        chunks = length // UNION_TOKENS
        if chunks:
            *_, (_, silent) = in_whole_runs(is_zero[:, : chunks * UNION_TOKENS], UNION_TOKENS)
            self._united = self._united + silent.numel() - count_rows(silent.flatten(0, 1)).sum()
        self._positions += windows * length
        self._recent_positions += windows * length
        self._chunks += windows * chunks

    def report(self) -> dict[str, torch.Tensor]:
        """Return the shares since the last report, over all processes, and begin anew."""
        seen = self._recent | self._before
        active, alive, united = sum_over_processes(
            torch.cat([self._active, seen.long(), self._united * torch.ones_like(self._active[:1])])
        ).split([len(seen), len(seen), 1])
        is_alive, processes = alive > 0, num_processes()
        live = self._positions * processes * is_alive.sum().clamp_min(1)
        report = {
            "live_sparsity": 1 - (active * is_alive).sum() / live,
            "dead": 1 - is_alive.sum() / len(seen),
        }
        if self._chunks:
            report["union_density"] = united[0] / (self._chunks * processes * len(seen))
        self._active, self._united, self._positions, self._chunks = 0, 0, 0, 0
        return report
