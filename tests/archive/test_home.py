"""A folder's archive beside its documents: who may have it, and what `verify` and `gc` do with it."""

from __future__ import annotations

from contextlib import closing
from functools import cache
from pathlib import Path

import pytest

from kvrag import Tenant
from kvrag.config import Sampling
from kvrag.documents import Document
from kvrag.engine import Engine
from kvrag.errors import ConfigError
from kvrag.home import Home, ingest
from kvrag.memory.window import Window
from kvrag.model import Model
from kvrag.portable.outgoing import export_collection
from kvrag.scrub import collect, verify
from kvrag.testing.files import holding
from kvrag.testing.models import tiny

ACME = Tenant("acme", b"a secret of acme, 32 bytes long.")
SECRET = "The treasure lies under the juniper."
SHORT = Sampling(max_new_tokens=4)


@cache
def model() -> Model:
    return tiny()


def talk(home: Home, name: str = "a") -> None:
    """A folder with a document, and a chat."""
    with Engine(model(), home.store(), tenant=home.tenant) as engine:
        ingest(home, engine, [Document("The lighthouse of Varn was built in 1871.", "1.txt")])
        with home.archive(engine) as archive:
            engine.session(Window(64), name=name, archive=archive).send(SECRET, sampling=SHORT)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path / "home")
    talk(home)
    return home


def reference_of(home: Home) -> tuple[str, str, str]:
    """The archive's collection, and a span's record and entry."""
    with Engine(model(), home.store()) as engine, home.archive(engine) as archive:
        ((record, key_id),) = archive._references.of(archive.index.id).items()
        return archive.index.id, record, key_id


def test_a_folder_without_chats_has_no_archive(tmp_path: Path) -> None:
    assert not Home(tmp_path).has_archive()
    assert not (tmp_path / "archive").exists()


def test_sweeping_leaves_what_chats_have_said(home: Home) -> None:
    assert home.has_archive()
    report = verify(home)
    assert report.ok
    assert (report.records, report.spans, report.entries, report.uncached_spans) == (1, 1, 2, ())
    assert collect(home).rubbish == ()
    home.sweep()
    with home.corpus() as corpus:
        corpus.delete([record.id for record in corpus.documents()])
    assert verify(home).entries == 1


def test_documents_are_searched_without_what_was_said(home: Home) -> None:
    with home.corpus() as corpus:
        assert [hit.text for hit in corpus.search("Where is the treasure?", 5)] == [
            "The lighthouse of Varn was built in 1871."
        ]


def test_an_export_takes_no_chat_along(home: Home, tmp_path: Path) -> None:
    export_collection(home, tmp_path / "out.kvrag")
    raw = (tmp_path / "out.kvrag").read_bytes()
    assert b"juniper" not in raw
    assert reference_of(home)[2].encode() not in raw


def test_what_a_crash_has_left_is_found_and_mended(home: Home) -> None:
    owner, record, key_id = reference_of(home)
    with Engine(model(), home.store()) as engine, home.archive(engine) as archive:
        archive._references.add(owner, {"gone": key_id})
    report = verify(home)
    assert (report.ok, report.stale) == (False, ("gone",))
    assert not verify(home, fix=True).ok
    assert verify(home).ok
    with Engine(model(), home.store()) as engine, home.archive(engine) as archive:
        assert archive._references.of(owner) == {record: key_id}


def test_a_lost_entry_is_said(home: Home) -> None:
    _, record, key_id = reference_of(home)
    with closing(home.store()) as store:
        store.delete(key_id)
    report = verify(home)
    assert report.ok  # slow, not wrong
    assert report.uncached_spans == (record,)


def test_sweeping_overwrites_deleted_texts(home: Home) -> None:
    with Engine(model(), home.store()) as engine, home.archive(engine) as archive:
        archive.delete("a", forget=False)
    assert holding(home.path / "archive", b"juniper")
    collect(home)
    assert not holding(home.path / "archive", b"juniper")


def test_a_tenants_chats_are_its_own(home: Home) -> None:
    acme = Home(home.path, tenant=ACME)
    with Engine(model(), acme.store(), tenant=ACME) as engine, acme.archive(engine) as archive:
        assert archive.sessions() == {}
    talk(acme, "of acme")
    with Engine(model(), home.store()) as engine, home.archive(engine) as archive:
        assert archive.sessions() == {"a": 1}
    with Engine(model(), acme.store()) as engine, pytest.raises(ConfigError, match="tenant"):
        acme.archive(engine)
