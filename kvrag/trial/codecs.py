"""What each codec loses against rows as they are, and how much smaller it makes them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import torch

from kvrag.compose import Arrangement
from kvrag.errors import ConfigError
from kvrag.focus.policy import PLAIN
from kvrag.looking import look
from kvrag.model import Model
from kvrag.prefill import read
from kvrag.segments import KV, SegmentTable
from kvrag.store.codec import CODECS, Codec
from kvrag.trial.divergence import divergence, logits_of
from kvrag.trial.prompts import CONTINUATION, Prepared


@dataclass(frozen=True, slots=True)
class CodecScore:
    """One codec against raw rows at the same places, means over questions and tokens of the answer.

    Attributes:
        name: of the codec.
        bytes_per_token: of the documents' rows in all layers, as they are written.
        kl: KL divergence of the next-token distributions, in nats.
        top1: share of tokens for which both find the same one likeliest.
    """

    name: str
    bytes_per_token: float
    kl: float
    top1: float


class CodecTrial:
    """Compares the codecs on questions that pass through.

    Attributes:
        scores: means so far; codecs that the model's shapes do not fit are left out.
    """

    def __init__(self, model: Model) -> None:
        """Compare on one model."""
        self._model = model
        self._found: dict[str, list[CodecScore]] = {name: [] for name in CODECS}

    def through(self, prepared: Iterable[Prepared]) -> Iterator[Prepared]:
        """Look at each question on its way to somebody else."""
        for one in prepared:
            answer, raw = self._greedy(one.arrangement)
            for name, codec in CODECS.items():
                try:
                    score = self._score(one, codec, answer, raw)
                except ConfigError:
                    continue
                self._found[name].append(score)
            yield one

    @property
    def scores(self) -> tuple[CodecScore, ...]:
        """See the class."""
        return tuple(_mean(found) for found in self._found.values() if found)

    def _greedy(self, arrangement: Arrangement) -> tuple[tuple[int, ...], torch.Tensor]:
        """What raw rows answer, and the logits of each token of it and the one behind."""
        found = look(self._model, arrangement, PLAIN)
        logits, tokens = [found.read.logits[-1]], []
        table = found.tables
        assert isinstance(table, SegmentTable)  # a plain policy reads one table in all layers
        for position in range(found.composed.end, found.composed.end + CONTINUATION):
            tokens.append(int(logits[-1].argmax()))
            seen = table.seen_from(found.fresh.num_rows)
            logits.append(read(self._model, seen, tokens[-1:], [position], found.fresh).logits[-1])
        return tuple(tokens), torch.stack(logits).float()

    def _score(self, one: Prepared, codec: Codec, answer: Sequence[int], raw: torch.Tensor) -> CodecScore:
        units, written = [], 0
        for unit in one.arrangement.units:
            kv, num_bytes = self._coded(unit.kv, codec)
            units.append(replace(unit, kv=kv))
            written += num_bytes
        found = look(self._model, replace(one.arrangement, units=tuple(units)), PLAIN)
        logits = logits_of(self._model, found, PLAIN, answer)
        same = float((raw.argmax(-1) == logits.argmax(-1)).float().mean())
        return CodecScore(codec.name, written / one.num_rows, divergence(raw, logits), same)

    def _coded(self, kv: KV, codec: Codec) -> tuple[KV, int]:
        """The rows as they come back, and the bytes that were written."""
        layers, written = [], 0
        for layer, spec in zip(kv.layers, self._model.specs, strict=True):
            heads, _, key_size = layer.keys.shape
            shape, dtype = (heads, key_size, layer.values.shape[2]), layer.keys.dtype
            written += sum(part.num_bytes for part in codec.parts(shape, kv.num_tokens, dtype))
            layers.append(codec.unpack(codec.pack(layer, spec.rotation), dtype, spec.rotation))
        return KV(kv.tokens, tuple(layers)), written


def _mean(found: Sequence[CodecScore]) -> CodecScore:
    return CodecScore(
        found[0].name,
        fmean(score.bytes_per_token for score in found),
        fmean(score.kl for score in found),
        fmean(score.top1 for score in found),
    )


def smallest(scores: Sequence[CodecScore], max_kl: float) -> CodecScore | None:
    """The codec that writes least of those within the budget; None without scores."""
    able = [score for score in scores if score.kl <= max_kl or score.name == "raw"]
    return min(able, key=lambda score: (score.bytes_per_token, score.kl), default=None)
