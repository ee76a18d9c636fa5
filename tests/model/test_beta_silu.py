"""beta-SiLU: between SiLU and ReLU, and loaded by name or not at all."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from families import FAMILIES
from relufy.engine.spec import decoder_spec
from relufy.errors import UserError
from relufy.model.activations import stock_activation
from relufy.model.beta_silu import BETAS, BetaSiLU
from relufy.model.checkpoint import load_model, save_checkpoint
from relufy.train.new_model import new_model

X = torch.linspace(-12, 12, 200_001, dtype=torch.float64)


@pytest.mark.parametrize("beta", BETAS)
def test_its_least_value(beta: float) -> None:
    least = BetaSiLU(beta)(X).min().item()
    assert least == pytest.approx(-0.2785 / beta, rel=1e-3)


def test_from_silu_by_gelu_to_relu() -> None:
    torch.testing.assert_close(BetaSiLU(1.0)(X), nn.functional.silu(X))
    assert (BetaSiLU(1.702)(X) - nn.functional.gelu(X)).abs().max() < 0.0205
    distances = [(BetaSiLU(beta)(X) - nn.functional.relu(X)).abs().max().item() for beta in (1, 2, 8, 32)]
    assert distances == sorted(distances, reverse=True) and distances[-1] < 0.01


def test_its_gradient() -> None:
    x = torch.randn(7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(BetaSiLU(8.0), x)


def test_large_inputs_stay_numbers() -> None:
    x = torch.tensor([-1e4, 1e4], dtype=torch.float16)
    assert BetaSiLU(32.0)(x).tolist() == [0.0, 1e4]


@pytest.mark.parametrize("name", [f"beta-silu:{beta:g}" for beta in BETAS])
def test_names(name: str) -> None:
    assert stock_activation(name).beta == float(name.partition(":")[2])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "beta"
    return save_checkpoint(new_model(FAMILIES["llama"](), "beta-silu:8"), None, folder)


def test_a_checkpoint_loads_by_name(checkpoint: Path) -> None:
    model = load_model(checkpoint)
    assert model.config.hidden_act == "beta-silu:8"
    assert model.model.layers[0].mlp.act_fn.beta == 8.0


LOADING = """
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained({folder!r})
except KeyError as error:
    print("refused", error)
import relufy.hf_plugin
print(AutoModelForCausalLM.from_pretrained({folder!r}).model.layers[1].mlp.act_fn)
"""


def test_transformers_alone_fails_and_with_the_plugin_loads(checkpoint: Path) -> None:
    code = LOADING.format(folder=str(checkpoint))
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines() == ["refused 'beta-silu:8'", "BetaSiLU(beta=8)"]


def test_the_engine_refuses_it_by_name(checkpoint: Path) -> None:
    from relufy.hub import read_config

    with pytest.raises(UserError, match="no activation 'beta-silu:8'"):
        decoder_spec(read_config(checkpoint))
