"""Archives beside an encrypted store: what chats have said is encrypted with its key."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from kvrag import Tenant
from kvrag.archive.archive import Archive
from kvrag.archive.rekey import rekey_archive
from kvrag.config import Sampling
from kvrag.engine import Engine
from kvrag.errors import ConfigError, InputError
from kvrag.index import Index
from kvrag.memory.window import Window
from kvrag.model import Model
from kvrag.reader import prose
from kvrag.reader.tokenizer import SYSTEM_CHAT
from kvrag.store.disk import DiskStore

KEY, OTHER = bytes(range(32)), bytes(32)
SHORT = Sampling(max_new_tokens=6)
FACT, QUESTION, ANSWER = "Bron Poberg lives in Vouport.", "Where does Bron Poberg live?", "Vouport"
ACME = Tenant("acme", b"a secret of acme, 32 bytes long.")


@pytest.fixture(scope="module")
def reader() -> Model:
    return Model.load()


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVRAG_STORE_KEY", raising=False)


@pytest.fixture
def engine(reader: Model, tmp_path: Path) -> Iterator[Engine]:
    with Engine(reader, DiskStore(tmp_path / "store", key=KEY)) as engine:
        yield engine


@pytest.fixture
def archive(engine: Engine, tmp_path: Path) -> Iterator[Archive]:
    with engine.archive(tmp_path / "chats") as archive:
        yield archive


def bytes_of(folder: Path) -> bytes:
    return b"".join(file.read_bytes() for file in folder.rglob("*") if file.is_file())


def test_what_was_said_comes_back_and_cannot_be_read(
    engine: Engine, archive: Archive, tmp_path: Path
) -> None:
    session = engine.session(Window(128), name="jane the first", system=SYSTEM_CHAT, archive=archive)
    session.send(FACT, sampling=SHORT)
    for number in range(14):
        session.send(prose.TALK[number % len(prose.TALK)][0], sampling=SHORT)
    answer = session.send(QUESTION)
    assert ANSWER in answer.text
    assert answer.memory is not None
    assert any(ANSWER in span.text and span.is_hit for span in answer.memory.spans)
    assert archive.sessions().keys() == {"jane the first"}
    assert archive.spans("jane the first")[0].text.startswith(FACT)
    raw = bytes_of(tmp_path / "chats") + bytes_of(tmp_path / "store")
    for text in ("Vouport", "Poberg", "jane"):
        assert text.encode() not in raw
        assert text.lower().encode() not in raw
    (first, *_) = session.forgotten()
    assert first.archived == 1.0
    copy = session.fork("bert")
    assert [span.text for span in archive.spans("bert")] == [
        span.text for span in archive.spans("jane the first")
    ]
    session.delete()
    assert ANSWER in copy.send(QUESTION).text
    copy.delete()
    assert archive.sessions() == {}
    assert archive.index.count() == 0


def test_only_its_key_opens_an_archive(
    engine: Engine, archive: Archive, reader: Model, tmp_path: Path
) -> None:
    engine.session(Window(64), name="a", archive=archive).send(FACT, sampling=SHORT)
    with (
        Engine(reader, DiskStore(tmp_path / "other", key=OTHER)) as other,
        pytest.raises(ConfigError, match="encrypted with the key"),
    ):
        other.archive(tmp_path / "chats")
    with (
        Engine(reader, DiskStore(tmp_path / "plain")) as other,
        pytest.raises(ConfigError, match="the archive is encrypted"),
    ):
        other.archive(tmp_path / "chats")
    with Engine(reader, DiskStore(tmp_path / "plain")) as other:
        with other.archive(tmp_path / "bare") as bare:
            other.session(Window(64), name="a", archive=bare).send(FACT, sampling=SHORT)
        with pytest.raises(ConfigError, match="is not encrypted, and everything here is to be"):
            engine.archive(tmp_path / "bare")


def test_a_record_that_was_changed_is_left_out(engine: Engine, archive: Archive) -> None:
    session = engine.session(Window(64), name="a", archive=archive)
    for said in (FACT, "The weather is fine.", "Good night."):
        session.send(said, sampling=SHORT)
    one, two, three = archive.index.records()
    archive.index.upsert([one.id], [two.text], [one.metadata])  # another record's text
    archive.index.upsert([three.id], ["???"], [three.metadata])
    archive.index.end_writing()
    assert len(archive.spans("a")) == 1
    assert archive.counts["damaged"] == 2
    assert len(archive.delete("a").ids) == 3


def test_tenants_in_one_collection_find_their_own(reader: Model, tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "store", key=KEY)
    with Engine(reader, store) as engine, engine.archive(tmp_path / "chats") as archive:
        engine.session(Window(64), name="a", archive=archive).send(FACT, sampling=SHORT)
        with Engine(reader, store, tenant=ACME) as acme, acme.archive(tmp_path / "chats") as mine:
            assert mine.sessions() == {}
            assert mine.search("a", QUESTION, 3) == []
            assert mine.counts["damaged"] == 0
            acme.session(Window(64), name="a", archive=mine).send("Hello", sampling=SHORT)
            assert mine.sessions() == {"a": 1}
        assert archive.sessions() == {"a": 1}
        assert FACT in archive.spans("a")[0].text


@pytest.mark.parametrize("tenant", [None, ACME], ids=["nobody's", "a tenant's"])
def test_other_keys_for_an_archive(reader: Model, tmp_path: Path, tenant: Tenant | None) -> None:
    chats, label = tmp_path / "chats", tenant.label if tenant else ""
    with (
        Engine(reader, DiskStore(tmp_path / "plain"), tenant=tenant) as engine,
        engine.archive(chats) as made,
    ):
        engine.session(Window(64), name="a", archive=made).send(FACT, sampling=SHORT)
        expected = made.spans("a")
        near = made.search("a", QUESTION, 1)[0]
    assert b"Poberg" in bytes_of(chats)
    assert rekey_archive(chats, None, KEY, label=label) == 1
    assert b"Poberg" not in bytes_of(chats)
    assert rekey_archive(chats, None, KEY, label=label) == 0
    assert rekey_archive(chats, KEY, OTHER) == 1
    with pytest.raises(ConfigError, match="encrypted with the key"):
        rekey_archive(chats, KEY, b"x" * 32)
    with (
        Engine(reader, DiskStore(tmp_path / "other", key=OTHER), tenant=tenant) as engine,
        engine.archive(chats) as archive,
    ):
        assert archive.spans("a") == expected
        (found,) = archive.search("a", QUESTION, 1)
        assert (found.text, found.similarity) == (near.text, pytest.approx(near.similarity))
    assert rekey_archive(chats, OTHER, None) == 1
    with (
        Engine(reader, DiskStore(tmp_path / "plain"), tenant=tenant) as engine,
        engine.archive(chats) as made,
    ):
        assert made.spans("a") == expected
    with pytest.raises(ConfigError, match="is the old one"):
        rekey_archive(chats, KEY, KEY)
    with pytest.raises(InputError, match="there is no archive"):
        rekey_archive(tmp_path / "nowhere", None, KEY)


def test_an_index_tells_one_record(tmp_path: Path) -> None:
    with closing(Index.open(tmp_path, "texts")) as index:
        assert index.first() is None
        index.add(["a"], ["one two"], [{"n": 1}])
        first = index.first()
        assert first is not None
        assert (first.id, first.text, first.metadata) == ("a", "one two", {"n": 1})
        ((_, kept),) = index.records_with_vectors()
        assert kept is not None
        assert kept.tolist() == pytest.approx(index.embed(["one two"])[0].tolist())
