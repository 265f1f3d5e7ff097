"""Tiny models with random weights, one per model family, and a tokenizer: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from kvrag.model import Model

VOCAB_SIZE = 320
WINDOW = 24

_SPECIAL = ("<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>")
_MERGES = (
    ("t", "h"),
    ("th", "e"),
    ("i", "n"),
    ("a", "n"),
    ("an", "d"),
    ("e", "r"),
    ("r", "e"),
    ("Ġ", "the"),
    ("Ġ", "a"),
    ("o", "f"),
    ("Ġ", "of"),
    ("Ċ", "Ċ"),
)
_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

_SHAPE: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
)
_EIGHTH = (0, 1, 2, 3, 4, 5, 6, 7)  # the eight frequencies of a head of 16
_SLIDING, _FULL = "sliding_attention", "full_attention"


def _config(name: str, **settings: Any) -> PreTrainedConfig:
    config: PreTrainedConfig = getattr(transformers, name)(**{**_SHAPE, **settings})
    return config


def _rope(name: str, kind: str, **parameters: Any) -> PreTrainedConfig:
    return _config(name, rope_parameters={"rope_type": kind, "rope_theta": 1e4, **parameters})


def _longrope(border: int) -> PreTrainedConfig:
    return _config(
        "Phi3Config",
        sliding_window=None,
        original_max_position_embeddings=border,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0 + 0.1 * i for i in _EIGHTH],
            "long_factor": [1.0 + 0.5 * i for i in _EIGHTH],
            "original_max_position_embeddings": border,
        },
    )


def _deepseek_v3() -> PreTrainedConfig:
    return _config(
        "DeepseekV3Config",
        num_key_value_heads=4,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=12,
        v_head_dim=14,
        moe_intermediate_size=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
    )


FAMILIES: Mapping[str, Callable[[], PreTrainedConfig]] = MappingProxyType(
    {
        "llama": partial(_config, "LlamaConfig"),
        "llama-llama3": partial(
            _rope,
            "LlamaConfig",
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=256,
        ),
        "llama-linear": partial(_rope, "LlamaConfig", "linear", factor=4.0),
        "llama-yarn": partial(
            _rope, "LlamaConfig", "yarn", factor=4.0, original_max_position_embeddings=1024
        ),
        "llama-dynamic": partial(_rope, "LlamaConfig", "dynamic", factor=2.0),
        "mistral": partial(_config, "MistralConfig", sliding_window=None),
        "mistral-window": partial(_config, "MistralConfig", sliding_window=WINDOW),
        "qwen2": partial(_config, "Qwen2Config"),
        "qwen3": partial(_config, "Qwen3Config", head_dim=24),
        "phi3": partial(_config, "Phi3Config", sliding_window=None),
        "phi3-longrope-short": partial(_longrope, 2048),
        "phi3-longrope-long": partial(_longrope, 32),
        "gemma2": partial(
            _config,
            "Gemma2Config",
            head_dim=16,
            sliding_window=WINDOW,
            query_pre_attn_scalar=16,
            attn_logit_softcapping=5.0,
        ),
        "gemma3": partial(
            _config,
            "Gemma3TextConfig",
            head_dim=16,
            sliding_window=WINDOW,
            query_pre_attn_scalar=16,
            layer_types=[_SLIDING, _SLIDING, _FULL, _SLIDING],
        ),
        "olmo2": partial(_config, "Olmo2Config"),
        "smollm3": partial(_config, "SmolLM3Config", no_rope_layer_interval=2),
        "granite": partial(_config, "GraniteConfig", attention_multiplier=0.2),
        "gpt_neox": partial(_config, "GPTNeoXConfig", rotary_pct=0.25),
        "cohere2": partial(
            _config,
            "Cohere2Config",
            sliding_window=WINDOW,
            layer_types=[_SLIDING, _FULL, _SLIDING, _FULL],
        ),
        "glm4": partial(_config, "Glm4Config", head_dim=16, partial_rotary_factor=0.5),
        "gpt_oss": partial(
            _config,
            "GptOssConfig",
            head_dim=16,
            sliding_window=WINDOW,
            num_local_experts=4,
            num_experts_per_tok=2,
        ),
        "deepseek_v3": _deepseek_v3,
    }
)

# LongRoPE has two sets of frequencies; the longest prompt decides which one a model is used with.
MAX_LENGTHS: Mapping[str, int] = MappingProxyType({"phi3-longrope-short": 2048})


def randomize(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """The model with weights under which attention matters and no norm is the identity.

    Args:
        model: changed in place.
        seed: of the weights.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            noise = torch.randn(weight.shape, generator=generator)
            if weight.dim() == 1:  # norms around one or, in families that add the one, around zero
                noise = weight.float().mean().round() + 0.2 * noise
            elif "embed" not in name:
                noise *= 1.2 / weight.shape[-1] ** 0.5
            weight.copy_(noise)
    return model


def tiny_model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model of a family, equal for equal arguments (before rounding to `dtype`).

    Args:
        family: a key of `FAMILIES`.
        seed: of the weights.
        dtype: of the weights.
    """
    model = AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=dtype)
    made: PreTrainedModel = randomize(model, seed).eval()
    return made


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with a few merges, a BOS that it puts in front, and a chat template."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*_SPECIAL, *letters, *("".join(pair) for pair in _MERGES)]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=list(_MERGES)))
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in _SPECIAL])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=_TEMPLATE,
    )


def tiny(family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32) -> Model:
    """A random model of a family, adopted and proven, with the tokenizer."""
    network = tiny_model(family, seed, dtype)
    return Model(network, tiny_tokenizer(), name=f"tiny {family}", max_length=MAX_LENGTHS.get(family))
