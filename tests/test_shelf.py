"""Documents and their caches in step, without a framework."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvrag import ConfigError, Engine
from kvrag.companion import Companion
from kvrag.ingested import known_of
from kvrag.prompt import RagPrompt
from kvrag.records import Record
from kvrag.shelf import Shelf
from kvrag.testing.models import tiny

FORM = RagPrompt("Use this.")


@pytest.fixture(scope="module")
def bare() -> Iterator[Engine]:
    with Engine(tiny()) as engine:
        yield engine


@pytest.fixture
def engine(tmp_path: Path, bare: Engine) -> Iterator[Engine]:
    with Engine(bare.model, tmp_path / "store") as made:
        yield made


@pytest.fixture
def shelf(tmp_path: Path, engine: Engine) -> Iterator[Shelf]:
    made = Shelf(tmp_path / "shelf", engine, FORM, batch_size=2)
    yield made
    made.close()


def records(count: int) -> dict[str, Record]:
    return {f"n{n}": Record(f"The lighthouse number {n} has a red door.", {"n": n}) for n in range(count)}


def entries(engine: Engine) -> set[str]:
    assert engine.store is not None
    return set(engine.store.ids())


def test_records_come_back_and_their_texts_are_told(tmp_path: Path, engine: Engine) -> None:
    told: list[list[str]] = []
    steps: list[tuple[int, int]] = []
    shelf = Shelf(tmp_path / "shelf", engine, FORM, retrieved=told.append, batch_size=2)
    kept = records(5)
    shelf.set(kept, lambda done, total: steps.append((done, total)))
    assert steps == [(2, 5), (4, 5), (5, 5)]
    assert shelf.get(["n3", "none", "n3"]) == [kept["n3"], None, kept["n3"]]
    assert told == [[kept["n3"].text]]
    assert [name for page in shelf.names("n") for name in page] == sorted(kept)
    shelf.close()
    assert shelf.get(["n0"]) == [kept["n0"]]  # opened again when it is needed
    shelf.close()


def test_what_was_read_before_an_interruption_stays(
    shelf: Shelf, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shelf.set(records(5), stop)
    assert [name for page in shelf.names() for name in page] == ["n0", "n1"]
    assert len(entries(engine)) == 2
    assert engine.store is not None
    before, built, put = entries(engine), [], engine.store.put
    monkeypatch.setattr(engine.store, "put", lambda key, kv: (built.append(key.id), put(key, kv)))
    shelf.set(records(5))
    assert len(built) == 3
    assert entries(engine) == before | set(built)


def test_after_a_crash_what_was_prepared_is_nobodys(
    shelf: Shelf, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf.set(records(1))
    before = entries(engine)
    with monkeypatch.context() as patch:
        patch.setattr(Companion, "refer", _crash)
        patch.setattr(Companion, "drop", _crash)
        with pytest.raises(SystemExit):
            shelf.set(records(3))
    assert len(entries(engine)) == 2  # of n0, which was there, and n1
    report = shelf.reconcile()
    assert (report.records, report.built, report.removed) == (1, 0, 1)
    assert entries(engine) == before


def _crash(*_: Any) -> None:
    raise SystemExit


def test_a_lost_store_is_built_again(shelf: Shelf, engine: Engine) -> None:
    shelf.set(records(3))
    assert engine.store is not None
    for name in entries(engine):
        engine.store.delete(name)
    steps: list[tuple[int, int]] = []
    report = shelf.reconcile(lambda done, total: steps.append((done, total)))
    assert (report.records, report.built, report.removed, report.unencodable) == (3, 3, 0, ())
    assert steps == [(2, 3), (3, 3)]
    assert len(entries(engine)) == 3


def test_deleting_is_enough_to_be_forgotten_however_often_it_was_opened(
    shelf: Shelf, engine: Engine, tmp_path: Path
) -> None:
    kept = records(2)
    shelf.set(kept)
    again = Shelf(tmp_path / "shelf", engine, FORM)
    again.close()
    shelf.delete(["n0"])
    assert [record.text in known_of(engine) for record in kept.values()] == [False, True]


def test_settings_that_cannot_work_are_refused(tmp_path: Path, bare: Engine) -> None:
    with pytest.raises(ConfigError, match="batch_size=0: expected at least 1"):
        Shelf(tmp_path / "shelf", bare, FORM, batch_size=0)
    assert not (tmp_path / "shelf").exists()
    storeless = Shelf(tmp_path / "shelf", bare, FORM)
    storeless.set(records(1))
    with pytest.raises(ConfigError, match="no store to keep caches in"):
        storeless.reconcile()
    storeless.close()
