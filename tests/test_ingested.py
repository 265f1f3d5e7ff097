"""Texts that adapters tell an engine of."""

from __future__ import annotations

from functools import cache

import pytest

from kvrag import Engine
from kvrag.ingested import engines, key_of, known_of
from kvrag.known import KnownTexts
from kvrag.model import Model
from kvrag.testing.models import tiny

TEXT = "The lighthouse of Varn was built in 1871 from the stone of the old harbour."


@cache
def model() -> Model:
    return tiny()


@pytest.fixture
def engine() -> Engine:
    return Engine(model())


def test_a_text_is_known_until_it_was_removed_as_often_as_it_was_added(engine: Engine) -> None:
    known = known_of(engine)
    known.add([TEXT, TEXT])
    known.remove([TEXT])
    assert TEXT in known
    known.remove([TEXT])
    assert TEXT not in known


def test_a_removed_text_is_not_known_even_if_it_was_seen(engine: Engine) -> None:
    known = known_of(engine)
    known.see([TEXT])
    assert TEXT in known
    known.add([TEXT])
    known.remove([TEXT])
    assert TEXT not in known


def test_the_white_space_around_a_text_is_not_part_of_its_name() -> None:
    assert key_of(f"\n{TEXT} ") == key_of(TEXT) != key_of(TEXT + ".")


def test_known_texts_are_found_in_prompts_that_name_no_chunks(engine: Engine) -> None:
    known_of(engine).add([TEXT])
    answer = engine.answer(f"Read this. {TEXT} When?")
    assert [use.key for use in answer.documents] == [key_of(TEXT)]


def test_each_engine_knows_its_own_texts(engine: Engine) -> None:
    with Engine(model()) as other:
        known_of(engine).add([TEXT])
        assert TEXT not in known_of(other)
        assert {engine, other} <= set(engines())
    assert other not in engines()


def test_another_registry_begins_anew(engine: Engine) -> None:
    known_of(engine).add([TEXT])
    engine.known = KnownTexts(("canonical",))
    assert TEXT not in known_of(engine)
