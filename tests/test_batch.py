"""Many callers at once: each gets the answer it would get alone, and nothing of anybody else."""

from __future__ import annotations

import asyncio
import gc
import threading
import tracemalloc
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from kvrag.answer import Answer
from kvrag.config import Sampling
from kvrag.constrain import regex
from kvrag.engine import Engine
from kvrag.errors import ConfigError, ContextOverflow, EngineClosed, GenerationCancelled, InputError
from kvrag.focus.policy import (
    PLAIN,
    Policy,
    SecondLook,
    ape,
    cacheblend,
    cachefocus,
    epic,
    naive,
    query_driven,
)
from kvrag.focus.pruning import Pruning
from kvrag.fresh import FreshRows
from kvrag.model import Model
from kvrag.passes import Passes
from kvrag.prefill import Want
from kvrag.streams import AnswerStream
from kvrag.testing.models import tiny, tiny_tokenizer

PREFIX = "Read this.\n\n"
TOWNS = ["Varn", "Mirrow", "Lindal", "Osted", "Skelde", "Brask", "Holm", "Eskild", "Torne", "Ulvik"]


@cache
def model(family: str = "llama") -> Model:
    return tiny(family)


def documents(number: int, count: int = 3) -> dict[str, str]:
    """Texts that no other request has, by names that tell whose they are."""
    return {
        f"{number}-{i}": f"The {'old ' * i}lighthouse of {TOWNS[number]} is of {1800 + 7 * number + i}."
        for i in range(count)
    }


def request(number: int, policy: Policy = PLAIN, count: int = 3, **sampling: Any) -> dict[str, Any]:
    """Arguments of `Engine.stream`."""
    chunks = documents(number, count)
    settings: dict[str, Any] = {"max_new_tokens": 6 + number, "ignore_eos": True, **sampling}
    return {
        "prompt": f"{PREFIX}{' and '.join(chunks.values())} Why {TOWNS[number]}?",
        "chunks": chunks,
        "prefix": PREFIX,
        "policy": policy,
        "sampling": Sampling(**settings),
    }


@contextmanager
def held(engine: Engine) -> Iterator[None]:
    """Nothing begins before the block ends."""
    begin = threading.Event()
    waiting = engine._worker.submit(lambda: iter([begin.wait(60)]))
    try:
        yield
    finally:
        begin.set()
    assert list(waiting) == [True]


def finished(stream: AnswerStream) -> Answer:
    for _ in stream:
        pass
    assert stream.answer is not None
    return stream.answer


def alone(engine: Engine, asked: Mapping[str, Any]) -> Answer:
    return finished(engine.stream(**asked))


def assert_same(found: Answer, expected: Answer) -> None:
    assert found.tokens == expected.tokens
    assert (found.text, found.finish_reason, found.policy) == (
        expected.text,
        expected.finish_reason,
        expected.policy,
    )
    assert found.plan.tokens == expected.plan.tokens
    assert [d.key for d in found.documents] == [d.key for d in expected.documents]
    for mine, theirs in zip(found.documents, expected.documents, strict=True):
        assert mine.mass == pytest.approx(theirs.mass, abs=1e-5)
        assert mine.focus == pytest.approx(theirs.focus, abs=1e-4)
        assert mine.question_mass == pytest.approx(theirs.question_mass, abs=1e-5)
        assert (mine.dropped_at, mine.is_read) == (theirs.dropped_at, theirs.is_read)
    for one, other in zip(found.logprobs or (), expected.logprobs or (), strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """How many tokens each request had in each pass."""
    seen: list[list[int]] = []
    run = Passes.run

    def counted(self: Passes, wants: Sequence[Want]) -> Any:
        seen.append([len(want.tokens) for want in wants])
        return run(self, wants)

    monkeypatch.setattr(Passes, "run", counted)
    return seen


MIXED = [
    request(0),
    request(1, cachefocus(keep=1)),
    request(2, epic(2), logprobs=2),
    request(3, query_driven(0.3), temperature=1.3, seed=5),
    request(4, Policy(second_look=SecondLook(after=2, keep=1), pruning=Pruning(keep=2), per_layer=True)),
    request(5, ape()),
    request(6, cacheblend(0.4), constraint=regex("[a-z ]{12}")),
    request(7, Policy(spans=True), repetition_penalty=1.4),
]


def test_requests_of_every_kind_are_answered_as_alone(passes: list[list[int]]) -> None:
    with Engine(model()) as engine:
        expected = [alone(engine, asked) for asked in MIXED]
        assert max(map(len, passes)) == 1
        passes.clear()
        with held(engine):
            streams = engine.batch(MIXED)
        found = [finished(stream) for stream in streams]
    for mine, theirs in zip(found, expected, strict=True):
        assert_same(mine, theirs)
    for number, mine in enumerate(found):
        assert {d.key for d in mine.documents} == set(documents(number))
    assert max(map(len, passes)) == 8
    assert Counter(map(len, passes))[1] < len(passes) / 2


@pytest.mark.parametrize("family", ["mistral-window", "gemma2", "gpt_oss", "deepseek_v3", "smollm3"])
def test_other_families_too(family: str) -> None:
    asked = [request(n, count=1 + n % 3) for n in range(4)]
    with Engine(model(family)) as engine:
        expected = [alone(engine, one) for one in asked]
        with held(engine):
            streams = engine.batch(asked)
        for stream, theirs in zip(streams, expected, strict=True):
            assert_same(finished(stream), theirs)


def test_some_fail_and_some_are_cancelled_and_the_others_do_not_notice() -> None:
    """Prompts that are too long, callers who leave before it begins, and in the middle."""
    small = Model(model().network, tiny_tokenizer(), name="small", max_length=150)
    good = [request(n, count=1, **({"logprobs": 1} if n else {})) for n in range(4)]
    too_long = {**request(4, naive(), count=1), "prompt": documents(4, 1)["4-0"] + "b" * 200}
    no_room = {**request(5, count=2, max_new_tokens=1), "prompt": "b" * 200}
    endless = request(6, count=1, max_new_tokens=4000)
    with Engine(small) as engine:
        expected = [alone(engine, asked) for asked in good]
        with held(engine):
            streams = engine.batch([good[0], too_long, good[1], endless, no_room, good[2], endless, good[3]])
            streams[6].cancel()
        next(iter(streams[3]))
        streams[3].cancel()
        found = [finished(streams[i]) for i in (0, 2, 5, 7)]
        for stream, error in ((1, ContextOverflow), (4, ContextOverflow), (6, GenerationCancelled)):
            with pytest.raises(error):
                finished(streams[stream])
        with pytest.raises(GenerationCancelled):
            finished(streams[3])
    for mine, theirs in zip(found, expected, strict=True):
        assert_same(mine, theirs)


def test_a_damaged_cache_is_mended_while_others_write(tmp_path: Path) -> None:
    """It shows in the middle of a shared pass, where a layer is read for the first time."""
    asked = [request(0, max_new_tokens=30), request(1, cachefocus(keep=1)), request(2)]
    with Engine(model(), tmp_path) as engine:
        expected = [alone(engine, one) for one in asked]
        theirs = {d.key for d in expected[1].documents}
        assert theirs == set(documents(1))
    for file in tmp_path.glob("??/*.safetensors"):
        raw = bytearray(file.read_bytes())
        raw[-5] ^= 0xFF
        file.unlink()
        file.write_bytes(bytes(raw))
    with Engine(model(), tmp_path) as engine:
        with held(engine):
            streams = engine.batch(asked)
        for stream, answer in zip(streams, expected, strict=True):
            assert finished(stream).tokens == answer.tokens


def test_threads_and_tasks_get_their_own() -> None:
    asked = [request(n) for n in range(6)]

    async def text(engine: Engine, one: Mapping[str, Any]) -> str:
        return "".join([piece async for piece in engine.stream(**one)])

    async def main(engine: Engine) -> list[str]:
        return await asyncio.gather(*(text(engine, one) for one in asked))

    with Engine(model()) as engine:
        expected = [alone(engine, one).text for one in asked]
        assert asyncio.run(main(engine)) == expected
        found: dict[int, str] = {}
        threads = [
            threading.Thread(target=lambda n=n: found.update({n: alone(engine, asked[n]).text}))  # type: ignore[misc]
            for n in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert [found[n] for n in range(6)] == expected


# ---- who runs


def test_no_more_than_allowed_are_under_way(passes: list[list[int]]) -> None:
    asked = [request(n, count=1, max_new_tokens=4) for n in range(5)]
    with Engine(model(), max_batch=2) as engine:
        with held(engine):
            streams = engine.batch(asked)
        assert engine.encode(["Not in line."])[0].num_tokens
        answers = [finished(stream) for stream in streams]
    assert [len(answer.tokens) for answer in answers] == [4] * 5
    assert max(map(len, passes)) == 2


@pytest.mark.parametrize("wrong", [{"max_batch": 0}, {"pass_tokens": 0}])
def test_limits_below_one_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))}.*at least 1"):
        Engine(model(), **wrong)  # type: ignore[arg-type]


def test_a_long_prompt_does_not_hold_up_an_answer(passes: list[list[int]]) -> None:
    """Its passes have the other's next token in them."""
    long = "the " * 150
    with Engine(model(), pass_tokens=16) as engine:
        expected = [alone(engine, request(1, max_new_tokens=40)), alone(engine, {"prompt": long})]
        stream = engine.stream(**request(1, max_new_tokens=40))
        next(iter(stream))
        passes.clear()
        late = engine.stream(long)
        answers = [finished(stream), finished(late)]
    for mine, theirs in zip(answers, expected, strict=True):
        assert_same(mine, theirs)
    strides = [sizes for sizes in passes if max(sizes) > 1]
    assert len(strides) >= 9
    assert all(max(sizes) <= 16 for sizes in passes)
    assert sum(1 in sizes for sizes in strides) >= len(strides) - 2


def test_answers_go_on_while_documents_are_encoded() -> None:
    order: list[str] = []
    with Engine(model(), token_budget=8) as engine:
        stream = engine.stream(**request(0, max_new_tokens=2000))
        pieces = iter(stream)
        next(pieces)
        before = stream._stream._job.mailbox.qsize()
        engine.encode([f"Text {i} is here." for i in range(12)])
        order += ["piece"] * (stream._stream._job.mailbox.qsize() - before)
        stream.cancel()
    assert len(order) >= 6


def test_a_cancelled_answer_leaves_its_rows_at_once() -> None:
    def alive() -> int:
        return sum(type(x) is FreshRows for x in gc.get_objects())

    gc.collect()
    before = alive()
    with Engine(model()) as engine:
        never_copied = Policy(spans=True)
        streams = [engine.stream(**request(n, never_copied, max_new_tokens=4000)) for n in range(3)]
        for stream in streams:
            next(iter(stream))
        engine.call(gc.collect)
        assert alive() == before + 3
        streams[1].cancel()
        next(iter(streams[0]))
        engine.call(lambda: None)
        engine.call(lambda: None)
        engine.call(gc.collect)
        assert alive() == before + 2
        for stream in streams:
            stream.cancel()


def test_closing_ends_all_of_them() -> None:
    engine = Engine(model(), max_batch=2)
    streams = engine.batch([request(n, max_new_tokens=4000) for n in range(4)])
    next(iter(streams[0]))
    engine.close()
    for stream in streams:
        with pytest.raises(EngineClosed):
            finished(stream)


def test_a_batch_with_a_bad_request_begins_none() -> None:
    with Engine(model()) as engine:
        with held(engine), pytest.raises(InputError, match="list of texts"):
            engine.batch([request(0, max_new_tokens=4000), {"prompt": "Why?", "chunks": "one text"}])
        assert engine.call(lambda: True)
        assert alone(engine, request(1)).tokens


# ---- long runs


def kept() -> Counter[str]:
    """Tensors, and objects of ours, that are alive."""
    gc.collect()
    found: Counter[str] = Counter()
    for thing in gc.get_objects():
        kind = type(thing)
        if kind is torch.Tensor or str(kind.__module__).startswith("kvrag"):
            found[kind.__name__] += 1
    return found


def test_memory_does_not_grow_from_request_to_request() -> None:
    """Different questions and settings, some cancelled, some refused: 200 of them leave nothing behind."""
    with Engine(model()) as engine:

        def ask(turn: int) -> None:
            asked = MIXED[turn % len(MIXED)]
            asked = {**asked, "prompt": f"{asked['prompt']} {turn}"}
            settings = {"max_new_tokens": 2, "seed": turn, "constraint": asked["sampling"].constraint}
            stream = engine.stream(**{**asked, "sampling": Sampling(**settings)})
            if turn % 5 == 4:
                stream.cancel()
                with pytest.raises(GenerationCancelled):
                    finished(stream)
                return
            finished(stream)
            if turn % 20 == 1:
                with pytest.raises(InputError):
                    engine.answer("")

        for turn in range(40):
            ask(turn)
        engine.call(gc.collect)
        before = kept()
        tracemalloc.start()
        try:
            for turn in range(40, 60):
                ask(turn)
            gc.collect()
            first, _ = tracemalloc.get_traced_memory()
            for turn in range(60, 200):
                ask(turn)
            gc.collect()
            last, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        engine.call(gc.collect)
        after = kept()
    grown = {name: n - before[name] for name, n in after.items() if n > before[name] + 5}
    assert grown == {}
    assert (last - first) / 140 < 4096  # tokens of different questions are remembered, up to a number


def test_the_event_loop_ticks_while_an_answer_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model waits for the loop before every pass: a loop that waits for the model never ends."""
    allowed = threading.Semaphore(0)
    run, num_passes, ticks = Passes.run, 0, 0

    def waiting(self: Passes, wants: Sequence[Want]) -> Any:
        nonlocal num_passes
        assert allowed.acquire(timeout=60)
        num_passes += 1
        return run(self, wants)

    async def beat() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0)
            ticks += 1
            if ticks % 20 == 0:
                allowed.release()

    async def main(engine: Engine) -> Answer | None:
        heart = asyncio.create_task(beat())
        stream = engine.stream(**request(0))
        text = "".join([piece.text async for piece in stream.aevents()])
        heart.cancel()
        assert stream.answer is not None
        assert stream.answer.text == text
        return stream.answer

    with Engine(model()) as engine:
        expected = alone(engine, request(0))
        monkeypatch.setattr(Passes, "run", waiting)
        answer = asyncio.run(asyncio.wait_for(main(engine), 120))
    assert answer is not None
    assert answer.tokens == expected.tokens
    assert num_passes >= len(answer.tokens)
    assert ticks >= 20 * num_passes
