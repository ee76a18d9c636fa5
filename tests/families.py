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

_GPT = {"vocab_size": 53, "n_embd": 24, "n_layer": 2, "n_positions": 64, **SPECIAL}
_GPT_HEADS = {"n_head": 3, "n_inner": 43}
PADDED = {"pad_token_id": 2}

MORE_FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "apertus": lambda: hf.ApertusConfig(**(OWN_HEAD_DIM | PADDED)),
    "arcee": lambda: hf.ArceeConfig(**LLAMA_LIKE),
    "biogpt": lambda: hf.BioGptConfig(**(PLAIN | PADDED)),
    "bitnet": lambda: hf.BitNetConfig(**OWN_HEAD_DIM),
    "codegen": lambda: hf.CodeGenConfig(**_GPT, n_head=4, n_inner=43, rotary_dim=4),
    "cohere2": lambda: hf.Cohere2Config(**OWN_HEAD_DIM),
    "cpmant": lambda: hf.CpmAntConfig(
        vocab_size=53, hidden_size=24, num_attention_heads=3, dim_head=8, dim_ff=43, num_hidden_layers=2
    ),
    "ctrl": lambda: hf.CTRLConfig(**_GPT, n_head=3, dff=43),
    "cwm": lambda: hf.CwmConfig(**LLAMA_LIKE),
    "diffllama": lambda: hf.DiffLlamaConfig(
        **(OWN_HEAD_DIM | {"num_attention_heads": 2} | {"num_key_value_heads": 2})
    ),
    "emu3": lambda: hf.Emu3Config(text_config=OWN_HEAD_DIM | PADDED),
    "ernie4_5": lambda: hf.Ernie4_5Config(**LLAMA_LIKE),
    "exaone4": lambda: hf.Exaone4Config(**OWN_HEAD_DIM),
    "flint": lambda: hf.FlintConfig(**LLAMA_LIKE),
    "gemma4_text": lambda: hf.Gemma4TextConfig(
        **LLAMA_LIKE, global_head_dim=8, hidden_size_per_layer_input=0
    ),
    "glm": lambda: hf.GlmConfig(**(LLAMA_LIKE | PADDED)),
    "glm4": lambda: hf.Glm4Config(**(LLAMA_LIKE | PADDED)),
    "gpt_bigcode": lambda: hf.GPTBigCodeConfig(**_GPT, **_GPT_HEADS),
    "gpt_neo": lambda: hf.GPTNeoConfig(
        **SPECIAL,
        vocab_size=53,
        hidden_size=24,
        intermediate_size=43,
        num_layers=2,
        num_heads=3,
        attention_types=[[["global", "local"], 1]],
        max_position_embeddings=64,
    ),
    "gpt_neox_japanese": lambda: hf.GPTNeoXJapaneseConfig(**(PLAIN | {"intermediate_multiple_size": 2})),
    "granite_swa": lambda: hf.GraniteSWAConfig(**OWN_HEAD_DIM),
    "helium": lambda: hf.HeliumConfig(**LLAMA_LIKE),
    "hunyuan_v1_dense": lambda: hf.HunYuanDenseV1Config(**LLAMA_LIKE),
    "hyperclovax": lambda: hf.HyperCLOVAXConfig(**LLAMA_LIKE),
    "jais2": lambda: hf.Jais2Config(**LLAMA_LIKE),
    "ministral": lambda: hf.MinistralConfig(**LLAMA_LIKE),
    "ministral3": lambda: hf.Ministral3Config(**LLAMA_LIKE),
    "modernbert_decoder": lambda: hf.ModernBertDecoderConfig(**(PLAIN | PADDED)),
    "mpt": lambda: hf.MptConfig(vocab_size=53, d_model=24, n_heads=3, n_layers=2, expansion_ratio=2),
    "nanochat": lambda: hf.NanoChatConfig(**OWN_HEAD_DIM),
    "olmo": lambda: hf.OlmoConfig(**OWN_HEAD_DIM),
    "olmo3": lambda: hf.Olmo3Config(**OWN_HEAD_DIM),
    "openai_gpt": lambda: hf.OpenAIGPTConfig(vocab_size=53, n_embd=24, n_layer=2, n_head=3, n_positions=64),
    "persimmon": lambda: hf.PersimmonConfig(**PLAIN),
    "seed_oss": lambda: hf.SeedOssConfig(**LLAMA_LIKE),
    "vaultgemma": lambda: hf.VaultGemmaConfig(**LLAMA_LIKE),
    "xglm": lambda: hf.XGLMConfig(
        vocab_size=53, d_model=24, ffn_dim=43, num_layers=2, attention_heads=3, max_position_embeddings=64
    ),
}
"""Families that only the finding of sites is tested with."""

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
