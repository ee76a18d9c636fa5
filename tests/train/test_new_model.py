"""New models: their shapes, their activations, and that they repeat."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from families import FAMILIES, PLAIN_MLP, family
from relufy.activation_sparsity import ACTIVATION_KEYS, Sparsifier
from relufy.errors import UserError
from relufy.model.activations import HeLU, ReLU
from relufy.model.checkpoint import load_model, save_checkpoint
from relufy.model.configuration import has_block, sparsity_of
from relufy.model.sites import find_sites
from relufy.train.new_model import SHAPES, new_model, read_shape

GEMMA_GELU = ("gemma", "gelu")
"""Its configuration takes that for the approximation by tanh."""
IDS = torch.arange(20).reshape(2, 10)


def tiny(name: str = "llama"):
    return FAMILIES[name]()


def weights(model) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_3m_is_the_bundled_shape() -> None:
    ours, bundled = read_shape("3m").to_dict(), read_shape("bundled").to_dict()
    ignored = {"dtype", "architectures"}
    assert {k: v for k, v in ours.items() if k not in ignored} == {
        k: v for k, v in bundled.items() if k not in ignored
    }


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("3m", 3.4e6, 3.5e6),
        ("30m", 30e6, 40e6),
        ("125m", 1.2e8, 1.4e8),
        ("350m", 3.4e8, 3.8e8),
        ("1.3b", 1.3e9, 1.4e9),
    ],
)
def test_shapes_are_as_large_as_they_are_called(name: str, least: float, most: float) -> None:
    config = read_shape(name)
    with torch.device("meta"):
        count = AutoModelForCausalLM.from_config(config).num_parameters()
    assert least <= count <= most
    assert config.intermediate_size % 64 == 0 and set(SHAPES) >= {name}


def test_a_seed_gives_the_same_weights_and_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    one, same, other = new_model(tiny(), seed=3), new_model(tiny(), seed=3), new_model(tiny(), seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(weights(one), weights(same)) and not torch.equal(weights(one), weights(other))
    assert one.dtype == torch.float32 and not one.training


def test_the_activation_does_not_change_the_weights() -> None:
    dense = weights(new_model(tiny(), "silu"))
    for activation in ("relu", "beta-silu:8", "helu", "drelu"):
        assert torch.equal(weights(new_model(tiny(), activation)), dense)


@pytest.mark.parametrize(
    "activation", ["relu", "relu2", "silu", "gelu", "gelu_new", "beta-silu:8", "helu", "drelu"]
)
@pytest.mark.parametrize("name", ["llama", "gemma", "gpt2", "nemotron", "opt", "falcon", "bloom"])
def test_every_family_takes_every_activation_or_says_why_not(
    name: str, activation: str, tmp_path: Path
) -> None:
    if name == "bloom" or (activation == "drelu" and name in PLAIN_MLP) or (name, activation) == GEMMA_GELU:
        with pytest.raises(UserError, match=r"no key of its config|has no gate|loads as"):
            new_model(tiny(name), activation)
        return
    model = new_model(tiny(name), activation, seed=1)
    save_checkpoint(model, None, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert has_block(model) == (activation in ("helu", "drelu"))
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    names = [config[key] for key in ACTIVATION_KEYS if key in config]
    stock = {"helu": "relu", "drelu": "relufy"}.get(activation, activation)
    assert stock in names


@pytest.mark.parametrize(
    ("activation", "function"),
    [
        ("relu", "relu"),
        ("relu2", "relu2"),
        ("helu", "helu"),
        ("drelu", "drelu"),
        ("silu", None),
        ("gelu", None),
    ],
)
def test_what_makes_zeros_is_known_to(activation: str, function: str | None) -> None:
    model = new_model(tiny(), activation)
    expected = (Sparsifier(("neuron",), function),) if function else ()
    assert sparsity_of(model).sparsifiers == expected
    own = find_sites(model)[0].activation.module
    assert isinstance(own, HeLU) == (activation == "helu") and isinstance(own, ReLU) == (
        activation in ("helu", "drelu")
    )


def test_drelu_makes_more_zeros_than_relu() -> None:
    def zeros(activation: str) -> float:
        seen: list[torch.Tensor] = []
        down = find_sites(model := new_model(tiny(), activation))[0].down.module
        down.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
        with torch.no_grad():
            model(IDS)
        return (seen[0] == 0).float().mean().item()

    assert zeros("silu") == 0 and 0.3 < zeros("relu") < 0.7 and 0.6 < zeros("drelu") < 0.9


def tokenizer_of(size: int) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models

    pieces = {"<s>": 0, "</s>": 1} | {f"w{index}": index for index in range(2, size)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(pieces, "w2")), bos_token="<s>", eos_token="</s>"
    )


def test_a_tokenizer_gives_vocabulary_and_special_tokens() -> None:
    config = new_model(tiny(), tokenizer=tokenizer_of(30)).config
    assert (config.vocab_size, config.bos_token_id, config.eos_token_id) == (30, 0, 1)
    assert new_model(tiny(), vocab_size=64, tokenizer=tokenizer_of(30)).config.vocab_size == 64
    assert new_model(tiny(), vocab_size=64).get_input_embeddings().weight.shape[0] == 64
    with pytest.raises(UserError, match="more than the vocabulary"):
        new_model(tiny(), vocab_size=20, tokenizer=tokenizer_of(30))
    with pytest.raises(UserError, match="beyond the vocabulary of 1"):
        new_model(tiny(), vocab_size=1)


def test_a_checkpoint_gives_its_shape_alone(tmp_path: Path) -> None:
    source = family("qwen3")
    save_checkpoint(source, None, tmp_path / "model", provenance={"data": "none"})
    for place in (tmp_path / "model", tmp_path / "model" / "config.json"):
        model = new_model(place, "relu")
        assert type(model) is type(source) and not has_block(model) and model.name_or_path == ""
        assert not torch.equal(weights(model), weights(source))


def test_a_relufied_checkpoint_needs_an_activation(tmp_path: Path) -> None:
    save_checkpoint(new_model(tiny(), "drelu"), None, tmp_path / "model")
    with pytest.raises(UserError, match="name the activation"):
        new_model(tmp_path / "model")
    assert new_model(tmp_path / "model", "silu").config.hidden_act == "silu"
    assert new_model(tmp_path / "model", "drelu").config.hidden_act == "relufy"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("4m",), "no shape '4m'.*known: 1.3b, 125m, 30m"),
        (("folder/that/is/not",), "no checkpoint folder"),
        ((tiny(), "relo"), "unknown activation 'relo'.*did you mean 'relu'"),
        ((tiny(), "beta-silu:1.5"), "beta is 1.702, 2, 3, and so on to 32"),
        ((tiny(), "fatrelu"), "unknown activation"),
        ((tiny(), "relufy"), "unknown activation"),
    ],
)
def test_refusals(arguments, message: str) -> None:
    with pytest.raises(UserError, match=message):
        new_model(*arguments)


def test_a_damaged_config_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    for text in ("{", "{}", '{"model_type": "no-such"}', '{"model_type": "llama", "hidden_size": "x"}'):
        file.write_text(text)
        with pytest.raises(UserError):
            new_model(file)
