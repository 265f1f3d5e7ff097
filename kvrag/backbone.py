"""A transformers decoder whose attention reads whatever we hand it.

One attention function is registered under one name; no modelling code is patched, hooked or copied. The model
is always called at position zero, where its own rotary embedding is the identity (times a constant), so
queries and keys arrive unrotated and the caller decides where they stand. The caller's state travels as a
keyword argument through every layer to the attention function; a context variable carries it to the few
models whose layers do not hand keyword arguments on.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kvrag.errors import UnsupportedModel

NAME = "kvrag"

# Handed on by modelling code and without meaning for a caller that masks, positions and caches itself.
_WITHOUT_EFFECT = frozenset(
    {
        "position_ids",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "is_causal",
        "past_key_values",
        "past_key_value",
        "cache_position",
        "logits_to_keep",
        "position_embeddings",
        "dropout",
        "num_items_in_batch",
    }
)


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One layer's attention as the model asks for it.

    Attributes:
        query: [B, H, T, D], not rotated.
        key: [B, K, T, D], not rotated.
        value: [B, K, T, Dv].
        scale: factor on the scores.
        softcap: soft cap of the scores, or None.
        sinks: [H] extra scores, or None.
        window: the sliding window that the layer passed along, or None.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: float
    softcap: float | None
    sinks: torch.Tensor | None
    window: int | None


class Reading(Protocol):
    """The state of one forward pass: it does the attention of every layer."""

    def attend(self, layer: int, call: AttentionCall) -> torch.Tensor:
        """Return the attention output, [B, H, T, Dv]."""
        ...

    def mask(self, predicate: Any) -> Any:
        """What the model's mask function is to hand on to the layers; None for no mask."""
        ...

    def take_mask(self, layer: int, mask: Any) -> None:
        """Receive what a layer got as its mask."""
        ...


_current: ContextVar[Reading | None] = ContextVar("kvrag_reading", default=None)


def _refuse_unknown(arguments: dict[str, Any]) -> None:
    unknown = sorted(k for k, v in arguments.items() if v is not None and k not in _WITHOUT_EFFECT)
    if unknown:
        raise UnsupportedModel(f"its attention takes {', '.join(unknown)}, whose effect is not known")


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    kvrag: Reading | None = None,
    **others: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    reading = kvrag if kvrag is not None else _current.get()
    if reading is None:
        return _ordinary(
            module,
            query,
            key,
            value,
            attention_mask,
            scaling,
            dropout,
            softcap=softcap,
            s_aux=s_aux,
            **others,
        )
    _refuse_unknown(others)
    layer = int(module.layer_idx)  # type: ignore[arg-type]  # nn.Module declares attributes as tensors
    reading.take_mask(layer, attention_mask)
    call = AttentionCall(
        query,
        key,
        value,
        scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        softcap=softcap,
        sinks=s_aux,
        window=sliding_window,
    )
    return reading.attend(layer, call).transpose(1, 2).contiguous(), None


def _ordinary(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    dropout: float,
    *,
    softcap: float | None,
    s_aux: torch.Tensor | None,
    **others: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """An ordinary forward pass of the same model: stock SDPA, explicit scores where SDPA cannot."""
    if softcap is None and s_aux is None:
        out: tuple[torch.Tensor, torch.Tensor | None] = sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, **others
        )
        return out
    groups, (rows, columns) = query.shape[1] // key.shape[1], (query.shape[2], key.shape[2])
    scores = torch.matmul(query, key.repeat_interleave(groups, 1).transpose(2, 3)).float()
    scores = scores * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = torch.ones(rows, columns, dtype=torch.bool, device=scores.device).tril(columns - rows)
    lowest = torch.finfo(scores.dtype).min
    scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    if s_aux is not None:
        sinks = s_aux.float().reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, sinks), -1)
    probs = scores.softmax(-1)[..., :columns].to(value.dtype)
    return torch.matmul(probs, value.repeat_interleave(groups, 1)).transpose(1, 2).contiguous(), None


def _mask(*args: Any, mask_function: Any = None, **kwargs: Any) -> Any:
    reading = _current.get()
    if reading is not None:
        return reading.mask(mask_function)
    kwargs["mask_function"] = mask_function
    return sdpa_mask(*args, **kwargs)


@cache
def _register() -> None:
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)


def adopt(model: PreTrainedModel) -> None:
    """Let the model's attention go through kvrag; without a reading it behaves as stock SDPA does.

    Raises:
        UnsupportedModel: the modelling code has no interchangeable attention.
    """
    _register()
    try:
        model.set_attn_implementation(NAME)
    except ValueError as error:
        raise UnsupportedModel(f"its code has no interchangeable attention ({error})") from error
    config = model.config.get_text_config(decoder=True)
    if NAME not in (config._attn_implementation, model.config._attn_implementation):
        raise UnsupportedModel("its code has no interchangeable attention (AttentionInterface)")


@contextmanager
def reading_with(reading: Reading) -> Iterator[None]:
    """Make a reading visible to models that do not hand keyword arguments on."""
    token = _current.set(reading)
    try:
        yield
    finally:
        _current.reset(token)


@dataclass(frozen=True, slots=True)
class Forward:
    """How a model's forward is called: which optional arguments its signature takes."""

    takes_keywords: bool
    takes_logits_to_keep: bool

    @classmethod
    def of(cls, model: PreTrainedModel) -> Forward:
        """Read the signature once."""
        parameters = inspect.signature(model.forward).parameters
        keywords = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        return cls(keywords, "logits_to_keep" in parameters)


def run(
    model: PreTrainedModel,
    forward: Forward,
    ids: torch.Tensor,
    positions: torch.Tensor,
    reading: Reading,
    *,
    logits_to_keep: int = 1,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """One forward pass whose attention is the reading's.

    Args:
        model: adopted model.
        forward: of this model.
        ids: [B, T], int64.
        positions: [B, T]; zeros, except while probing.
        reading: does the attention of every layer.
        logits_to_keep: logits of this many last tokens; 0 for all.
        rows: [kept], int64: logits of these tokens instead.

    Returns:
        Logits, [B, kept, V].
    """
    arguments: dict[str, Any] = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    if forward.takes_keywords:
        arguments["kvrag"] = reading
    if rows is None and logits_to_keep:
        last = ids.shape[1]
        rows = torch.arange(max(0, last - logits_to_keep), last, device=ids.device)
    if forward.takes_logits_to_keep and rows is not None:
        # As indices: with a number, Gemma 4 leaves out the other rows already in layers that share keys.
        arguments["logits_to_keep"] = rows
    with reading_with(reading):
        logits: torch.Tensor = model(**arguments).logits
    return logits if rows is None or logits.shape[1] == len(rows) else logits[:, rows]
