"""What a model's caches look like, from its configuration alone: no weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from kvrag import backbone
from kvrag.errors import ConfigError, UnsupportedModel
from kvrag.store.codec import Shape


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a model.

    Attributes:
        layers: (K, D, Dv) of every layer.
        num_parameters: of the decoder.
        active_parameters: those that every token passes through, embedding and output left out.
        dtype: of the checkpoint, such as "bfloat16".
        max_length: longest prompt plus answer that it was trained for; 0: not known.
    """

    layers: tuple[Shape, ...]
    num_parameters: int
    active_parameters: int
    dtype: str
    max_length: int

    def bytes_per_token(self, itemsize: int) -> int:
        """Of keys and values, with elements of this size."""
        return itemsize * sum(heads * (key + value) for heads, key, value in self.layers)


@dataclass
class Recorder:
    """A reading that notes shapes, and computes nothing."""

    layers: dict[int, Shape] = field(default_factory=dict)

    def attend(self, layer: int, call: backbone.AttentionCall) -> torch.Tensor:
        """Nothing of the right shape."""
        batch, heads, rows, _ = call.query.shape
        self.layers[layer] = (call.key.shape[1], call.key.shape[3], call.value.shape[3])
        return call.value.new_empty(batch, heads, rows, call.value.shape[3])

    def mask(self, predicate: Any) -> Any:
        """None."""
        return None

    def take_mask(self, layer: int, mask: Any) -> None:
        """Take any."""


def shape_of(source: str, *, revision: str | None = None) -> ModelShape:
    """The sizes of a model by folder or hub name; only its configuration is read.

    The model is built without memory for its weights, and two tokens are passed through it in name only: what
    its layers hand to their attention is what would be cached. Where its code cannot do that, the
    configuration's own numbers are taken.

    Raises:
        ConfigError: no such model here.
        UnsupportedModel: transformers does not know it as a decoder.
    """
    try:
        config = AutoConfig.from_pretrained(source, revision=revision)
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(config)
    except (OSError, ImportError) as error:
        raise ConfigError(f"model {source!r} could not be found: {str(error).splitlines()[0]}") from error
    except (ValueError, KeyError) as error:
        raise UnsupportedModel(
            f"model {source!r} is not a decoder that transformers knows: {str(error).splitlines()[0]}"
        ) from error
    return of_network(network, config)


def of_network(network: PreTrainedModel, config: Any) -> ModelShape:
    """The sizes of a model that is on the meta device."""
    text = config.get_text_config(decoder=True)
    dtype = getattr(config, "dtype", None) or getattr(text, "dtype", None) or torch.float32
    return ModelShape(
        layers=_passed(network) or _stated(text),
        num_parameters=sum(p.numel() for p in network.parameters()),
        active_parameters=_active(network, text),
        dtype=str(dtype).removeprefix("torch."),
        max_length=max(0, getattr(text, "max_position_embeddings", None) or 0),
    )


def _passed(network: PreTrainedModel) -> tuple[Shape, ...]:
    """What the layers hand to their attention; empty if a pass in name only is not possible."""
    recorder = Recorder()
    try:
        backbone.adopt(network)
        with torch.device("meta"), torch.no_grad():
            ids = torch.zeros(1, 2, dtype=torch.long)
            # With a mask: without one, transformers looks into the positions, and there is nothing to see.
            with backbone.reading_with(recorder):
                network(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    except UnsupportedModel:
        raise
    except Exception:
        return ()
    return tuple(shape for _, shape in sorted(recorder.layers.items()))


def _stated(text: Any) -> tuple[Shape, ...]:
    """The same from the configuration's numbers."""
    heads = text.num_attention_heads
    key = getattr(text, "head_dim", None) or text.hidden_size // heads
    value = getattr(text, "v_head_dim", None) or key
    if getattr(text, "kv_lora_rank", None):  # latent attention: what is cached are the expanded heads
        key = text.qk_nope_head_dim + text.qk_rope_head_dim
        return ((heads, key, value),) * int(text.num_hidden_layers)
    shared = getattr(text, "num_key_value_heads", None) or heads
    return ((int(shared), int(key), int(value)),) * int(text.num_hidden_layers)


def _active(network: PreTrainedModel, text: Any) -> int:
    """Parameters that a token passes through: of experts, the share that is chosen."""
    outside = {id(m.weight) for m in (network.get_input_embeddings(), network.get_output_embeddings()) if m}
    experts = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None)
    chosen = getattr(text, "num_experts_per_tok", None) or 1
    share = min(1.0, chosen / experts) if experts else 1.0
    total = 0.0
    for name, parameter in network.named_parameters():
        if id(parameter) not in outside:
            total += parameter.numel() * (share if ".experts." in name else 1.0)
    return int(total)
