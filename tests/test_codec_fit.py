"""A codec chosen by what it loses on a collection's own texts."""

from __future__ import annotations

import pytest

from kvrag.config import Sampling
from kvrag.doctor import fit_codec
from kvrag.engine import Engine
from kvrag.errors import ConfigError
from kvrag.store.memory import MemoryStore
from kvrag.testing.models import tiny

MODEL = tiny()
TEXTS = [
    f"The {what} of Varn was built in {year}." for year, what in enumerate("mill tower pier".split(), 1871)
]


def test_the_smallest_codec_within_the_budget_is_taken() -> None:
    with Engine(MODEL) as engine:
        fit = fit_codec(engine, TEXTS, max_kl=1e9, questions=2)
        assert fit.questions == 2
        least = min(fit.scores, key=lambda score: score.bytes_per_token)
        assert fit.codec == engine.codec == least.name != "raw"
        strict = fit_codec(engine, TEXTS, max_kl=0.0, questions=2)
        assert strict.codec == engine.codec == "raw"
        losses = sorted(score.kl for score in fit.scores)
        between = fit_codec(engine, TEXTS, max_kl=losses[1], questions=2)
        assert next(s.kl for s in between.scores if s.name == between.codec) <= losses[1]
        assert between.scores == fit.scores  # the same prompts again


def test_texts_that_make_no_prompt_leave_rows_as_they_are() -> None:
    with Engine(MODEL, codec="int8") as engine:
        fit = fit_codec(engine, ["", "alone", "alone"], max_kl=1.0)
        assert (fit.codec, fit.questions, fit.scores, engine.codec) == ("raw", 0, (), "raw")
        with pytest.raises(ConfigError, match="max_kl"):
            fit_codec(engine, TEXTS, max_kl=-1.0)
        with pytest.raises(ConfigError, match="codec"):
            engine.use_codec("none")


def test_entries_of_the_codec_before_are_not_found() -> None:
    store = MemoryStore()
    prompt = f"Read. {TEXTS[0]} Why?"
    with Engine(MODEL, store) as engine:
        for codec, is_hit in (("raw", False), ("int8", False), ("int8", True), ("raw", True)):
            engine.use_codec(codec)
            answer = engine.answer(prompt, TEXTS[:1], prefix="Read. ", sampling=Sampling(max_new_tokens=2))
            assert [d.is_hit for d in answer.documents] == [is_hit]
    assert len(list(store.ids())) == 2
