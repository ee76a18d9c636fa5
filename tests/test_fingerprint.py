"""A checkpoint whose tensors were derived from other weights is refused: loaded, saved, packed, trained."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tests.methods.calibrated import IDS, calibrated, text
from transformers import AutoModelForCausalLM, PreTrainedModel

import relufy
from relufy.errors import UserError
from relufy.fingerprint import SAMPLES, fingerprint, sampled
from relufy.method import RSparse, Teal, Wina
from relufy.model.checkpoint import load_model, save_checkpoint
from relufy.model.configuration import sparsity_of
from relufy.model.fingerprints import fingerprint_of_tensor
from relufy.recipe import Finetune
from relufy.train.finetune import finetune

WINA = Wina(allocation="uniform")
METHODS = {"wina": WINA, "rsparse": RSparse(search=False, channels=0.5, sparsity=0.4)}
CHANGED = "has changed since sparsifiers' tensors were derived from it.*calibrate again"


@pytest.mark.parametrize("shape", [(3, 5), (1,), (700, 301), (SAMPLES + 1,)])
def test_numpy_and_torch_agree_and_a_cast_to_bfloat16_changes_nothing(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = fingerprint(weight.numpy())
    assert fingerprint_of_tensor(weight) == fingerprint_of_tensor(weight.bfloat16()) == expected
    assert fingerprint_of_tensor(weight.reshape(-1, 1)) != expected
    changed = weight.clone()
    changed.view(-1)[-1] += 1
    assert fingerprint(changed.numpy()) != expected


@pytest.mark.parametrize("size", [1, 2, SAMPLES - 1, SAMPLES, SAMPLES + 1, 4096 * 4096])
def test_samples_reach_from_end_to_end(size: int) -> None:
    places = sampled(size)
    assert len(places) == min(size, SAMPLES)
    assert (places[0], places[-1]) == (0, size - 1)
    assert (np.diff(places) > 0).all()


def saved(method: str, folder: Path, name: str = "llama") -> PreTrainedModel:
    model = calibrated(name, METHODS[method])
    save_checkpoint(model, None, folder)
    return model


def change(folder: Path, part: str) -> None:
    """Change the first weight whose name ends so by a little, in the file."""
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in sorted(tensors) if name.endswith(part))
    tensors[name] = tensors[name] * 1.01
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("method", METHODS)
def test_another_weight_is_refused_when_loaded_and_when_packed(method: str, tmp_path: Path) -> None:
    saved(method, tmp_path / "model")
    change(tmp_path / "model", "up_proj.weight")
    with pytest.raises(UserError, match=f"model.layers.0.mlp.up_proj.weight {CHANGED}"):
        load_model(tmp_path / "model")
    with pytest.raises(UserError, match=CHANGED):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=CHANGED):
        relufy.pack(tmp_path / "model", tmp_path / "m.relufy")
    assert not (tmp_path / "m.relufy").exists()


def test_weights_that_nothing_was_derived_from_may_change(tmp_path: Path) -> None:
    saved("wina", tmp_path / "model")
    change(tmp_path / "model", "embed_tokens.weight")
    load_model(tmp_path / "model")


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_saved_by_transformers_in_bfloat16_it_loads_in_any_type(name: str, tmp_path: Path) -> None:
    model = saved("wina", tmp_path / "model", name)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    loaded.save_pretrained(tmp_path / "bf16")
    assert sparsity_of(loaded).provenance["derived_from"] == sparsity_of(model).provenance["derived_from"]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        load_model(tmp_path / "bf16", dtype)


def test_a_fused_transposed_weight_packs(tmp_path: Path) -> None:
    saved("wina", tmp_path / "model", "gpt2")
    relufy.pack(tmp_path / "model", tmp_path / "m.relufy", "int8")
    change(tmp_path / "model", "c_attn.weight")
    with pytest.raises(UserError, match=f"transformer.h.0.attn.c_attn.weight {CHANGED}"):
        relufy.pack(tmp_path / "model", tmp_path / "m.relufy")


@pytest.mark.parametrize("method", METHODS)
def test_training_is_refused(method: str) -> None:
    model = calibrated("llama", METHODS[method])
    with pytest.raises(UserError, match="fine-tune the model first, then make it sparse"):
        finetune(model, Finetune(steps=1, batch_size=2, window=48), text())


def test_a_model_without_derived_tensors_trains() -> None:
    model = calibrated("llama", Teal(allocation="uniform"))
    assert "derived_from" not in sparsity_of(model).provenance
    finetune(model, Finetune(steps=1, batch_size=2, window=48), text())


def test_a_changed_model_is_not_saved(tmp_path: Path) -> None:
    model = calibrated("llama", WINA)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.mul_(1.1)
    with pytest.raises(UserError, match=f"model.layers.1.self_attn.o_proj.weight {CHANGED}"):
        save_checkpoint(model, None, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_adapters_of_projections_with_masks_of_their_own_are_refused() -> None:
    adapted = get_peft_model(calibrated("llama", WINA), LoraConfig(target_modules=["q_proj"], r=2))
    with pytest.raises(UserError, match="has a sparsifier of its own"):
        adapted(IDS)


def test_merging_where_readers_share_the_mask_changes_nothing_but_is_not_saved(tmp_path: Path) -> None:
    model = calibrated("gpt2", WINA)
    adapted = get_peft_model(model, LoraConfig(target_modules=["c_attn"], r=2, fan_in_fan_out=True))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    before = adapted.eval()(IDS).logits
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, before, rtol=1e-3, atol=1e-3)
    with pytest.raises(UserError, match=CHANGED):
        save_checkpoint(merged, None, tmp_path / "saved")


def test_info_counts_them(tmp_path: Path) -> None:
    saved("wina", tmp_path / "model")
    assert relufy.info(tmp_path / "model")["provenance"]["derived_from"] == "14 weights"


def test_a_damaged_record_is_refused(tmp_path: Path) -> None:
    saved("wina", tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    config["activation_sparsity"]["provenance"]["derived_from"] = ["q"]
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match="should map weights to fingerprints"):
        load_model(tmp_path / "model")


def test_a_record_of_a_weight_that_is_not_there_is_refused(tmp_path: Path) -> None:
    saved("wina", tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    config["activation_sparsity"]["provenance"]["derived_from"]["nowhere.weight"] = "0" * 16
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"lacks nowhere\.weight"):
        load_model(tmp_path / "model")


def test_families_have_one_name_for_a_weight_in_torch_and_in_the_engine(tmp_path: Path) -> None:
    """A record that pack would not look up is a check that never happens."""
    for name in ("llama", "gpt2", "phi3", "opt", "falcon"):
        folder = tmp_path / name
        save_checkpoint(calibrated(name, WINA), None, folder)
        relufy.pack(folder, tmp_path / f"{name}.relufy")
        change(folder, _last(folder))
        with pytest.raises(UserError, match=CHANGED):
            relufy.pack(folder, tmp_path / f"{name}.relufy")


def _last(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    return list(config["activation_sparsity"]["provenance"]["derived_from"])[-1]


def test_an_adapter_of_such_a_weight_is_not_packed(tmp_path: Path) -> None:
    saved("wina", tmp_path / "model")
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(load_model(tmp_path / "model"), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match=f"q_proj.weight {CHANGED}"):
        relufy.pack(tmp_path / "model", tmp_path / "m.relufy", lora=tmp_path / "adapter")
