"""CATS, CHESS, SCAP and FATReLU on the engine, under its contract; with adapters; written with."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.engine.configurations import CONFIGS
from tests.engine.contract import (
    all_at_once,
    assert_close,
    bits,
    hf_logits,
    in_steps,
    tokens_of,
)
from tests.engine.test_dtypes import dequantised_logits
from tests.methods.written import bundled_model, drawn_windows, written_windows
from transformers import PreTrainedModel

import families
import relufy
from relufy.engine.naive import NaiveDecoder
from relufy.engine.pack import pack
from relufy.errors import UserError
from relufy.method import Cats, Chess, FatRelu, Relufication, Scap, Selecting
from relufy.methods.sparsify import sparsify
from relufy.model.checkpoint import load_model, save_checkpoint

METHODS: dict[str, Selecting] = {
    "cats": Cats(),
    "chess": Chess(),
    "scap": Scap(centre="median"),
    "fatrelu": FatRelu(sparsity=0.8),
}
IDS = torch.tensor([[3, 4, 5, 50, 7], [0, 1, 2, 9, 9]])


def made_sparse(model: PreTrainedModel, name: str, windows: np.ndarray) -> PreTrainedModel:
    if name == "fatrelu":
        sparsify(model, Relufication())
    return sparsify(model, METHODS[name], windows)


@pytest.fixture(scope="session")
def bundled_by(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that saves the bundled model made sparse by a method, once."""
    folders: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name) / "saved"
            model = made_sparse(bundled_model(), name, written_windows()[0])
            save_checkpoint(model, None, folders[name])
        return folders[name]

    return make


@pytest.mark.parametrize("name", METHODS)
def test_the_engine_agrees(name: str, bundled_by: Callable[[str], Path], tmp_path: Path) -> None:
    """Of each text until a score comes too near to its threshold, as the contract has it."""
    folder, compared = bundled_by(name), 0
    path = pack(folder, tmp_path / "m")
    naive, engine = NaiveDecoder(path), relufy.Engine(path, threads=2)
    reading = relufy.Engine(path, skip=False)
    for tokens in written_windows()[1][:8, 1:9].tolist():
        expected = naive.run(tokens)
        found = in_steps(engine, tokens, 1)
        compared += assert_close(hf_logits(folder, tokens), expected.logits, expected.margins)
        compared += assert_close(found, expected.logits, expected.margins)
        assert bits(found) == bits(all_at_once(engine, tokens)) == bits(all_at_once(reading, tokens))
    assert compared > 25


@pytest.mark.parametrize("name", METHODS)
def test_the_engine_stays_close_in_int8(name: str, bundled_by: Callable[[str], Path], tmp_path: Path) -> None:
    """Rounding moves scores over their thresholds; that changes little beside what the masks change."""
    folder, tokens = bundled_by(name), written_windows()[1][0, :100].tolist()
    path = pack(folder, tmp_path / "m", "int8")
    expected = dequantised_logits(folder, path, tokens).log_softmax(-1)
    found = torch.tensor(in_steps(relufy.Engine(path), tokens, 1), dtype=torch.float64).log_softmax(-1)
    dense = bundled_model()(torch.tensor([tokens])).logits[0].detach().double().log_softmax(-1)

    def divergence(other: torch.Tensor) -> float:
        return (expected.exp() * (expected - other)).sum(-1).mean().item()

    assert 0 < divergence(found) < 0.05 * divergence(dense)


@pytest.mark.parametrize("family", ["phi3", "gpt2", "falcon", "gemma2"])
def test_the_engine_agrees_on_other_families(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = families.build(CONFIGS[family]())
    method = Chess() if family in ("phi3", "gemma2") else Scap(centre="mode")
    sparsify(model, method, drawn_windows(model.config.vocab_size))
    save_checkpoint(model, None, tmp_path / "saved")
    path, tokens = pack(tmp_path / "saved", tmp_path / "m"), tokens_of(model.config.vocab_size, 30)
    naive = NaiveDecoder(path).run(tokens)
    assert assert_close(hf_logits(tmp_path / "saved", tokens), naive.logits, naive.margins) > 3
    assert assert_close(all_at_once(relufy.Engine(path), tokens), naive.logits, naive.margins) > 3


ADAPTED = [
    ("cats", ["gate_proj", "up_proj", "down_proj", "q_proj"]),
    ("chess", ["gate_proj", "up_proj", "down_proj", "v_proj"]),
    ("scap", ["gate_proj", "up_proj", "q_proj"]),
    ("fatrelu", ["gate_proj", "up_proj", "down_proj", "o_proj"]),
]


@pytest.mark.parametrize(("name", "targets"), ADAPTED, ids=[name for name, _ in ADAPTED])
def test_a_merged_adapter_equals_an_unmerged_one(name: str, targets: list[str]) -> None:
    model = made_sparse(families.family("llama").double(), name, drawn_windows())
    adapted = get_peft_model(model, LoraConfig(target_modules=targets, r=2, init_lora_weights=False))
    with torch.no_grad():
        unmerged = adapted(IDS).logits
        merged = adapted.merge_and_unload()(IDS).logits
    torch.testing.assert_close(merged, unmerged)


@pytest.mark.parametrize(
    ("name", "target"), [("chess", "q_proj"), ("chess", "o_proj"), ("scap", "down_proj")]
)
def test_an_adapter_around_a_mask_is_refused(name: str, target: str) -> None:
    model = made_sparse(families.family("llama"), name, drawn_windows())
    with pytest.raises(UserError, match=rf"{target} has a sparsifier of its own"):
        get_peft_model(model, LoraConfig(target_modules=[target], r=2))(IDS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", METHODS)
def test_it_comes_back_bit_for_bit_and_writes(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = made_sparse(families.family("llama", dtype), name, drawn_windows())
    save_checkpoint(model, None, tmp_path / "saved")
    loaded = load_model(tmp_path / "saved", dtype)
    for batch in (1, 2):
        assert torch.equal(loaded(IDS[:batch]).logits, model(IDS[:batch]).logits)
    written = loaded.generate(IDS[:1], max_new_tokens=5, do_sample=False)
    assert torch.equal(written, model.generate(IDS[:1], max_new_tokens=5, do_sample=False))
