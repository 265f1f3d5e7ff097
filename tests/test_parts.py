"""Chunks that are encoded behind the parts before them in their documents, in Chroma, store and answers."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrag.config import ALONE, BEFORE, Context, Sampling
from kvrag.contexts import run_starts
from kvrag.corpus import Corpus
from kvrag.documents import Document, split
from kvrag.encoder import DocumentEncoder
from kvrag.engine import Engine
from kvrag.errors import ConfigError, InputError
from kvrag.focus.policy import PRESETS, preset
from kvrag.home import Home, ingest
from kvrag.index import Index
from kvrag.items import FROM_FIELD, KEY_FIELD, RESERVED
from kvrag.model import Model
from kvrag.parts import DOCUMENT_FIELD, PART_FIELD, part_of
from kvrag.prompt import RagPrompt
from kvrag.rag import Reply, ask
from kvrag.reader.questions import every_kind
from kvrag.reader.world import Mix, World
from kvrag.segments import KV, LayerKV
from kvrag.store.disk import DiskStore
from kvrag.store.key import EntryKey, Fingerprint
from kvrag.store.references import References
from kvrag.testing.models import tiny
from kvrag.testing.stores import assert_same_rows, example_fingerprint, example_rows

PARTS = ["one one", "two two", "three three", "four four"]
ONE = [{"source": "one.txt"}] * 4
FORM = RagPrompt("Answer from the documents.\n\n", "\n\nQuestion: ", "\nAnswer:", is_rendered=False)
SHORT = Sampling(max_new_tokens=4, ignore_eos=True)


class BytesEncoder:
    """Bytes for tokens, and rows that depend on them and on what they stand behind; notes what it reads."""

    def __init__(self, max_tokens: int = 200) -> None:
        self.max_tokens = max_tokens
        self.fingerprint = example_fingerprint()
        self.encoded: list[str] = []

    def tokenize(self, text: str) -> tuple[int, ...]:
        return tuple(text.encode())

    def context(self, texts: Sequence[str]) -> tuple[int, ...]:
        return tuple("".join(f"{text}|" for text in texts).encode())

    def fingerprint_behind(self, context: tuple[int, ...]) -> Fingerprint:
        return example_fingerprint(prefix=bytes(context).hex()) if context else self.fingerprint

    def encode(self, token_lists: Sequence[tuple[int, ...]]) -> list[KV]:
        return self.encode_behind(token_lists, [()] * len(token_lists))

    def encode_behind(
        self, token_lists: Sequence[tuple[int, ...]], contexts: Sequence[tuple[int, ...]]
    ) -> list[KV]:
        self.encoded += [bytes(tokens).decode() for tokens in token_lists]
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
        opened.append(Corpus(index, DiskStore(tmp_path / "store"), encoder or BytesEncoder(), **settings))
        return opened[-1]

    yield open_corpus
    for corpus in opened:
        corpus.close()


@pytest.fixture
def corpus(open_corpus: Callable[..., Corpus]) -> Corpus:
    """One document of four parts, and another one of one."""
    corpus = open_corpus(context=BEFORE, batch_size=2)
    corpus.add([*PARTS, "alone"], [*"abcd", "x"], metadatas=[*ONE, {"source": "x.txt"}])
    encoder_of(corpus).encoded.clear()
    return corpus


def encoder_of(corpus: Corpus) -> Any:
    return corpus._lockstep._encoder


def order(corpus: Corpus, document: str = "one.txt") -> list[str]:
    """Texts of a document's parts, in order."""
    return [part.text for part in corpus._contexts.parts.of([document])[document]]


def key_behind(corpus: Corpus, text: str, context: Sequence[str]) -> EntryKey:
    encoder = encoder_of(corpus)
    return EntryKey(encoder.fingerprint_behind(encoder.context(context)), encoder.tokenize(text))


def assert_lockstep(corpus: Corpus) -> None:
    """Every record has one entry, behind the parts that stand before it now, and nothing else is there."""
    index, store, encoder = corpus._index, corpus._store, encoder_of(corpus)
    records = {record.id: record for record in index.records()}
    behind = dict.fromkeys(records, ()) | dict(corpus.contexts(list(records)))
    for record in records.values():
        if document := record.metadata.get(DOCUMENT_FIELD):
            parts = corpus._contexts.parts.of([str(document)])[str(document)]
            before = [part.text for part in parts if part_of(part) < part_of(record)]
            context = behind[record.id]
            assert context == tuple(before[len(before) - len(context) :])
    keys = {i: key_behind(corpus, r.text, behind[i]) for i, r in records.items()}
    assert {i: r.metadata[KEY_FIELD] for i, r in records.items()} == {i: key.id for i, key in keys.items()}
    assert corpus._references.of(index.id) == {i: key.id for i, key in keys.items()}
    assert set(store.ids()) == {key.id for key in keys.values()}
    for i, key in keys.items():
        assert_same_rows(store.get(key), rows_behind(encoder.context(behind[i]), key.tokens))
    assert store.check().ok


def keys_telling(corpus: Corpus, gone: str) -> set[str]:
    """Names of all entries that could have been encoded behind a text among the parts, in any order."""
    texts = [*PARTS, "alone"]
    contexts = [c for n in range(1, 5) for c in itertools.permutations(texts, n) if gone in c]
    keys = {key_behind(corpus, text, c).id for c in contexts for text in texts if text not in c}
    return keys | {key_behind(corpus, gone, c).id for n in range(5) for c in itertools.permutations(texts, n)}


# --- choosing -------------------------------------------------------------------------------------


def test_parts_stand_behind_those_before_them(corpus: Corpus) -> None:
    assert corpus.contexts([*"dbax", "nobody"]) == {
        "d": tuple(PARTS[:3]),
        "b": (PARTS[0],),
        "a": (),
        "x": (),
    }
    assert corpus.context == BEFORE
    assert_lockstep(corpus)
    assert corpus.reconcile().was_equal


def test_our_fields_are_hidden_and_cannot_be_forged(corpus: Corpus) -> None:
    assert corpus.get(["b"])[0].metadata == {"source": "one.txt"}
    forged = {DOCUMENT_FIELD: "x.txt", PART_FIELD: 7, FROM_FIELD: 0, KEY_FIELD: "?", "source": "other.txt"}
    corpus.update(["b"], metadatas=[forged])
    assert corpus.get(["b"])[0].metadata == {"source": "other.txt"}
    assert order(corpus) == PARTS
    assert_lockstep(corpus)


@given(st.lists(st.integers(1, 9), max_size=12), st.integers(0, 30))
def test_runs_hold_the_nearest_parts_and_reading_them_costs_twice_at_most(
    lengths: list[int], window: int
) -> None:
    rooms = [window - length for length in lengths]
    starts = run_starts(lengths, rooms)
    read, end = 0, 0
    for i, (start, room) in enumerate(zip(starts, rooms, strict=True)):
        assert start <= i
        context = sum(lengths[start:i])
        assert context <= max(room, 0)
        # Left out is only what would not have fitted, or was left out to let the run grow.
        if start and room >= 0:
            assert context + lengths[start - 1] > room // 2 or starts[i - 1] == start
        if i and start == i:
            assert lengths[i - 1] > room
        if i and start == starts[i - 1]:
            read += lengths[i]
        else:
            read, end = read + context + lengths[i], i
    assert end < max(len(lengths), 1)
    if max(lengths, default=0) * 2 <= window // 2:
        assert read <= 2 * sum(lengths)


def test_long_documents_are_read_in_runs(open_corpus: Callable[..., Corpus]) -> None:
    encoder = BytesEncoder(max_tokens=40)
    corpus = open_corpus(encoder, context=BEFORE, batch_size=2)
    texts = [f"part {n:02}" for n in range(12)]  # 7 tokens, 8 with a separator: 4 fit in front of another
    corpus.add(texts, metadatas=[{"source": "long.txt"}] * 12)
    ids = corpus._index.existing([r.id for r in corpus.documents()])
    lengths = {r.text: len(corpus.contexts([r.id])[r.id]) for r in corpus.get(sorted(ids))}
    assert [lengths[text] for text in texts] == [0, 1, 2, 3, 4, 2, 3, 4, 2, 3, 4, 2]
    assert_lockstep(corpus)
    assert corpus.reconcile().was_equal


def test_at_most_so_many_tokens(open_corpus: Callable[..., Corpus]) -> None:
    corpus = open_corpus(context=Context("before", max_tokens=20))
    corpus.add(PARTS, list("abcd"), metadatas=ONE)
    assert corpus.contexts(["d"]) == {"d": ("three three",)}
    assert corpus.contexts(["c"]) == {"c": ("one one", "two two")}
    assert_lockstep(corpus)
    with pytest.raises(ConfigError, match="renew_contexts"):
        open_corpus(context=BEFORE)
    assert open_corpus().context == Context("before", max_tokens=20)


# --- changing and removing ------------------------------------------------------------------------


@pytest.mark.parametrize("gone", "abcd")
def test_nothing_tells_of_a_deleted_part(corpus: Corpus, gone: str) -> None:
    text = PARTS["abcd".index(gone)]
    telling = keys_telling(corpus, text)
    assert len(telling & set(corpus._store.ids())) == 4 - "abcd".index(gone)
    corpus.delete([gone])
    assert not telling & set(corpus._store.ids())
    assert encoder_of(corpus).encoded == PARTS["abcd".index(gone) + 1 :]
    assert order(corpus) == [part for part in PARTS if part != text]
    assert_lockstep(corpus)


def test_nothing_tells_of_a_replaced_part(corpus: Corpus) -> None:
    telling = keys_telling(corpus, PARTS[1])
    corpus.update(["b"], texts=["zwei zwei"])
    assert not telling & set(corpus._store.ids())
    assert encoder_of(corpus).encoded == ["zwei zwei", *PARTS[2:]]
    assert order(corpus) == ["one one", "zwei zwei", *PARTS[2:]]
    assert_lockstep(corpus)
    encoder_of(corpus).encoded.clear()
    corpus.update(["c"], metadatas=[{"x": 1}])
    corpus.upsert(["three three"], ["c"], metadatas=[{"source": "one.txt", "y": 2}])
    assert not encoder_of(corpus).encoded[1:]  # a record that is written anew may be encoded anew
    assert corpus.get(["c"])[0].metadata == {"source": "one.txt", "y": 2}
    assert_lockstep(corpus)


def test_a_part_that_goes_to_another_document(corpus: Corpus) -> None:
    corpus.upsert([PARTS[1]], ["b"], metadatas=[{"source": "x.txt"}])
    assert order(corpus) == [PARTS[0], *PARTS[2:]]
    assert order(corpus, "x.txt") == ["alone", PARTS[1]]
    assert_lockstep(corpus)
    corpus.upsert([PARTS[1]], ["b"], documents=[None])
    assert corpus.contexts(["b"]) == {"b": ()}
    assert_lockstep(corpus)
    with pytest.raises(InputError, match="one length"):
        corpus.add(["more"], documents=[])


def test_later_calls_go_to_the_end(corpus: Corpus) -> None:
    corpus.add(["five", "other"], ["e", "f"], documents=["one.txt", "y"])
    assert order(corpus) == [*PARTS, "five"]
    assert encoder_of(corpus).encoded == ["five", "other"]
    assert_lockstep(corpus)


def test_ingestion_follows_a_document_that_changes(open_corpus: Callable[..., Corpus]) -> None:
    corpus = open_corpus(context=BEFORE, batch_size=2)
    encoder = encoder_of(corpus)

    def again(texts: list[str], encoded: list[str]) -> None:
        encoder.encoded.clear()
        there = [r.id for r in corpus.documents() if r.metadata["source"] == "one.txt"]
        corpus.ingest(texts, metadatas=[{"source": "one.txt"}] * len(texts), instead_of=there)
        assert order(corpus) == list(dict.fromkeys(texts))
        assert encoder.encoded == encoded
        assert_lockstep(corpus)

    corpus.ingest(["elsewhere"], metadatas=[{"source": "two.txt"}])
    again(PARTS, PARTS)
    again(PARTS, [])
    again([PARTS[0], "new", *PARTS[1:]], ["new", *PARTS[1:]])
    again([PARTS[0], *PARTS[2:]], PARTS[2:])
    again([PARTS[3], PARTS[0], PARTS[3], PARTS[2]], [PARTS[3], PARTS[0], PARTS[2]])
    again([*PARTS[:1], "x"], [PARTS[0], "x"])
    assert len(list(corpus.documents())) == 3


def test_halves_of_a_document_can_be_ingested_again(corpus: Corpus) -> None:
    for _ in range(2):
        corpus.ingest(["five", "six"], metadatas=[{"source": "one.txt"}] * 2)
        assert order(corpus) == [*PARTS, "five", "six"]
        assert encoder_of(corpus).encoded == ["five", "six"]
    assert_lockstep(corpus)


# --- settings -------------------------------------------------------------------------------------


def test_other_choices_and_back(open_corpus: Callable[..., Corpus]) -> None:
    corpus = open_corpus()
    corpus.add(PARTS, list("abcd"), metadatas=ONE)
    assert corpus.contexts(list("abcd")) == {}
    assert_lockstep(corpus)
    for context in (BEFORE, Context("similar", 1), ALONE, BEFORE, Context("before", max_tokens=9), BEFORE):
        assert corpus.renew_contexts(context).changed > 0
        assert corpus.context == context
        assert len({r.metadata[KEY_FIELD] for r in corpus._index.records()}) == len(list(corpus._store.ids()))
        assert corpus.renew_contexts().changed == 0
        assert corpus.reconcile().was_equal
    assert_lockstep(corpus)


@pytest.mark.parametrize("text", ["after", "before:2", "similar", "similar:9", "alone/5", "before/0", ""])
def test_choices_that_say_nothing(text: str) -> None:
    with pytest.raises(ConfigError, match="expected"):
        Context.parse(text)


@given(
    st.one_of(
        st.just(ALONE),
        st.builds(Context, st.just("before"), st.just(0), st.none() | st.integers(1, 10**6)),
        st.builds(Context, st.just("similar"), st.integers(1, 8), st.none() | st.integers(1, 10**6)),
    )
)
def test_choices_in_words(context: Context) -> None:
    assert Context.parse(str(context)) == context


# --- crashes, changes behind our back -------------------------------------------------------------


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
NEW = ["one one", "new", "three three"]
CHANGES: dict[str, Callable[[Corpus], object]] = {
    "ingest": lambda c: c.ingest(
        NEW, metadatas=ONE[:3], instead_of=[r.id for r in c.documents() if r.text in PARTS]
    ),
    "upsert": lambda c: c.upsert(["uno", "five"], ["a", "e"], metadatas=ONE[:2]),
    "delete": lambda c: c.delete(["b"]),
    "other choice": lambda c: c.renew_contexts(Context("similar", 1)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_crash_at_any_step_is_mended(
    open_corpus: Callable[..., Corpus], monkeypatch: pytest.MonkeyPatch, change: str, when: str
) -> None:
    """Every call of every step, one after the other, is the last thing that happens."""
    corpus = open_corpus(context=BEFORE, batch_size=2)
    for owner, name in STEPS:
        for nth in (1, 2):
            corpus.delete([record.id for record in corpus.documents()])
            corpus.renew_contexts(BEFORE)
            if change == "ingest":
                corpus.ingest(PARTS[:3], metadatas=ONE[:3])
            else:
                corpus.add(PARTS[:3], list("abc"), metadatas=ONE[:3])
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
            if corpus.context == BEFORE:
                assert_lockstep(corpus)
            assert corpus.reconcile(verify=False).was_equal
            if change == "ingest":  # the same call again ends where the first one would have
                CHANGES[change](corpus)
                assert order(corpus) == NEW
                assert_lockstep(corpus)


def test_an_interrupted_ingestion_goes_on(open_corpus: Callable[..., Corpus]) -> None:
    corpus = open_corpus(context=BEFORE, batch_size=1)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    texts, sources = [*PARTS, "elsewhere"], [*ONE, {"source": "two.txt"}]
    with pytest.raises(KeyboardInterrupt):
        corpus.ingest(texts, metadatas=sources, progress=stop)
    assert corpus.stats().store.entries == 4
    report = corpus.ingest(texts, metadatas=sources)
    assert (report.added, report.skipped, report.completed) == (0, 5, 1)
    assert_lockstep(corpus)


def test_changes_behind_our_back(corpus: Corpus) -> None:
    index = corpus._index
    index.delete(["b"])
    index.upsert(["c"], ["drei drei"], [{DOCUMENT_FIELD: "one.txt", PART_FIELD: 2}])
    index.add(["theirs"], ["Nobody's part."], [{"by": "them"}])
    corpus._store.put(corpus.key_of("an orphan"), example_rows(corpus.key_of("an orphan").tokens))
    assert corpus.contexts(["d"]) == {"d": ("one one", "drei drei")}  # what is right, whatever is kept
    assert not corpus.reconcile().was_equal
    assert_lockstep(corpus)
    assert corpus.reconcile().was_equal


def test_a_store_that_cannot_be_written(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    telling = keys_telling(corpus, PARTS[0])
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr("kvrag.store.folder.write_partials", full)
        corpus.update(["a"], texts=["uno"])
    assert len([record for record in caplog.records if record.name == "kvrag.lockstep"]) == 1
    assert not telling & set(corpus._store.ids())
    assert corpus.reconcile().rebuilt == 4
    assert_lockstep(corpus)


def test_a_plain_corpus_notes_places_only(open_corpus: Callable[..., Corpus]) -> None:
    corpus = open_corpus()
    corpus.add(PARTS, list("abcd"), metadatas=ONE)
    corpus.delete(["a"])
    assert encoder_of(corpus).encoded == PARTS
    for record in corpus._index.records():
        assert set(record.metadata) & set(RESERVED) == {KEY_FIELD, DOCUMENT_FIELD, PART_FIELD}
    assert corpus._index.context is None


# --- answers --------------------------------------------------------------------------------------


def by_hand(engine: Engine, reply: Reply, contexts: dict[str, list[str]]) -> Reply | Any:
    """The same prompt by an engine that keeps nothing, every part encoded on its own behind its context."""
    with Engine(engine.model) as bare:
        stream = bare.stream_rendered(
            reply.answer.plan.text,
            {source.id: source.text for source in reply.sources},
            prefix=FORM.prefix,
            sampling=SHORT,
            policy=preset(reply.answer.policy),
            contexts={
                source.id: [piece for text in contexts[source.text] for piece in (text, "\n\n")]
                for source in reply.sources
            },
            is_rendered=False,
        )
        for _ in stream:
            pass
        return stream.answer


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with Engine(tiny("llama"), tmp_path_factory.mktemp("store"), token_budget=40) as engine:
        yield engine


LAMP = [
    "The lamp of Varn is old.",
    "It was lit in 1871.",
    "It is white all over.",
    "Nobody lives there today.",
]
BOAT = ["The boat is called Mirrow.", "It was built by two brothers.", "It leaves at noon every day."]


@pytest.fixture(scope="module")
def real(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Corpus]:
    """Two documents in a corpus of a real, tiny model."""
    assert engine.store is not None
    index = Index.open(tmp_path_factory.mktemp("chroma"))
    corpus = Corpus(index, engine.store, engine.encoder(FORM), context=BEFORE)
    corpus.add([*LAMP, *BOAT], documents=["lamp"] * 4 + ["boat"] * 3)
    yield corpus
    index.close()


def test_parts_read_in_one_go_have_the_rows_of_each_alone(engine: Engine, real: Corpus) -> None:
    encoder = engine.encoder(FORM)
    records = list(real.documents())
    for i, texts in real.contexts([record.id for record in records]).items():
        (record,) = real.get([i])
        key = key_of(encoder, record.text, texts)
        (alone,) = encoder.encode_behind([key.tokens], [encoder.context(texts)])
        kept = real._store.get(key)
        assert kept.tokens == alone.tokens
        for a, b in zip(kept.layers, alone.layers, strict=True):
            assert (a.keys - b.keys).abs().max() < 1e-5
            assert (a.values - b.values).abs().max() < 1e-5


def key_of(encoder: DocumentEncoder, text: str, context: Sequence[str]) -> EntryKey:
    return EntryKey(encoder.fingerprint_behind(encoder.context(context)), encoder.tokenize(text))


@pytest.mark.parametrize("name", PRESETS)
def test_answers_are_those_of_encoding_by_hand(engine: Engine, real: Corpus, name: str) -> None:
    reply = ask(
        engine, real, "When was the lamp lit?", k=6, form=FORM, sampling=SHORT, policy=preset(name)
    ).reply()
    assert all(source.is_hit for source in reply.sources)
    contexts = {d[i]: d[:i] for d in (LAMP, BOAT) for i in range(len(d))}
    expected = by_hand(engine, reply, contexts)
    assert reply.answer.tokens == expected.tokens
    got = [document.mass for document in reply.answer.documents]
    assert got == pytest.approx([document.mass for document in expected.documents], abs=1e-5)
    assert real.reconcile(verify=False).was_equal


def test_a_context_is_what_stands_in_the_prompt(engine: Engine) -> None:
    """Token by token: prefix, the parts before with what stands between them, and the part."""
    encoder = engine.encoder(FORM)
    reply = engine.answer(FORM.render(LAMP, "Why?"), LAMP, prefix=FORM.prefix, sampling=SHORT)
    tokens = reply.plan.tokens
    for i, text in enumerate(LAMP):
        before = (*encoder._prefix, *encoder.context(LAMP[:i]), *encoder.tokenize(text))
        assert tokens[: len(before)] == before


def test_equal_parts_of_two_documents_stand_behind_their_own(engine: Engine, tmp_path: Path) -> None:
    texts = [
        "Jane lives in Varn.",
        "She has a cat at home.",
        "Mia lives in Lindal.",
        "She has a cat at home.",
    ]
    with Corpus(
        Index.open(tmp_path / "chroma"), DiskStore(tmp_path / "store"), engine.encoder(FORM), context=BEFORE
    ) as corpus:
        corpus.add(texts, list("abcd"), documents=["jane", "jane", "mia", "mia"])
        with Engine(engine.model, DiskStore(tmp_path / "store")) as own:
            reply = ask(own, corpus, "Who has a cat at home?", form=FORM, sampling=SHORT).reply()
        assert all(source.is_hit for source in reply.sources)
        assert corpus.stats().store.entries == 4
        assert corpus.reconcile().was_equal


# --- the shipped reader ---------------------------------------------------------------------------


def test_a_later_part_that_names_nobody_is_found(tmp_path: Path) -> None:
    """Ten questions about facts in later parts: found behind the parts before, and usually not without."""
    world = World(4, held_out=True, mix=Mix(crossing=0.9, max_parts=2))
    documents = world.documents(6)
    asked = every_kind(world, documents, num_unknown=0)["crossing"][:10]
    assert len(asked) == 10
    model = Model.load()
    right = {}
    for context in (BEFORE, ALONE):
        home = Home(tmp_path / str(context))
        with Engine(model, home.store()) as engine:
            files = [Document(d.text, d.entity.name) for d in documents]
            ingest(home, engine, files, by_paragraph=True, context=context)
            with home.corpus(engine) as corpus:
                assert len(split(files[0].text, engine.model.text.tokenize, 512, by="paragraph")) <= 2
                replies = [ask(engine, corpus, q.text, k=12, form=home.form(engine)).reply() for q in asked]
        assert all(source.is_hit for reply in replies for source in reply.sources)
        right[context] = sum(reply.text == q.answer for reply, q in zip(replies, asked, strict=True))
    assert right[BEFORE] >= 9
    assert right[ALONE] <= 3
