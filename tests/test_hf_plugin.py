"""Checkpoints in transformers: with the plug-in an ordinary model, without it equal or loudly refused."""

import copy
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

import families
import relufy.hf_plugin
from relufy.errors import UserError
from relufy.method import Relufication
from relufy.methods.sparsify import sparsify
from relufy.model.checkpoint import save_checkpoint

IDS = torch.tensor([[3, 4, 5, 50, 7], [0, 1, 2, 9, 9]])

STOCK = """
import json, sys
import torch
from transformers import AutoModelForCausalLM

torch.set_num_threads(int(sys.argv[1]))  # as many as here, for the same bits
answers = {}
for folder in sys.argv[2:]:
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        answers[folder] = model(torch.tensor([[3, 4, 5, 50, 7], [0, 1, 2, 9, 9]])).logits.tolist()
    except Exception as error:
        answers[folder] = f"{type(error).__name__}: {error}"
assert "relufy" not in sys.modules
print(json.dumps(answers))
"""

SHIFTED = Relufication(stage=1, shift=0.5)
CASES = {
    (name, label): recipe
    for name in ("llama", "gpt2", "falcon", "gemma2")
    for label, recipe in {"1": Relufication(1), "2": Relufication(2), "shifted": SHIFTED}.items()
} | {("opt", "2"): Relufication(2)}


@pytest.fixture(scope="module")
def in_stock_transformers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Save every case both ways and load all of them in one process that never imports relufy."""
    folder = tmp_path_factory.mktemp("stock")
    for (name, label), recipe in CASES.items():
        model = sparsify(families.family(name), recipe)
        save_checkpoint(model, None, folder / f"{name}-{label}-checkpoint")
        model.save_pretrained(folder / f"{name}-{label}-by_hand")
    paths = sorted(str(path) for path in folder.iterdir())
    command = [sys.executable, "-c", STOCK, str(torch.get_num_threads()), *paths]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return {Path(path).name: answer for path, answer in json.loads(run.stdout.splitlines()[-1]).items()}


@pytest.mark.parametrize("saved", ["checkpoint", "by_hand"])
@pytest.mark.parametrize(("name", "label"), CASES, ids=lambda part: part)
def test_stock_transformers_computes_the_same_or_fails(
    name: str, label: str, saved: str, in_stock_transformers: dict[str, object]
) -> None:
    answer = in_stock_transformers[f"{name}-{label}-{saved}"]
    if label == "1":
        logits = sparsify(families.family(name), CASES[name, label])(IDS).logits
        assert torch.equal(torch.tensor(answer), logits)
    else:
        assert isinstance(answer, str)
        assert answer.startswith("KeyError")
        assert "relufy" in answer


@pytest.fixture(params=["llama", "gpt2"])
def loaded(request: pytest.FixtureRequest, tmp_path: Path) -> PreTrainedModel:
    """Return a stage-2 model as `AutoModelForCausalLM.from_pretrained` gives it with the plug-in."""
    save_checkpoint(sparsify(families.family(request.param), "relufy-stage2"), None, tmp_path / "checkpoint")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint", dtype=torch.float32)


def logits_of(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def test_it_loads_what_was_saved(loaded: PreTrainedModel) -> None:
    name = "llama" if loaded.config.model_type == "llama" else "gpt2"
    assert torch.equal(logits_of(loaded), logits_of(sparsify(families.family(name), "relufy-stage2")))


def test_the_loaded_model_is_an_ordinary_one(loaded: PreTrainedModel) -> None:
    assert not loaded.is_quantized
    assert not hasattr(loaded, "hf_quantizer")
    assert not hasattr(loaded, "quantization_method")
    assert not hasattr(loaded.config, "_is_quantized")
    assert not [name for name, weight in loaded.named_parameters() if not weight.requires_grad]


def test_it_trains_copies_saves_and_reloads(loaded: PreTrainedModel, tmp_path: Path) -> None:
    before = logits_of(loaded)
    rows = Dataset.from_dict({"input_ids": IDS.tolist(), "labels": IDS.tolist()})
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=1,
        learning_rate=0.01,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    Trainer(loaded, arguments, train_dataset=rows).train()
    after = logits_of(loaded)
    assert not torch.equal(before, after)
    assert torch.equal(logits_of(copy.deepcopy(loaded)), after)
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(logits_of(again), after)


def test_it_generates_with_and_without_a_cache(loaded: PreTrainedModel) -> None:
    with_cache, without = (
        loaded.generate(IDS[:1], max_new_tokens=6, do_sample=False, use_cache=use_cache, pad_token_id=0)
        for use_cache in (True, False)
    )
    assert torch.equal(with_cache, without)


def test_lora_merges_saves_and_reloads(loaded: PreTrainedModel, tmp_path: Path) -> None:
    adapted = get_peft_model(loaded, LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert torch.equal(logits_of(again), logits_of(merged))


def test_importing_again_is_harmless(loaded: PreTrainedModel, tmp_path: Path) -> None:
    importlib.reload(relufy.hf_plugin)
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(logits_of(again), logits_of(loaded))


def test_a_pointer_without_a_block_is_refused(loaded: PreTrainedModel, tmp_path: Path) -> None:
    loaded.save_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again/config.json").read_text())
    del config["activation_sparsity"]
    (tmp_path / "again/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="no block 'activation_sparsity'"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "again")
