"""Sparsifiers make exactly the zeros that they promise, where they promise, and refuse what cannot be."""

import copy
import pickle
import warnings

import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

import families
from relufy.activation_sparsity import ActivationSparsity, Sparsifier
from relufy.errors import UserError
from relufy.model.activations import Placeholder, ReLU, SquaredReLU
from relufy.model.configuration import sparsity_of
from relufy.model.sites import find_sites
from relufy.model.sparsifiers import apply_sparsity

IDS = torch.tensor([[3, 4, 5, 50, 7], [0, 1, 2, 9, 9]])
NEURON = Sparsifier(("neuron",), "relu")
QKV = Sparsifier(("q", "k", "v"), "relu")
GATE_UP = Sparsifier(("gate", "up"), "relu")
UP = Sparsifier(("up",), "relu")


def stage2(model: PreTrainedModel) -> ActivationSparsity:
    is_gated = find_sites(model)[0].gate is not None
    return ActivationSparsity((NEURON, QKV, GATE_UP if is_gated else UP))


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1), st.floats(-3, 3, width=32))
def test_functions_are_their_formulas(values: list[float], shift: float) -> None:
    x = torch.tensor(values)
    expected = torch.where(x > shift, x - shift, 0.0)
    assert torch.equal(ReLU(shift)(x), expected)
    assert torch.equal(SquaredReLU(shift)(x), expected * expected)


def llama_stage2_logits(model: PreTrainedModel, ids: torch.Tensor, shift: float) -> torch.Tensor:
    """The paper's stage 2 for a Llama, written out from its formulas: [batch, time, vocabulary]."""
    weights, config = model.state_dict(), model.config
    heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return weights[f"{name}.weight"] * x * (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).rsqrt()

    def rotate(x: torch.Tensor) -> torch.Tensor:
        frequencies = 10000.0 ** (-torch.arange(0, size, 2) / size)
        angles = torch.arange(x.shape[-2])[:, None] * frequencies
        cos, sin = angles.cos(), angles.sin()
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    h = weights["model.embed_tokens.weight"][ids]
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}"
        x = norm(h, f"{at}.input_layernorm").clamp(min=0)
        q, k, v = (
            (x @ weights[f"{at}.self_attn.{p}_proj.weight"].T).unflatten(-1, (-1, size)).transpose(1, 2)
            for p in "qkv"
        )
        k, v = (t.repeat_interleave(heads // groups, 1) for t in (k, v))
        scores = rotate(q) @ rotate(k).transpose(-1, -2) / size**0.5
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
        h = h + mixed.transpose(1, 2).flatten(-2) @ weights[f"{at}.self_attn.o_proj.weight"].T
        x = norm(h, f"{at}.post_attention_layernorm").clamp(min=0)
        gate, up = (x @ weights[f"{at}.mlp.{p}_proj.weight"].T for p in ("gate", "up"))
        h = h + ((gate - shift).clamp(min=0) * up) @ weights[f"{at}.mlp.down_proj.weight"].T
    return norm(h, "model.norm") @ weights["lm_head.weight"].T


@pytest.mark.parametrize("shift", [0.0, 0.7])
def test_stage_2_of_a_llama_is_the_papers_formula(shift: float) -> None:
    model = families.family("llama")
    dense = model(IDS).logits
    apply_sparsity(model, ActivationSparsity((Sparsifier(("neuron",), "relu", shift), QKV, GATE_UP)))
    logits = model(IDS).logits
    torch.testing.assert_close(logits, llama_stage2_logits(model, IDS, shift), rtol=1e-4, atol=1e-4)
    assert (logits - dense).abs().max() > 0.1


@pytest.mark.parametrize("name", families.STAGE_2)
def test_stage_2_zeroes_the_shared_inputs_and_leaves_the_rest(name: str) -> None:
    model = families.family(name)
    keys = list(model.state_dict())
    apply_sparsity(model, stage2(model))
    inputs: dict[str, torch.Tensor] = {}
    for site, projection in find_sites(model)[1].projections().items():
        projection.module.register_forward_pre_hook(
            lambda _m, args, site=site: inputs.update({site: args[0]})
        )
    model.get_output_embeddings().register_forward_pre_hook(lambda _m, args: inputs.update(head=args[0]))
    model(IDS)
    for site in ("q", "k", "v", "gate", "up"):
        if site in inputs:
            assert inputs[site].min() == 0.0
            assert 0.2 < (inputs[site] == 0).float().mean() < 0.8
    assert inputs["o"].min() < 0
    assert inputs["head"].min() < 0
    assert list(model.state_dict()) == keys


def test_falcon_gets_one_relu_for_attention_and_mlp() -> None:
    model = apply_sparsity(families.family("falcon"), ActivationSparsity((NEURON, QKV, UP)))
    sparse = [name for name, module in model.named_modules() if name.endswith("sparsifier")]
    assert sparse == [f"transformer.h.{layer}.input_layernorm.sparsifier" for layer in (0, 1)]


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon"])
def test_stage_1_then_2_is_stage_2(name: str) -> None:
    direct, stepwise = families.family(name), families.family(name)
    apply_sparsity(direct, stage2(direct))
    apply_sparsity(stepwise, ActivationSparsity((NEURON,)))
    apply_sparsity(stepwise, stage2(stepwise))
    assert torch.equal(direct(IDS).logits, stepwise(IDS).logits)
    assert direct.config.to_dict() == stepwise.config.to_dict()


def test_a_natively_sparse_model_is_left_as_it_is_with_a_warning() -> None:
    model = families.family("opt")
    before, config = model(IDS).logits, model.config.to_dict()
    with pytest.warns(UserWarning, match="already"):
        apply_sparsity(model, ActivationSparsity((NEURON,)))
    assert torch.equal(model(IDS).logits, before)
    assert model.config.to_dict() == config


def test_stage_2_of_a_natively_sparse_model_adds_the_input_relus() -> None:
    model = families.family("opt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_sparsity(model, stage2(model))
    assert sparsity_of(model).at("q", 1) == QKV
    assert model.config.activation_function == "relufy"


REFUSED = {
    "only_q": ("llama", [NEURON, Sparsifier(("q",), "relu")], "q k v read one norm's output"),
    "unequal_functions": (
        "llama",
        [NEURON, Sparsifier(("q", "k"), "relu"), Sparsifier(("v",), "relu2")],
        "q k v read one norm's output",
    ),
    "half_of_a_shared_norm": ("falcon", [NEURON, QKV], "q k v up read one norm's output"),
    "no_norm_post_norms": ("olmo2", [NEURON, QKV], "no norm makes the input of q k v"),
    "no_norm_opt_350m": ("opt_post_norm", [NEURON, UP], "no norm makes the input of up"),
    "neuron_and_down_in_a_plain_mlp": (
        "gpt2",
        [NEURON, Sparsifier(("down",), "relu")],
        "'neuron' and 'down' are one site",
    ),
    "gate_of_a_plain_mlp": ("gpt2", [NEURON, GATE_UP], "has no gate"),
    "o": ("llama", [NEURON, Sparsifier(("o",), "relu")], "at 'o' is not supported"),
    "inputs_alone": ("llama", [QKV], "need the site 'neuron'"),
    "some_layers": ("llama", [Sparsifier(("neuron",), "relu", layers=(1,))], "need the site 'neuron'"),
    "beyond_the_last_layer": (
        "llama",
        [NEURON, Sparsifier(("q", "k", "v"), "relu", layers=(2,))],
        "layer 2, the model has layers 0 to 1",
    ),
    "twice": ("llama", [NEURON, NEURON], "two sparsifiers at the site 'neuron'"),
    "native_relu2": (
        "nemotron",
        [NEURON],
        "already has relu2 at 'neuron' of layer 0, which would become relu",
    ),
    "native_relu_shifted": (
        "opt",
        [Sparsifier(("neuron",), "relu", 0.5)],
        "already has relu at .* become relu with shift 0.5",
    ),
    "activation_without_a_name": ("bloom", [NEURON], "no key of its config.json decides"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_and_unchanged(case: str) -> None:
    name, sparsifiers, message = REFUSED[case]
    model = families.family(name)
    before, config = model(IDS).logits, model.config.to_dict()
    with pytest.raises(UserError, match=message):
        apply_sparsity(model, ActivationSparsity(tuple(sparsifiers)))
    assert torch.equal(model(IDS).logits, before)
    assert model.config.to_dict() == config


def test_stage_2_to_stage_1_is_refused() -> None:
    model = families.family("llama")
    apply_sparsity(model, stage2(model))
    with pytest.raises(UserError, match="already has relu at 'q' of layer 0, which would become dense"):
        apply_sparsity(model, ActivationSparsity((NEURON,)))


def test_input_relus_may_be_in_some_layers() -> None:
    model = families.family("llama")
    apply_sparsity(model, ActivationSparsity((NEURON, Sparsifier(("q", "k", "v"), "relu", layers=(1,)))))
    assert [hasattr(layer.input_layernorm, "sparsifier") for layer in model.model.layers] == [False, True]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_copies_and_pickles_are_sparse_and_independent(name: str) -> None:
    model = families.family(name)
    apply_sparsity(model, stage2(model))
    logits = model(IDS).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(IDS).logits, logits)
        with torch.no_grad():
            next(other.parameters()).zero_()
    assert torch.equal(model(IDS).logits, logits)


def test_it_compiles_without_graph_breaks() -> None:
    model = families.family("llama")
    apply_sparsity(model, stage2(model))
    norm = torch.compile(model.model.layers[0].input_layernorm, backend="eager", fullgraph=True)
    x = torch.randn(2, 3, 24)
    assert torch.equal(norm(x), model.model.layers[0].input_layernorm(x))


def test_lora_trains_on_the_sparse_inputs_and_merges() -> None:
    model = families.family("llama")
    apply_sparsity(model, stage2(model))
    sparsity = sparsity_of(model)
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False))
    adapted(IDS, labels=IDS).loss.backward()
    with torch.no_grad():
        logits = adapted(IDS).logits
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(IDS).logits, logits, rtol=1e-4, atol=1e-4)
    assert sparsity_of(merged) == sparsity


def test_an_adapted_or_quantised_model_is_refused() -> None:
    adapted = get_peft_model(families.family("llama"), LoraConfig(target_modules="all-linear", r=2))
    with pytest.raises(UserError, match="merge its adapters"):
        apply_sparsity(adapted, ActivationSparsity((NEURON,)))
    quantised = families.family("llama")
    quantised.config.quantization_config = hf.BitsAndBytesConfig(load_in_8bit=True)
    with pytest.raises(UserError, match=r"is quantised .bitsandbytes"):
        apply_sparsity(quantised, ActivationSparsity((NEURON,)))


def test_the_placeholder_refuses_to_compute() -> None:
    with pytest.raises(UserError, match=r"relufy\.load_model"):
        Placeholder()(torch.ones(1))
