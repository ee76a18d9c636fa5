"""`relufy info` shows the sites of a folder, from its config.json alone; what has none is refused by name."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf

import families
from relufy.cli.info import SITES_NEED
from relufy.cli.main import run

MIXTRAL = families.OWN_HEAD_DIM | {"num_local_experts": 5, "num_experts_per_tok": 2}


@pytest.fixture
def mixtral(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    hf.MixtralForCausalLM(hf.MixtralConfig(**MIXTRAL)).save_pretrained(tmp_path / "mixtral")
    return tmp_path / "mixtral"


def info(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert run(["info", *arguments]) == 0
    return capsys.readouterr().out


def test_the_sites_are_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    lines = info(capsys, "bundled").splitlines()
    table = lines[lines.index("sites in model.layers.*:") :]
    assert table[2].split() == [
        "q",
        "self_attn.q_proj",
        "192x192",
        "6",
        "8.3%",
        "6.4%",
        "0.44",
        "input_layernorm",
    ]
    assert table[8].split() == ["down", "mlp.down_proj", "192x512", "6", "22.2%", "17.1%", "1.18", "neuron"]
    assert "  neuron: 512 in each of 6 blocks, mlp.act_fn (SiLUActivation)" in table
    assert any(line.split() == ["embeddings", "786,432", "22.8%", "1.57"] for line in table)


def test_the_sites_are_in_the_document(capsys: pytest.CaptureFixture[str]) -> None:
    document = json.loads(info(capsys, "bundled", "--json"))
    rows = document["sites"]["rows"]
    assert [site for row in rows for site in row["sites"]] == ["q", "k", "v", "o", "gate", "up", "down"]
    assert sum(part["parameters"] for part in document["sites"]["parts"]) == document["parameters"]


def test_a_fused_projection_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    families.FAMILIES["phi3"]().save_pretrained(tmp_path)
    text = info(capsys, str(tmp_path))
    assert "  q k v    self_attn.qkv_proj" in text and "  gate up  mlp.gate_up_proj" in text
    assert "note: q k v are one projection, model.layers.*.self_attn.qkv_proj: they get one mask" in text
    assert text.count("where teal, wina and rsparse give each its own") == 2


@pytest.mark.parametrize("recipe", ["relufy-stage1", "relufy-stage2"])
def test_a_sparse_checkpoint_has_the_same_sites(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tmp_path / recipe)
    assert run(["sparsify", "bundled", "-o", folder, "--recipe", recipe]) == 0
    own, bundled = (json.loads(info(capsys, model, "--json"))["sites"] for model in (folder, "bundled"))
    assert own["rows"] and [row["module"] for row in own["rows"]] == [
        row["module"] for row in bundled["rows"]
    ]


def test_a_mixture_of_experts_is_shown(mixtral: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = info(capsys, str(mixtral))
    assert "sites: none; MixtralForCausalLM is no dense decoder" in text
    assert "mixture of experts (5 experts, 2 per token, in 2 of 2 blocks: model.layers.0.mlp.experts)" in text
    (experts,) = [line for line in text.splitlines() if "mlp.experts.down_proj" in line]
    assert experts.split()[:3] == ["mlp.experts.down_proj", "5x24x43", "2"]


def test_a_mixture_of_experts_is_refused(
    mixtral: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    output = tmp_path / "out"
    assert run(["sparsify", str(mixtral), "-o", str(output), "--recipe", "relufy-stage1"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and not output.exists() and said.err.count("\n") == 1
    assert "mixture of experts (5 experts, 2 per token" in said.err


def test_a_recurrent_model_is_refused_before_its_weights_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = hf.MambaConfig(vocab_size=53, hidden_size=24, num_hidden_layers=2)
    config.architectures = ["MambaForCausalLM"]
    config.save_pretrained(tmp_path / "mamba")
    capsys.readouterr()
    arguments = [
        "sparsify",
        str(tmp_path / "mamba"),
        "-o",
        str(tmp_path / "out"),
        "--recipe",
        "relufy-stage1",
    ]
    assert run(arguments) == 2
    said = capsys.readouterr().err
    assert "recurrent mixer (MambaMixer in 2 of 2 blocks: backbone.layers.0.mixer)" in said
    assert said.count("\n") == 1 and not (tmp_path / "out").exists()


def test_an_unknown_model_is_shown_without_sites(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "phlogiston", "hidden_size": 8}))
    assert "sites: none; transformers cannot build the model" in info(capsys, str(tmp_path))


def test_without_torch_everything_else_is_shown() -> None:
    hide = "import sys; sys.modules.update(torch=None, transformers=None)"
    main = "from relufy.cli.main import run; sys.exit(run(['info', 'bundled']))"
    found = subprocess.run(
        [sys.executable, "-c", f"{hide}; {main}"], capture_output=True, text=True, check=True
    )
    assert "hidden_size: 192" in found.stdout and f"sites: none; {SITES_NEED}" in found.stdout
