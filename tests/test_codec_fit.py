"""A codec chosen by what it loses on a collection's own texts."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from kvrag.config import Sampling
from kvrag.doctor import fit_codec
from kvrag.engine import Engine
from kvrag.errors import ConfigError
from kvrag.model import Model
from kvrag.store.disk import DiskStore
from kvrag.store.memory import MemoryStore
from kvrag.testing.models import tiny, tiny_model, tiny_tokenizer
from kvrag.trial import choice

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


# --- codec="auto" ---------------------------------------------------------------------------------


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the models that were measured, each time that they were."""
    seen: list[str] = []
    real = choice.scores_on

    def count(model: Model, *rest: Any) -> Any:
        seen.append(model.name)
        return real(model, *rest)

    monkeypatch.setattr(choice, "scores_on", count)
    monkeypatch.setattr(choice, "_QUESTIONS", 2)
    return seen


def chosen(store: Any, max_kl: float | None, model: Model = MODEL) -> str:
    with Engine(model, store, codec="auto", max_kl=max_kl) as engine:
        assert engine.fingerprint().codec == engine.codec
        return engine.codec


def test_auto_measures_once_for_a_store_and_a_model(tmp_path: Path, trials: list[str]) -> None:
    folder = tmp_path / "caches"
    first = chosen(folder, 1e9)
    assert first not in ("raw", "auto")
    assert len(trials) == 1
    assert chosen(DiskStore(folder), 1e9) == first  # another start
    scores = next(iter(json.loads((folder / choice.FILE).read_text()).values()))
    for limit in sorted(score["kl"] for score in scores):  # and other budgets
        able = [s for s in scores if s["kl"] <= limit or s["name"] == "raw"]
        least = min(able, key=lambda s: (s["bytes_per_token"], s["kl"]))
        assert chosen(folder, limit) == least["name"]
    assert len(trials) == 1
    other = tiny(seed=1)
    assert chosen(folder, 1e9, other) == first
    assert len(trials) == 2
    assert chosen(folder, 1e9) == first
    assert chosen(folder, 1e9, other) == first
    assert len(trials) == 2


def test_auto_goes_by_what_the_doctor_measures(tmp_path: Path, trials: list[str]) -> None:
    from kvrag.doctor import examine

    with Engine(MODEL, tmp_path / "caches", codec="auto", max_kl=0.5) as engine:
        report = examine(engine, questions=2, max_kl=0.5)
        assert report.codec == engine.codec
    kept = next(iter(json.loads((tmp_path / "caches" / choice.FILE).read_text()).values()))
    assert {s["name"]: s["kl"] for s in kept} == {s.name: s.kl for s in report.codecs}


def test_auto_without_a_folder_remembers_nothing(trials: list[str]) -> None:
    for store in (None, MemoryStore()):
        assert chosen(store, None) in choice.CODECS
    assert len(trials) == 2


def test_auto_keeps_rows_as_they_are_where_nothing_smaller_is_good_enough(
    tmp_path: Path, trials: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert chosen(tmp_path / "caches", 0.0) == "raw"
    assert "no codec that writes less than raw rows loses at most 0 nats (fp8 " in caplog.text


@pytest.mark.parametrize("raw", ["", "[]", "{", '{"KEY": 7}', '{"KEY": [{"name": "zip"}]}'])
def test_a_file_that_says_nothing_is_measured_again(raw: str, tmp_path: Path, trials: list[str]) -> None:
    first = chosen(tmp_path, 1e9)
    file = tmp_path / choice.FILE
    key = next(iter(json.loads(file.read_text())))
    file.write_text(raw.replace("KEY", key))
    assert chosen(tmp_path, 1e9) == first
    assert len(trials) == 2


def test_auto_that_cannot_work(tmp_path: Path) -> None:
    narrow = Model(tiny_model("llama"), tiny_tokenizer(), name="narrow", max_length=24)
    with pytest.raises(ConfigError, match=r"max_kl=0.1 chooses a codec, and codec='int8' names one"):
        Engine(MODEL, codec="int8", max_kl=0.1)
    with pytest.raises(ConfigError, match=r"max_kl=-1: expected 0 nats or more"):
        Engine(MODEL, codec="auto", max_kl=-1)
    with pytest.raises(ConfigError, match=r"nothing can be measured .* window of 24 tokens; name a codec"):
        Engine(narrow, tmp_path / "caches", codec="auto")
    assert not (tmp_path / "caches").exists()
