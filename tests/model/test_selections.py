"""Selections keep exactly what their formulas keep, at every site, and change nothing where all is kept."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

import families
from relufy.activation_sparsity import ActivationSparsity, Sparsifier
from relufy.model.observe import observe_sites
from relufy.model.selections import Selection, TokenPositions, greatest
from relufy.model.sites import find_sites
from relufy.model.sparsifiers import apply_sparsity, sparsity_tensors
from relufy.model.structure import find_blocks

IDS = torch.tensor([[3, 4, 5, 50, 7], [0, 1, 2, 9, 9]])
ALL = ("q", "k", "v", "o", "gate", "up", "down")
PLAIN = ("q", "k", "v", "o", "up", "down")


def sites_of(name: str) -> tuple[str, ...]:
    return PLAIN if name in families.PLAIN_MLP else ALL


def separate(name: str, **fields) -> ActivationSparsity:
    """One sparsifier for each projection: no mask is shared."""
    return ActivationSparsity(tuple(Sparsifier((site,), **fields) for site in sites_of(name)))


def random_tensors(model: PreTrainedModel, sparsity: ActivationSparsity, rank: int = 3) -> dict:
    generator = torch.Generator().manual_seed(1)
    shapes = sparsity_tensors(find_sites(model), sparsity)
    return {
        name: torch.rand([size or rank for size in shape], generator=generator)
        for name, shape in shapes.items()
    }


@given(st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.0]), min_size=1, max_size=9), st.data())
def test_of_equal_scores_the_first_are_kept(values: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(values)))
    ranked = sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]
    kept = greatest(torch.tensor([values, values[::-1]]), k)
    assert kept[0].nonzero().flatten().tolist() == sorted(ranked)
    assert kept.sum(-1).tolist() == [k, k]


@pytest.mark.parametrize("function", ["threshold", "topk"])
@pytest.mark.parametrize("per_channel", [(), ("weight",), ("centre",), ("weight", "centre")], ids="-".join)
def test_a_selection_is_its_formula(function: str, per_channel: tuple[str, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 11, generator=generator)
    tensors = {name: torch.rand(11, generator=generator) for name in per_channel}
    weight, centre = tensors.get("weight", 1.0), tensors.get("centre", torch.zeros(11))
    fields = {"threshold": 0.4} if function == "threshold" else {"k": 4}
    definition = Sparsifier(("q",), function, per_channel=per_channel, **fields)
    score = weight * (x - centre).abs()
    kept = score >= 0.4 if function == "threshold" else score >= score.sort(-1).values[..., -4, None]
    expected = torch.where(kept, x, centre)
    assert torch.equal(Selection(definition, tensors, TokenPositions())(x), expected)


def test_values_equal_to_the_threshold_survive() -> None:
    x = torch.tensor([0.1, -0.1, 0.09999, float("nan")])
    scalar = Selection(Sparsifier(("q",), "threshold", threshold=0.1), {}, TokenPositions())
    definition = Sparsifier(("q",), "threshold", per_channel=("threshold",))
    vector = Selection(definition, {"threshold": torch.full((4,), 0.1)}, TokenPositions())
    for selection in (scalar, vector):
        kept = selection(x)
        assert torch.equal(kept[:3], torch.tensor([0.1, -0.1, 0.0]))
        assert kept[3].isnan()


def test_a_threshold_is_not_rounded_to_a_narrow_dtype() -> None:
    x = torch.tensor([1.0, 1.0078125], dtype=torch.bfloat16)
    kept = Selection(Sparsifier(("q",), "threshold", threshold=1.001), {}, TokenPositions())(x)
    assert kept.dtype == torch.bfloat16
    assert kept.tolist() == [0.0, 1.0078125]


KEEPS_ALL: dict[str, Callable[[str], ActivationSparsity]] = {
    "shared": lambda name: ActivationSparsity((Sparsifier(sites_of(name), "threshold", threshold=0.0),)),
    "separate": lambda name: separate(name, function="threshold", threshold=0.0),
    "neuron": lambda _name: ActivationSparsity((Sparsifier(("neuron",), "threshold", threshold=0.0),)),
    "topk": lambda _name: ActivationSparsity((Sparsifier(("q", "k", "v"), "topk", k=24),)),
    "topk_neuron": lambda _name: ActivationSparsity((Sparsifier(("neuron",), "topk", k=43),)),
}


@pytest.mark.parametrize("case", KEEPS_ALL)
@pytest.mark.parametrize("name", ["llama", "gemma2", "starcoder2", "gpt2", "phi3", "cohere", "falcon_new"])
def test_threshold_zero_and_all_of_them_are_dense_bit_for_bit(name: str, case: str) -> None:
    if case == "separate" and name in families.FUSED_QKV:
        pytest.skip("a fused projection has one input")
    model = families.family(name)
    dense = model(IDS).logits
    apply_sparsity(model, KEEPS_ALL[case](name))
    assert any(isinstance(module, Selection) for module in model.modules())
    assert torch.equal(model(IDS).logits, dense)


def opt(**changes) -> PreTrainedModel:
    return families.build(families._opt(activation_function="gelu", **changes))


@pytest.mark.parametrize("build", [lambda: families.family("llama"), opt], ids=["llama", "opt"])
def test_each_projection_has_its_own_mask(build: Callable[[], PreTrainedModel]) -> None:
    model = build()
    sites = PLAIN if model.config.model_type == "opt" else ALL
    thresholds = {site: 0.1 * (i + 1) for i, site in enumerate(sites)}
    sparsity = ActivationSparsity(
        tuple(Sparsifier((site,), "threshold", threshold=t) for site, t in thresholds.items())
    )
    keys = list(model.state_dict())
    apply_sparsity(model, sparsity)
    assert list(model.state_dict()) == keys
    seen: dict[str, tuple] = {}
    for site, projection in find_blocks(model)[1].projections().items():
        projection.module.register_forward_hook(
            lambda m, args, y, site=site: seen.update({site: (m, args[0], y)})
        )
    model(IDS)
    for site, (module, x, y) in seen.items():
        kept = torch.where(x.abs() >= thresholds[site], x, 0.0)
        torch.testing.assert_close(y, torch.nn.functional.linear(kept, module.weight, module.bias))
        assert 0 < (kept == 0).float().mean() < 1


@pytest.mark.parametrize("function", ["threshold", "topk", "relu"])
def test_the_correction_is_the_low_rank_branch(function: str) -> None:
    model = families.family("llama")
    fields = {"threshold": {"threshold": 0.5}, "topk": {"k": 5}, "relu": {}}[function]
    sites = [Sparsifier((s,), function, correction="low_rank", **fields) for s in ("q", "down")]
    own = () if function != "relu" else (Sparsifier(("neuron",), "relu"),)
    sparsity = ActivationSparsity((*own, *sites))
    tensors = random_tensors(model, sparsity)
    apply_sparsity(model, sparsity, tensors)
    seen: dict[str, torch.Tensor] = {}
    q = model.model.layers[1].self_attn.q_proj
    q.register_forward_hook(lambda _m, args, y: seen.update(x=args[0], y=y))
    model(IDS)
    kept = q.sparsifier(seen["x"])
    prefix = "model.layers.1.self_attn.q_proj.sparsifier"
    low_rank = tensors[f"{prefix}.low_rank_out"] @ tensors[f"{prefix}.low_rank_in"]
    expected = kept @ q.weight.T + (seen["x"] - kept) @ low_rank.T
    torch.testing.assert_close(seen["y"], expected, rtol=1e-4, atol=1e-4)


def test_full_rank_is_dense() -> None:
    model = families.family("llama")
    dense = model(IDS).logits
    sparsity = separate("llama", function="threshold", threshold=0.7, correction="low_rank")
    tensors = {}
    for block in find_sites(model):
        for projection in block.projections().values():
            weight = projection.module.weight.detach()
            tensors[f"{projection.name}.sparsifier.low_rank_in"] = weight
            tensors[f"{projection.name}.sparsifier.low_rank_out"] = torch.eye(weight.shape[0])
    apply_sparsity(model, sparsity, tensors)
    torch.testing.assert_close(model(IDS).logits, dense, rtol=1e-4, atol=1e-4)


def test_gradients_flow_through_what_is_kept() -> None:
    x = torch.tensor([0.5, -2.0, 0.1], requires_grad=True)
    Selection(Sparsifier(("q",), "threshold", threshold=0.3), {}, TokenPositions())(x).sum().backward()
    assert x.grad.tolist() == [1.0, 1.0, 0.0]
    model = families.family("llama").train()
    apply_sparsity(model, separate("llama", function="topk", k=12))
    model(IDS, labels=IDS).loss.backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in model.parameters())


@pytest.mark.parametrize(
    "sites", [("q", "k", "v", "gate", "up"), ("q", "o", "down"), ("neuron",)], ids="-".join
)
@pytest.mark.parametrize("has_centre", [False, True])
def test_zeros_are_counted_behind_the_masks(sites: tuple[str, ...], has_centre: bool) -> None:
    if has_centre and sites == ("neuron",):
        pytest.skip("there is no centre at neuron")
    model = families.family("llama")
    sparsity = ActivationSparsity(
        (Sparsifier(sites, "topk", k=7, per_channel=("centre",) if has_centre else ()),)
    )
    apply_sparsity(model, sparsity, random_tensors(model, sparsity))
    with observe_sites(model) as observer:
        model(IDS)
    widths = {site: p.shape[1] for site, p in find_blocks(model)[0].projections().items()} | {"neuron": 43}
    sparse = (*sites, "down") if "neuron" in sites else sites
    for site, layers in observer.sparsity().items():
        assert layers == pytest.approx([1 - 7 / widths[site]] * 2 if site in sparse else [0.0] * 2), site


def test_copies_and_pickles_select_alike() -> None:
    model = families.family("llama")
    sparsity = ActivationSparsity(
        (
            Sparsifier(("o", "down", "up"), "topk", k=9, per_channel=("weight",), dense_first_tokens=2),
            Sparsifier(("neuron",), "drelu"),
        )
    )
    apply_sparsity(model, sparsity, random_tensors(model, sparsity))
    logits = model(IDS).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        model(IDS[:, :2])  # another's positions must not be taken for one's own
        assert torch.equal(other(IDS).logits, logits)


def test_selections_take_the_place_of_selections() -> None:
    model, fresh = families.family("llama"), families.family("llama")
    config = fresh.config.to_dict()
    apply_sparsity(model, separate("llama", function="topk", k=3, dense_first_tokens=1))
    last = ActivationSparsity((Sparsifier(("q", "k", "v", "neuron"), "threshold", threshold=0.3),))
    apply_sparsity(model, last)
    apply_sparsity(fresh, last)
    assert torch.equal(model(IDS).logits, fresh(IDS).logits)
    assert str(model) == str(fresh)
    assert not model.model._forward_pre_hooks
    assert model.config.hidden_act == config["hidden_act"]
