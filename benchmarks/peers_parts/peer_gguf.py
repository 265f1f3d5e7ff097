"""Writes a Llama of transformers as GGUF files; runs in the environment of `peer_llama.py`.

Names and settings are those of llama.cpp's format, so that nothing of its converter is needed; there is no
vocabulary, tokens are given as numbers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from gguf.quants import quantize
from safetensors.numpy import load_file

KINDS = {
    "F32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "F16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "BF16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "Q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
_IN_A_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write(model: Path, folder: Path, kinds: list[str]) -> dict[str, Path]:
    """One file for each kind of weights; those of the norms stay as they are, as in llama.cpp's own files.

    Args:
        model: a folder with config.json and model.safetensors in float32.
        folder: for the files.
        kinds: of `KINDS`.
    """
    config = json.loads((model / "config.json").read_text())
    weights = {_name(name): rows for name, rows in load_file(model / "model.safetensors").items()}
    for name, rows in weights.items():
        if name.endswith(("attn_q.weight", "attn_k.weight")):
            weights[name] = _pairs_together(rows, config["head_dim"])
    return {kind: _write(folder / f"{kind}.gguf", config, weights, kind) for kind in kinds}


def _name(name: str) -> str:
    """What llama.cpp calls a tensor of transformers' Llama."""
    stem = name.removesuffix(".weight")
    if stem in _OUTSIDE:
        return f"{_OUTSIDE[stem]}.weight"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{_IN_A_LAYER[part]}.weight"


def _pairs_together(rows: np.ndarray[Any, Any], dim: int) -> np.ndarray[Any, Any]:
    """llama.cpp rotates neighbouring dimensions of a Llama's heads, transformers (i, i + D / 2)."""
    halves = rows.reshape(-1, 2, dim // 2, rows.shape[1])  # [heads, 2, D / 2, in]
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows.shape))


def _write(path: Path, config: dict[str, Any], weights: dict[str, np.ndarray[Any, Any]], kind: str) -> Path:
    element, file_type = KINDS[kind]
    writer = GGUFWriter(path, "llama")
    writer.add_file_type(file_type)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    for name, rows in weights.items():
        of_it = GGMLQuantizationType.F32 if rows.ndim == 1 else element
        writer.add_tensor(name, quantize(rows, of_it), raw_dtype=of_it)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
