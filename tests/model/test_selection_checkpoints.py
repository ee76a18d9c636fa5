"""Sparsifiers and their tensors come back bit for bit, in relufy and in transformers, or not at all."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import families
import relufy.hf_plugin  # noqa: F401
from relufy.activation_sparsity import ActivationSparsity, Sparsifier
from relufy.errors import UserError
from relufy.model.checkpoint import load_model, save_checkpoint
from relufy.model.configuration import sparsity_of
from relufy.model.sites import find_sites
from relufy.model.sparsifiers import apply_sparsity, sparsity_tensors

IDS = torch.tensor([[3, 4, 5, 50, 7], [0, 1, 2, 9, 9]])

NEURON = ("neuron",)
CASES: dict[str, tuple[str, list[Sparsifier], str]] = {
    "helu": ("llama", [Sparsifier(NEURON, "helu")], "relu"),
    "fatrelu": ("llama", [Sparsifier(NEURON, "fatrelu", threshold=0.2)], "relufy"),
    "drelu": ("llama", [Sparsifier(NEURON, "drelu")], "relufy"),
    "statistical_topk": (
        "gemma2",
        [Sparsifier(NEURON, "statistical_topk", sparsity=0.8, layers=(0,))],
        "relufy",
    ),
    "cats": ("llama", [Sparsifier(NEURON, "threshold", threshold=0.3)], "silu"),
    "chess": ("llama", [Sparsifier(NEURON, "threshold", per_channel=("threshold",))], "silu"),
    "teal": (
        "llama",
        [Sparsifier((s,), "threshold", threshold=0.4) for s in ("q", "k", "v", "o", "down")],
        "silu",
    ),
    "weights": ("opt", [Sparsifier(("q", "k", "v"), "topk", k=9, per_channel=("weight",))], "gelu"),
    "plain_up": (
        "opt",
        [Sparsifier(("up",), "threshold", per_channel=("threshold",), phase="decode")],
        "gelu",
    ),
    "fused": ("gpt2", [Sparsifier(("q", "k", "v"), "topk", k=9, per_channel=("weight",))], "gelu_new"),
    "centre": ("llama", [Sparsifier(("q", "k", "v", "o"), "topk", k=9, per_channel=("centre",))], "relufy"),
    "low_rank": (
        "llama",
        [Sparsifier(("q", "down"), "threshold", per_channel=("threshold", "weight"), correction="low_rank")],
        "silu",
    ),
    "relufied_and_selecting": (
        "llama",
        [Sparsifier(NEURON, "relu"), Sparsifier(("o",), "topk", k=5, dense_first_tokens=2)],
        "relu",
    ),
    "relu_and_selection_by_layer": (
        "llama",
        [Sparsifier(NEURON, "relu", layers=(0,)), Sparsifier(NEURON, "topk", k=7, layers=(1,))],
        "relufy",
    ),
}


def dense(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    if name == "opt":
        return families.build(families._opt(activation_function="gelu"), dtype=dtype)
    return families.family(name, dtype)


def sparse(case: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    name, sparsifiers, _ = CASES[case]
    model, sparsity = dense(name, dtype), ActivationSparsity(tuple(sparsifiers))
    generator = torch.Generator().manual_seed(2)
    shapes = sparsity_tensors(find_sites(model), sparsity)
    tensors = {n: torch.rand([size or 3 for size in s], generator=generator) for n, s in shapes.items()}
    return apply_sparsity(model, sparsity, tensors)


def by_transformers(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


@pytest.mark.parametrize("load", [load_model, by_transformers], ids=["relufy", "transformers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_round_trip_is_equal_bit_for_bit(
    case: str, dtype: torch.dtype, load: Callable, tmp_path: Path
) -> None:
    model = sparse(case, dtype)
    assert not torch.equal(model(IDS[:, :1]).logits, dense(CASES[case][0], dtype)(IDS[:, :1]).logits) or (
        case == "relufied_and_selecting"
    )
    save_checkpoint(model, None, tmp_path / "saved")
    loaded = load(tmp_path / "saved", dtype)
    for ids in (IDS, IDS[:, :1]):
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert sparsity_of(loaded).sparsifiers == sparsity_of(model).sparsifiers
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
        assert loaded.state_dict()[name].dtype == tensor.dtype
    loaded.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again", dtype)
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("case", CASES)
def test_the_activation_has_a_stock_name_only_where_the_weights_are_stock(case: str) -> None:
    *_, expected = CASES[case]
    model = sparse(case)
    config = model.config.to_dict()
    found = [config.get(k) for k in ("hidden_act", "hidden_activation", "activation_function")]
    assert expected in found
    assert ("relufy" in found) == (expected == "relufy")


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("chess", "model.layers.0.mlp.act_fn.threshold"),
        ("weights", "model.decoder.layers.0.self_attn_layer_norm.sparsifier.weight"),
        ("plain_up", "model.decoder.layers.0.final_layer_norm.sparsifier.threshold"),
        ("centre", "model.layers.1.input_layernorm.sparsifier.centre"),
        ("centre", "model.layers.1.self_attn.o_proj.sparsifier.centre"),
        ("low_rank", "model.layers.0.self_attn.q_proj.sparsifier.low_rank_in"),
        ("low_rank", "model.layers.0.mlp.down_proj.sparsifier.low_rank_out"),
    ],
)
def test_tensors_have_their_names_in_the_checkpoint(case: str, name: str, tmp_path: Path) -> None:
    save_checkpoint(sparse(case), None, tmp_path / "saved")
    assert name in load_file(tmp_path / "saved/model.safetensors")


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


NAME = "model.layers.0.mlp.act_fn.threshold"
DAMAGE = {
    "missing": (lambda tensors: tensors.pop(NAME), f"need 1 tensors more, {NAME}"),
    "shape": (lambda tensors: tensors.update({NAME: torch.ones(42)}), r"\[43\], is torch.float32 \[42\]"),
    "nan": (lambda tensors: tensors[NAME].fill_(torch.nan), "no numbers"),
}


@pytest.mark.parametrize("load", [load_model, by_transformers], ids=["relufy", "transformers"])
@pytest.mark.parametrize("case", DAMAGE)
def test_a_missing_or_damaged_tensor_is_refused(case: str, load: Callable, tmp_path: Path) -> None:
    edit, message = DAMAGE[case]
    save_checkpoint(sparse("chess"), None, tmp_path / "saved")
    edit_weights(tmp_path / "saved", edit)
    with pytest.raises(UserError, match=message):
        load(tmp_path / "saved", torch.float32)


def test_tensors_of_a_sharded_checkpoint_are_found(tmp_path: Path) -> None:
    model = sparse("low_rank")
    model.save_pretrained(tmp_path, max_shard_size="5KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(load_model(tmp_path)(IDS).logits, model(IDS).logits)


def test_tensors_survive_a_stripped_pointer(tmp_path: Path) -> None:
    model = sparse("chess")
    save_checkpoint(model, None, tmp_path / "saved")
    config = json.loads((tmp_path / "saved/config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "saved/config.json").write_text(json.dumps(config))
    assert torch.equal(load_model(tmp_path / "saved")(IDS).logits, model(IDS).logits)


def test_a_block_that_lacks_the_needed_activation_is_refused(tmp_path: Path) -> None:
    save_checkpoint(sparse("statistical_topk"), None, tmp_path / "saved")
    config = json.loads((tmp_path / "saved/config.json").read_text())
    del config["activation_sparsity"]["activation"]
    (tmp_path / "saved/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="own activation"):
        load_model(tmp_path / "saved")


def test_a_fatrelu_model_of_others_is_loaded(tmp_path: Path) -> None:
    families.family("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"hidden_act": "fatrelu", "hidden_act_param": 0.2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(load_model(tmp_path)(IDS).logits, sparse("fatrelu")(IDS).logits)


def test_tensors_stay_where_another_site_is_added() -> None:
    model = sparse("chess")
    o = Sparsifier(("o",), "topk", k=5)
    before = dict(model.state_dict())
    apply_sparsity(model, ActivationSparsity((CASES["chess"][1][0], o)))
    assert torch.equal(model.state_dict()[NAME], before[NAME])


def test_lora_beside_a_mask_merges_and_around_it_is_refused() -> None:
    model = sparse("teal")
    around = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2))
    with pytest.raises(UserError, match=r"self_attn.q_proj has a sparsifier of its own, which the Linear"):
        around(IDS)
    model = around.unload()
    beside = get_peft_model(model, LoraConfig(target_modules=["up_proj"], r=2, init_lora_weights=False))
    with torch.no_grad():
        logits = beside(IDS).logits
        merged = beside.merge_and_unload()
        torch.testing.assert_close(merged(IDS).logits, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["chess", "centre", "drelu"])
def test_lora_sees_shared_masks_and_not_the_rectified_up(case: str) -> None:
    model = sparse(case)
    target = {
        "chess": ["gate_proj", "up_proj", "down_proj"],
        "centre": ["q_proj", "v_proj"],
        "drelu": ["up_proj"],
    }
    config = LoraConfig(target_modules=target[case], r=2, init_lora_weights=False)
    adapted = get_peft_model(model, config)
    if case == "drelu":
        with pytest.raises(UserError, match=r"mlp.up_proj has a sparsifier"):
            adapted(IDS)
        return
    with torch.no_grad():
        logits = adapted(IDS).logits
        torch.testing.assert_close(adapted.merge_and_unload()(IDS).logits, logits, rtol=1e-3, atol=1e-3)
