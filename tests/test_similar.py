"""Chunks that are encoded behind their most similar chunks, in Chroma, store and answers."""

from __future__ import annotations

import errno
import itertools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import chromadb
import pytest

from kvrag.config import ALONE, MAX_SIMILAR, Context, Sampling
from kvrag.corpus import Corpus
from kvrag.embedding import HashedEmbedding
from kvrag.engine import Engine
from kvrag.errors import ConfigError, DocumentTooLong
from kvrag.index import Index
from kvrag.items import KEY_FIELD, NEAR_FIELDS, RESERVED, near_of
from kvrag.prompt import RagPrompt
from kvrag.rag import ask
from kvrag.segments import KV, LayerKV
from kvrag.store.disk import DiskStore
from kvrag.store.key import EntryKey, Fingerprint
from kvrag.store.references import References
from kvrag.testing.models import tiny
from kvrag.testing.stores import assert_same_rows, example_fingerprint, example_rows

TEXTS = {
    "ferry": "The ferry to the island leaves at seven.",
    "boat": "The boat to the island leaves at noon.",
    "ship": "The ship to the island never leaves.",
    "mill": "The old mill grinds wheat and rye.",
    "flour": "The old mill sells flour of wheat.",
    "bread": "Bread of rye and wheat is sold at the old mill.",
}
SHORT = Sampling(max_new_tokens=4, ignore_eos=True)


def similar(count: int) -> Context:
    return Context("similar", count) if count else ALONE


FORM = RagPrompt("Answer from the documents.\n\n", "\n\nQuestion: ", "\nAnswer:", is_rendered=False)


class FakeEncoder:
    """Bytes for tokens, and rows that depend on them; counts what it is asked to encode."""

    max_tokens = 200

    def __init__(self) -> None:
        self.fingerprint = example_fingerprint()
        self.encoded: list[int] = []

    def tokenize(self, text: str) -> tuple[int, ...]:
        return tuple(text.encode())

    def encode(self, token_lists: Sequence[tuple[int, ...]]) -> list[KV]:
        self.encoded.append(len(token_lists))
        return [example_rows(tokens) for tokens in token_lists]


class FakeContextEncoder(FakeEncoder):
    """Rows that depend on what the tokens stand behind, too."""

    def context(self, texts: Sequence[str]) -> tuple[int, ...]:
        return tuple("".join(f"{text}|" for text in texts).encode())

    def fingerprint_behind(self, context: tuple[int, ...]) -> Fingerprint:
        return example_fingerprint(prefix=bytes(context).hex())

    def encode_behind(
        self, token_lists: Sequence[tuple[int, ...]], contexts: Sequence[tuple[int, ...]]
    ) -> list[KV]:
        self.encoded.append(len(token_lists))
        return [rows_behind(c, t) for c, t in zip(contexts, token_lists, strict=True)]


def rows_behind(context: tuple[int, ...], tokens: tuple[int, ...]) -> KV:
    whole, n = example_rows(context + tokens), len(tokens)
    return KV(tokens, tuple(LayerKV(layer.keys[:, -n:], layer.values[:, -n:]) for layer in whole.layers))


@pytest.fixture
def open_corpus(tmp_path: Path) -> Iterator[Callable[..., Corpus]]:
    opened: list[Corpus] = []

    def open_corpus(encoder: Any = None, **settings: Any) -> Corpus:
        while opened:
            opened.pop().close()
        index = Index.open(tmp_path / "chroma")
        opened.append(
            Corpus(index, DiskStore(tmp_path / "store"), encoder or FakeContextEncoder(), **settings)
        )
        return opened[-1]

    yield open_corpus
    for corpus in opened:
        corpus.close()


@pytest.fixture
def corpus(open_corpus: Callable[..., Corpus]) -> Corpus:
    """All texts, each behind two others."""
    corpus = open_corpus(context=similar(2), batch_size=4)
    corpus.add(list(TEXTS.values()), list(TEXTS))
    return corpus


def key_behind(corpus: Corpus, text: str, near: Sequence[str]) -> EntryKey:
    encoder: Any = corpus._lockstep._encoder
    return EntryKey(encoder.fingerprint_behind(encoder.context(near)), encoder.tokenize(text))


def assert_lockstep(corpus: Corpus) -> None:
    """Every record has one entry, behind the texts that its neighbours have now, nothing else is there."""
    index, store = corpus._index, corpus._store
    records = {record.id: record for record in index.records()}
    near = {i: [records[n].text for n in near_of(r)] for i, r in records.items()}
    fitting = dict.fromkeys(records, ()) | dict(corpus.contexts(list(records)))
    assert all(fitting[i][::-1] == tuple(near[i][: len(fitting[i])]) for i in records)
    keys = {i: key_behind(corpus, r.text, fitting[i]) for i, r in records.items() if fitting[i]}
    keys |= {i: corpus.key_of(r.text) for i, r in records.items() if not fitting[i]}
    assert {i: r.metadata[KEY_FIELD] for i, r in records.items()} == {i: key.id for i, key in keys.items()}
    assert corpus._references.of(index.id) == {i: key.id for i, key in keys.items()}
    assert set(store.ids()) == {key.id for key in keys.values()}
    if isinstance(corpus._lockstep._encoder, FakeContextEncoder):
        for i, key in keys.items():
            assert_same_rows(
                store.get(key), rows_behind(corpus._lockstep._encoder.context(fitting[i]), key.tokens)
            )
    assert store.check().ok


def assert_close(got: KV, wanted: KV) -> None:
    assert got.tokens == wanted.tokens
    for a, b in zip(got.layers, wanted.layers, strict=True):
        assert (a.keys - b.keys).abs().max() < 1e-5
        assert (a.values - b.values).abs().max() < 1e-5


def contexts_with(corpus: Corpus, gone: str, texts: Sequence[str]) -> list[EntryKey]:
    """Names of all entries that could have been encoded behind a text, with at most two neighbours."""
    nears = [near for n in (1, 2) for near in itertools.permutations(texts, n) if gone in near]
    return [key_behind(corpus, text, near) for near in nears for text in texts if text not in near]


# --- choosing -------------------------------------------------------------------------------------


def test_neighbours_are_the_most_similar_others(corpus: Corpus) -> None:
    near = corpus.contexts(list(TEXTS))
    assert set(near["ferry"]) == {TEXTS["boat"], TEXTS["ship"]}
    assert set(near["flour"]) == {TEXTS["mill"], TEXTS["bread"]}
    assert all(TEXTS[i] not in texts for i, texts in near.items())
    assert corpus.contexts(["nobody"]) == {}
    assert_lockstep(corpus)


def test_the_fields_are_ours_alone(corpus: Corpus) -> None:
    assert corpus.get(["ferry"])[0].metadata == {}
    assert corpus.search("ferry", 1)[0].metadata == {}
    assert all(record.metadata == {} for record in corpus.documents())
    corpus.update(["ferry"], metadatas=[{NEAR_FIELDS[0]: "forged", KEY_FIELD: "forged", "mine": 1}])
    assert corpus.get(["ferry"])[0].metadata == {"mine": 1}
    assert_lockstep(corpus)


def test_chunks_of_one_text_are_no_neighbours(open_corpus: Callable[..., Corpus]) -> None:
    corpus = open_corpus(context=similar(2))
    corpus.add(["the same", "the same", "the same or not", "the same or not", "else"], list("abcde"))
    near = corpus.contexts(list("abcde"))
    assert near["a"] == near["b"] == ("else", "the same or not")
    assert near["c"] == ("else", "the same")
    assert corpus.stats().store.entries == 3
    corpus.delete(["a"])
    assert corpus.contexts(["c"])["c"] == ("else", "the same")
    assert_lockstep(corpus)


def test_neighbours_that_do_not_fit_are_left_out(open_corpus: Callable[..., Corpus]) -> None:
    encoder = FakeContextEncoder()
    encoder.max_tokens = 90
    corpus = open_corpus(encoder, context=similar(2))
    corpus.add(list(TEXTS.values()), list(TEXTS))
    assert all(len(texts) == 1 for texts in corpus.contexts(list(TEXTS)).values())
    assert_lockstep(corpus)
    assert corpus.reconcile().was_equal
    encoder.max_tokens = 60
    assert all(texts == () for texts in corpus.contexts(list(TEXTS)).values())
    assert corpus.reconcile().rebuilt == len(TEXTS)
    assert_lockstep(corpus)


def test_later_chunks_change_nothing_until_renewed(open_corpus: Callable[..., Corpus]) -> None:
    encoder = FakeContextEncoder()
    corpus = open_corpus(encoder, context=similar(1))
    corpus.add(["the red boat"], ["a"])
    assert corpus.contexts(["a"]) == {"a": ()}
    corpus.add(["the old mill"], ["b"])
    corpus.add(["the red boats"], ["c"])
    assert encoder.encoded == [1, 1, 1]
    assert corpus.contexts(["a", "c"]) == {"a": (), "c": ("the red boat",)}
    assert_lockstep(corpus)
    steps: list[tuple[int, int]] = []
    report = corpus.renew_contexts(progress=lambda done, total: steps.append((done, total)))
    assert corpus.contexts(["a"]) == {"a": ("the red boats",)}
    assert (report.records, report.changed, report.encoded, report.removed) == (3, 1, 1, 1)
    assert steps == [(3, 3)]
    assert_lockstep(corpus)
    assert corpus.renew_contexts().changed == 0


# --- changing and removing -----------------------------------------------------------------------


@pytest.mark.parametrize("gone", TEXTS)
def test_nothing_tells_of_a_deleted_text(corpus: Corpus, gone: str) -> None:
    behind = [i for i, near in corpus.contexts(list(TEXTS)).items() if TEXTS[gone] in near]
    suspects = [corpus.key_of(TEXTS[gone]), *contexts_with(corpus, TEXTS[gone], list(TEXTS.values()))]
    assert sum(key in corpus._store for key in suspects) == len(behind)
    # As answers of somebody who knows nothing of contexts leave them.
    corpus._store.put(corpus.key_of(TEXTS[gone]), example_rows(corpus.key_of(TEXTS[gone]).tokens))
    corpus.delete([gone])
    assert not any(key in corpus._store for key in suspects)
    assert all(len(near) == 2 for near in corpus.contexts([i for i in TEXTS if i != gone]).values())
    assert_lockstep(corpus)


def test_nothing_tells_of_a_replaced_text(corpus: Corpus) -> None:
    suspects = contexts_with(corpus, TEXTS["boat"], list(TEXTS.values()))
    corpus.update(["boat"], texts=["Rye bread is baked of rye."])
    assert not any(key in corpus._store for key in suspects)
    assert_lockstep(corpus)
    corpus.upsert([TEXTS["boat"], "Another one"], ["boat", "new"], metadatas=[{"x": 1}, None])
    assert_lockstep(corpus)
    assert corpus.get(["boat"])[0].metadata == {"x": 1}


def test_metadata_alone_encodes_nothing(corpus: Corpus) -> None:
    encoder: Any = corpus._lockstep._encoder
    before = sum(encoder.encoded)
    corpus.upsert([TEXTS["boat"]], ["boat"], metadatas=[{"x": 1}])
    corpus.update(["mill"], metadatas=[{"y": 1}])
    corpus.renew_contexts()
    before_again = sum(encoder.encoded)
    corpus.upsert([TEXTS["boat"]], ["boat"], metadatas=[{"x": 2}])
    corpus.renew_contexts()
    assert sum(encoder.encoded) == before_again
    assert before_again - before <= len(TEXTS)
    assert_lockstep(corpus)


def test_without_an_encoder_rows_go_and_are_built_later(
    corpus: Corpus, open_corpus: Callable[..., Corpus]
) -> None:
    suspects = contexts_with(corpus, TEXTS["boat"], list(TEXTS.values()))
    bare = open_corpus(FakeEncoder())
    assert bare.contexts(list(TEXTS)) == {}
    bare.delete(["boat"])
    assert not any(key in bare._store for key in suspects)
    with pytest.raises(ConfigError, match="encoder of an engine"):
        bare.add(["more"])
    with pytest.raises(ConfigError, match="encoder of an engine"):
        bare.reconcile()
    corpus = open_corpus()
    assert all(TEXTS["boat"] not in near for near in corpus.contexts(list(TEXTS)).values())
    assert corpus.reconcile().rebuilt > 0
    assert_lockstep(corpus)


# --- settings -------------------------------------------------------------------------------------


def test_a_collection_knows_its_number(corpus: Corpus, open_corpus: Callable[..., Corpus]) -> None:
    with pytest.raises(ConfigError, match="renew_contexts"):
        open_corpus(context=similar(1))
    corpus = open_corpus()
    assert corpus._index.context == "similar:2"
    assert all(len(near) == 2 for near in corpus.contexts(list(TEXTS)).values())
    for count in (1, 0, 3):
        assert corpus.renew_contexts(similar(count)).changed == len(TEXTS)
        assert corpus.context == similar(count)
        found = corpus.contexts(list(TEXTS))
        assert [len(found.get(i, ())) for i in TEXTS] == [count] * len(TEXTS)
        assert_lockstep(corpus)


def test_impossible_settings(open_corpus: Callable[..., Corpus]) -> None:
    for count in (-1, 0, MAX_SIMILAR + 1):
        with pytest.raises(ConfigError, match="expected 1 to"):
            Context("similar", count)
    with pytest.raises(ConfigError, match="encoder of an engine"):
        open_corpus(FakeEncoder(), context=similar(1))
    with pytest.raises(ConfigError, match="encoder of an engine"):
        open_corpus(FakeEncoder()).renew_contexts(similar(1))


def test_a_plain_corpus_notes_and_asks_nothing(
    open_corpus: Callable[..., Corpus], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("nearest", "matching", "note_context"):
        monkeypatch.setattr(Index, name, None)
    encoder = FakeContextEncoder()
    corpus = open_corpus(encoder)
    corpus.add(list(TEXTS.values()), list(TEXTS))
    corpus.upsert(["new"], ["boat"])
    corpus.delete(["ferry"])
    corpus.ingest(["one more"])
    assert corpus.reconcile().was_equal
    assert corpus.contexts(list(TEXTS)) == {}
    assert encoder.encoded == [6, 1, 1]
    for record in corpus._index.records():
        assert set(record.metadata) & set(RESERVED) == {KEY_FIELD}
        assert record.metadata[KEY_FIELD] == corpus.key_of(record.text).id


def test_a_plain_corpus_gets_neighbours(open_corpus: Callable[..., Corpus]) -> None:
    open_corpus().add(list(TEXTS.values()), list(TEXTS))
    corpus = open_corpus(context=similar(2))
    assert corpus.reconcile().was_equal
    corpus.add(["The ferry never leaves."], ["late"])
    assert [i for i, near in corpus.contexts([*TEXTS, "late"]).items() if near] == ["late"]
    assert_lockstep(corpus)
    assert corpus.renew_contexts().changed == len(TEXTS)
    assert_lockstep(corpus)


def test_a_foreign_distance_stays(tmp_path: Path) -> None:
    client: Any = chromadb.PersistentClient(str(tmp_path))
    client.create_collection("mine", metadata={"hnsw:space": "l2", "by": "me"}, embedding_function=None)
    client.close()
    for context in (similar(3), ALONE):
        index = Index.open(tmp_path, "mine", embedding=HashedEmbedding())
        index.note_context(str(context))
        index.close()
    client = chromadb.PersistentClient(str(tmp_path))
    found = client.get_collection("mine", embedding_function=None)
    assert found.metadata == {"by": "me", "kvrag_context": "alone"}
    assert found.configuration_json["hnsw"]["space"] == "l2"
    client.close()


# --- crashes, a disk that cannot be written --------------------------------------------------------


class Crash(BaseException):
    """What no code between here and the disk may catch and tidy up after."""


def dying(original: Callable[..., Any], nth: int, when: str) -> Callable[..., Any]:
    """A function whose nth call is the last thing that happens."""
    calls = itertools.count(1)

    def call(*args: Any, **kwargs: Any) -> Any:
        number = next(calls)
        if number == nth and when == "before":
            raise Crash
        result = original(*args, **kwargs)
        if number == nth:
            raise Crash
        return result

    return call


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
    (Index, "note_context"),
]
CHANGES: dict[str, Callable[[Corpus], object]] = {
    "add": lambda c: c.add(["three four", "four five", "one two"], ["c", "d", "e"]),
    "upsert": lambda c: c.upsert(["uno dos", "three four", "two three"], ["a", "c", "b"]),
    "delete": lambda c: c.delete(["a"]),
    "renew": lambda c: c.renew_contexts(),
    "other number": lambda c: c.renew_contexts(similar(1)),
    "reconcile": lambda c: c.reconcile(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_crash_at_any_step_is_mended(
    open_corpus: Callable[..., Corpus], monkeypatch: pytest.MonkeyPatch, change: str, when: str
) -> None:
    """Every call of every step, one after the other, is the last thing that happens."""
    corpus = open_corpus(batch_size=2)
    for owner, name in STEPS:
        for nth in (1, 2):
            corpus.delete([record.id for record in corpus.documents()])
            corpus.renew_contexts(similar(2))
            corpus.add(["one two", "two three", "two three four"], ["a", "b", "z"])
            if change == "reconcile":
                corpus._index.delete(["a"])
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, dying(getattr(owner, name), nth, when))
                try:
                    CHANGES[change](corpus)
                except Crash:
                    pass
                else:
                    break
            corpus = open_corpus(batch_size=2)
            corpus.reconcile(verify=False)
            assert_lockstep(corpus)
            assert corpus.reconcile(verify=False).was_equal


def test_an_interrupted_ingestion_can_be_repeated(open_corpus: Callable[..., Corpus]) -> None:
    corpus = open_corpus(context=similar(2), batch_size=2)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        corpus.ingest(list(TEXTS.values()), progress=stop)
    assert corpus.stats().store.entries == 2
    assert corpus.ingest(list(TEXTS.values())).skipped == len(TEXTS)
    assert_lockstep(corpus)


def test_a_store_that_cannot_be_written(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    suspects = contexts_with(corpus, TEXTS["boat"], list(TEXTS.values()))
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr("kvrag.store.folder.write_partial", full)
        corpus.upsert(["Rye is a grain", "more"], ["boat", "new"])
    assert len([record for record in caplog.records if record.name == "kvrag.lockstep"]) == 1
    assert corpus.stats().uncached > 2
    assert not any(key in corpus._store for key in suspects)
    assert corpus.reconcile().rebuilt > 2
    assert_lockstep(corpus)


def test_changes_behind_our_back(corpus: Corpus) -> None:
    index = corpus._index
    index.delete(["boat"])
    index.upsert(["mill"], ["The new mill grinds nothing."], [{}])
    index.add(["theirs"], ["The ferry is theirs."], [{"by": "them"}])
    key = corpus.key_of("an orphan")
    corpus._store.put(key, example_rows(key.tokens))
    assert not corpus.reconcile().was_equal
    assert_lockstep(corpus)
    assert corpus.get(["theirs"])[0].metadata == {"by": "them"}
    assert corpus.reconcile().was_equal


# --- answers --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with Engine(tiny("llama"), tmp_path_factory.mktemp("store")) as engine:
        yield engine


@pytest.fixture
def real(engine: Engine, tmp_path: Path) -> Iterator[Corpus]:
    """The texts in a corpus of a real, tiny model."""
    assert engine.store is not None
    index = Index.open(tmp_path / "chroma")
    corpus = Corpus(index, engine.store, engine.encoder(FORM), context=similar(2))
    corpus.add(list(TEXTS.values()), list(TEXTS))
    yield corpus
    corpus.delete([record.id for record in corpus.documents()])
    assert not list(engine.store.ids())
    index.close()


def test_answers_come_from_the_store(engine: Engine, real: Corpus) -> None:
    entries = real.stats().store.entries
    found = ask(engine, real, "When does the ferry leave?", form=FORM, sampling=SHORT).reply()
    assert [source.is_hit for source in found.sources] == [True] * 4
    with Engine(engine.model) as bare:
        expected = ask(bare, real, "When does the ferry leave?", form=FORM, sampling=SHORT).reply()
    assert not any(source.is_hit for source in expected.sources)
    assert found.answer.tokens == expected.answer.tokens
    assert [s.focus for s in found.sources] == pytest.approx([s.focus for s in expected.sources], abs=1e-5)
    assert real.stats().store.entries == entries
    assert real.reconcile().removed == 0


def test_the_encoder_gives_the_rows_of_answers(engine: Engine, real: Corpus) -> None:
    """What a miss of a question would have encoded."""
    caches = engine._caches
    prefix = engine.model.text.tokenize(FORM.prefix, first=True)
    encoder = engine.encoder(FORM)
    kept = set(caches._prefixes)
    for i, near in real.contexts(list(TEXTS)).items():
        tokens, context = encoder.tokenize(TEXTS[i]), encoder.context(near)
        (rows,) = engine.call(partial(caches.encode, prefix, [tokens], [context]))
        assert_close(real._store.get(key_behind(real, TEXTS[i], near)), rows)
    assert set(caches._prefixes) == kept
    with pytest.raises(DocumentTooLong, match="behind"):
        encoder.encode_behind([(5,)], [(5,) * encoder.max_tokens])


def test_an_answer_leaves_nothing_behind(engine: Engine, real: Corpus) -> None:
    """Whoever asked before, a deletion takes all that was kept of a text for the answers."""
    found = ask(engine, real, "the old mill", k=6, form=FORM, sampling=SHORT).reply()
    texts = [source.text for source in found.sources]
    bare = engine.answer(found.answer.plan.text, texts, prefix=FORM.prefix, sampling=SHORT)
    assert not any(document.is_hit for document in bare.documents)
    real.delete(["mill"])
    suspects = contexts_with(real, TEXTS["mill"], list(TEXTS.values()))
    assert not any(key in real._store for key in [real.key_of(TEXTS["mill"]), *suspects])
    again = ask(engine, real, "old mill", k=5, form=FORM, sampling=SHORT).reply()
    assert all(source.is_hit for source in again.sources)
    real.reconcile()
    assert_lockstep(real)
