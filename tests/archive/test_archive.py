import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvrag.archive.archive import Archive, ArchiveReport
from kvrag.archive.rekey import rekey_archive
from kvrag.archive.span import Mark, Span
from kvrag.errors import ConfigError, CorpusLocked, InputError, StoreWriteError
from kvrag.store.base import KVStore
from kvrag.store.disk import DiskStore
from kvrag.store.key import EntryKey, Fingerprint
from kvrag.store.memory import MemoryStore
from kvrag.store.references import References
from kvrag.store.rekey import rekey
from kvrag.store.tenants import Tenant
from kvrag.testing.faults import FaultyStore
from kvrag.testing.files import holding
from kvrag.testing.stores import assert_same_rows, example_fingerprint, example_rows

PIER, LAMP, BOAT = "The pier is old.", "A lamp hangs on the wall.", "The boat sails at noon."

Opener = Callable[..., Archive]


def span(text: str, at: Mark | None = None) -> Span:
    return Span(at or Mark(), "user", text, example_rows(tuple(text.encode())), 0.5)


def chain(*texts: str) -> list[Span]:
    """Spans one behind the other, each a turn of its own."""
    spans, at = [], Mark()
    for text in texts:
        spans.append(span(text, at))
        at = replace(at.behind(spans[-1].tokens), turn=len(spans))
    return spans


@pytest.fixture
def open_archive(tmp_path: Path) -> Iterator[Opener]:
    opened: list[Archive] = []

    def open_archive(
        store: KVStore | None = None, fingerprint: Fingerprint | None = None, **kwargs: Any
    ) -> Archive:
        opened.append(
            Archive.open(
                tmp_path / "chroma",
                store or DiskStore(tmp_path / "store"),
                fingerprint or example_fingerprint(),
                **kwargs,
            )
        )
        return opened[-1]

    yield open_archive
    for archive in opened:
        archive.close()


def assert_lockstep(archive: Archive) -> None:
    """Every span has entry and reference, and nothing else is there."""
    owner = archive.index.id
    labels = {record.id: record.metadata["kvrag_key"] for record in archive.index.records()}
    assert archive._references.of(owner) == labels
    assert set(archive._store.ids()) == set(labels.values())


def test_what_was_said_is_found_and_its_rows_are_the_same(open_archive: Opener) -> None:
    archive = open_archive()
    spans = chain(PIER, LAMP, BOAT)
    archive.add("a", spans)
    (found,) = archive.search("a", "When does the boat sail?", 1)
    assert (found.text, found.at, found.role, found.session) == (BOAT, spans[2].at, "user", "a")
    assert (found.start, found.end, found.tokens) == (spans[2].at.position, spans[2].end, spans[2].tokens)
    (kv,) = archive.load([found])
    assert kv is not None
    assert_same_rows(kv, spans[2].kv)
    assert [s.text for s in archive.spans("a")] == [PIER, LAMP, BOAT]
    assert archive.sessions() == {"a": 3}
    assert archive.counts == {"added": 3, "hits": 1, "waiting": 0, "misses": 0}
    assert_lockstep(archive)


def test_only_what_is_wanted_and_was_said_before_is_found(open_archive: Opener) -> None:
    archive = open_archive()
    spans = chain(*(f"The boat number {n} sails." for n in range(70)))
    archive.add("a", spans)
    held = {found.start for found in archive.search("a", "The boat sails.", 60)}
    assert len(held) == 60
    found = archive.search("a", "The boat sails.", 20, is_wanted=lambda s: s.start not in held)
    assert len(found) == 10
    border = spans[4].end
    assert len(archive.search("a", "The boat sails.", 20, before=border)) == 5
    with pytest.raises(InputError, match="at least 1"):
        archive.search("a", "The boat sails.", 0)


def test_sessions_and_collections_never_meet(open_archive: Opener) -> None:
    store = MemoryStore()
    one, other = open_archive(store), open_archive(store, collection="kvrag-others")
    one.add("a", chain(PIER))
    assert one.search("b", PIER, 3) == other.search("a", PIER, 3) == []
    one.add("b", chain(PIER))
    other.add("a", chain(PIER))
    assert len(set(store.ids())) == 3  # the same text at the same place, three entries


def test_no_document_has_the_name_of_a_span(open_archive: Opener) -> None:
    store, fingerprint = MemoryStore(), example_fingerprint()
    archive = open_archive(store, fingerprint)
    archive.add("a", chain(PIER))
    assert EntryKey(fingerprint, tuple(PIER.encode())) not in store
    for text in ("a", "", PIER):
        assert EntryKey(example_fingerprint(prefix=text), tuple(PIER.encode())) not in store


def test_another_course_of_the_same_chat_has_entries_of_its_own(open_archive: Opener) -> None:
    archive = open_archive()
    archive.add("a", chain(PIER, LAMP))
    (before,) = archive.search("a", LAMP, 1)
    archive.delete("a")
    archive.add("a", chain(BOAT[: len(PIER)], LAMP))  # the same place, the same text, another beginning
    (after,) = archive.search("a", LAMP, 1)
    assert (before.start, before.tokens) == (after.start, after.tokens)
    assert archive.load([before]) == [None]
    assert archive.load([after]) != [None]


def test_what_is_said_anew_at_the_same_place_replaces_what_was_there(open_archive: Opener) -> None:
    archive = open_archive()
    archive.add("a", chain(PIER))
    archive.add("a", chain(LAMP))
    assert [s.text for s in archive.spans("a")] == [LAMP]
    assert_lockstep(archive)


def test_undoing_takes_back_what_came_behind(open_archive: Opener) -> None:
    archive = open_archive()
    spans = chain(PIER, LAMP, BOAT)
    archive.add("a", spans)
    archive.add("b", chain(PIER, LAMP))
    gone = archive.delete("a", start=spans[1].at.position)
    assert len(gone.ids) == 2
    assert gone.num_bytes > 0
    assert [s.text for s in archive.spans("a")] == [PIER]
    assert len(archive.spans("b")) == 2
    assert_lockstep(archive)


def test_deleting_a_session_removes_every_byte(open_archive: Opener, tmp_path: Path) -> None:
    secret = "The treasure lies under the juniper."
    archive = open_archive()
    archive.add("private", chain(PIER, secret))
    archive.add("other", chain(PIER))
    rows = archive.load(archive.search("private", secret, 1))[0]
    assert rows is not None
    values = rows.layers[0].values.contiguous().numpy().tobytes()
    del rows
    archive.close()
    assert holding(tmp_path / "chroma", b"juniper")
    assert holding(tmp_path / "store", values)
    archive = open_archive()
    receipt = archive.delete("private")
    assert [len(receipt.ids), len(receipt.entries), receipt.kept] == [2, 2, ()]
    archive.close()
    for word in (b"juniper", b"treasure"):
        assert not holding(tmp_path / "chroma", word)
    assert not holding(tmp_path / "store", values)
    archive = open_archive()
    assert archive.sessions() == {"other": 1}
    assert_lockstep(archive)
    assert archive.delete("private").ids == ()


def test_a_copy_shares_entries_until_the_last_is_deleted(open_archive: Opener) -> None:
    archive = open_archive()
    spans = chain(PIER, LAMP, BOAT)
    archive.add("a", spans)
    assert archive.fork("a", "b", end=spans[1].end) == 2
    assert [s.text for s in archive.spans("b")] == [PIER, LAMP]
    assert len(list(archive._store.ids())) == 3
    receipt = archive.delete("a")
    assert len(receipt.kept) == 2
    assert len(receipt.entries) == 1
    (found,) = archive.search("b", "Where is the lamp?", 1)
    (kv,) = archive.load([found])
    assert kv is not None
    assert_same_rows(kv, spans[1].kv)
    assert (found.session, found.origin) == ("b", "a")
    assert archive.fork("b", "c") == 2  # a copy of a copy
    archive.delete("b")
    assert archive.load(archive.search("c", LAMP, 1)) != [None]
    archive.delete("c")
    assert list(archive._store.ids()) == []


def test_an_evicted_entry_is_a_counted_miss_and_its_text_is_still_there(
    open_archive: Opener, tmp_path: Path
) -> None:
    spans = chain(PIER, LAMP, BOAT)
    archive = open_archive(DiskStore(tmp_path / "store"))
    archive.add("a", spans[:1])
    size = archive._store.stats().num_bytes
    archive.close()
    archive = open_archive(DiskStore(tmp_path / "store", budget_bytes=2 * size))
    archive.add("a", spans)
    found = archive.spans("a")
    rows = archive.load(found)
    assert sum(kv is None for kv in rows) == archive.counts["misses"] > 0
    assert [s.tokens for s in found] == [s.tokens for s in spans]
    for kv, mine in zip(rows, spans, strict=True):
        if kv is not None:
            assert_same_rows(kv, mine.kv)


def test_a_pinned_span_stays_when_the_store_is_full(open_archive: Opener, tmp_path: Path) -> None:
    archive = open_archive(DiskStore(tmp_path / "store"))
    spans = chain(PIER, LAMP, BOAT)
    archive.add("a", spans[:1])
    store = DiskStore(tmp_path / "store", budget_bytes=2 * archive._store.stats().num_bytes)
    store.pin(next(archive.index.records()).metadata["kvrag_key"])
    full = open_archive(store)
    full.add("a", spans[1:])
    assert full.load(full.spans("a"))[0] is not None


def test_a_damaged_entry_is_a_miss(open_archive: Opener, tmp_path: Path) -> None:
    archive = open_archive()
    archive.add("a", chain(PIER, LAMP))
    store = DiskStore(tmp_path / "store")
    path = max(store.files_of(next(store.ids())), key=lambda file: file.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    archive.close()
    archive = open_archive()
    rows = archive.load(archive.spans("a"))
    assert sum(kv is None for kv in rows) == 1


def test_an_expired_entry_is_a_miss(open_archive: Opener, tmp_path: Path) -> None:
    archive = open_archive(ttl_seconds=1e-6)
    archive.add("a", chain(PIER))
    assert archive.load(archive.spans("a")) == [None]


def test_tenants_never_find_each_others_spans(open_archive: Opener) -> None:
    store = MemoryStore()
    prints = []
    for name in ("acme", "bolt"):
        tenant = Tenant(name, f"a secret of {name}, long enough".encode())
        prints.append(example_fingerprint(tenant=tenant.label, tenant_key=tenant.key))
    archives = [
        open_archive(store, fingerprint, collection=f"chats-{i}") for i, fingerprint in enumerate(prints)
    ]
    for archive in archives:
        archive.add("a", chain(PIER))
    assert len(set(store.ids())) == 2
    # Even one who reads the other's database lacks the names of the entries.
    thief = open_archive(store, prints[1], collection="chats-0")
    assert thief.spans("a") == []
    assert thief.load(archives[0].spans("a")) == [None]
    with pytest.raises(ConfigError, match="secret"):
        open_archive(store, example_fingerprint(tenant=prints[0].tenant)).add("a", chain(PIER))


def test_a_store_with_another_key_still_has_every_span(open_archive: Opener, tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    old, new = bytes(range(32)), bytes(range(1, 33))
    spans = chain(PIER, LAMP)
    archive = open_archive(DiskStore(tmp_path / "store", key=old))
    archive.add("a", spans)
    archive.close()
    archive._store.close()
    rekey(tmp_path / "store", old, new)
    with pytest.raises(ConfigError, match="the archive is encrypted with the key"):
        open_archive(DiskStore(tmp_path / "store", key=new))
    assert rekey_archive(tmp_path / "chroma", old, new) == len(spans)
    archive = open_archive(DiskStore(tmp_path / "store", key=new))
    for kv, mine in zip(archive.load(archive.spans("a")), spans, strict=True):
        assert kv is not None
        assert_same_rows(kv, mine.kv)


def test_what_the_store_refuses_is_kept_as_text(
    open_archive: Opener, caplog: pytest.LogCaptureFixture
) -> None:
    store = FaultyStore(MemoryStore())
    archive = open_archive(store)
    store.failing = frozenset({"put"})
    with caplog.at_level(logging.WARNING):
        archive.add("a", chain(PIER))
    assert "read anew" in caplog.text
    assert archive.counts["without entry"] == 1
    found = archive.search("a", PIER, 1)
    assert archive.load(found) == [None]
    assert found[0].tokens == tuple(PIER.encode())


def test_a_deletion_that_the_store_refuses_can_be_repeated(open_archive: Opener) -> None:
    store = FaultyStore(MemoryStore())
    archive = open_archive(store)
    archive.add("a", chain(PIER, LAMP))
    store.failing = frozenset({"delete"})
    with pytest.raises(StoreWriteError):
        archive.delete("a")
    assert archive.search("a", PIER, 2) == []
    store.failing = frozenset()
    assert archive.reconcile().removed == 2
    assert list(store.store.ids()) == []


_KILLED = """
import os, signal, sys
from chromadb.api.types import EmbeddingFunction
from kvrag.archive.archive import Archive
from kvrag.embedding import HashedEmbedding
from kvrag.store.disk import DiskStore
from kvrag.testing.stores import example_fingerprint
sys.path.insert(0, sys.argv[2])
from test_archive import PIER, LAMP, chain

class Deadly(HashedEmbedding):
    def __call__(self, input):
        if any("lamp" in text for text in input):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(input)

archive = Archive.open(
    sys.argv[1] + "/chroma", DiskStore(sys.argv[1] + "/store"), example_fingerprint(), embedding=Deadly()
)
archive.add("a", chain(PIER, LAMP)[:1])
archive.add("a", chain(PIER, LAMP)[1:])
"""


@pytest.fixture
def crashed(tmp_path: Path) -> Path:
    """A process was killed between the store and Chroma."""
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, str(tmp_path), str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        env={**os.environ},
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    return tmp_path


def test_a_crash_between_store_and_chroma_leaves_nothing_that_is_found(
    crashed: Path, open_archive: Opener
) -> None:
    archive = open_archive()
    assert [s.text for s in archive.spans("a")] == [PIER]
    assert len(list(archive._store.ids())) == 2  # and one that nobody finds
    report = archive.reconcile()
    assert report == ArchiveReport(records=1, stale=1, unreferenced=0, removed=1, missing=0)
    assert_lockstep(archive)


def test_a_deletion_finds_what_a_crash_has_left(crashed: Path, open_archive: Opener) -> None:
    archive = open_archive()
    archive.delete("a")
    assert list(archive._store.ids()) == []
    assert archive._references.of(archive.index.id) == {}


def test_a_chat_goes_on_behind_a_crash(crashed: Path, open_archive: Opener) -> None:
    archive = open_archive()
    archive.add("a", chain(PIER, LAMP)[1:])
    assert [s.text for s in archive.spans("a")] == [PIER, LAMP]
    assert_lockstep(archive)


def test_lost_references_come_back(open_archive: Opener, tmp_path: Path) -> None:
    archive = open_archive()
    archive.add("a", chain(PIER, LAMP))
    with closing(References(tmp_path / "store" / "references.sqlite")) as references:
        references.remove(archive.index.id, [next(archive.index.records()).id])
    assert archive.reconcile().unreferenced == 1
    assert_lockstep(archive)


_WRITER = """
import sys
from kvrag.archive.archive import Archive
from kvrag.store.disk import DiskStore
from kvrag.testing.stores import example_fingerprint
sys.path.insert(0, sys.argv[2])
from test_archive import chain
store = DiskStore(sys.argv[1] + "/store")
archive = Archive.open(sys.argv[1] + "/chroma", store, example_fingerprint(), wait_seconds=60.0)
name = sys.argv[3]
spans = chain(*(f"Turn {n} of {name}, about {name}." for n in range(12)))
for one in spans:
    archive.add(name, [one])
archive.close()
"""


def test_processes_write_in_turns(open_archive: Opener, tmp_path: Path) -> None:
    folder = str(Path(__file__).parent)
    open_archive().close()
    writers = [
        subprocess.Popen([sys.executable, "-c", _WRITER, str(tmp_path), folder, name]) for name in ("x", "y")
    ]
    assert [writer.wait() for writer in writers] == [0, 0]
    archive = open_archive()
    assert archive.sessions() == {"x": 12, "y": 12}
    for name in ("x", "y"):
        found = archive.search(name, f"Turn 7 of {name}", 12)
        assert len(found) == 12
        assert None not in archive.load(found)
    assert_lockstep(archive)


def test_what_chroma_cannot_take_waits_for_it(
    open_archive: Opener, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    archive = open_archive(wait_seconds=0.0)
    code = (
        "import sys; from kvrag.index import Index; index = Index.open(sys.argv[1], 'others');"
        "index.begin_writing(); print('held', flush=True); sys.stdin.read(); index.close()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "chroma")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with caplog.at_level(logging.WARNING):
            archive.add("a", chain(PIER))
        assert archive.counts["waiting"] == 1
        assert "wait to be written" in caplog.text
        with pytest.raises(CorpusLocked):
            archive.delete("a")
        holder.communicate()
    assert [s.text for s in archive.search("a", PIER, 1)] == [PIER]
    assert archive.counts["waiting"] == 0
    assert_lockstep(archive)


def test_ids_that_cannot_be_kept_are_refused(open_archive: Opener) -> None:
    archive = open_archive()
    for name in ("", "\ud800"):
        with pytest.raises(InputError):
            archive.add(name, chain(PIER))
        with pytest.raises(InputError):
            archive.search(name, PIER, 1)
        with pytest.raises(InputError):
            archive.delete(name)
    assert list(archive._store.ids()) == []


def test_records_of_others_are_passed_over(open_archive: Opener) -> None:
    archive = open_archive()
    archive.add("a", chain(PIER))
    archive.index.add(["x"], ["The pier of somebody else."], [{"session": "a", "end": 1}])
    assert [s.text for s in archive.search("a", "The pier", 5)] == [PIER]
    assert [s.text for s in archive.spans("a")] == [PIER]
