"""`relufy pretrain`: from a text and a tiny shape to a checkpoint that every other command takes."""

import json
from pathlib import Path
from typing import Any

import pytest

from relufy.cli.main import run
from relufy.model.checkpoint import load_model, load_tokenizer

SHAPE = {
    "model_type": "llama",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
WORDS = ("the", "old", "man", "sat", "by", "a", "fire", "and", "thought", "of", "sea", "storms", "ships")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Return a file of a language where each word but the first depends on the one before it."""
    file, step = tmp_path / "text.txt", 1
    words = []
    for _ in range(3000):
        step = (step * 5 + 3) % len(WORDS)
        words.append(WORDS[step])
    file.write_text(" ".join(words))
    return file


@pytest.fixture
def arguments(tmp_path: Path, text: Path) -> list[str]:
    shape = tmp_path / "shape.json"
    shape.write_text(json.dumps(SHAPE))
    return [
        *("pretrain", "-o", str(tmp_path / "model"), "--config", str(shape), "--data", str(text)),
        *("--train-tokenizer", "270", "--steps", "12", "--batch-size", "4", "--window", "16"),
        *("--learning-rate", "0.01", "--set", "finetune.warmup_steps=2", "--set", "finetune.log_steps=1"),
    ]


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert run([*arguments, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_a_text_becomes_a_model(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = run_json(capsys, *arguments, "--activation", "relu", "--seed", "3", "--dtype", "bf16")
    assert document["steps"] == 12 and document["tokens"] == 12 * 4 * 15
    assert document["losses"][-1] < 0.9 * document["losses"][0]
    folder = tmp_path / "model"
    config = json.loads((folder / "config.json").read_text())
    assert config["hidden_act"] == "relu" and config["vocab_size"] == 270
    assert config["bos_token_id"] == config["eos_token_id"] == 0 and config["dtype"] == "bfloat16"
    origin = config["activation_sparsity"]["provenance"]
    assert origin["pretrained"]["activation"] == "relu" and origin["training_tokens"] == 12 * 4 * 15
    assert origin["pretrained"]["finetune"]["seed"] == 3
    assert load_tokenizer(folder)("the old man").input_ids[0] == 0
    assert load_model(folder).config.hidden_act == "relu"
    assert not list(tmp_path.glob("model.*")), "no checkpoints are left"
    assert run(["info", str(folder)]) == 0 and "relu" in capsys.readouterr().out


def test_a_tokenizer_of_a_folder(
    arguments: list[str], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from relufy.train.tokenizer import train_tokenizer

    train_tokenizer([text], 272).save_pretrained(tmp_path / "pieces")
    index = arguments.index("--train-tokenizer")
    given = [*arguments[:index], "--tokenizer", str(tmp_path / "pieces"), *arguments[index + 2 :]]
    assert run_json(capsys, *given, "--activation", "helu", "--log", str(tmp_path / "log"))["steps"] == 12
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["vocab_size"] == 272 and config["hidden_act"] == "relu"
    assert config["activation_sparsity"]["sparsifiers"] == [{"sites": ["neuron"], "function": "helu"}]
    logs = [json.loads(line) for line in (tmp_path / "log" / "log.jsonl").read_text().splitlines()]
    assert [log["step"] for log in logs] == list(range(1, 13))
    assert 0.3 < logs[0]["sparsity"]["neuron"][0] < 0.7


def test_a_target_of_zeros(arguments: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run_json(capsys, *arguments, "--activation", "relu", "--penalty-target", "0.8")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    penalty = config["activation_sparsity"]["provenance"]["pretrained"]["finetune"]["penalty"]
    assert penalty["target"] == 0.8 and penalty["until"] == [0.1, 0.7, 1.0]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tokenizer", "bundled"], "one of --tokenizer FOLDER and --train-tokenizer SIZE"),
        (["--activation", "relo"], "unknown activation 'relo'"),
        (["--optimizer", "sgd"], "expected one of"),
        (["--penalty-target", "1.5"], "share of zeros"),
        (["--dtype", "int8"], "f32 or bf16"),
        (["--tensorboard"], "give --log FOLDER"),
        (["--window", "100"], "longer than the 64"),
        (["--set", "finetune.distill=1"], "no dense original"),
        (["--resume"], "no checkpoint to resume from"),
    ],
)
def test_refusals(
    more: list[str], message: str, arguments: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run([*arguments, *more]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error and error.startswith("relufy: ")
    assert not (tmp_path / "model").exists()


def test_an_occupied_folder_is_left_alone(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").write_text("mine")
    assert run(arguments) == 2 and "not empty" in capsys.readouterr().err
