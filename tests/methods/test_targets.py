"""One target for all methods: what each knob has to be for it, and the most that each can reach."""

import pytest

import families
from relufy.errors import UserError
from relufy.measure.site_weights import site_weights
from relufy.method import METHODS, Chess, Scap, Teal
from relufy.methods.targets import (
    Unreachable,
    comparable_methods,
    method_at,
    method_with,
    unread_share,
)
from relufy.model.structure import find_blocks

MASKED = {
    "teal": ("q", "k", "v", "o", "gate", "up", "down"),
    "wina": ("q", "k", "v", "o", "gate", "up", "down"),
    "rsparse": ("q", "k", "v", "o", "gate", "up", "down"),
    "larosa": ("q", "k", "v", "o", "gate", "up", "down"),
    "cats": ("up", "down"),
    "fatrelu": ("up", "down"),
    "chess": ("up", "down", "q", "o"),
    "scap": ("gate", "up", "down"),
}


def blocks_of(name: str):
    return find_blocks(families.family(name))


def test_every_calibrated_method_has_a_target_or_a_reason() -> None:
    assert set(comparable_methods()) == set(MASKED)


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen2"])
@pytest.mark.parametrize("name", MASKED)
def test_the_knob_times_what_it_is_about_is_the_target(name: str, family: str) -> None:
    blocks = blocks_of(family)
    weights = site_weights(blocks[0])
    masked = [s for s in MASKED[name] if not (name == "chess" and family == "phi3" and s == "q")]
    expected = 0.2 * sum(weights.values()) / sum(weights[site] for site in masked)
    assert method_at(name, 0.2, blocks).sparsity == pytest.approx(expected)


def test_scap_has_the_share_at_both_inputs() -> None:
    method = method_at("scap", 0.3, blocks_of("llama"))
    assert isinstance(method, Scap) and method.sparsity == method.sparsity_down > 0.3


def test_in_a_plain_mlp_neurons_save_columns_of_down_alone() -> None:
    weights = site_weights(blocks_of("opt")[0])
    assert unread_share("fatrelu", 1.0, blocks_of("opt")) == pytest.approx(
        weights["down"] / sum(weights.values())
    )


def test_what_cannot_be_reached_says_how_much_can() -> None:
    blocks = blocks_of("llama")
    with pytest.raises(Unreachable, match=r"cats cannot leave 90% .* rows of up") as caught:
        method_at("cats", 0.9, blocks)
    most = caught.value.most
    weights = site_weights(blocks[0])
    assert most == pytest.approx((weights["up"] + weights["down"]) / sum(weights.values()))
    assert method_at("cats", 0.999 * most, blocks).sparsity == pytest.approx(0.999)
    with pytest.raises(Unreachable):
        method_at("cats", most, blocks)


def test_the_paper_s_own_knob_is_taken_as_it_is() -> None:
    assert method_with("chess", 0.4) == Chess(sparsity=0.4)
    assert method_with("scap", 0.4) == Scap(sparsity=0.4, sparsity_down=0.4)
    assert method_with("teal", 0.4) == Teal(sparsity=0.4)


def test_zeros_that_the_model_has_are_counted_once() -> None:
    """In a plain MLP nobody masks down beside them; where a gate makes them, rows of up are theirs."""
    for family, zeros in (
        ("opt", {"down": (0.9, 0.9)}),
        ("llama", {"neuron": (0.6, 0.6), "down": (0.6, 0.6)}),
    ):
        blocks = blocks_of(family)
        weights = site_weights(blocks[0])
        total, share = sum(weights.values()), method_at("teal", 0.5, blocks, zeros).sparsity
        own = (
            0.9 * weights["down"]
            if family == "opt"
            else 0.6 * weights["up"] + weights["down"] * max(0.6, share)
        )
        rest = total - weights["down"] - (weights["up"] if family == "llama" else 0)
        assert own + share * rest == pytest.approx(0.5 * total)


def test_a_target_below_the_model_s_own_zeros_is_refused() -> None:
    with pytest.raises(UserError, match="the model's own zeros save"):
        method_at("teal", 0.1, blocks_of("opt"), {"down": (0.95, 0.95)})


@pytest.mark.parametrize("target", [0.0, 1.0, -0.5, float("nan")])
def test_a_target_is_a_share(target: float) -> None:
    for make in (lambda: method_at("teal", target, blocks_of("llama")), lambda: method_with("teal", target)):
        with pytest.raises(UserError, match="a share between 0 and 1"):
            make()


@pytest.mark.parametrize(
    ("name", "words"),
    [("teel", "did you mean 'teal'"), ("relufication", "needs a fine-tune"), ("greedy", "no target")],
)
def test_other_names_are_refused_with_the_reason(name: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        method_at(name, 0.5, blocks_of("llama"))


def test_reasons_are_given_for_methods_that_there_are() -> None:
    assert set(MASKED) <= set(METHODS)
