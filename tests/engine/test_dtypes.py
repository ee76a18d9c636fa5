"""Contract (b): narrow types against transformers in float32 with the weights that the file stands for."""

import numpy as np
import pytest
import torch
from tests.engine.contract import in_steps, tokens_of

import relufy
from relufy.engine.pack import pack
from relufy.engine.packed_tensors import PackedTensors

BOUNDS = {"bf16": 0.001, "int8": 0.001, "int4": 0.003}
"""Of mean KL in nats, and of the relative change in perplexity."""
MODULES = {
    **{name: f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")},
    **{name: f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}


def dequantised_logits(folder, path, tokens: list[int]) -> torch.Tensor:
    """Return the logits of the checkpoint with every matrix replaced by what the packed file holds."""
    model, tensors = relufy.load_model(folder), PackedTensors(path)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.tensor(tensors.matrix("embedding").weight()))
        for index, layer in enumerate(model.model.layers):
            for name, module in MODULES.items():
                weight = torch.tensor(tensors.matrix(f"layers.{index}.{name}").weight())
                layer.get_submodule(module).weight.copy_(weight)
    with torch.inference_mode():
        return model(input_ids=torch.tensor([tokens])).logits[0].double()


@pytest.mark.parametrize("recipe", ["dense", "stage1", "stage2"])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_the_bundled_model_stays_close(dtype, recipe, bundled, sparsified, tmp_path):
    folder = sparsified(bundled, recipe)
    path, tokens = pack(folder, tmp_path / "m", dtype), tokens_of(4096, 200)
    expected = dequantised_logits(folder, path, tokens).log_softmax(-1)
    logits = in_steps(relufy.Engine(path), tokens, 1)  # with its default KV cache, of 16 bits
    found = torch.tensor(logits, dtype=torch.float64).log_softmax(-1)
    divergence = (expected.exp() * (expected - found)).sum(-1).mean()
    assert 0 < divergence < BOUNDS[dtype]
    likelihoods = [p[:-1].gather(1, torch.tensor(tokens[1:])[:, None]).mean() for p in (expected, found)]
    assert abs(np.expm1(float(likelihoods[0] - likelihoods[1]))) < BOUNDS[dtype]
