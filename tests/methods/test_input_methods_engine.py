"""WINA and R-Sparse on the engine: the specification, and transformers with the weights that the file has."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.engine.contract import assert_close, hf_logits, in_steps
from tests.methods.calibrated import VOCAB, calibrated

import relufy
from relufy.engine.naive import NaiveDecoder
from relufy.engine.pack import pack
from relufy.engine.packed_tensors import PackedTensors
from relufy.method import RSparse, Wina
from relufy.model.checkpoint import load_model, save_checkpoint
from relufy.model.configuration import sparsity_of

METHODS = {
    "wina": Wina(allocation="uniform"),
    "wina-topk": Wina(allocation="uniform", select="topk"),
    "rsparse": RSparse(search=False, channels=0.5, sparsity=0.4),
}
TOKENS = np.random.default_rng(5).integers(0, VOCAB, 40).tolist()
BOUND = 0.001
"""Of int8: mean KL, nats."""
CUT = 1e-4
"""Scores nearer to their cut than this may change sides where inputs are rounded to 16 bits."""


def packed(method: str, name: str, dtype: str, tmp_path: Path) -> tuple[Path, Path]:
    model = calibrated(name, METHODS[method])
    has_branches = any(s.correction for s in sparsity_of(model).sparsifiers)
    assert has_branches == (method == "rsparse")
    save_checkpoint(model, None, tmp_path / "model")
    return tmp_path / "model", pack(tmp_path / "model", tmp_path / "m.relufy", dtype)


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "opt"])
@pytest.mark.parametrize("method", METHODS)
def test_equals_the_specification_and_transformers(method: str, name: str, tmp_path: Path) -> None:
    folder, path = packed(method, name, "f32", tmp_path)
    specified = NaiveDecoder(path).run(TOKENS)
    found = in_steps(relufy.Engine(path), TOKENS, 1)
    assert assert_close(found, specified.logits, specified.margins) > 5
    assert assert_close(found, hf_logits(folder, TOKENS), specified.margins) > 5
    assert np.array_equal(in_steps(relufy.Engine(path, skip=False), TOKENS, 1), found)


@pytest.mark.parametrize("method", METHODS)
def test_int8_stays_close_to_the_weights_that_it_stores(method: str, tmp_path: Path) -> None:
    folder, path = packed(method, "llama", "int8", tmp_path)
    expected = stored_logits(folder, path).log_softmax(-1)
    logits = in_steps(relufy.Engine(path, kv_dtype="f32"), TOKENS, 1)
    found = torch.tensor(logits, dtype=torch.float64).log_softmax(-1)
    margins = NaiveDecoder(path).run(TOKENS).margins
    certain = int(np.flatnonzero(np.append(margins, 0) < CUT)[0])
    assert certain >= 4
    divergence = (expected.exp() * (expected - found)).sum(-1)[:certain].mean()
    assert abs(divergence) < BOUND


def stored_logits(folder: Path, path: Path) -> torch.Tensor:
    """Return the logits of a checkpoint with every matrix replaced by what the packed file holds."""
    model, tensors = load_model(folder), PackedTensors(path)
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.tensor(tensors.matrix("embedding").weight()))
        model.lm_head.weight.copy_(torch.tensor(tensors.matrix("head").weight()))
        for module_name, module in model.named_modules():
            if (last := module_name.rpartition(".")[2]) in names:
                prefix = f"layers.{module_name.split('.')[2]}.{last.removesuffix('_proj')}"
                module.weight.copy_(torch.tensor(tensors.matrix(prefix).weight()))
                for factor, tensor in module.named_buffers():
                    if "low_rank" in factor:
                        stored = tensors.matrix(f"{prefix}.{factor.rpartition('.')[2]}")
                        tensor.copy_(torch.tensor(stored.weight()))
    with torch.inference_mode():
        return model(input_ids=torch.tensor([TOKENS])).logits[0].double()
