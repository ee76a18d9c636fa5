"""Tiny random models of every family that the tests know, built from their configurations; sizes are odd."""

from collections.abc import Callable

import torch
import transformers as hf
from transformers import PretrainedConfig, PreTrainedModel

torch.set_num_threads(1)

SMALL = {"vocab_size": 53, "hidden_size": 24, "intermediate_size": 43, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 8}
SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
LLAMA_LIKE = SMALL | HEADS | SPECIAL
OWN_HEAD_DIM = {key: value for key, value in LLAMA_LIKE.items() if key != "head_dim"}
PLAIN = SMALL | SPECIAL | {"num_attention_heads": 3}


def _opt(**changes) -> hf.OPTConfig:
    sizes = {"ffn_dim": 43, "word_embed_proj_dim": 24, "num_attention_heads": 3, "dropout": 0.0}
    sizes |= {"vocab_size": 53, "hidden_size": 24, "num_hidden_layers": 2}
    return hf.OPTConfig(**sizes, **(SPECIAL | {"pad_token_id": 2}), max_position_embeddings=64, **changes)


FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: hf.LlamaConfig(**LLAMA_LIKE),
    "mistral": lambda: hf.MistralConfig(**LLAMA_LIKE),
    "qwen2": lambda: hf.Qwen2Config(**OWN_HEAD_DIM),
    "qwen3": lambda: hf.Qwen3Config(**LLAMA_LIKE),
    "gemma": lambda: hf.GemmaConfig(**LLAMA_LIKE),
    "gemma2": lambda: hf.Gemma2Config(**LLAMA_LIKE),
    "gemma3": lambda: hf.Gemma3TextConfig(**LLAMA_LIKE),
    "granite": lambda: hf.GraniteConfig(**OWN_HEAD_DIM),
    "smollm3": lambda: hf.SmolLM3Config(**(LLAMA_LIKE | {"pad_token_id": 2})),
    "olmo2": lambda: hf.Olmo2Config(**LLAMA_LIKE),
    "cohere": lambda: hf.CohereConfig(**LLAMA_LIKE),
    "stablelm": lambda: hf.StableLmConfig(**OWN_HEAD_DIM),
    "phi3": lambda: hf.Phi3Config(**(OWN_HEAD_DIM | {"pad_token_id": 2})),
    "nemotron": lambda: hf.NemotronConfig(**LLAMA_LIKE),
    "phi": lambda: hf.PhiConfig(**PLAIN),
    "starcoder2": lambda: hf.Starcoder2Config(**(PLAIN | {"num_key_value_heads": 1})),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**PLAIN),
    "gptj": lambda: hf.GPTJConfig(
        vocab_size=53, n_embd=24, n_layer=2, n_head=3, n_inner=43, rotary_dim=4, n_positions=64, **SPECIAL
    ),
    "gpt2": lambda: hf.GPT2Config(
        vocab_size=53, n_embd=24, n_layer=2, n_head=3, n_inner=43, n_positions=64, **SPECIAL
    ),
    "opt": lambda: _opt(),
    "opt_post_norm": lambda: _opt(do_layer_norm_before=False),
    "falcon": lambda: hf.FalconConfig(
        vocab_size=53,
        hidden_size=24,
        ffn_hidden_size=43,
        num_hidden_layers=2,
        num_attention_heads=3,
        **SPECIAL,
    ),
    "falcon_new": lambda: hf.FalconConfig(
        vocab_size=53,
        hidden_size=24,
        ffn_hidden_size=43,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_kv_heads=1,
        new_decoder_architecture=True,
        **SPECIAL,
    ),
    "bloom": lambda: hf.BloomConfig(vocab_size=53, hidden_size=24, n_layer=2, n_head=3, **SPECIAL),
}

PARALLEL = ("cohere", "falcon", "phi", "gptj")
"""Families where one norm feeds attention and MLP."""

WITHOUT_NORMS = ("olmo2", "opt_post_norm")
"""Families without a norm before the projections."""

FUSED_QKV = ("gpt2", "gpt_neox", "falcon", "falcon_new", "bloom", "phi3")
PLAIN_MLP = ("nemotron", "phi", "starcoder2", "gpt_neox", "gptj", "gpt2", "opt", "opt_post_norm", "falcon")
PLAIN_MLP += ("falcon_new", "bloom")
GATED = tuple(name for name in FAMILIES if name not in PLAIN_MLP)
NATIVELY_SPARSE = ("opt", "opt_post_norm", "nemotron")
STAGE_2 = [name for name in FAMILIES if name not in (*WITHOUT_NORMS, "nemotron", "bloom")]
"""Families that can be relufied in both stages."""


def build(config: PretrainedConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return the model in eval mode, with weights large enough that every activation matters."""
    torch.manual_seed(seed)
    model = hf.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2:
                weight.normal_(0.0, 0.3)
            elif name.endswith("bias"):
                weight.normal_(0.0, 0.1)
    return model


def family(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return build(FAMILIES[name](), dtype=dtype)
