"""CHESS: thresholds for each neuron as the paper has them, CATS where all means are equal, and no worse."""

import numpy as np
import pytest
import torch
import transformers as hf
from tests.methods.written import bundled_model, drawn_windows, found_by, written_windows

import families
from relufy.activation_sparsity import ActivationSparsity, Sparsifier
from relufy.errors import UserError
from relufy.measure.sparsity import measure_sparsity
from relufy.method import Cats, Chess
from relufy.methods.blockwise import recorded_block
from relufy.methods.chess import LARGEST_THRESHOLD
from relufy.methods.sparsify import make_setting, sparsify
from relufy.model.configuration import sparsity_of
from relufy.model.sites import find_sites
from relufy.model.sparsifiers import apply_sparsity
from relufy.model.trial import keep_at_least, trial_masks
from relufy.recipe import Recipe

IDS = torch.tensor([[3, 4, 5, 50, 7], [0, 1, 2, 9, 9]])


def with_biases() -> hf.PreTrainedModel:
    return families.build(hf.LlamaConfig(**families.LLAMA_LIKE, mlp_bias=True))


def with_equal_means() -> hf.PreTrainedModel:
    """Return a model whose up projections put out 0.3 or -0.3, whatever the token."""
    model = with_biases()
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.data.zero_()
        layer.mlp.up_proj.bias.data = 0.3 * layer.mlp.up_proj.bias.data.sign()
    return model


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_equal_means_are_cats_bit_for_bit(share: float) -> None:
    windows = drawn_windows()
    cats = sparsify(with_equal_means(), Cats(sparsity=share), windows)
    chess = sparsify(with_equal_means(), Chess(sparsity=share, attention=False), windows)
    assert torch.equal(chess(IDS).logits, cats(IDS).logits)
    assert not torch.equal(chess(IDS).logits, with_equal_means()(IDS).logits)


def test_thresholds_are_the_scores_quantile_over_the_means() -> None:
    model, windows = families.family("llama"), drawn_windows()
    kept: dict[str, list[torch.Tensor]] = {"gate": [], "up": []}
    block = find_sites(model)[1]
    block.activation.module.register_forward_hook(lambda _m, _a, y: kept["gate"].append(y[:, 1:].abs()))
    block.up.module.register_forward_hook(lambda _m, _a, y: kept["up"].append(y[:, 1:].abs()))
    model(torch.from_numpy(windows))
    gates, ups = (torch.cat(kept[name]).flatten(0, 1).double() for name in ("gate", "up"))
    means = ups.mean(0)
    expected = (gates * means).flatten().quantile(0.6) / means
    found = found_by(Chess(sparsity=0.6, attention=False), families.family("llama"), windows)
    assert found.sparsifiers == (Sparsifier(("neuron",), "threshold", per_channel=("threshold",)),)
    thresholds = found.tensors[1, "neuron", "threshold"]
    assert thresholds.dtype == torch.float32
    torch.testing.assert_close(thresholds.double(), expected, rtol=0.01, atol=0)


def test_a_target_of_next_to_nothing_is_dense_bit_for_bit() -> None:
    model = sparsify(families.family("llama"), Chess(sparsity=1e-9), drawn_windows())
    assert torch.equal(model(IDS).logits, families.family("llama")(IDS).logits)


def test_a_neuron_whose_up_is_zero_is_skipped_and_has_a_finite_threshold() -> None:
    model, windows = with_biases(), drawn_windows()
    for parameter in model.model.layers[0].mlp.up_proj.parameters():
        parameter.data[7] = 0
    sparsify(model, Chess(attention=False), windows)
    thresholds = model.model.layers[0].mlp.act_fn.threshold
    assert thresholds[7] == LARGEST_THRESHOLD == thresholds.max()
    for dtype in (torch.float16, torch.bfloat16):
        assert model.to(dtype).model.layers[0].mlp.act_fn.threshold.isfinite().all()


def test_where_every_up_is_zero_it_is_cats() -> None:
    model, windows = with_biases(), drawn_windows()
    for layer in model.model.layers:
        for parameter in layer.mlp.up_proj.parameters():
            parameter.data.zero_()
    cats = found_by(Cats(), model, windows)
    chess = found_by(Chess(attention=False), model, windows)
    for layer, sparsifier in enumerate(cats.sparsifiers):
        expected = torch.full((43,), sparsifier.threshold)
        assert torch.equal(chess.tensors[layer, "neuron", "threshold"], expected)


@pytest.mark.parametrize(("share", "drift"), [(0.5, 0.02), (0.7, 0.03)])
def test_held_out_text_is_as_sparse_as_asked_for(share: float, drift: float) -> None:
    """The more is left out, the further later layers see from what the thresholds were found on."""
    calibration, held_out = written_windows()
    realised = measure_sparsity(sparsify(bundled_model(), Chess(sparsity=share), calibration), held_out)
    assert realised.sparsity["q"][0] == pytest.approx(share, abs=0.02), "no mask comes before this one"
    for site in ("neuron", "q", "o"):
        assert realised.mean[site] == pytest.approx(share, abs=drift)
    for site in ("k", "v", "gate", "up"):
        assert realised.mean[site] == 0


def test_the_mlps_error_is_less_than_that_of_cats() -> None:
    model, windows, share = bundled_model(), written_windows()[0], 0.6
    chess = found_by(Chess(sparsity=share, attention=False), model, windows)
    cats = found_by(Cats(sparsity=share), model, windows)
    setting = make_setting(model, Recipe(name="test", sparsify=Cats()), windows)
    wins = []
    for block in setting.blocks:
        masks = (chess.tensors[block.index, "neuron", "threshold"], cats.sparsifiers[block.index].threshold)
        errors = []
        with recorded_block(setting, windows[:8], block.index) as recorded, trial_masks(setting.blocks) as t:
            for threshold in masks:
                t.put(block.index, "neuron", keep_at_least(threshold))  # type: ignore[arg-type]
                errors.append(recorded.error())
        wins.append(errors[0] <= errors[1])
    assert np.mean(wins) > 0.5


def test_attention_gets_thresholds_at_q_and_o_alone() -> None:
    model, windows = families.family("llama"), drawn_windows()
    found = found_by(Chess(sparsity=0.4), model, windows)
    places = [(s.sites, s.layers) for s in found.sparsifiers]
    assert places == [(("neuron",), None)] + [((site,), (n,)) for n in (0, 1) for site in ("q", "o")]
    seen: list[torch.Tensor] = []
    attention = model.model.layers[0].self_attn
    attention.o_proj.register_forward_pre_hook(lambda _m, args: seen.append(args[0][:, 1:].abs()))
    with torch.inference_mode():
        model(torch.from_numpy(windows))
    assert found.sparsifiers[2].threshold == pytest.approx(float(seen[0].quantile(0.4)), rel=0.01)


def test_a_fused_projection_leaves_the_attentions_input_dense_and_says_so() -> None:
    model, windows = families.family("phi3"), drawn_windows()
    found = found_by(Chess(), model, windows)
    assert {site for s in found.sparsifiers for site in s.sites} == {"neuron", "o"}
    assert found.notes[1:] == (
        "q, k and v are one projection, so q cannot have a mask of its own: only o has, in the attention",
    )
    assert len(found_by(Chess(attention=False), model, windows).notes) == 1


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in families.GATED] + [(n, torch.bfloat16) for n in ("llama", "phi3")],
)
def test_every_gated_family(name: str, dtype: torch.dtype) -> None:
    windows = drawn_windows()
    model = sparsify(families.family(name, dtype), Chess(), windows)
    realised = measure_sparsity(model, windows).sparsity
    assert realised["o"][0] == pytest.approx(0.5, abs=0.02)
    assert realised["neuron"][0] == pytest.approx(0.5, abs=0.1)  # its input is behind masks
    assert realised["k"][0] == pytest.approx(0, abs=0.01)
    assert realised["q"][0] == pytest.approx(0 if name in families.FUSED_QKV else 0.5, abs=0.02)
    assert torch.isfinite(model(IDS).logits).all()


def test_a_plain_mlp_is_refused() -> None:
    with pytest.raises(UserError, match="chess needs a gate, and OPTForCausalLM has a plain MLP"):
        sparsify(families.family("opt"), Chess(), drawn_windows())


def test_an_activation_with_zeros_is_refused() -> None:
    model = families.family("llama")
    apply_sparsity(model, ActivationSparsity((Sparsifier(("neuron",), "relu"),)))
    with pytest.raises(UserError, match="layer 0 has relu at 'neuron' already; fatrelu can make it sparser"):
        sparsify(model, Chess(), drawn_windows())
    with pytest.raises(UserError, match="chess needs text"):
        sparsify(families.family("llama"), Chess())


def test_the_phase_goes_to_every_mask() -> None:
    model = sparsify(families.family("llama"), Chess(phase="decode", dense_first_tokens=2), drawn_windows())
    masks = sparsity_of(model).sparsifiers
    assert {(s.phase, s.dense_first_tokens) for s in masks} == {("decode", 2)}
