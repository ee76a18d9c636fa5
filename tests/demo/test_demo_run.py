"""The whole demo on a tiny random model: every file, every figure, every command is there."""

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from relufy.cli.demo import table_rows
from relufy.cli.main import app
from relufy.demo.options import DemoOptions
from relufy.demo.result import DemoResult
from relufy.demo.run import run_demo
from relufy.errors import UserError


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, bundled: Path) -> Path:
    """Return a random Llama of odd sizes with the bundled tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=36, intermediate_size=52, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=3, head_dim=12, max_position_embeddings=256, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(bundled).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def options(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> DemoOptions:
    output = tmp_path_factory.mktemp("demo") / "relufy-demo"
    return DemoOptions(output=output, model=str(tiny), prompt="The old man", steps=1)


@pytest.fixture(scope="module")
def result(options: DemoOptions, cache: Path) -> DemoResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RELUFY_CACHE", str(cache))
        return run_demo(options)


@pytest.fixture
def document(result: DemoResult, options: DemoOptions) -> dict[str, Any]:
    return json.loads((options.output / "demo.json").read_text())


def test_every_file_is_there(result: DemoResult, options: DemoOptions) -> None:
    names = {path.name for path in options.output.iterdir()}
    packed = {"dense.relufy", "stage1.relufy", "stage2.relufy"}
    assert names == {"stage1", "stage2", "demo.json", "report.html"} | packed
    assert (options.output / "stage2" / "model.safetensors").is_file()


def test_json_is_the_result(document: dict[str, Any], result: DemoResult) -> None:
    assert document == json.loads(json.dumps(result.to_json()))


def test_stages_have_more_zeros_and_fewer_bytes(result: DemoResult) -> None:
    dense, stage1, stage2 = result.variants
    assert not any(dense.sparsity["neuron"]) and all(stage1.sparsity["neuron"])
    assert not any(stage1.sparsity["q"]) and all(stage2.sparsity["q"])
    assert dense.cost and stage1.cost and stage2.cost
    assert dense.cost.macs_paper > stage1.cost.macs_paper > stage2.cost.macs_paper
    assert dense.cost.bytes_engine > stage1.cost.bytes_engine > stage2.cost.bytes_engine


def test_without_text_there_is_fidelity_and_no_perplexity(result: DemoResult) -> None:
    assert all(variant.perplexity_before is variant.perplexity is None for variant in result.variants)
    assert all(variant.kl and variant.kl_before and variant.kl_drop for variant in result.variants[1:])
    assert "not quality" in result.texts.description


def test_every_variant_wrote_text_at_some_speed(result: DemoResult) -> None:
    assert all(len(variant.tokens_per_second) > 2 and variant.text for variant in result.variants)


def test_each_step_is_a_command_that_exists(result: DemoResult) -> None:
    import typer

    known = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    for _, line in result.commands:
        words = shlex.split(line)
        assert words[0] == "relufy" and words[1] in known


def test_table_has_a_cell_for_each_variant(result: DemoResult) -> None:
    assert all(len(row) == 4 for row in table_rows(result))


def test_real_text_gives_perplexity_and_a_control(
    result: DemoResult, options: DemoOptions, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RELUFY_CACHE", str(cache))
    text = tmp_path / "own.txt"
    text.write_text(
        "".join(
            f"On day {day} the old man walked to the sea and counted {day} ships.\n" for day in range(500)
        )
    )
    found = run_demo(replace(options, output=tmp_path / "demo", text=text))
    assert all(variant.perplexity_before for variant in found.variants)
    assert all(variant.control and variant.perplexity for variant in found.variants[1:])
    assert found.texts.kind == "text"
    assert all(variant.kl and variant.kl_closed is None for variant in found.variants[1:])
    assert found.targets() == []
    assert all(
        "--set finetune.distill=0" in command for _, command in found.commands if "finetune" in command
    )
    assert "perplexity, dense control" in (tmp_path / "demo" / "report.html").read_text()


def test_a_stranger_folder_is_refused_and_kept(options: DemoOptions, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        run_demo(replace(options, output=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]
