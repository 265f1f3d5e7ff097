"""Reading texts on their own behind a prefix: their keys and values are what the store keeps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvrag.attention import refuse_mask
from kvrag.backbone import AttentionCall
from kvrag.layout import fresh_mask, last_turn, span_of
from kvrag.model import Model
from kvrag.prefill import Work, alone
from kvrag.rotary import LayerSpec, rotate
from kvrag.segments import KV, LayerKV, Segment
from kvrag.worker import PAUSE
from kvrag_kernels import Rows, Turn, segment_attention


def batches(lengths: Sequence[int], token_budget: int) -> Iterator[list[int]]:
    """Group texts of similar length so that no padded batch exceeds the budget.

    Args:
        lengths: tokens of each text.
        token_budget: most tokens of a batch, padding included; a longer text is a batch of its own.

    Yields:
        Numbers of the texts of one batch; every number comes exactly once.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True)
    batch: list[int] = []
    for i in order:
        if batch and lengths[batch[0]] * (len(batch) + 1) > token_budget:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


@dataclass(frozen=True, slots=True)
class Run:
    """Tokens that are read one behind the other, and the texts among them whose rows are wanted.

    Attributes:
        tokens: at least one.
        texts: first token of each text and the one behind its last.
    """

    tokens: tuple[int, ...]
    texts: tuple[tuple[int, int], ...]


def encode(
    model: Model, texts: Sequence[Sequence[int]], prefix: KV | None = None, *, token_budget: int = 2048
) -> list[KV]:
    """Read texts independently of each other, each right behind the prefix (CacheFocus, sec. 1).

    Args:
        model: the decoder.
        texts: tokens of each text, at least one each.
        prefix: rows of the shared prefix; None for none.
        token_budget: most tokens per forward pass, padding included; a longer text is read in strides.

    Returns:
        One KV per text, in order; the prefix's rows are not part of it.
    """
    runs = [Run(tuple(text), ((0, len(text)),)) for text in texts]
    return [kv for (kv,) in encode_runs(model, runs, prefix, token_budget=token_budget)]


def encode_runs(
    model: Model, runs: Sequence[Run], prefix: KV | None = None, *, token_budget: int = 2048
) -> list[list[KV]]:
    """Read runs at once; see `encoding_runs`."""
    return alone(model, encoding_runs(model, runs, prefix, token_budget=token_budget))


def encoding_runs(
    model: Model, runs: Sequence[Run], prefix: KV | None = None, *, token_budget: int = 2048
) -> Work[list[list[KV]]]:
    """Read runs independently of each other, each right behind the prefix and each token once.

    Rows of a text are those it has behind the prefix and the tokens of its run before it. Its keys are
    rotated at its own positions 0..n-1, so that it can appear anywhere, with or without what stood there.

    Args:
        model: the decoder.
        runs: what is to be read.
        prefix: rows of the shared prefix; None for none.
        token_budget: most tokens per forward pass, padding included; a longer run is read in strides.

    Returns:
        For each run, one KV per text of it.
    """
    found: dict[int, list[KV]] = {}
    for batch in batches([len(run.tokens) for run in runs], token_budget):
        some = [runs[i] for i in batch]
        is_long = len(some[0].tokens) > token_budget
        if is_long:
            rows = yield from _in_strides(model, some[0], prefix, token_budget)
        else:
            rows = _rows(model, some, prefix)
            yield PAUSE
        for place, i in enumerate(batch):
            found[i] = [_text(model.specs, rows, place, runs[i].tokens, *text) for text in runs[i].texts]
    return [found[i] for i in range(len(runs))]


_RawRows = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""Keys, not rotated, and values of each layer, [B, K, T, D] and [B, K, T, Dv]."""


def _rows(model: Model, runs: Sequence[Run], prefix: KV | None) -> _RawRows:
    """One forward pass over padded runs."""
    longest = max(len(run.tokens) for run in runs)
    ids = torch.zeros(len(runs), longest, dtype=torch.long, device=model.device)
    for i, run in enumerate(runs):
        ids[i, : len(run.tokens)] = torch.tensor(run.tokens)
    reading = EncodeReading(model.specs, prefix, longest, device=model.device)
    model.run(ids, reading)
    return reading.kept


def _in_strides(model: Model, run: Run, prefix: KV | None, stride: int) -> Work[_RawRows]:
    """The same for one run, so that memory does not grow with the square of it."""
    read: list[_RawRows] = []
    for start in range(0, len(run.tokens), stride):
        piece = Run(run.tokens[start : start + stride], ())
        read.append(_rows(model, [piece], prefix))
        prefix = _extended(model.specs, prefix, piece.tokens, read[-1])
        yield PAUSE
    return [
        (torch.cat([k for k, _ in layer], dim=2), torch.cat([v for _, v in layer], dim=2))
        for layer in zip(*read, strict=True)
    ]


def _extended(specs: Sequence[LayerSpec], prefix: KV | None, tokens: tuple[int, ...], rows: _RawRows) -> KV:
    """A longer prefix: the rows behind it, their keys rotated once, at the places they have there."""
    before = 0 if prefix is None else prefix.num_tokens
    behind = _keep(specs, rows, 0, slice(0, len(tokens)), before)
    if prefix is None:
        return KV(tokens, behind)
    layers = (
        LayerKV(torch.cat((old.keys, new.keys), dim=1), torch.cat((old.values, new.values), dim=1))
        for old, new in zip(prefix.layers, behind, strict=True)
    )
    return KV(prefix.tokens + tokens, tuple(layers))


def _text(
    specs: Sequence[LayerSpec], rows: _RawRows, i: int, tokens: tuple[int, ...], start: int, end: int
) -> KV:
    """One text's rows out of a padded batch."""
    return KV(tokens[start:end], _keep(specs, rows, i, slice(start, end), 0))


def _keep(
    specs: Sequence[LayerSpec], rows: _RawRows, i: int, part: slice, position: int
) -> tuple[LayerKV, ...]:
    """Rows of every layer in memory of their own, keys rotated at positions from `position` on."""
    device = rows[0][0].device
    places = torch.arange(position, position + part.stop - part.start, device=device)
    turns = {s: s.rotation.turn(places) if s.rotation else None for s in dict.fromkeys(specs)}
    return tuple(
        LayerKV(_own(rotate(keys[i : i + 1, :, part], turns[spec])), _own(values[i : i + 1, :, part]))
        for spec, (keys, values) in zip(specs, rows, strict=True)
    )


def _own(rows: torch.Tensor) -> torch.Tensor:
    """[K, n, D], contiguous, in memory of its own."""
    return rows[0].clone(memory_format=torch.contiguous_format)


class EncodeReading:
    """Reads a batch of texts, each on its own behind one prefix, and keeps their keys and values.

    Texts are padded on the right; a causal text never sees its padding. Every text starts right behind the
    prefix.

    Attributes:
        kept: keys, not rotated, and values of each layer, [B, K, T, D] and [B, K, T, Dv].
    """

    def __init__(
        self, specs: Sequence[LayerSpec], prefix: KV | None, num_rows: int, *, device: torch.device
    ) -> None:
        """Prepare for texts of up to `num_rows` tokens."""
        self.specs = specs
        self.prefix = prefix
        self.kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._local = torch.arange(num_rows, device=device)
        self._turns: dict[LayerSpec, Turn | None] = {}

    def attend(self, layer: int, call: AttentionCall) -> torch.Tensor:
        """Causal attention of each text to the prefix and itself."""
        spec = self.specs[layer]
        before = self.prefix.num_tokens if self.prefix is not None else 0
        turn = self._turn(spec, before)
        keys = rotate(call.key, last_turn(turn))  # rows 0..n-1 of the text's own segment
        self.kept.append((call.key, call.value))
        mask = fresh_mask(spec.window, self._local, ()) if spec.window is not None else None
        rows = [Rows(keys, call.value, mask=mask, causal=mask is None)]
        if self.prefix is not None:
            kv = self.prefix.layers[layer]
            start, _, cut = span_of(Segment(self.prefix, 0), spec.window, self._local + before)
            rows.insert(0, Rows(kv.keys[None, :, start:], kv.values[None, :, start:], mask=cut))
        return segment_attention(
            call.query,
            rows,
            turn,
            scale=call.scale * spec.score_factor(call.query.dtype),
            softcap=call.softcap,
            sinks=call.sinks,
        ).out

    def _turn(self, spec: LayerSpec, before: int) -> Turn | None:
        if spec.rotation is None:
            return None
        if spec not in self._turns:
            positions = [self._local] if self.prefix is None else [self._local + before, self._local]
            self._turns[spec] = spec.rotation.turn(torch.stack(positions))
        return self._turns[spec]

    def mask(self, predicate: Any) -> Any:
        """The layers get no mask: who sees what is decided here."""
        return None

    def take_mask(self, layer: int, mask: Any) -> None:
        """Refuse a mask that the modelling code made by itself."""
        refuse_mask(layer, mask)
