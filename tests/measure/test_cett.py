"""CETT: the paper's hand examples, the search for epsilon, and what counts as a neuron's contribution."""

import numpy as np
import pytest
import torch

import families
from relufy.activation_sparsity import ActivationSparsity, Sparsifier
from relufy.errors import UserError
from relufy.measure.cett import EpsilonSearch, cett_sparsity, truncate_tail
from relufy.measure.sparsity import measure_sparsity
from relufy.method import Relufication
from relufy.methods.sparsify import sparsify
from relufy.model.sites import find_sites
from relufy.model.sparsifiers import apply_sparsity, sparsity_tensors

WINDOWS = np.random.default_rng(0).integers(3, 53, (6, 16))
INFINITY = float("inf")


def random_activations() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(40, 30, generator=generator), torch.randn(8, 30, generator=generator)


def test_neurons_that_cancel_cost_nothing() -> None:
    """n = (3, 0), (0, 1), (0, -1): without the two small ones the sum is the same."""
    contributions = torch.tensor([[3.0, 0.0, 0.0], [0.0, 1.0, -1.0]])
    error, share = truncate_tail(torch.ones(1, 3), contributions, 2.0)
    assert error.item() == 0.0
    assert share.item() == pytest.approx(2 / 3)


def test_nothing_left_out_costs_0_and_everything_costs_1() -> None:
    activations, weight = random_activations()
    for epsilon, expected in ((0.0, 0.0), (INFINITY, 1.0)):
        error, share = truncate_tail(activations, weight, epsilon)
        assert torch.allclose(error, torch.full((40,), expected))
        assert (share == expected).all()


def test_a_token_without_output_costs_nothing() -> None:
    assert truncate_tail(torch.zeros(1, 3), torch.ones(2, 3), 1.0)[0].item() == 0.0


def test_more_is_left_out_at_a_greater_epsilon_and_on_average_it_costs_more() -> None:
    activations, weight = random_activations()
    found = [truncate_tail(activations, weight, epsilon) for epsilon in (0.5, 1.0, 2.0, 4.0, 8.0)]
    errors, shares = ([float(values.mean()) for values in kind] for kind in zip(*found, strict=True))
    assert errors == sorted(errors) and shares == sorted(shares) and errors[0] < errors[-1]


def test_the_search_ends_just_within_the_target() -> None:
    model = families.family("llama")
    found = cett_sparsity(model, WINDOWS, target=0.3)
    assert found.tokens == 6 * 15
    assert all(0.27 < error <= 0.3 for error in found.error)
    assert 0 < found.mean < 1


@pytest.mark.parametrize("mode", ["all", "second-half", "decode"])
def test_the_share_agrees_with_the_activations_themselves(mode: str) -> None:
    model = families.family("llama")
    found = cett_sparsity(model, WINDOWS, mode=mode)
    seen: list[torch.Tensor] = []
    down = find_sites(model)[1].down.module
    down.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    with torch.inference_mode():
        model(torch.from_numpy(WINDOWS[:, :-1]))
    rows = seen[0][:, 0 if mode == "all" else 8 :].flatten(0, 1)
    error, share = truncate_tail(rows, down.weight.detach(), found.epsilon[1])
    assert float(error.mean()) == pytest.approx(found.error[1], abs=1e-3)
    assert float(share.mean()) == pytest.approx(found.sparsity[1], abs=1e-3)


def test_at_a_target_of_next_to_nothing_a_relu_model_has_its_zeros() -> None:
    model = sparsify(families.family("llama"), Relufication())
    found = cett_sparsity(model, WINDOWS, target=1e-6)
    assert found.sparsity == pytest.approx(
        measure_sparsity(model, WINDOWS[:, :-1]).sparsity["down"], abs=2e-3
    )


def test_what_a_centre_stands_for_is_no_contribution() -> None:
    model = families.family("llama")
    sparsity = ActivationSparsity(
        (Sparsifier(("down",), "threshold", threshold=1e9, per_channel=("centre",)),)
    )
    tensors = {
        name: torch.full(shape, 0.5) for name, shape in sparsity_tensors(find_sites(model), sparsity).items()
    }
    apply_sparsity(model, sparsity, tensors)
    assert cett_sparsity(model, WINDOWS).sparsity == (1.0, 1.0)


@pytest.mark.parametrize("target", [0.0, 1.0])
def test_a_target_is_a_share(target: float) -> None:
    with pytest.raises(UserError, match="between 0 and 1"):
        cett_sparsity(families.family("llama"), WINDOWS, target=target)


def test_the_mean_hides_tokens_that_lose_more() -> None:
    found = cett_sparsity(families.family("llama"), WINDOWS, target=0.3)
    assert all(p95 > mean for p95, mean in zip(found.error_p95, found.error, strict=True))


def test_targets_in_any_order_find_the_same() -> None:
    """What was found for other targets narrows the search, and changes its end by its precision only."""
    model = families.family("llama")
    search = EpsilonSearch(model, WINDOWS)
    for target in (0.5, 0.1, 0.3):
        alone = cett_sparsity(model, WINDOWS, target=target)
        assert search.epsilons(target) == pytest.approx(alone.epsilon, rel=0.013)
        assert search.result(target).sparsity == pytest.approx(alone.sparsity, abs=0.01)
