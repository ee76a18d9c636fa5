"""A checkpoint comes back bit for bit, says where it came from, and is never half written."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import families
from relufy.errors import UserError
from relufy.method import Relufication
from relufy.methods.sparsify import sparsify
from relufy.model.checkpoint import load_model, load_tokenizer, save_checkpoint

IDS = torch.tensor([[3, 4, 5, 50, 7], [0, 1, 2, 9, 9]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("name", families.STAGE_2)
def test_round_trip_is_equal_bit_for_bit(name: str, stage: int, dtype: torch.dtype, tmp_path: Path) -> None:
    model = families.family(name, dtype)
    if stage and not (name == "opt" and stage == 1):
        sparsify(model, Relufication(stage=stage))
    save_checkpoint(model, None, tmp_path / "saved")
    loaded = load_model(tmp_path / "saved", dtype)
    assert not loaded.training
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert (loaded.state_dict().keys()) == model.state_dict().keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_the_models_own_dtype_is_saved(dtype: torch.dtype, tmp_path: Path) -> None:
    save_checkpoint(families.family("llama", dtype), None, tmp_path / "saved")
    assert json.loads((tmp_path / "saved/config.json").read_text())["dtype"] == str(dtype).split(".")[1]
    assert load_model(tmp_path / "saved").dtype == torch.float32


def test_stage_1_saved_and_loaded_goes_on_to_stage_2(tmp_path: Path) -> None:
    direct = sparsify(families.family("llama"), "relufy-stage2")
    save_checkpoint(sparsify(families.family("llama"), "relufy-stage1"), None, tmp_path / "one")
    stepwise = sparsify(load_model(tmp_path / "one"), "relufy-stage2")
    assert torch.equal(stepwise(IDS).logits, direct(IDS).logits)
    save_checkpoint(stepwise, None, tmp_path / "two")
    loaded = load_model(tmp_path / "two")
    assert torch.equal(loaded(IDS).logits, direct(IDS).logits)
    with pytest.raises(UserError, match="would become dense"):
        sparsify(loaded, "relufy-stage1")


def test_the_block_tells_recipe_and_origin(bundled: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(bundled), load_tokenizer(bundled)
    save_checkpoint(sparsify(model, "relufy-stage2"), tokenizer, tmp_path / "one", {"data": "none"})
    block = json.loads((tmp_path / "one/config.json").read_text())["activation_sparsity"]
    weights = (bundled / "model.safetensors").read_bytes()
    assert block["recipe"]["name"] == "relufy-stage2"
    assert block["provenance"]["base"] == "llama-prose-3m"
    assert block["provenance"]["base_sha256"] == hashlib.sha256(weights).hexdigest()
    assert block["provenance"]["data"] == "none"
    assert set(block["provenance"]["versions"]) == {"relufy", "torch", "transformers"}
    save_checkpoint(load_model(tmp_path / "one"), None, tmp_path / "two")
    again = json.loads((tmp_path / "two/config.json").read_text())["activation_sparsity"]
    assert again == block


def test_the_name_of_a_hub_folder_is_the_models(bundled: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models--owner--small-model" / "snapshots" / "abc123"
    shutil.copytree(bundled, folder)
    model = sparsify(load_model(folder), "relufy-stage1")
    assert model.config.activation_sparsity["provenance"]["base"] == "owner/small-model@abc123"


def test_tokenizer_files_are_kept(bundled: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(bundled)
    save_checkpoint(load_model(bundled), tokenizer, tmp_path / "saved")
    saved = load_tokenizer(tmp_path / "saved")
    text = 'It was a bright, cold day;  \n"Nay," said Mr. O\'Neil\u2014'
    assert saved(text).input_ids == tokenizer(text).input_ids
    assert (saved.bos_token_id, saved.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert (
        json.loads((tmp_path / "saved/tokenizer.json").read_text())["model"]
        == (json.loads((bundled / "tokenizer.json").read_text())["model"])
    )


def test_a_dense_checkpoint_stays_stock(tmp_path: Path) -> None:
    save_checkpoint(families.family("llama"), None, tmp_path / "saved")
    config = json.loads((tmp_path / "saved/config.json").read_text())
    assert not {"activation_sparsity", "quantization_config"} & set(config)


def test_provenance_of_a_dense_checkpoint_is_kept(tmp_path: Path) -> None:
    save_checkpoint(families.family("llama"), None, tmp_path / "saved", {"finetuned": "3 steps"})
    config = json.loads((tmp_path / "saved/config.json").read_text())
    assert config["activation_sparsity"]["provenance"]["finetuned"] == "3 steps"
    assert "quantization_config" not in config
    assert torch.equal(load_model(tmp_path / "saved")(IDS).logits, families.family("llama")(IDS).logits)


def test_nothing_is_left_of_a_failed_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = families.family("llama")
    write = model.save_pretrained

    def fail_at_the_end(folder: Path, **options) -> None:
        write(folder, **options)
        raise OSError("disk full")

    monkeypatch.setattr(model, "save_pretrained", fail_at_the_end)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(model, None, tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_an_occupied_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        save_checkpoint(families.family("llama"), None, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def cut_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def drop_a_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no_config": (lambda f: (f / "config.json").unlink(), "holds no config.json"),
    "config_cut": (lambda f: (f / "config.json").write_text('{"a"'), "not valid JSON"),
    "config_list": (lambda f: (f / "config.json").write_text("[]"), "not a JSON object"),
    "no_weights": (lambda f: (f / "model.safetensors").unlink(), "lacks the weights file model.safetensors"),
    "weights_cut": (cut_weights, "could not be loaded: .*incomplete"),
    "weights_empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "could not be loaded"),
    "weights_noise": (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 4000), "could not be loaded"),
    "tensor_missing": (drop_a_tensor, "lack 1 tensors of the model, model.norm.weight"),
    "shard_missing": (
        lambda f: (f / "model.safetensors.index.json").write_text(
            '{"weight_map": {"a": "model-1.safetensors"}}'
        ),
        "lacks the weights file model-1.safetensors",
    ),
    "index_damaged": (lambda f: (f / "model.safetensors.index.json").write_text("{"), "is damaged"),
    "wrong_shape": (lambda f: edit_config(f, intermediate_size=44), "could not be loaded"),
    "unknown_family": (lambda f: edit_config(f, model_type="nonsense"), "could not be loaded"),
    "unknown_activation": (lambda f: edit_config(f, hidden_act="nonsense"), "could not be loaded.*nonsense"),
    "quantised": (lambda f: edit_config(f, quantization_config={"quant_method": "awq"}), "is quantised .awq"),
    "block_missing": (lambda f: edit_config(f, activation_sparsity=None), "activation_sparsity"),
    "block_damaged": (lambda f: edit_config(f, activation_sparsity={"sites": 1}), "unknown key 'sites'"),
    "block_of_the_future": (
        lambda f: edit_config(f, activation_sparsity={"version": 2, "sparsifiers": []}),
        "upgrade relufy",
    ),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "stage2"
    return save_checkpoint(sparsify(families.family("llama"), "relufy-stage2"), None, folder)


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_refused_in_one_line(case: str, saved: Path, tmp_path: Path) -> None:
    damage, message = DAMAGE[case]
    folder = tmp_path / "damaged"
    shutil.copytree(saved, folder)
    damage(folder)
    with pytest.raises(UserError, match=message) as refusal:
        load_model(folder)
    assert "\n" not in str(refusal.value)


def test_a_folder_without_a_tokenizer_is_refused(saved: Path) -> None:
    with pytest.raises(UserError, match="has no tokenizer"):
        load_tokenizer(saved)


def test_a_checkpoint_without_the_pointer_is_still_sparse(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "stripped"
    shutil.copytree(saved, folder)
    edit_config(folder, quantization_config=None)
    stripped: PreTrainedModel = load_model(folder)
    assert torch.equal(stripped(IDS).logits, load_model(saved)(IDS).logits)
    assert stripped.config.to_dict()["quantization_config"]["quant_method"] == "relufy"
