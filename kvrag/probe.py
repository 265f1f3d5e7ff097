"""Finds how each layer rotates and masks, and proves it, from a few forward passes of eight tokens.

No table of model families: the queries and keys at position 0 and at some other position p are compared
with every rotation that the model's own frequencies allow; the one that explains them is the layer's. A
model that no rotation explains is refused with the reason, never guessed at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from kvrag.backbone import AttentionCall, Forward, run
from kvrag.errors import UnsupportedModel
from kvrag.rotary import LayerSpec, Rotation, rotate

_FAR = 1 << 20
_BACK = torch.cat((torch.arange(70_000), torch.tensor([1 << 17, 1 << 18, 1 << 19])))


class _Predicate:
    """Stands for a mask while probing, and answers what the model wants to see."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def _sees(self, row: int, columns: torch.Tensor) -> torch.Tensor:
        zero = torch.zeros((), dtype=torch.long)
        try:
            seen = self.function(zero, zero, torch.full_like(columns, row), columns)
        except (IndexError, RuntimeError) as error:  # it looks up something about every token
            raise UnsupportedModel(f"its mask depends on more than positions ({error})") from error
        return torch.as_tensor(seen).expand(columns.shape)

    def window(self) -> int | None:
        """None for a causal mask, the width of a sliding window, or a refusal."""
        found = set()
        for row in (_FAR, _FAR + 1, _FAR + 12345):
            if bool(self._sees(row, torch.tensor([row + 1])).any()):
                raise UnsupportedModel("its mask is not causal")
            seen = self._sees(row, row - _BACK)
            run_length = int(seen.long().cumprod(0).sum())
            if int(seen.sum()) != run_length:
                raise UnsupportedModel("its mask is neither causal nor a sliding window")
            found.add(None if run_length == len(_BACK) else run_length)
        if len(found) > 1:
            raise UnsupportedModel("its mask depends on absolute positions (chunked attention)")
        return found.pop()


@dataclass
class _Recorder:
    """A reading that notes what each layer hands over, and attends causally so that the pass goes on."""

    calls: dict[int, AttentionCall] = field(default_factory=dict)
    masks: dict[int, Any] = field(default_factory=dict)

    def attend(self, layer: int, call: AttentionCall) -> torch.Tensor:
        if layer in self.calls:
            raise UnsupportedModel(f"layer {layer} calls its attention function twice")
        self.calls[layer] = call
        groups = call.query.shape[1] // call.key.shape[1]
        keys, values = (x.repeat_interleave(groups, 1) for x in (call.key, call.value))
        scores = torch.matmul(call.query, keys.transpose(-1, -2)).float() * call.scale
        rows = scores.shape[-1]
        later = torch.ones(rows, rows, dtype=torch.bool, device=scores.device).triu(1)
        return torch.matmul(scores.masked_fill(later, float("-inf")).softmax(-1).to(values.dtype), values)

    def mask(self, predicate: Any) -> Any:
        return _Predicate(predicate)

    def take_mask(self, layer: int, mask: Any) -> None:
        if mask is not None and not isinstance(mask, _Predicate):
            raise UnsupportedModel("it makes an attention mask of its own")
        self.masks[layer] = mask


def _static_refusals(config: Any) -> None:
    """What forward passes at small positions cannot show."""
    types = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if types:
        raise UnsupportedModel(f"it has layers of type {', '.join(sorted(types))}")
    rope = str(getattr(config, "rope_parameters", None) or {})
    if "mrope" in rope:
        raise UnsupportedModel("its positions have three axes (multimodal RoPE)")
    if getattr(config, "attn_temperature_tuning", False):
        raise UnsupportedModel("its attention temperature depends on the length of the cache")
    if getattr(config, "is_causal", True) is False or getattr(
        config, "use_bidirectional_attention", None
    ) in (
        True,
        "all",
    ):
        raise UnsupportedModel("its attention is bidirectional")


def _frequency_buffers(module: nn.Module) -> list[str]:
    names = [name for name, _ in module.named_buffers(recurse=False) if name.endswith("inv_freq")]
    return [name for name in names if "original" not in name]


def _restore_frequencies(model: PreTrainedModel) -> None:
    """Make frequencies anew that `model.to(bfloat16)` has rounded: far positions were off by whole turns."""
    for module in model.modules():
        names = _frequency_buffers(module)
        if any(torch.finfo(getattr(module, n).dtype).bits < 32 for n in names) and hasattr(module, "config"):
            exact = type(module)(module.config)
            for name, buffer in exact.named_buffers(recurse=False):
                setattr(module, name, buffer.to(getattr(module, name).device))


def _frequencies(model: PreTrainedModel) -> dict[tuple[float, ...], float]:
    """Every frequency vector that the model's rotary modules hold now, with its scale of cos and sin."""
    found: dict[tuple[float, ...], float] = {}
    for module in model.modules():
        for name in _frequency_buffers(module):
            prefix = name.removesuffix("inv_freq")
            scale = getattr(module, f"{prefix}attention_scaling", getattr(module, "attention_scaling", 1.0))
            found[tuple(getattr(module, name).detach().float().flatten().tolist())] = float(scale or 1.0)
    return found


def _candidates(frequencies: dict[tuple[float, ...], float], head_dim: int) -> list[Rotation]:
    found = []
    for values, scale in frequencies.items():
        rotated = 2 * len(values)
        if rotated > head_dim or not values:
            continue
        starts = sorted({0, head_dim - rotated})
        for layout, start, sign in product(("half", "interleaved"), starts, (1, -1)):
            found.append(Rotation(values, layout=layout, start=start, sign=sign, scale=scale))  # type: ignore[arg-type]
    return found


def _error(rotation: Rotation | None, calls: dict[int, AttentionCall], positions: Sequence[int]) -> float:
    """Largest relative difference between rotated and observed queries and keys."""
    worst = 0.0
    for p in positions:
        for at_zero, there in ((calls[0].query, calls[p].query), (calls[0].key, calls[p].key)):
            where = torch.full((at_zero.shape[2],), p, device=at_zero.device)
            # float32 angles here: the model's own, whose rounding is not to count as a difference
            turn = rotation.turn(where, dtype=torch.float32) if rotation else None
            moved = rotate(at_zero.float(), turn)
            peak = there.float().abs().max().clamp_min(1e-9)
            worst = max(worst, float((moved - there.float()).abs().max() / peak))
    return worst


def _explain(
    layer: int,
    calls: dict[int, AttentionCall],
    positions: Sequence[int],
    frequencies: dict[tuple[float, ...], float],
    tolerance: float,
) -> Rotation | None:
    values = calls[0].value
    for p in positions:
        if not torch.allclose(calls[p].value, values, atol=tolerance * max(1.0, float(values.abs().max()))):
            raise UnsupportedModel(f"values of layer {layer} depend on absolute positions")
    options: list[Rotation | None] = [None, *_candidates(frequencies, calls[0].key.shape[-1])]
    errors = [_error(o, calls, positions) for o in options]
    best = min(range(len(options)), key=errors.__getitem__)
    if errors[best] > tolerance:
        raise UnsupportedModel(
            f"no rotation explains the keys of layer {layer} (nearest: off by {errors[best]:.1e})"
        )
    return options[best]


def _check_position_free(recorded: _Recorder, tolerance: float) -> None:
    """Rows of one token, again and again at one position, must be one and the same row.

    They are not where a model numbers its tokens by itself (learned positions that no argument reaches) or
    mixes neighbours before its attention.
    """
    for layer, call in sorted(recorded.calls.items()):
        for rows in (call.query, call.key, call.value):
            spread = (rows - rows[:, :, :1]).float().abs().max()
            if float(spread) > tolerance * max(1.0, float(rows.float().abs().max())):
                raise UnsupportedModel(
                    f"layer {layer} knows where a token stands although all positions are equal "
                    "(positions or neighbours enter before the attention)"
                )


def probe_positions(config: Any, max_length: int) -> tuple[int, ...]:
    """Positions to compare with position 0, all inside the regime that `max_length` pins.

    Models with LongRoPE use other frequencies once a prompt is longer than their original window.
    """
    original = longrope_border(config)
    if original is not None and max_length > original:
        return (original + 1, original + 7, max_length - 1)
    return (*(p for p in (1, 7, 113) if p < max_length - 1), max_length - 1)


def longrope_border(config: Any) -> int | None:
    """The length from which on a LongRoPE model uses its long frequencies; None for other models."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return None
    border = rope.get("original_max_position_embeddings") or config.original_max_position_embeddings
    return int(border)


def _record(
    model: PreTrainedModel, forward: Forward, ids: torch.Tensor, positions: torch.Tensor
) -> _Recorder:
    recorder = _Recorder()
    try:
        run(model, forward, ids, positions, recorder)
    except (UnsupportedModel, torch.OutOfMemoryError):
        raise
    except Exception as error:  # foreign code, which meets an attention and masks that it does not expect
        raise UnsupportedModel(f"a forward pass fails with {type(error).__name__}: {error}") from error
    return recorder


@torch.no_grad()
def probe(model: PreTrainedModel, forward: Forward, *, max_length: int) -> tuple[LayerSpec, ...]:
    """Find and prove each layer's rotation and window.

    Args:
        model: an adopted model, in evaluation mode.
        forward: of this model.
        max_length: longest prompt plus answer, in tokens; decides the regime of LongRoPE models.

    Raises:
        UnsupportedModel: with the reason why caches of this model cannot be re-positioned exactly.
    """
    config = model.config.get_text_config(decoder=True)
    _static_refusals(config)
    _restore_frequencies(model)
    parameter = next(model.parameters())
    tolerance = 1e-4 if parameter.dtype == torch.float32 else 4e-2
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(min(5, config.vocab_size - 2), config.vocab_size - 1, (1, 8), generator=generator)
    ids = ids.to(parameter.device)
    positions = probe_positions(config, max_length)
    recorded: dict[int, _Recorder] = {}
    frequencies: dict[tuple[float, ...], float] = {}
    for p in (*positions, 0):
        recorded[p] = _record(model, forward, ids, torch.full_like(ids, p))
        frequencies.update(_frequencies(model))
    ordinary = _record(model, forward, ids, torch.arange(8, device=ids.device)[None])
    _check_position_free(_record(model, forward, ids[:, :1].expand_as(ids), torch.zeros_like(ids)), tolerance)
    layers = list(range(config.num_hidden_layers))
    if sorted(recorded[0].calls) != layers:
        missing = sorted(set(layers) - set(recorded[0].calls))
        raise UnsupportedModel(f"layers {missing} do not go through the attention interface (hybrid model?)")
    specs = []
    for layer in layers:
        predicate = ordinary.masks[layer]
        if predicate is None:
            raise UnsupportedModel(f"the mask of layer {layer} is not made by transformers' mask functions")
        window = predicate.window()
        passed = recorded[0].calls[layer].window
        if passed is not None and passed != window:
            raise UnsupportedModel(f"layer {layer} passes a window of {passed}, but its mask shows {window}")
        calls = {p: recorded[p].calls[layer] for p in (0, *positions)}
        specs.append(LayerSpec(_explain(layer, calls, positions, frequencies, tolerance), window))
    return tuple(specs)
