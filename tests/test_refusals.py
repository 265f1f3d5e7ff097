"""Models that cannot be composed exactly are refused, and the message says why."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from kvrag.errors import ConfigError, UnsupportedModel
from kvrag.model import Model
from kvrag.testing.models import randomize, tiny_model, tiny_tokenizer

SHAPE = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def network_of(name: str, **settings: Any) -> PreTrainedModel:
    config = getattr(transformers, name)(**{**SHAPE, **settings})
    return randomize(AutoModelForCausalLM.from_config(config, dtype=torch.float32)).eval()


MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}

REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "gpt2": ("GPT2Config", {}, "values of layer 0 depend on absolute positions"),
    "bert": ("BertConfig", {"is_decoder": True}, "values of layer 0 depend on absolute positions"),
    "bart": (
        "BartConfig",
        {
            "d_model": 64,
            "decoder_layers": 2,
            "decoder_attention_heads": 4,
            "decoder_ffn_dim": 96,
            "is_decoder": True,
        },
        "layer 0 knows where a token stands although all positions are equal",
    ),
    "bloom": ("BloomConfig", {"n_layer": 2, "n_head": 4}, "no interchangeable attention"),
    "mpt": ("MptConfig", {"d_model": 64, "n_layers": 2, "n_heads": 4}, "no interchangeable attention"),
    "mamba": ("MambaConfig", {}, "layers of type linear_attention"),
    "qwen3_next": (
        "Qwen3NextConfig",
        {"num_hidden_layers": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
        "layers of type linear_attention",
    ),
    "lfm2": ("Lfm2Config", {"layer_types": ["conv", "full_attention"]}, "layers of type conv"),
    "llama4": (
        "Llama4TextConfig",
        {"head_dim": 16, "num_local_experts": 2, "intermediate_size_mlp": 96, "num_hidden_layers": 4},
        "layers of type chunked_attention",
    ),
    "ministral3": (
        "Ministral3Config",
        {"head_dim": 16, "max_position_embeddings": 32_768},
        "no rotation explains",
    ),
    "hunyuan": ("HunYuanDenseV1Config", {"head_dim": 16}, "no rotation explains"),
    "diffllama": ("DiffLlamaConfig", {}, "calls its attention function twice"),
    "doge": ("DogeConfig", {}, "a forward pass fails"),
    "bidirectional": (
        "Gemma3TextConfig",
        {"head_dim": 16, "use_bidirectional_attention": True},
        "bidirectional",
    ),
    "mrope": ("LlamaConfig", {"rope_parameters": MROPE}, "three axes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused_with_the_reason(name: str) -> None:
    config, settings, reason = REFUSED[name]
    network = network_of(config, **settings)
    kind = network.config.model_type
    with pytest.raises(UnsupportedModel, match=re.escape(reason)) as caught:
        Model(network, tiny_tokenizer(), name="mine")
    assert str(caught.value).startswith(f"mine ({kind}) cannot be used: ")


def test_a_mask_of_the_models_own_is_refused() -> None:
    network = tiny_model("llama")
    attention = network.model.layers[1].self_attn
    ordinary = attention.forward

    def masking(*args: Any, **arguments: Any) -> Any:
        return ordinary(*args, **arguments | {"attention_mask": torch.zeros(1, 1, 8, 8)})

    attention.forward = masking
    with pytest.raises(UnsupportedModel, match="attention mask of its own"):
        Model(network, tiny_tokenizer())


def test_an_attention_argument_of_unknown_effect_is_refused() -> None:
    network = tiny_model("llama")
    attention = network.model.layers[0].self_attn
    ordinary = attention.forward
    attention.forward = lambda *args, **arguments: ordinary(*args, **arguments, position_bias=torch.zeros(1))
    with pytest.raises(UnsupportedModel, match="takes position_bias, whose effect is not known"):
        Model(network, tiny_tokenizer())


def test_a_window_that_the_mask_does_not_show_is_refused() -> None:
    network = tiny_model("gemma2")
    network.model.layers[0].self_attn.sliding_window = 7
    with pytest.raises(UnsupportedModel, match="layer 0 passes a window of 7, but its mask shows 24"):
        Model(network, tiny_tokenizer())


@pytest.mark.parametrize("length", [0, 5000])
def test_a_length_beyond_the_models_positions_is_an_error(length: int) -> None:
    with pytest.raises(ConfigError, match=f"max_length is {length}; this model has positions 1 to 4096"):
        Model(tiny_model("llama"), tiny_tokenizer(), max_length=length)


def test_an_unknown_path_is_an_error_that_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="could not be loaded") as caught:
        Model.load(tmp_path / "nothing")
    assert "\n" not in str(caught.value)
    assert "config.json" in str(caught.value)


def test_a_hub_name_that_cannot_be_reached_is_an_error() -> None:
    with pytest.raises(ConfigError, match="'no-such/model' could not be loaded"):
        Model.load("no-such/model")


def test_an_unknown_type_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nonsense"}))
    with pytest.raises(UnsupportedModel, match="nonsense"):
        Model.load(tmp_path)


def test_a_model_that_is_no_decoder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(UnsupportedModel, match="not a decoder"):
        Model.load(tmp_path)


@pytest.mark.parametrize("dtype", ["float31", "int8", "Tensor"])
def test_an_impossible_dtype_is_an_error(tmp_path: Path, dtype: str) -> None:
    with pytest.raises(ConfigError, match=f"dtype is '{dtype}'; expected auto"):
        Model.load(tmp_path, dtype=dtype)


def test_a_saved_model_is_loaded_as_it_was(tmp_path: Path) -> None:
    tiny_model("qwen3").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    loaded = Model.load(tmp_path, max_length=1000, device="cpu")
    direct = Model(tiny_model("qwen3"), tiny_tokenizer(), max_length=1000)
    assert loaded.specs == direct.specs
    assert loaded.fingerprint((1, 2)) == direct.fingerprint((1, 2))
    assert loaded.max_length == 1000
