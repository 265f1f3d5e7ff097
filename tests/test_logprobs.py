"""Log-probabilities and pieces: the model's own distribution, and every token told once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvrag.answer import Answer, Piece
from kvrag.config import Sampling
from kvrag.engine import Engine
from kvrag.errors import ConfigError
from kvrag.model import Model
from kvrag.testing.models import tiny
from kvrag.written import Written

PROMPT = "The lighthouse of Varn was built in 1871. Why?"
DOCUMENT = "The lighthouse of Varn was built in 1871."


@cache
def model() -> Model:
    return tiny()


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(model()) as made:
        yield made


def full_logprobs(tokens: tuple[int, ...], num_new: int) -> torch.Tensor:
    """[num_new, V]: of the stock model reading everything at once."""
    with torch.no_grad():
        logits = model().network(torch.tensor([tokens]), use_cache=False).logits[0]
    return logits[-num_new - 1 : -1].float().log_softmax(-1)


SETTINGS = {
    "greedy": Sampling(max_new_tokens=9, logprobs=3, ignore_eos=True),
    "sampled": Sampling(max_new_tokens=9, logprobs=3, temperature=1.7, top_k=50, seed=3, ignore_eos=True),
    "penalised": Sampling(max_new_tokens=9, logprobs=3, repetition_penalty=1.8, ignore_eos=True),
}


@pytest.mark.parametrize("sampling", SETTINGS.values(), ids=SETTINGS)
def test_they_are_those_of_the_model_before_anything_shapes_the_choice(
    engine: Engine, sampling: Sampling
) -> None:
    answer = engine.answer(PROMPT, [DOCUMENT], sampling=sampling)
    assert len(answer.documents) == 1
    assert answer.logprobs is not None
    assert [x.token for x in answer.logprobs] == list(answer.tokens)
    expected = full_logprobs(answer.plan.tokens + answer.tokens, len(answer.tokens))
    for found, row in zip(answer.logprobs, expected, strict=True):
        assert found.logprob == pytest.approx(float(row[found.token]), abs=1e-4)
        best = row.topk(3)
        assert [x.token for x in found.top] == best.indices.tolist()
        assert [x.logprob for x in found.top] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert all(x.top == () for x in found.top)
        assert found.text == model().text.tokenizer.decode([found.token])


def test_they_do_not_change_the_answer(engine: Engine) -> None:
    plain = engine.answer(PROMPT, sampling=Sampling(max_new_tokens=9))
    told = engine.answer(PROMPT, sampling=Sampling(max_new_tokens=9, logprobs=0))
    assert plain.tokens == told.tokens
    assert plain.logprobs is None
    assert told.logprobs is not None
    assert all(x.top == () for x in told.logprobs)


def test_more_than_the_vocabulary_is_the_vocabulary(engine: Engine) -> None:
    answer = engine.answer(PROMPT, sampling=Sampling(max_new_tokens=1, logprobs=10_000))
    assert answer.logprobs is not None
    assert len(answer.logprobs[0].top) == model().network.config.vocab_size
    assert sum(torch.tensor([x.logprob for x in answer.logprobs[0].top]).exp()) == pytest.approx(1)


def test_a_negative_number_is_refused() -> None:
    with pytest.raises(ConfigError, match="logprobs is -1; expected 0 or more"):
        Sampling(logprobs=-1)


def test_special_tokens_have_names(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end mark is the last token, and no text."""
    first = engine.answer("Hi", sampling=Sampling(max_new_tokens=1)).tokens[0]
    monkeypatch.setattr(model().network.generation_config, "eos_token_id", first)
    stream = engine.stream("Hi", sampling=Sampling(max_new_tokens=4, logprobs=1))
    pieces = list(stream.events())
    assert stream.answer is not None
    assert stream.answer.finish_reason == "stop"
    assert sum((p.tokens for p in pieces), ()) == (first,)
    assert model().text.name(2) == "</s>"


# ---- pieces


def joined(pieces: list[Piece]) -> tuple[str, tuple[int, ...], list[int]]:
    tokens = sum((p.tokens for p in pieces), ())
    return "".join(p.text for p in pieces), tokens, [x.token for p in pieces for x in p.logprobs]


@pytest.mark.parametrize("stop", [(), "from the answer"], ids=["whole", "stopped"])
def test_pieces_are_the_text_and_the_tokens(engine: Engine, stop: object) -> None:
    whole = engine.answer(PROMPT, sampling=Sampling(max_new_tokens=40))
    stops = (whole.text[7:10],) if stop else ()
    sampling = Sampling(max_new_tokens=40, logprobs=1, stop=stops)
    stream = engine.stream(PROMPT, sampling=sampling)
    pieces = list(stream.events())
    answer = stream.answer
    assert answer is not None
    assert joined(pieces) == (answer.text, answer.tokens, list(answer.tokens))
    assert all(p.text for p in pieces[:-1])
    assert "".join(engine.stream(PROMPT, sampling=sampling)) == answer.text
    assert len(answer.text) == 7 if stop else len(answer.text) > 7

    async def read() -> list[Piece]:
        return [piece async for piece in engine.stream(PROMPT, sampling=sampling).aevents()]

    assert asyncio.run(read()) == pieces


def test_leaving_the_async_events_stops_the_answer(engine: Engine) -> None:
    async def read() -> Answer | None:
        stream = engine.stream(PROMPT, sampling=Sampling(max_new_tokens=4000, ignore_eos=True))
        async for piece in stream.aevents():
            assert piece.tokens
            break
        return stream.answer

    assert asyncio.run(read()) is None
    assert engine.answer("Hi", sampling=Sampling(max_new_tokens=2)).tokens


VOCABULARY = st.integers(0, 273)


@given(st.lists(VOCABULARY, max_size=25), st.lists(st.text("the ando\n", min_size=1), max_size=2))
def test_every_token_is_told_once_and_with_its_text(tokens: list[int], stop: list[str]) -> None:
    """Special tokens, pieces of characters, stop strings across tokens: whatever is written."""
    written, pieces = Written(model().text, stop), []
    for token in tokens:
        if (piece := written.add(token, ((token, -1.0),))) is not None:
            pieces.append(piece)
        if written.stopped:
            break
    so_far = joined(pieces)
    if (rest := written.finish()) is not None:
        pieces.append(rest)
    text, told, logprobs = joined(pieces)
    assert (text, list(told)) == (written.text, written.tokens)
    assert logprobs == written.tokens
    assert all(p.text for p in pieces[:-1])
    assert model().text.decode(so_far[1]) == text[: len(model().text.decode(so_far[1]))]
