"""What was derived from a weight is refused with another one: at save, at load, when packing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tests.engine.configurations import CONFIGS
from tests.methods.written import drawn_windows
from transformers import AutoModelForCausalLM, PreTrainedModel

import families
import relufy
import relufy.hf_plugin
from relufy.activation_sparsity import BLOCK_KEY, ActivationSparsity, Sparsifier
from relufy.errors import UserError
from relufy.fingerprint import SAMPLES, recorded, sampled
from relufy.method import METHODS, RSparse, Wina
from relufy.methods.sparsify import sparsify
from relufy.model.checkpoint import load_model, save_checkpoint
from relufy.model.configuration import sparsity_of
from relufy.model.fingerprints import check_model, fingerprint_of_tensor
from relufy.model.sites import find_sites
from relufy.model.sparsifiers import apply_sparsity

torch.set_num_threads(1)

IDS = torch.tensor([[3, 4, 5, 50, 7], [0, 1, 2, 9, 9]])
WINA = Wina(allocation="uniform")
DOWN = "model.layers.1.mlp.down_proj.weight"


def wina(name: str = "llama") -> PreTrainedModel:
    return sparsify(families.family(name), WINA, drawn_windows()).eval()


def fingerprints(model: PreTrainedModel) -> dict[str, str]:
    return recorded(sparsity_of(model).provenance)


def by_transformers(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder)


def edit(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change a weight on disk, in whichever file it is."""
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            tensors[name] = change(tensors[name]).contiguous()
            save_file(tensors, file, {"format": "pt"})


LOADS = pytest.mark.parametrize("load", [load_model, by_transformers], ids=["relufy", "transformers"])


def test_every_column_of_a_large_matrix_is_sampled() -> None:
    for width in (4096, 1024, 768):
        columns = sampled(4096 * width) % width
        assert len(np.unique(columns)) > 0.98 * min(width, SAMPLES)


def test_the_same_in_float32_and_bfloat16_and_another_for_another_shape() -> None:
    weight = torch.randn(64, 24, generator=torch.Generator().manual_seed(0))
    halves = weight.bfloat16()
    assert fingerprint_of_tensor(weight) == fingerprint_of_tensor(halves)
    assert fingerprint_of_tensor(halves.float()) == fingerprint_of_tensor(halves)
    assert fingerprint_of_tensor(weight) != fingerprint_of_tensor(weight.reshape(24, 64))
    assert fingerprint_of_tensor(halves.half()) == fingerprint_of_tensor(halves)  # nothing lost here


@pytest.mark.parametrize("place", [(0, 0), (-1, -1), (3, 5)])
def test_one_entry_of_a_small_weight_counts(place: tuple[int, int]) -> None:
    weight = torch.randn(24, 24, generator=torch.Generator().manual_seed(0))
    other = weight.clone()
    other[place] *= 1.01
    assert fingerprint_of_tensor(weight) != fingerprint_of_tensor(other)


def test_the_weights_of_every_projection_are_recorded() -> None:
    model = wina()
    projections = {
        p.name for block in find_sites(families.family("llama")) for p in block.projections().values()
    }
    assert fingerprints(model).keys() == {f"{name}.weight" for name in projections}
    dense = dict(families.family("llama").named_parameters())
    assert fingerprints(model) == {name: fingerprint_of_tensor(dense[name]) for name in fingerprints(model)}


def test_only_projections_with_a_branch_are_recorded() -> None:
    model = sparsify(families.family("llama"), RSparse(channels=0.7, search=False), drawn_windows())
    sites = {s.sites for s in sparsity_of(model).sparsifiers if s.correction}
    assert 0 < len(sites) < 7
    assert len(fingerprints(model)) == sum(bool(s.correction) for s in sparsity_of(model).sparsifiers)


@pytest.mark.parametrize(
    "name", sorted(set(METHODS) - {"wina", "rsparse", "relufication", "fatrelu", "auto"})
)
def test_checkpoints_without_derived_tensors_carry_none(name: str) -> None:
    changes: dict[str, Any] = {"teal": {"step": 0.5}, "greedy": {"step": 0.5, "loss_tokens": 300}}.get(
        name, {}
    )
    model = sparsify(families.family("llama"), METHODS[name](**changes), drawn_windows())
    assert "derived_from" not in sparsity_of(model).provenance
    check_model(model)


def test_masks_that_were_taken_off_take_their_fingerprints_along() -> None:
    model = sparsify(wina(), "relufy-stage1")
    assert not fingerprints(model)


def test_calibrating_again_records_the_weights_of_now(tmp_path: Path) -> None:
    model = wina()
    old = sparsity_of(model).provenance
    apply_sparsity(model, ActivationSparsity((Sparsifier(("o",), "topk", k=5),), provenance=old))
    apply_sparsity(model, ActivationSparsity((), provenance=old))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight *= 1.1
    sparsify(model, WINA, drawn_windows())
    assert fingerprints(model)[DOWN] != old["derived_from"][DOWN]
    load_model(save_checkpoint(model, None, tmp_path / "saved"))


@pytest.mark.parametrize(
    ("name", "load"),
    [(name, (load_model, by_transformers)[index % 2]) for index, name in enumerate(families.FAMILIES)],
)
def test_every_family_comes_back_and_is_refused_when_changed(
    name: str, load: Callable, tmp_path: Path
) -> None:
    model = wina(name)
    expected, changed = model(IDS).logits, sorted(fingerprints(model))[-1]
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert torch.equal(loaded(IDS).logits, expected)
    assert fingerprints(loaded) == fingerprints(model)
    check_model(loaded)
    edit(tmp_path, changed, lambda weight: weight + 0.01)
    with pytest.raises(UserError, match=f"{changed} has changed .* calibrate again with `relufy sparsify`"):
        load(tmp_path)


@LOADS
def test_shards_and_bfloat16_are_no_change(load: Callable, tmp_path: Path) -> None:
    model = wina()
    model.to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="5KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert fingerprints(load(tmp_path)) == fingerprints(model)
    edit(tmp_path, DOWN, lambda weight: weight * 1.02)
    with pytest.raises(UserError, match="has changed"):
        load(tmp_path)


def test_a_weight_that_is_not_there_is_refused(tmp_path: Path) -> None:
    wina().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config[BLOCK_KEY]["provenance"]["derived_from"]["model.layers.7.mlp.up_proj.weight"] = "0" * 16
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"lacks model\.layers\.7\.mlp\.up_proj\.weight"):
        load_model(tmp_path)
    with pytest.raises(UserError, match=r"lacks model\.layers\.7\.mlp\.up_proj\.weight"):
        relufy.pack(tmp_path, tmp_path / "packed.relufy")


PACKED = sorted({name.partition("-")[0] for name in CONFIGS})


@pytest.mark.parametrize("name", PACKED)
def test_packing_checks_every_recorded_weight(name: str, tmp_path: Path) -> None:
    first = next(config for config in CONFIGS if config.partition("-")[0] == name)
    model = families.build(CONFIGS[first]())
    sparsify(model, WINA, drawn_windows())
    model.save_pretrained(tmp_path)
    relufy.pack(tmp_path, tmp_path / "packed.relufy", "int8")
    (tmp_path / "packed.relufy").unlink()
    assert fingerprints(model).keys() <= load_file(tmp_path / "model.safetensors").keys()
    for changed in sorted(fingerprints(model))[:: len(fingerprints(model)) - 1]:
        edit(tmp_path, changed, lambda weight: weight * 1.01)
        with pytest.raises(
            UserError, match=f"{changed} has changed .* calibrate again with `relufy sparsify`"
        ):
            relufy.pack(tmp_path, tmp_path / "packed.relufy")
        edit(tmp_path, changed, lambda weight: weight / 1.01)
    assert not (tmp_path / "packed.relufy").exists()


def test_a_checkpoint_without_its_head_packs(tmp_path: Path) -> None:
    """The names of its weights lack their first word."""
    model = families.build(CONFIGS["gpt2"]())
    sparsify(model, WINA, drawn_windows())
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({n.removeprefix("transformer."): t for n, t in tensors.items()}, tmp_path / "model.safetensors")
    relufy.pack(tmp_path, tmp_path / "packed.relufy")


def test_a_step_of_training_is_a_change(tmp_path: Path) -> None:
    model = wina().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    with pytest.raises(UserError, match=r"LlamaForCausalLM: .*proj.weight has changed .*calibrate again"):
        save_checkpoint(model, None, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    model.save_pretrained(tmp_path / "stock")
    with pytest.raises(UserError, match=r"the checkpoint: .*proj.weight has changed"):
        load_model(tmp_path / "stock")


@LOADS
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_a_merged_adapter_is_refused_at_save_and_at_load(name: str, load: Callable, tmp_path: Path) -> None:
    """Of the projections with a mask of their own, an adapter runs nowhere, but it merges."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    merged: Any = get_peft_model(wina(name), config).merge_and_unload()
    with pytest.raises(UserError, match=r"has changed .*merged with an adapter"):
        save_checkpoint(merged, None, tmp_path / "saved")
    merged.save_pretrained(tmp_path / "stock")
    with pytest.raises(UserError, match=r"has changed .*merged with an adapter"):
        load(tmp_path / "stock")


@LOADS
def test_an_adapter_merged_elsewhere_saves(load: Callable, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["embed_tokens"], init_lora_weights=False)
    merged: Any = get_peft_model(wina(), config).merge_and_unload()
    save_checkpoint(merged, None, tmp_path / "saved")
    assert torch.equal(load(tmp_path / "saved")(IDS).logits, merged(IDS).logits)


def test_an_adapter_that_is_not_merged_is_told(tmp_path: Path) -> None:
    model = wina()
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(UserError, match="has adapters of its own; merge or delete them first"):
        save_checkpoint(model, None, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
