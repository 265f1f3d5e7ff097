import errno
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from kvrag.corpus import KEY_FIELD, Corpus
from kvrag.errors import (
    CacheMiss,
    ConfigError,
    DocumentNotFound,
    DocumentTooLong,
    DuplicateDocument,
    EmptyDocument,
    InputError,
    StoreWriteError,
)
from kvrag.index import Index
from kvrag.segments import KV
from kvrag.store.disk import DiskStore
from kvrag.store.memory import MemoryStore
from kvrag.store.references import References
from kvrag.testing.stores import assert_same_rows, example_fingerprint, example_rows


class FakeEncoder:
    """Bytes for tokens, and rows that depend on them; counts what it is asked to encode."""

    max_tokens = 100

    def __init__(self, model: str = "m") -> None:
        self.fingerprint = example_fingerprint(model=model)
        self.encoded: list[int] = []

    def tokenize(self, text: str) -> tuple[int, ...]:
        return tuple(text.encode())

    def encode(self, token_lists: Sequence[tuple[int, ...]]) -> list[KV]:
        self.encoded.append(len(token_lists))
        return [example_rows(tokens) for tokens in token_lists]


@pytest.fixture
def encoder() -> FakeEncoder:
    return FakeEncoder()


@pytest.fixture
def open_corpus(tmp_path: Path, encoder: FakeEncoder):
    opened: list[Corpus] = []

    def open_corpus(collection: str = "kvrag", encoder: FakeEncoder = encoder, **kwargs: Any) -> Corpus:
        corpus = Corpus(
            Index.open(tmp_path / "chroma", collection), DiskStore(tmp_path / "store"), encoder, **kwargs
        )
        opened.append(corpus)
        return corpus

    yield open_corpus
    for corpus in opened:
        if corpus not in CLOSED:
            corpus.close()
    CLOSED.clear()


CLOSED: list[Corpus] = []


def close(corpus: Corpus) -> None:
    corpus.close()
    CLOSED.append(corpus)


@pytest.fixture
def corpus(open_corpus: Callable[..., Corpus]) -> Corpus:
    return open_corpus()


def assert_lockstep(corpus: Corpus) -> None:
    """Every record has its entry and its reference, every entry a record, and nothing else is there."""
    store, index, references = corpus._store, corpus._index, corpus._references
    records = list(index.records())
    keys = {record.id: corpus.key_of(record.text) for record in records}
    assert {record.id: record.metadata[KEY_FIELD] for record in records} == {i: k.id for i, k in keys.items()}
    assert references.of(index.id) == {i: key.id for i, key in keys.items()}
    assert set(store.ids()) == {key.id for key in keys.values()}
    for key in keys.values():
        assert_same_rows(store.get(key), example_rows(key.tokens))
    assert store.check().ok


def bytes_of(corpus: Corpus, text: str) -> bool:
    """Whether any file of the store still has the text's tokens."""
    needle = b"".join(token.to_bytes(4, "little") for token in text.encode())
    return any(needle in f.read_bytes() for f in corpus._store.path.rglob("*") if f.is_file())


# --- adding -------------------------------------------------------------------------------------


def test_add_and_find(corpus: Corpus) -> None:
    ids = corpus.add(["the red boat", "the old mill"], metadatas=[{"source": "a", "n": 1}, None])
    assert len(set(ids)) == 2
    assert_lockstep(corpus)
    (hit,) = corpus.search("boat", 1)
    assert (hit.id, hit.text, hit.metadata) == (ids[0], "the red boat", {"source": "a", "n": 1})
    assert {record.text for record in corpus.documents()} == {"the red boat", "the old mill"}
    assert all(KEY_FIELD not in record.metadata for record in corpus.documents())
    assert [record.id for record in corpus.get(ids[::-1])] == ids[::-1]
    assert corpus.stats().documents == 2
    assert corpus.stats().store.entries == 2


def test_ids_derive_from_text_and_source(corpus: Corpus) -> None:
    one, two = corpus.add(["text", "text"], metadatas=[{"source": "a"}, {"source": "b"}])
    assert one != two
    assert corpus.stats().store.entries == 1
    with pytest.raises(DuplicateDocument, match="twice"):
        corpus.add(["other", "other"])
    with pytest.raises(DuplicateDocument, match="upsert"):
        corpus.add(["fresh", "text"], metadatas=[None, {"source": "a", "page": 2}])
    assert corpus.stats().documents == 2
    assert_lockstep(corpus)


def test_batches_encode_only_what_is_lacking(
    open_corpus: Callable[..., Corpus], encoder: FakeEncoder
) -> None:
    corpus = open_corpus(batch_size=4)
    steps: list[tuple[int, int]] = []
    texts = [f"text {n % 7}" for n in range(10)]
    corpus.add(texts, [str(n) for n in range(10)], progress=lambda done, total: steps.append((done, total)))
    assert steps == [(4, 10), (8, 10), (10, 10)]
    assert encoder.encoded == [4, 3]
    assert_lockstep(corpus)


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        ("", EmptyDocument),
        (" \n", EmptyDocument),
        ("x" * 101, DocumentTooLong),
        ("lone \ud800", InputError),
    ],
)
def test_bad_documents_write_nothing(corpus: Corpus, bad: str, error: type[Exception]) -> None:
    for method in (corpus.add, corpus.upsert, corpus.ingest):
        with pytest.raises(error, match="document"):
            method(["good", bad])
    assert corpus.stats().documents == 0
    assert not list(corpus._store.ids())


def test_bad_calls(corpus: Corpus) -> None:
    with pytest.raises(DocumentTooLong, match=r"split\(text, tokenize, 100\)"):
        corpus.add(["x" * 101])
    with pytest.raises(DuplicateDocument, match="'a'"):
        corpus.add(["one", "two"], ["a", "a"])
    with pytest.raises(InputError, match="one length"):
        corpus.add(["one"], ["a", "b"])
    with pytest.raises(InputError, match="nested"):
        corpus.add(["one"], ["nested"], metadatas=[{"a": {"b": 1}}])
    with pytest.raises(ConfigError, match="batch_size"):
        Corpus(corpus._index, MemoryStore(), FakeEncoder(), batch_size=0)
    assert corpus.stats().documents == 0
    assert corpus.add([]) == []


def test_ingest_can_be_repeated(open_corpus: Callable[..., Corpus], encoder: FakeEncoder) -> None:
    corpus = open_corpus(batch_size=2)
    texts = ["one", "two", "one", "three", "four", "five"]

    class Interrupted(KeyboardInterrupt):
        pass

    def stop(done: int, total: int) -> None:
        if done == 4:
            raise Interrupted

    with pytest.raises(Interrupted):
        corpus.ingest(texts, progress=stop)
    assert corpus.stats().documents == 4
    assert_lockstep(corpus)
    report = corpus.ingest(texts)
    assert (report.added, report.skipped) == (1, 5)
    assert report.ids[0] == report.ids[2]
    assert encoder.encoded == [2, 2, 1]
    assert_lockstep(corpus)


# --- changing and removing ----------------------------------------------------------------------


def test_upsert(corpus: Corpus) -> None:
    corpus.upsert(["one", "two"], ["a", "b"], metadatas=[{"x": 1}, {"y": 1}])
    corpus.upsert(["uno", "two", "three"], ["a", "b", "c"], metadatas=[{"z": 1}, None, None])
    assert [(r.text, r.metadata) for r in corpus.get(["a", "b", "c"])] == [
        ("uno", {"z": 1}),
        ("two", {}),
        ("three", {}),
    ]
    assert not bytes_of(corpus, "one")
    assert_lockstep(corpus)


def test_update(corpus: Corpus) -> None:
    corpus.add(["one", "two"], ["a", "b"], metadatas=[{"x": 1}, {"y": 1}])
    corpus.update(["a"], texts=["uno"])
    corpus.update(["b", "a"], metadatas=[{"y": None, "z": 2}, {"w": 3}])
    assert [(r.text, r.metadata) for r in corpus.get(["a", "b"])] == [
        ("uno", {"x": 1, "w": 3}),
        ("two", {"z": 2}),
    ]
    corpus.update(["a"], texts=["one"], metadatas=[{"x": None, "v": 4}])
    assert corpus.get(["a"])[0].metadata == {"w": 3, "v": 4}
    corpus.update(["a", "b"], metadatas=[{}, {KEY_FIELD: "forged"}])
    assert_lockstep(corpus)
    with pytest.raises(DocumentNotFound, match="'c'"):
        corpus.update(["a", "c"], texts=["x", "y"])
    with pytest.raises(DuplicateDocument):
        corpus.update(["a", "a"], texts=["x", "y"])
    with pytest.raises(EmptyDocument):
        corpus.update(["a"], texts=[""])
    assert corpus.get(["a"])[0].text == "one"


def test_the_last_delete_takes_the_bytes(corpus: Corpus) -> None:
    text = "a secret of some length"
    corpus.add([text, text, "kept"], ["a", "b", "c"])
    held = corpus._store.get(corpus.key_of(text))
    corpus.delete(["a"])
    assert bytes_of(corpus, text)
    corpus.delete(["b", "b"])
    assert not bytes_of(corpus, text)
    assert_same_rows(held, example_rows(tuple(text.encode())))
    assert_lockstep(corpus)
    with pytest.raises(DocumentNotFound):
        corpus.delete(["c", "b"])
    assert corpus.get(["c"])
    with pytest.raises(DocumentNotFound):
        corpus.get(["a"])


def test_collections_share_a_store(open_corpus: Callable[..., Corpus]) -> None:
    one, two = open_corpus("one"), open_corpus("two")
    one.add(["shared", "of one"], ["a", "b"])
    two.add(["shared"], ["a"])
    one.delete(["a", "b"])
    assert not bytes_of(one, "of one")
    assert bytes_of(one, "shared")
    assert one.reconcile().was_equal
    two.delete(["a"])
    assert not bytes_of(one, "shared")


def test_with_a_store_in_memory(tmp_path: Path, encoder: FakeEncoder) -> None:
    with Corpus(Index.open(tmp_path), MemoryStore(), encoder) as corpus:
        corpus.add(["one", "two"], ["a", "b"])
        corpus.delete(["a"])
        assert_lockstep(corpus)
    with Corpus(Index.open(tmp_path), MemoryStore(), encoder) as corpus:
        assert corpus.reconcile().rebuilt == 1
        assert_lockstep(corpus)


# --- another model, a disk that cannot be written ------------------------------------------------


def test_another_model_misses_until_reconciled(open_corpus: Callable[..., Corpus]) -> None:
    first = open_corpus()
    first.add(["one", "two"])
    old = set(first._store.ids())
    close(first)
    second = open_corpus(encoder=FakeEncoder("another"))
    with pytest.raises(CacheMiss):
        second._store.get(second.key_of("one"))
    report = second.reconcile()
    assert (report.rebuilt, report.relabelled, report.removed) == (2, 2, 2)
    assert not old & set(second._store.ids())
    assert_lockstep(second)
    assert second.reconcile().was_equal


def test_records_this_model_cannot_read_are_reported(open_corpus: Callable[..., Corpus]) -> None:
    first = open_corpus()
    first.add(["x" * 90, "short"], ["long", "short"])
    close(first)
    small = FakeEncoder("small")
    small.max_tokens = 50
    second = open_corpus(encoder=small)
    report = second.reconcile()
    assert report.unencodable == ("long",)
    assert report.records == 2
    assert second.stats().store.entries == 1
    second.delete(["long"])
    assert_lockstep(second)


def test_a_store_that_cannot_be_written(
    corpus: Corpus, encoder: FakeEncoder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    corpus.add(["before"], ["before"])
    corpus._lockstep.batch_size = 2
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr("kvrag.store.folder.write_partial", full)
        corpus.add([f"text {n}" for n in range(5)], list("abcde"))
        corpus.upsert(["more", "before"], ["f", "before"])
    assert encoder.encoded == [1, 2, 1]  # not the rest of the call in vain
    warnings = [record for record in caplog.records if record.name == "kvrag.lockstep"]
    assert len(warnings) == 1
    assert "free some space" in warnings[0].message
    assert corpus.stats().documents == 7
    assert corpus.stats().uncached == 6
    assert corpus.stats().store.write_failures == 2
    assert corpus.search("text 3", 1)[0].id == "d"
    assert corpus.reconcile().rebuilt == 6
    assert_lockstep(corpus)


def test_references_that_cannot_be_written(
    tmp_path: Path, encoder: FakeEncoder, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    store = DiskStore(tmp_path / "file")
    with Corpus(Index.open(tmp_path / "chroma"), store, encoder) as corpus:
        corpus.add(["one"], ["a"])
        assert corpus.search("one", 1)[0].id == "a"
        assert corpus.stats().uncached == 1
        with pytest.raises(StoreWriteError):
            corpus.delete(["a"])
        with pytest.raises(StoreWriteError):
            corpus.reconcile()
    assert len(caplog.records) == 1


# --- reconcile ----------------------------------------------------------------------------------


def test_changes_behind_our_back(corpus: Corpus) -> None:
    corpus.add(["one", "two", "three", "four"], list("abcd"))
    index, store = corpus._index, corpus._store
    index.delete(["a"])
    index.upsert(["b"], ["dos"], [{}])
    index.add(["e"], ["five"], [{"mine": 1}])
    store.delete(corpus.key_of("three").id)
    data = store.path / corpus.key_of("four").id[:2] / f"{corpus.key_of('four').id}.safetensors"
    data.write_bytes(data.read_bytes()[:-1])
    report = corpus.reconcile()
    assert (report.records, report.rebuilt, report.removed, report.relabelled) == (4, 4, 2, 2)
    assert (report.unreferenced, report.damaged, report.was_equal) == (1, 1, False)
    assert corpus.get(["e"])[0].metadata == {"mine": 1}
    assert_lockstep(corpus)
    assert corpus.reconcile().was_equal


def test_references_that_were_lost(open_corpus: Callable[..., Corpus]) -> None:
    corpus = open_corpus()
    corpus.add(["one", "two"], ["a", "b"])
    close(corpus)
    for file in corpus._store.path.glob("references.sqlite*"):
        file.unlink()
    corpus = open_corpus()
    corpus.delete(["a"])
    assert not bytes_of(corpus, "one")
    corpus.reconcile()
    assert_lockstep(corpus)


class Crash(BaseException):
    """What no code between here and the disk may catch and tidy up after."""


STEPS: list[tuple[type, str]] = [
    (References, "add"),
    (References, "remove"),
    (References, "collect"),
    (DiskStore, "put"),
    (DiskStore, "delete"),
    (Index, "add"),
    (Index, "upsert"),
    (Index, "delete"),
    (Index, "update_metadata"),
]
CHANGES: dict[str, Callable[[Corpus], object]] = {
    "add": lambda c: c.add(["three", "four", "one"], ["c", "d", "e"]),
    "upsert": lambda c: c.upsert(["uno", "three", "two"], ["a", "c", "d"]),
    "update": lambda c: c.update(["a", "b"], texts=["uno", "dos"]),
    "update metadata": lambda c: c.update(["a"], metadatas=[{"x": 1}]),
    "delete": lambda c: c.delete(["a", "b"]),
    "reconcile": lambda c: c.reconcile(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_crash_at_any_step_is_mended(
    open_corpus: Callable[..., Corpus], monkeypatch: pytest.MonkeyPatch, change: str, when: str
) -> None:
    """Every call of every step, one after the other, is the last thing that happens."""
    for owner, name in STEPS:
        for nth in range(1, 5):
            corpus = open_corpus(batch_size=2)
            corpus.upsert(["one", "two", "one"], ["a", "b", "z"])
            if change == "reconcile":
                corpus._index.delete(["a"])
                corpus._store.delete(corpus.key_of("two").id)
            if not crash(corpus, monkeypatch, CHANGES[change], owner, name, nth, when):
                corpus.delete([record.id for record in corpus.documents()])
                close(corpus)
                break
            close(corpus)
            corpus = open_corpus()
            corpus.reconcile()
            assert_lockstep(corpus)
            assert corpus.reconcile().was_equal
            corpus.delete([record.id for record in corpus.documents()])
            assert_lockstep(corpus)
            close(corpus)


def crash(
    corpus: Corpus,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Corpus], object],
    owner: type,
    name: str,
    nth: int,
    when: str,
) -> bool:
    """Run a change that dies at the nth call of a step; whether it got there."""
    original, calls = getattr(owner, name), 0

    def dying(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == nth and when == "before":
            raise Crash
        result = original(*args, **kwargs)
        if calls == nth:
            raise Crash
        return result

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, dying)
        try:
            change(corpus)
        except Crash:
            return True
    return False


DIE = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from kvrag.corpus import Corpus
from kvrag.index import Index
from kvrag.store.disk import DiskStore
from kvrag.store.references import References
from test_corpus import FakeEncoder
where = {"put": DiskStore, "add": Index, "collect": References}[sys.argv[3]]
original = getattr(where, sys.argv[3])
def dying(*args, **kwargs):
    original(*args, **kwargs)
    if args[0].dying and (args[0].dying.pop(), not args[0].dying)[1]:
        os._exit(9)
where.dying = [0] * int(sys.argv[4])
setattr(where, sys.argv[3], dying)
folder = Path(sys.argv[2])
corpus = Corpus(Index.open(folder / "chroma"), DiskStore(folder / "store"), FakeEncoder(), batch_size=2)
corpus.add([f"new {n}" for n in range(6)], [f"n{n}" for n in range(6)])
corpus.upsert(["uno", "dos"], ["a", "b"])
corpus.delete(["a", "n0"])
"""


@pytest.mark.parametrize(("step", "nth"), [("put", 3), ("add", 2), ("collect", 1), ("collect", 2)])
def test_a_process_that_dies_is_mended(
    tmp_path: Path, open_corpus: Callable[..., Corpus], step: str, nth: int
) -> None:
    corpus = open_corpus()
    corpus.add(["one", "two"], ["a", "b"])
    close(corpus)
    done = subprocess.run(
        [sys.executable, "-c", DIE, Path(__file__).parent, tmp_path, step, str(nth)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 9, done.stderr
    corpus = open_corpus()
    corpus.reconcile()
    assert_lockstep(corpus)
    assert corpus.stats().documents >= 2
