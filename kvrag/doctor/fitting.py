"""The codec that writes least of those that lose little enough, measured on a collection's own texts."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvrag.engine import Engine
from kvrag.errors import ConfigError
from kvrag.prompt import RagPrompt
from kvrag.trial.choice import check_max_kl, scores_on
from kvrag.trial.codecs import CodecScore, smallest
from kvrag.trial.samples import Case

_NUM_DOCUMENTS = 4
_WORDS = 8


@dataclass(frozen=True, slots=True)
class CodecFit:
    """What was measured, and what follows.

    Attributes:
        codec: name of the one to take: "raw" where no other is within the budget, or nothing could be
            measured.
        max_kl: the budget, in nats.
        questions: how many prompts it was measured on.
        scores: what each codec loses and how much it writes.
    """

    codec: str
    max_kl: float
    questions: int
    scores: tuple[CodecScore, ...]


def fit_codec(
    engine: Engine,
    texts: Sequence[str],
    *,
    max_kl: float,
    form: RagPrompt | None = None,
    questions: int = 4,
) -> CodecFit:
    """Measure the codecs on prompts over sampled texts, and have the engine write by the one that fits.

    Each prompt asks about the beginning of one of its documents; compared are the distributions of the tokens
    that follow, against rows as they are. `Engine.use_codec` says what changing the codec means.

    Args:
        engine: the model.
        texts: chunks of a collection.
        max_kl: what a codec may lose, in nats, mean over tokens.
        form: of the prompts; None: the one of the model's template.
        questions: how many prompts.

    Raises:
        ConfigError: the budget is negative, or no prompts are wanted.
    """
    check_max_kl(max_kl)
    if questions < 1:
        raise ConfigError(f"questions={questions}: expected at least 1")
    form = form or engine.encoder().prompt
    asked = list(_cases([text for text in dict.fromkeys(texts) if text.strip()], questions))
    count, scores = engine.call(lambda: scores_on(engine.model, form, asked))
    best = smallest(scores, max_kl)
    fit = CodecFit("raw" if best is None else best.name, max_kl, count, scores)
    engine.use_codec(fit.codec)
    return fit


def _cases(texts: Sequence[str], count: int) -> Iterator[Case]:
    """Prompts over texts drawn alike whenever they are drawn."""
    rng = random.Random(0)
    for _ in range(count if len(texts) > 1 else 0):
        chosen = rng.sample(texts, min(_NUM_DOCUMENTS, len(texts)))
        gold = rng.randrange(len(chosen))
        words = " ".join(chosen[gold].split()[:_WORDS])
        yield Case(tuple(chosen), f"What follows after these words: {words}?", gold)
