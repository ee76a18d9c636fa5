"""Every dense decoder of transformers within reach: its sites cover the blocks' linear weights, each once."""

from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import nn
from transformers import PreTrainedModel

import families
from relufy.activation_sparsity import ActivationSparsity, Sparsifier
from relufy.model.checkpoint import load_model, save_checkpoint
from relufy.model.sites import find_sites
from relufy.model.sparsifiers import apply_sparsity
from relufy.model.structure import BlockSites

SEPARATE, FUSED_QKV = "q k v o gate up down", "q+k+v o gate+up down"
PLAIN, PLAIN_FUSED = "q k v o up down", "q+k+v o up down"
LLAMA_NORMS = ("input_layernorm", "post_attention_layernorm")
NO_NORMS = (None, None)

EXPECTED: dict[str, tuple[str, tuple[str | None, str | None]]] = {
    "llama": (SEPARATE, LLAMA_NORMS),
    "mistral": (SEPARATE, LLAMA_NORMS),
    "qwen2": (SEPARATE, LLAMA_NORMS),
    "qwen3": (SEPARATE, LLAMA_NORMS),
    "gemma": (SEPARATE, LLAMA_NORMS),
    "gemma2": (SEPARATE, ("input_layernorm", "pre_feedforward_layernorm")),
    "gemma3": (SEPARATE, ("input_layernorm", "pre_feedforward_layernorm")),
    "granite": (SEPARATE, LLAMA_NORMS),
    "smollm3": (SEPARATE, LLAMA_NORMS),
    "olmo2": (SEPARATE, NO_NORMS),
    "cohere": (SEPARATE, ("input_layernorm", "input_layernorm")),
    "stablelm": (SEPARATE, LLAMA_NORMS),
    "phi3": (FUSED_QKV, LLAMA_NORMS),
    "nemotron": (PLAIN, LLAMA_NORMS),
    "phi": (PLAIN, ("input_layernorm", "input_layernorm")),
    "starcoder2": (PLAIN, LLAMA_NORMS),
    "gpt_neox": (PLAIN_FUSED, LLAMA_NORMS),
    "gptj": (PLAIN, ("ln_1", "ln_1")),
    "gpt2": (PLAIN_FUSED, ("ln_1", "ln_2")),
    "opt": (PLAIN, ("self_attn_layer_norm", "final_layer_norm")),
    "opt_post_norm": (PLAIN, NO_NORMS),
    "falcon": (PLAIN_FUSED, ("input_layernorm", "input_layernorm")),
    "falcon_new": (PLAIN_FUSED, ("ln_attn", "ln_mlp")),
    "bloom": (PLAIN_FUSED, LLAMA_NORMS),
    "apertus": (PLAIN, ("attention_layernorm", "feedforward_layernorm")),
    "arcee": (PLAIN, LLAMA_NORMS),
    "biogpt": (PLAIN, ("self_attn_layer_norm", "final_layer_norm")),
    "bitnet": (SEPARATE, LLAMA_NORMS),
    "codegen": (PLAIN_FUSED, ("ln_1", "ln_1")),
    "cohere2": (SEPARATE, ("input_layernorm", "input_layernorm")),
    "cpmant": (SEPARATE, ("self_att.layernorm_before_attention", "ffn.layernorm_before_ffn")),
    "ctrl": (PLAIN, ("layernorm1", "layernorm2")),
    "cwm": (SEPARATE, LLAMA_NORMS),
    "diffllama": (SEPARATE, LLAMA_NORMS),
    "emu3": (SEPARATE, LLAMA_NORMS),
    "ernie4_5": (SEPARATE, LLAMA_NORMS),
    "exaone4": (SEPARATE, NO_NORMS),
    "flint": (SEPARATE, LLAMA_NORMS),
    "gemma4_text": (SEPARATE, ("input_layernorm", "pre_feedforward_layernorm")),
    "glm": ("q k v o gate+up down", LLAMA_NORMS),
    "glm4": ("q k v o gate+up down", LLAMA_NORMS),
    "gpt_bigcode": (PLAIN_FUSED, ("ln_1", "ln_2")),
    "gpt_neo": (PLAIN, ("ln_1", "ln_2")),
    "gpt_neox_japanese": (PLAIN_FUSED, LLAMA_NORMS),
    "granite_swa": (SEPARATE, LLAMA_NORMS),
    "helium": (SEPARATE, LLAMA_NORMS),
    "hunyuan_v1_dense": (SEPARATE, LLAMA_NORMS),
    "hyperclovax": (SEPARATE, LLAMA_NORMS),
    "jais2": (PLAIN, LLAMA_NORMS),
    "ministral": (SEPARATE, LLAMA_NORMS),
    "ministral3": (SEPARATE, LLAMA_NORMS),
    "modernbert_decoder": ("q k v o gate+up down", ("attn_norm", "mlp_norm")),
    "mpt": (PLAIN_FUSED, ("norm_1", "norm_2")),
    "nanochat": (PLAIN, LLAMA_NORMS),
    "olmo": (SEPARATE, LLAMA_NORMS),
    "olmo3": (SEPARATE, NO_NORMS),
    "openai_gpt": (PLAIN_FUSED, NO_NORMS),
    "persimmon": (PLAIN_FUSED, LLAMA_NORMS),
    "seed_oss": (SEPARATE, LLAMA_NORMS),
    "vaultgemma": (SEPARATE, ("input_layernorm", "pre_feedforward_layernorm")),
    "xglm": (PLAIN, ("self_attn_layer_norm", "final_layer_norm")),
}
"""The sites, `+` between those of one projection, and the norms that feed attention and MLP."""

ALL = families.FAMILIES | families.MORE_FAMILIES


def empty_model(name: str) -> PreTrainedModel:
    with torch.device("meta"):
        return hf.AutoModelForCausalLM.from_config(ALL[name]()).eval()


NATIVELY_SPARSE = ("arcee", "bitnet", "jais2", "nanochat", "persimmon")
"""Their activation's zeros stay, so a recipe has to name them too."""


def described(block: BlockSites) -> tuple[str, tuple[str | None, ...]]:
    norms = tuple(
        norm and norm.name.removeprefix(f"{block.name}.") for norm in (block.attention_norm, block.mlp_norm)
    )
    return " ".join("+".join(group) for group in block.groups()), norms


def test_as_many_families_as_promised() -> None:
    classes = {type(empty_model(name)).__name__ for name in ALL}
    assert set(EXPECTED) == set(ALL)
    assert len(classes) >= 55


@pytest.mark.parametrize("name", ALL)
def test_sites_fused_shapes_and_norms_are_found(name: str) -> None:
    model = empty_model(name)
    blocks = find_sites(model)
    assert [block.index for block in blocks] == [0, 1]
    assert described(blocks[1]) == EXPECTED[name]
    groups, (attention_norm, mlp_norm) = EXPECTED[name]
    begins_with_no_norm = name == "modernbert_decoder"  # its embeddings end with one
    assert described(blocks[0]) == (groups, (None if begins_with_no_norm else attention_norm, mlp_norm))
    for block in blocks:
        assert all(model.get_submodule(p.name) is p.module for p in block.projections().values())
        assert model.get_submodule(block.activation.name) is block.activation.module


@pytest.mark.parametrize("name", ALL)
def test_every_weight_of_a_block_is_a_site_a_norm_or_a_vector(name: str) -> None:
    model = empty_model(name)
    for block in find_sites(model):
        served = {block.projections()[group[0]].name for group in block.groups()}
        module = model.get_submodule(block.name)
        weights = {f"{block.name}.{n}": w for n, w in module.named_parameters()}
        owners = Counter(n.rpartition(".")[0] for n, weight in weights.items() if weight.ndim >= 2)
        assert owners == Counter(served), "each projection has one matrix, and there are no others"
        shapes = [block.projections()[group[0]].shape for group in block.groups()]
        vectors = sum(weight.numel() for weight in weights.values() if weight.ndim < 2)
        assert sum(rows * columns for rows, columns in shapes) + vectors == sum(
            w.numel() for w in weights.values()
        )


@pytest.mark.parametrize("name", families.MORE_FAMILIES)
def test_norms_and_projections_are_where_the_numbers_flow(name: str) -> None:
    """Run real weights: the readers of a norm get its output, a projection has the widths that it claims."""
    model = families.build(ALL[name]())
    blocks = find_sites(model)
    inputs: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}

    def note(key: str, module: nn.Module) -> None:
        def hook(_module: nn.Module, args: tuple, output: torch.Tensor) -> None:
            inputs[key], outputs[key] = args[0], output

        module.register_forward_hook(hook)

    for block in blocks:
        for part in (*block.projections().values(), block.attention_norm, block.mlp_norm):
            if part is not None:
                note(part.name, part.module)
    model(torch.tensor([[3, 4, 5]]))
    for block in blocks:
        for projection in block.projections().values():
            seen = (outputs[projection.name].shape[-1], inputs[projection.name].shape[-1])
            assert seen == projection.shape
        for norm, readers in block.shared_inputs():
            for site in readers if norm else ():
                assert torch.equal(inputs[block.projections()[site].name], outputs[norm.name])


@pytest.mark.parametrize("name", [n for n in families.MORE_FAMILIES if n not in (*NATIVELY_SPARSE, "emu3")])
def test_every_projection_can_have_a_mask_that_is_saved_with_the_model(name: str, tmp_path: Path) -> None:
    model, tokens = families.build(ALL[name]()), torch.tensor([[3, 4, 5]])
    dense = model(tokens).logits
    groups = find_sites(model)[0].groups()
    apply_sparsity(
        model, ActivationSparsity(tuple(Sparsifier(group, "threshold", threshold=0.1) for group in groups))
    )
    sparse = model(tokens).logits
    assert not torch.equal(sparse, dense)
    save_checkpoint(model, None, tmp_path / "sparse")
    assert torch.equal(load_model(tmp_path / "sparse")(tokens).logits, sparse)
