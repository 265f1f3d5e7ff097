"""Engines that several hold, hints, caches beside somebody else's collection, budgets, calls."""

from __future__ import annotations

import copy
import gc
import logging
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrag import ConfigError, DiskStore, Engine, MemoryStore, StoreWriteError
from kvrag.budget import Budget
from kvrag.calling import CallWatch, closed
from kvrag.companion import Companion
from kvrag.prefetch import Prefetch
from kvrag.prompt import RagPrompt
from kvrag.shared import EngineSettings, SharedEngine, shared_engine
from kvrag.testing.models import tiny, tiny_tokenizer
from kvrag.text import Text

TEXTS = {"a": "The lighthouse of Varn was built in 1871.", "b": "A ferry crosses the Mirrow twice a day."}
TOOL = {"name": "look", "description": "", "parameters": {}}
CALL = '{"name": "look", "arguments": {"place": "Varn"}}'


# ---- engines


def test_equal_settings_are_one_engine_until_the_last_lets_go(tmp_path: Path) -> None:
    one = shared_engine(EngineSettings(store=tmp_path / "store"))
    two = shared_engine(EngineSettings(store=str(tmp_path / "." / "store")))
    assert two is one is copy.copy(one) is copy.deepcopy(one)
    other = shared_engine(EngineSettings(store=tmp_path / "store", codec="int8"))
    assert other is not one
    assert shared_engine(EngineSettings(store=tmp_path / "store", tiers=("canonical",))) is not one
    engine = one.engine
    del one
    gc.collect()
    assert not engine.is_closed
    del two
    gc.collect()
    assert engine.is_closed
    assert not other.engine.is_closed


def test_a_closed_engine_is_not_given_away() -> None:
    one = shared_engine(EngineSettings(codec="int4"))
    one.engine.close()
    assert shared_engine(EngineSettings(codec="int4")) is not one


def test_an_engine_that_is_lent_stays_open() -> None:
    with Engine(tiny()) as engine:
        share = SharedEngine(engine, own=False)
        assert copy.deepcopy(engine) is engine
        with pytest.raises(ConfigError, match="cannot be pickled; name model and store"):
            share.__reduce__()
        del share
        gc.collect()
        assert not engine.is_closed


# ---- the beginning that all conversations share


def test_the_templates_beginning_ends_before_the_white_space_of_the_first_text() -> None:
    assert Text(tiny_tokenizer()).opening == "<s><|system|>"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (None, ""),
        ("{% for m in messages %}[{{ m.content }}]{% endfor %}", "["),
        (
            "Today is {{ strftime_now('%d') }}.{% for m in messages %}[{{ m.content }}]{% endfor %}",
            "Today is",
        ),
        (
            "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
            "<{{ messages[0].role }}>{{ messages[0].content }}",
            "<user>",
        ),
        ("{{ raise_exception('never') }}", ""),
    ],
)
def test_the_beginning_of_other_templates(template: str | None, expected: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    assert Text(tokenizer).opening == expected


# ---- hints


def test_a_hint_loads_what_is_there_and_nothing_else() -> None:
    with Engine(tiny(), MemoryStore()) as engine:
        list(engine.stream_rendered(TEXTS["a"], TEXTS))
        prefetch = Prefetch(engine)
        assert prefetch.hint(list(TEXTS.values()))
        prefetch.wait()
        assert prefetch.loaded == 1
        assert not prefetch.hint([])
    assert not prefetch.hint([TEXTS["a"]])  # closed


# ---- caches beside a collection


def companion(engine: Engine, owner: str = "one") -> Companion:
    assert engine.store is not None
    return Companion(owner, engine.store, engine.encoder(RagPrompt("Read.\n")), batch_size=2)


def entries(engine: Engine) -> int:
    assert engine.store is not None
    return len(list(engine.store.ids()))


def test_entries_live_while_somebody_refers_to_them(tmp_path: Path) -> None:
    with Engine(tiny(), tmp_path) as engine:
        one, two = companion(engine), companion(engine, "two")
        assert one.hold(TEXTS) == []
        assert one.has(TEXTS["a"])
        two.hold({"x": TEXTS["a"]})
        assert entries(engine) == 2
        freed = one.hold({"a": TEXTS["b"]})
        assert len(freed) == 0  # "x" has it
        one.drop(["a", "b", "nobody"])
        assert entries(engine) == 1
        two.drop_all()
        assert entries(engine) == 0
        one.close()
        two.close()


def test_reconciling_builds_removes_and_tells(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    records = [*TEXTS.items(), ("long", "a" * 5000), ("empty", "")]
    with Engine(tiny(), tmp_path) as engine:
        kept = companion(engine)
        kept.hold({"gone": "A text that nobody has any more."})
        told = kept.reconcile(records, total=4, progress=lambda *at: seen.append(at))
        assert (told.records, told.built, told.removed) == (4, 2, 1)
        assert told.unencodable == ("long", "empty")
        assert seen == [(2, 4), (4, 4)]
        assert kept.reconcile(records, total=4).built == 0
        kept.close()


def test_a_store_that_refuses_costs_one_warning(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise StoreWriteError("the disk is full")

    with Engine(tiny(), DiskStore(tmp_path)) as engine:
        monkeypatch.setattr(engine.store, "put", refuse)
        kept = companion(engine)
        for _ in range(2):
            assert kept.hold(TEXTS) == []
        kept.close()
    assert [r.levelname for r in caplog.records if r.levelno >= logging.WARNING] == ["WARNING"]


def test_an_impossible_batch_is_refused() -> None:
    with Engine(tiny(), MemoryStore()) as engine, pytest.raises(ConfigError, match="batch_size=0"):
        Companion("one", MemoryStore(), engine.encoder(), batch_size=0)


# ---- budgets


@cache
def _engine() -> Engine:
    return Engine(tiny())


@given(st.lists(st.integers(0, 6000)), st.integers(1, 5000))
def test_what_fits_is_never_more_than_the_budget(lengths: list[int], limit: int) -> None:
    budget = Budget(_engine(), max_tokens=limit)
    kept = budget.fitting(lengths)
    assert kept == sorted(set(kept))
    assert sum(lengths[n] for n in kept) <= limit
    assert all(0 < lengths[n] <= 4096 for n in kept)
    first = next((n for n, length in enumerate(lengths) if 0 < length <= min(limit, 4096)), None)
    assert kept[:1] == ([] if first is None else [first])


def test_the_default_budget_leaves_room_for_the_rest() -> None:
    assert Budget(_engine(), answer_tokens=100).max_tokens == 4096 - 100 - 512
    assert Budget(_engine()).length(TEXTS["a"]) == len(_engine().model.text.tokenize(TEXTS["a"]))
    with pytest.raises(ConfigError, match="no tokens are left"):
        Budget(_engine(), answer_tokens=4000)


# ---- calls while they are written


@pytest.mark.parametrize(
    ("text", "shown", "calls"),
    [
        (CALL, "", 1),
        (f"  {CALL}\n{CALL}", "", 2),
        (f"I look. <tool_call>{CALL}</tool_call>", "I look.", 1),
        ("A text < that { is no call", "A text < that { is no call", 0),
        ('{"name": "jump", "arguments": {}}', '{"name": "jump", "arguments": {}}', 0),
        ("{ not JSON", "{ not JSON", 0),
        ("<tool_ca", "<tool_ca", 0),
        ("", "", 0),
    ],
)
@given(st.data())
def test_calls_are_told_from_text_however_they_come(
    text: str, shown: str, calls: int, data: st.DataObject
) -> None:
    watch, seen, at = CallWatch([TOOL]), "", 0
    while at < len(text):
        size = data.draw(st.integers(1, 9))
        seen += watch.push(text[at : at + size])
        at += size
    rest, found = watch.finish()
    assert (seen + rest).strip() == shown.strip()
    assert len(found) == calls
    assert "<tool_call>" not in seen


def test_text_is_not_held_back_without_need() -> None:
    assert CallWatch([TOOL]).push("A text") == "A text"
    assert CallWatch([]).push("{") == "{"


def test_objects_are_closed_and_strings_get_an_end_unless_they_say_otherwise() -> None:
    free = {"type": "string"}
    kept = {"type": "string", "enum": ["a"]}
    inner = {"type": "object", "properties": {"a": free, "b": kept}}
    open_one = {"type": "object", "properties": {"a": free}, "additionalProperties": True}
    schema = {"anyOf": [inner, open_one, {"type": "array", "items": free}, {"type": "object"}]}
    ended = {**free, "maxLength": 5}
    assert closed(schema, 5) == {
        "anyOf": [
            {**inner, "properties": {"a": ended, "b": kept}, "additionalProperties": False},
            {**open_one, "properties": {"a": ended}},
            {"type": "array", "items": ended},
            {"type": "object"},
        ]
    }
    assert closed(free) == free
