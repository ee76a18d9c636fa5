"""The commands on the bundled model: what they print, on which stream, and what they leave behind."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from relufy.cli.main import run

PROMPT = "The old man"


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """Run a `--json` command and return the one document that it prints."""
    assert run([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def stage1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "stage1"
    assert run(["sparsify", "bundled", "-o", str(folder), "--recipe", "relufy-stage1"]) == 0
    return folder


def test_sparsify_leaves_a_checkpoint(stage1: Path) -> None:
    config = json.loads((stage1 / "config.json").read_text())
    assert config["hidden_act"] == "relu"
    assert config["activation_sparsity"]["recipe"]["name"] == "relufy-stage1"


def test_info_knows_the_sparsifiers(stage1: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "neuron" in json.dumps(run_json(capsys, "info", str(stage1)))
    assert run(["info", str(stage1)]) == 0
    assert "relu" in capsys.readouterr().out


def test_quiet_generation_prints_the_text_alone(stage1: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", str(stage1), PROMPT, "--max-new-tokens", "8", "--threads", "1"]
    document = run_json(capsys, *arguments)
    assert len(document["token_ids"]) == 8 and document["stats"]["decode_tokens_per_second"] > 0
    assert run([*arguments, "--quiet"]) == 0
    captured = capsys.readouterr()
    assert captured.out == document["text"] + "\n" and captured.err == ""


def test_loud_generation_says_bytes_on_stderr(stage1: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", str(stage1), PROMPT, "--max-new-tokens", "4", "--threads", "1"]) == 0
    printed = capsys.readouterr().err
    assert "MB of weights a token" in printed and "GB/s" in printed and "32.01 bits a weight" in printed


def test_settings_that_change_nothing_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "bundled", PROMPT, "--max-new-tokens", "2", "--threads", "1"]
    ignored = ["--top-k", "3", "--seed", "1", "--keep", "2", "--context", "9999"]
    assert run([*arguments, *ignored]) == 0
    first, *rest = capsys.readouterr().err.splitlines()
    assert all(f"{name} is ignored" in first for name in ("--top-k", "--seed", "--keep")) and len(rest) == 1
    assert "--context 9999 is more than the model's 512" in first
    sampled = ["--top-k", "3", "--temperature", "1", "--keep", "2", "--context-policy", "sliding"]
    assert run([*arguments, *sampled, "--context", "512"]) == 0
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert run([*arguments, *ignored, "--quiet"]) == 0
    assert capsys.readouterr().err == ""


def test_stop_ends_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "bundled", PROMPT, "--max-new-tokens", "20", "--threads", "1"]
    whole = run_json(capsys, *arguments)["text"]
    middle = whole[6:10]
    assert run_json(capsys, *arguments, "--stop", middle)["text"] == whole[: whole.index(middle)]


def test_pack_verify_generate(stage1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed = tmp_path / "stage1.relufy"
    assert run_json(capsys, "pack", str(stage1), "-o", str(packed))["bytes"] == packed.stat().st_size
    assert run_json(capsys, "verify", str(packed))["ok"] is True
    assert run(["generate", str(packed), PROMPT, "--max-new-tokens", "4", "--threads", "1", "--quiet"]) == 0


def test_pack_says_what_it_made(stage1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed, text = tmp_path / "small.relufy", tmp_path / "text.txt"
    text.write_text("It was a dark and stormy night; the old man sat by the fire. " * 40)
    arguments = ["pack", str(stage1), "-o", str(packed), "--dtype", "int4"]
    assert run([*arguments, "--text", str(text)]) == 0
    printed = capsys.readouterr().out
    assert "int4" in printed and "bits per weight" in printed and "zeros at neuron" in printed
    assert "perplexity" in printed and "f32" in printed
    assert run([*arguments, "--for", "dense"]) == 0
    assert "skips nothing" in capsys.readouterr().out
    document = run_json(capsys, "info", str(packed))
    assert document["dtype"] == "int4" and document["packed_for"] == "dense"
    assert set(document["weight_bytes"]) == {"f32", "int8", "int4"}
    assert document["bits_per_weight"] == pytest.approx(
        8 * document["bytes"] / document["parameters"], rel=0.1
    )


def test_a_narrow_dtype_reads_fewer_bytes(stage1: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", str(stage1), PROMPT, "--max-new-tokens", "4", "--threads", "1"]
    wide = run_json(capsys, *arguments)
    narrow = run_json(capsys, *arguments, "--dtype", "int8", "--kv-dtype", "bf16", "--load")
    assert wide["engine"]["kv_dtype"] == "f32" and narrow["engine"]["kv_dtype"] == "bf16"
    for name in ("weight_bytes_per_token", "kv_bytes_per_token"):
        assert narrow["stats"][name] <= 0.5 * wide["stats"][name]
    assert narrow["engine"]["bits_per_weight"] < 9 < 32 < wide["engine"]["bits_per_weight"]


def test_verify_refuses_a_damaged_file(
    stage1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = tmp_path / "stage1.relufy"
    assert run(["pack", str(stage1), "-o", str(packed)]) == 0
    content = bytearray(packed.read_bytes())
    content[len(content) // 2] ^= 1
    packed.write_bytes(content)
    capsys.readouterr()
    assert run(["verify", str(packed)]) == 2
    assert str(packed) in capsys.readouterr().err


def test_cache_is_listed_and_cleared(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_json(capsys, "cache", "list") == []
    assert run(["generate", "bundled", PROMPT, "--max-new-tokens", "1", "--threads", "1", "--quiet"]) == 0
    capsys.readouterr()
    (entry,) = run_json(capsys, "cache", "list")
    assert entry["model"] == "llama-prose-3m" and Path(entry["path"]).is_file()
    assert run_json(capsys, "cache", "clear")["bytes_freed"] == entry["bytes"]
    assert run_json(capsys, "cache", "list") == []


def test_measure_names_what_it_counted(
    stage1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("It was a dark and stormy night; the old man sat by the fire. " * 20)
    arguments = ["measure", str(stage1), "--text", str(text), "--dense", "bundled", "--window", "32"]
    document = run_json(capsys, *arguments)
    assert document["tokens"] == document["windows"] * 32
    assert document["macs_paper"]["sparse"] < document["macs_paper"]["dense"]
    assert document["dense_perplexity"]["perplexity"] != document["perplexity"]["perplexity"]
    written = tmp_path / "found.json"
    assert run([*arguments, "--by-layer", "--target", "0.9", "-o", str(written)]) == 0
    printed = capsys.readouterr().out
    for words in ("exact zeros by layer", "union density", "int4", "90.0%", "model_level_sparsity:"):
        assert words in printed
    assert json.loads(written.read_text())["sparsity"] == document["sparsity"]
    assert run([*arguments, "-o", str(tmp_path)]) == 2


def test_finetune_leaves_a_checkpoint_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, output = tmp_path / "text.txt", tmp_path / "tuned"
    text.write_text("It was a dark and stormy night; the old man sat by the fire. " * 40)
    recipe = tmp_path / "short.yaml"
    recipe.write_text(
        "name: short\nsparsify: {method: relufication, stage: 2}\n"
        "finetune: {steps: 2, batch_size: 2, window: 32, distill: 1.0, learning_rate: 0.001}\n"
    )
    arguments = ["finetune", "bundled", "-o", str(output), "--recipe", str(recipe), "--data", str(text)]
    document = run_json(capsys, *arguments)
    assert document["steps"] == 2 and len(document["losses"]) == 2
    assert json.loads((output / "config.json").read_text())["hidden_act"] == "relufy"
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt", "short.yaml", "tuned"}


def test_an_interrupted_finetune_goes_on_where_it_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "short.yaml"
    recipe.write_text(
        "name: short\nsparsify: {method: relufication}\n"
        "finetune: {steps: 4, batch_size: 2, window: 16, distill: 1.0, save_steps: 1}\n"
    )
    output = tmp_path / "tuned"
    arguments = ["finetune", "bundled", "-o", str(output), "--recipe", str(recipe), "--data", "self"]
    unbroken = run_json(capsys, "finetune", "bundled", "-o", str(tmp_path / "whole"), *arguments[4:])

    with monkeypatch.context() as patch:

        def interrupt(display: object, task: str, done: int, *_: object) -> None:
            if task == "fine-tuning short" and done == 3:
                raise KeyboardInterrupt

        patch.setattr("relufy.cli.progress.ProgressDisplay.update", interrupt)
        assert run(arguments) == 130
    assert not output.exists()
    resumed = run_json(capsys, *arguments, "--resume")
    assert resumed["losses"] == unbroken["losses"]
    assert {path.name for path in tmp_path.iterdir()} == {"short.yaml", "tuned", "whole"}


def test_a_relufied_model_is_no_teacher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sparse = tmp_path / "sparse"
    assert run(["sparsify", "bundled", "-o", str(sparse), "--recipe", "relufy-stage1"]) == 0
    arguments = ["finetune", str(sparse), "-o", str(tmp_path / "out"), "--recipe", "relufy-stage2"]
    assert run([*arguments, "--data", "self"]) == 2
    assert "--dense" in capsys.readouterr().err


def test_generation_tells_logprobs_slides_and_what_it_chose(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "bundled", PROMPT, "--threads", "1", "--context", "64", "--no-mmap"]
    more = ["--max-new-tokens", "120", "--context-policy", "sliding", "--keep", "2", "--logit-bias", "0=-inf"]
    document = run_json(capsys, *arguments, *more, "--logprobs", "2")
    assert document["stats"]["num_slides"] >= 2 and len(document["logprobs"]) == 120
    first = document["logprobs"][0]
    assert first["token"] == document["token_ids"][0] == first["top"][0]["token"] and first["logprob"] < 0
    assert len(first["top"]) == 2 and isinstance(first["piece"], str)
    assert run([*arguments, *more]) == 0
    assert f"the context slid {document['stats']['num_slides']} times" in capsys.readouterr().err


def test_memory_is_locked_or_the_limit_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "bundled", PROMPT, "--max-new-tokens", "2", "--threads", "1", "--mlock"]
    assert run(arguments) == 0 or "ulimit -l" in capsys.readouterr().err


def test_packing_tells_of_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    module = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    factors = {
        f"{module}A.weight": np.ones((2, 192), np.float32),
        f"{module}B.weight": np.ones((192, 2), np.float32),
    }
    save_file(factors, adapter / "adapter_model.safetensors")
    target, text = str(tmp_path / "out.relufy"), tmp_path / "text.txt"
    text.write_text("It was a dark night, and the old man sat by the fire. " * 20)
    arguments = [
        "pack",
        "bundled",
        "-o",
        target,
        "--dtype",
        "bf16",
        "--lora",
        str(adapter),
        "--text",
        str(text),
    ]
    document = run_json(capsys, *arguments, "--lora-scale", "0.01")
    assert document["lora"][0]["name"] == "adapter" and document["lora"][0]["scale"] == 0.01
    assert abs(document["perplexity_change_percent"]) < 2  # of the same merged model in f32, not of the base
    assert run([*arguments, "--lora-scale", "3"]) == 0
    assert "merged the adapter adapter, scaled by 3" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "out.relufy", "text.txt"]


def test_a_method_that_finds_nothing_writes_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("It was a dark and stormy night, and the rain fell in torrents. " * 60)
    sizes = ["--set", "calibrate.window=64", "--set", "calibrate.tokens=1024"]
    method = ["--recipe", "rsparse", "--sparsity", "1e-9", "--set", "sparsify.search=false", *sizes]
    output = tmp_path / "out"
    assert run(["sparsify", "bundled", "-o", str(output), *method, "--calibration", str(text)]) == 2
    assert "rsparse found nothing to leave out: calibrated on" in capsys.readouterr().err
    assert not output.exists()
