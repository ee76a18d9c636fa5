"""What is no dense decoder is told from the module tree, and refused by name with what it has."""

from collections.abc import Callable

import pytest
import torch
import transformers as hf
from torch import nn

import families
from relufy.errors import UserError
from relufy.model.kinds import other_kinds, pattern_of
from relufy.model.structure import find_blocks

LLAMA, LAYERS = families.OWN_HEAD_DIM, {"num_hidden_layers": 2}
SMALL = {"vocab_size": 53, "hidden_size": 24, **LAYERS}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
EXPERTS, RECURRENT, LATENTS = "mixture of experts", "recurrent mixer", "latent attention"

OTHERS: dict[str, tuple[Callable[[], hf.PretrainedConfig], dict[str, str]]] = {
    "mixtral": (
        lambda: hf.MixtralConfig(**LLAMA, num_local_experts=5, num_experts_per_tok=2),
        {EXPERTS: "5 experts, 2 per token, in 2 of 2 blocks: model.layers.0.mlp.experts"},
    ),
    "qwen2_moe": (
        lambda: hf.Qwen2MoeConfig(**LLAMA, num_experts=4, num_experts_per_tok=3, decoder_sparse_step=2),
        {EXPERTS: "4 experts, 3 per token, in 1 of 2 blocks: model.layers.1.mlp.experts"},
    ),
    "qwen3_moe": (
        lambda: hf.Qwen3MoeConfig(**LLAMA, num_experts=4, num_experts_per_tok=3),
        {EXPERTS: "4 experts, 3 per token, in 2 of 2 blocks: model.layers.0.mlp.experts"},
    ),
    "deepseek_v3": (
        lambda: hf.DeepseekV3Config(
            **(LLAMA | LATENT | {"num_key_value_heads": 3}),
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
        ),
        {
            EXPERTS: "4 experts, 2 per token, in 1 of 2 blocks: model.layers.1.mlp.experts",
            LATENTS: "DeepseekV3Attention in 2 of 2 blocks: model.layers.0.self_attn",
        },
    ),
    "gpt_oss": (
        lambda: hf.GptOssConfig(**families.LLAMA_LIKE, num_local_experts=6, num_experts_per_tok=2),
        {EXPERTS: "6 experts, 2 per token, in 2 of 2 blocks: model.layers.0.mlp.experts"},
    ),
    "minicpm3": (
        lambda: hf.MiniCPM3Config(**(LLAMA | LATENT | {"num_key_value_heads": 3})),
        {LATENTS: "MiniCPM3Attention in 2 of 2 blocks: model.layers.0.self_attn"},
    ),
    "mamba": (
        lambda: hf.MambaConfig(**SMALL),
        {RECURRENT: "MambaMixer in 2 of 2 blocks: backbone.layers.0.mixer"},
    ),
    "mamba2": (
        lambda: hf.Mamba2Config(**SMALL, num_heads=6, head_dim=8),
        {RECURRENT: "Mamba2Mixer in 2 of 2 blocks: backbone.layers.0.mixer"},
    ),
    "rwkv": (
        lambda: hf.RwkvConfig(**SMALL),
        {RECURRENT: "RwkvSelfAttention in 2 of 2 blocks: rwkv.blocks.0.attention"},
    ),
    "recurrent_gemma": (
        lambda: hf.RecurrentGemmaConfig(**(LLAMA | {"num_hidden_layers": 3})),
        {RECURRENT: "RecurrentGemmaRecurrentBlock in 2 of 3 blocks: model.layers.0.temporal_block"},
    ),
    "jamba": (
        lambda: hf.JambaConfig(**LLAMA, num_experts=4, attn_layer_period=2, attn_layer_offset=1),
        {
            EXPERTS: "4 experts, 2 per token, in 1 of 2 blocks: model.layers.1.feed_forward.experts",
            RECURRENT: "JambaMambaMixer in 1 of 2 blocks: model.layers.0.mamba",
        },
    ),
    "lfm2": (
        lambda: hf.Lfm2Config(**LLAMA, layer_types=["conv", "full_attention"]),
        {RECURRENT: "Lfm2ShortConv in 1 of 2 blocks: model.layers.0.conv"},
    ),
    "bart": (
        lambda: hf.BartConfig(
            vocab_size=53, d_model=24, encoder_layers=2, decoder_layers=2, decoder_attention_heads=3
        ),
        {"cross-attention": "BartAttention in 2 of 2 blocks: model.decoder.layers.0.encoder_attn"},
    ),
}


def model_of(name: str) -> nn.Module:
    with torch.device("meta"):
        return hf.AutoModelForCausalLM.from_config(OTHERS[name][0]())


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_dense_decoder_is_told_by_name(name: str) -> None:
    assert {kind.word: kind.details for kind in other_kinds(model_of(name))} == OTHERS[name][1]


@pytest.mark.parametrize("name", OTHERS)
def test_it_is_refused_with_all_that_it_has(name: str) -> None:
    model = model_of(name)
    with pytest.raises(UserError, match="is no dense decoder") as refusal:
        find_blocks(model)
    message = str(refusal.value)
    assert message.startswith(type(model).__name__) and "\n" not in message
    assert all(f"{word} ({details})" in message for word, details in OTHERS[name][1].items())


@pytest.mark.parametrize("name", families.FAMILIES | families.MORE_FAMILIES)
def test_a_dense_decoder_is_of_no_other_kind(name: str) -> None:
    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config((families.FAMILIES | families.MORE_FAMILIES)[name]())
    assert other_kinds(model) == []


def test_more_than_a_decoder_of_text_is_refused() -> None:
    vision = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 3}
    config = hf.Gemma3Config(text_config=families.LLAMA_LIKE, vision_config=vision)
    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match="Gemma3ForConditionalGeneration is more than a decoder of text"):
        find_blocks(model)


def test_numbers_are_taken_out_of_a_name() -> None:
    assert pattern_of("model.layers.12.mlp.experts.3") == "model.layers.*.mlp.experts.*"
    assert pattern_of("lm_head") == "lm_head"
