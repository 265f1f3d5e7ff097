"""A folder of documents and caches: ingest, change, remove, interrupt, and what it remembers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from kvrag.config import ALONE, BEFORE, Context, Sampling
from kvrag.corpus import Corpus
from kvrag.documents import Document, load
from kvrag.engine import Engine
from kvrag.errors import ConfigError, InputError, StoreWriteError
from kvrag.focus.policy import PRESETS, Policy
from kvrag.focus.pruning import AttentionScore, GivenScore, Pruning
from kvrag.focus.repair import QueryDriven
from kvrag.focus.together import Together
from kvrag.home import Home, file_of, ingest
from kvrag.model import READER, Model
from kvrag.prompt import RagPrompt
from kvrag.rag import Reply, ask, policy_of
from kvrag.store.disk import DiskStore
from kvrag.testing.models import tiny, tiny_model, tiny_tokenizer

SHORT = Sampling(max_new_tokens=4)
LIGHTHOUSE = "The lighthouse of Varn was built in 1871."
FERRY = "A ferry crosses the Mirrow twice a day."
ORCHARD = "The orchard at Lindal grows apples and plums."


@cache
def model(seed: int = 0) -> Model:
    found = tiny(seed=seed)
    found.name = f"tiny {seed}"
    return found


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


@pytest.fixture
def engine(home: Home) -> Iterator[Engine]:
    with Engine(model(), home.store()) as made:
        yield made
    with home.corpus() as corpus:
        assert corpus._store.check().ok


def put(home: Home, engine: Engine, *texts: tuple[str, str]) -> Any:
    """Ingest (source, text) pairs."""
    return ingest(home, engine, [Document(text, source) for source, text in texts])


def texts_of(home: Home) -> list[str]:
    with home.corpus() as corpus:
        return sorted(r.text for r in corpus.documents())


def question(home: Home, engine: Engine, text: str = "Who built the lighthouse?", **options: Any) -> Reply:
    with home.corpus(engine) as corpus:
        return ask(engine, corpus, text, form=home.form(engine), sampling=SHORT, **options).reply()


def bytes_in(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


# ---- the whole way


def test_ingest_ask_change_remove(home: Home, engine: Engine) -> None:
    report = put(home, engine, ("a.txt", LIGHTHOUSE), ("b.txt", FERRY))
    assert (report.added, report.skipped) == (2, 0)

    reply = question(home, engine)
    assert sorted(s.name for s in reply.sources) == ["a.txt", "b.txt"]
    assert all(s.is_hit for s in reply.sources)
    assert [s.focus for s in reply.sources] == sorted((s.focus for s in reply.sources), reverse=True)
    assert reply.answer.usage.cached_tokens > reply.answer.usage.read_tokens
    assert json.loads(json.dumps(reply.as_dict()))["answer"] == reply.text

    changed = f"{LIGHTHOUSE} It was painted in 1902."
    report = put(home, engine, ("a.txt", changed))
    assert (report.added, report.skipped) == (1, 0)
    assert texts_of(home) == [FERRY, changed]

    report = put(home, engine, ("a.txt", changed), ("b.txt", FERRY))
    assert (report.added, report.skipped) == (0, 2)
    assert home.store().stats().entries == 2

    with home.corpus() as corpus:
        corpus.delete([r.id for r in corpus.documents() if r.metadata["source"] == "a.txt"])
    assert texts_of(home) == [FERRY]
    assert home.store().stats().entries == 1
    assert [s.name for s in question(home, engine).sources] == ["b.txt"]


def test_answers_from_caches_are_those_without(home: Home, engine: Engine) -> None:
    put(home, engine, ("a.txt", LIGHTHOUSE), ("b.txt", FERRY))
    cached = question(home, engine)
    with Engine(model()) as bare:
        texts = {s.id: s.text for s in cached.sources}
        form = home.form(bare)
        again = bare.answer(cached.answer.plan.text, texts, prefix=form.prefix, sampling=SHORT)
    assert cached.answer.plan.text.count("<s>") == 1
    # The text was written by a template already: to the engine it is a text that begins with its BOS.
    assert again.tokens == cached.answer.tokens


def test_files_that_shrink_lose_their_chunks(home: Home, engine: Engine, tmp_path: Path) -> None:
    lines = tmp_path / "facts.jsonl"
    lines.write_text("\n".join(json.dumps({"text": t}) for t in (LIGHTHOUSE, FERRY, ORCHARD)))
    notes = tmp_path / "notes.md"
    notes.write_text("Some notes.")
    ingest(home, engine, load([lines, notes]))
    assert len(texts_of(home)) == 4

    lines.write_text(json.dumps({"text": LIGHTHOUSE}))
    notes.write_text("  \n")
    report = ingest(home, engine, load([lines, notes]))
    assert (report.added, report.skipped) == (0, 1)
    assert texts_of(home) == [LIGHTHOUSE]
    assert home.store().stats().entries == 1


@pytest.mark.parametrize(
    ("source", "file"),
    [
        ("a.pdf#page=3", "a.pdf"),
        ("a.jsonl#line=12", "a.jsonl"),
        ("a#page=b.txt", "a#page=b.txt"),
        ("x#line=1#line=2", "x#line=1"),
        ("", ""),
    ],
)
def test_the_file_of_a_source(source: str, file: str) -> None:
    assert file_of(source) == file


def test_removed_documents_leave_no_bytes(home: Home, engine: Engine) -> None:
    """Neither those of ingestion, nor those that another model's answers left behind."""
    put(home, engine, ("a.txt", LIGHTHOUSE), ("b.txt", FERRY))
    with Engine(model(seed=1), home.store()) as other:
        reply = question(home, other)
        assert not any(s.is_hit for s in reply.sources)
        assert all(s.is_hit for s in question(home, other).sources)
    assert home.store().stats().entries == 4
    with home.corpus() as corpus:
        corpus.delete([r.id for r in corpus.documents()])
    home.sweep()
    assert home.store().stats().entries == 0
    assert list((home.path / "store").rglob("*.safetensors")) == []
    assert LIGHTHOUSE.encode() not in bytes_in(home.path / "store")


def test_sweeping_a_folder_without_caches_changes_nothing(home: Home) -> None:
    home.sweep()
    assert home.store().stats().entries == 0


def test_an_interrupted_ingest_goes_on(home: Home, engine: Engine) -> None:
    many = [(f"{i}.txt", f"Document number {i} tells of house number {i + 100}.") for i in range(40)]

    def interrupt(done: int, total: int) -> None:
        assert total == 40
        if done >= 32:
            raise KeyboardInterrupt

    documents = [Document(text, source) for source, text in many]
    with pytest.raises(KeyboardInterrupt):
        ingest(home, engine, documents, progress=interrupt)
    assert len(texts_of(home)) == 40
    assert home.store().stats().entries == 32
    assert home.exists()
    report = put(home, engine, *many)
    assert (report.added, report.skipped, report.completed) == (0, 40, 8)
    assert len(texts_of(home)) == home.store().stats().entries == 40


def test_an_ingest_interrupted_while_encoding_loses_nothing(
    home: Home, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(home, engine, ("a.txt", LIGHTHOUSE))

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(DiskStore, "put_many", interrupted)
    with pytest.raises(KeyboardInterrupt):
        put(home, engine, ("a.txt", LIGHTHOUSE), ("b.txt", FERRY))
    monkeypatch.undo()
    assert texts_of(home) == [FERRY, LIGHTHOUSE]
    assert sorted(source.is_hit for source in question(home, engine).sources) == [False, True]
    assert put(home, engine, ("a.txt", LIGHTHOUSE), ("b.txt", FERRY)).skipped == 2
    assert home.store().stats().entries == 2


def test_ingesting_with_another_model_builds_its_caches(home: Home, engine: Engine) -> None:
    put(home, engine, ("a.txt", LIGHTHOUSE), ("b.txt", FERRY))
    with Engine(model(seed=1), home.store()) as other:
        report = put(home, other, ("a.txt", LIGHTHOUSE), ("b.txt", FERRY))
        assert (report.added, report.skipped) == (0, 2)
        assert home.model() == other.model.name
        assert all(s.is_hit for s in question(home, other).sources)
    assert home.store().stats().entries == 2
    assert set(home.settings().forms) == {"tiny 0", "tiny 1"}


def test_lost_caches_are_built_again(home: Home, engine: Engine) -> None:
    put(home, engine, ("a.txt", LIGHTHOUSE), ("b.txt", FERRY))
    for file in (home.path / "store").glob("??/*"):
        file.unlink()
    put(home, engine, ("a.txt", LIGHTHOUSE))
    assert home.store().stats().entries == 2


def test_long_documents_are_cut_to_fit(home: Home) -> None:
    small = Model(model().network, tiny_tokenizer(), name="small", max_length=120)
    text = "\n\n".join(f"Paragraph {i} says so." for i in range(12))
    with Engine(small, home.store()) as engine:
        encoder = engine.encoder(home.form(engine))
        report = ingest(home, engine, [Document(text, "a.txt")])
        assert len(report.ids) > 3
        assert all(len(encoder.tokenize(t)) <= encoder.max_tokens // 2 < 50 for t in texts_of(home))
        assert question(home, engine, "Why?", k=1).sources
        many = question(home, engine, k=8)
        assert sum(source.num_tokens for source in many.sources) > small.max_length  # they share positions


def test_paragraphs_can_be_chunks_of_their_own(home: Home, engine: Engine) -> None:
    ingest(home, engine, [Document(f"{LIGHTHOUSE}\n\n{FERRY}", "a.txt")], by_paragraph=True)
    assert texts_of(home) == [FERRY, LIGHTHOUSE]


def test_documents_without_text_are_refused(home: Home, engine: Engine) -> None:
    with pytest.raises(InputError, match="no text found"):
        put(home, engine, ("a.txt", " \n"))
    assert not home.exists()
    put(home, engine, ("a.txt", LIGHTHOUSE), ("b.txt", ""))
    assert texts_of(home) == [LIGHTHOUSE]


def test_chunks_of_no_tokens_are_refused(home: Home, engine: Engine) -> None:
    with pytest.raises(ConfigError, match="0 tokens"):
        ingest(home, engine, [Document(LIGHTHOUSE, "a.txt")], chunk_tokens=0)


# ---- asking


@pytest.mark.parametrize("blank", ["", " \n"])
def test_a_blank_question_is_refused(home: Home, engine: Engine, blank: str) -> None:
    put(home, engine, ("a.txt", LIGHTHOUSE))
    with pytest.raises(InputError, match="the question is empty"):
        question(home, engine, blank)


def test_an_empty_corpus_is_answered_without_documents(home: Home, engine: Engine) -> None:
    put(home, engine, ("a.txt", LIGHTHOUSE))
    with home.corpus() as corpus:
        corpus.delete([r.id for r in corpus.documents()])
    reply = question(home, engine)
    assert reply.sources == ()
    assert len(reply.answer.tokens) == 4


def test_what_a_policy_did_is_in_the_reply(home: Home, engine: Engine) -> None:
    put(home, engine, ("a.txt", LIGHTHOUSE), ("b.txt", FERRY), ("c.txt", ORCHARD))
    reply = question(home, engine, policy=policy_of("cachefocus", keep=1, repair=0.2, spans=True))
    best, *others = reply.sources
    assert (best.is_read, best.dropped_at) == (True, None)
    assert best.span is not None
    assert 1 <= best.span.start < best.span.end <= best.num_tokens
    assert best.span.text in best.text
    assert [s.is_read for s in others] == [False, False]
    assert all(s.dropped_at in (1, 2, 3) for s in others)
    found = json.loads(json.dumps(reply.as_dict()))
    assert found["policy"] == "cachefocus+query-driven"
    assert found["sources"][0]["span"]["text"] == best.span.text
    assert found["usage"]["recomputed_tokens"] == round(0.2 * best.num_tokens)
    assert 0 <= found["risk"]["value"] == found["risk"]["doubt"] <= 1
    assert not found["in_full"]


def test_the_search_has_a_say_in_pruning(home: Home, engine: Engine) -> None:
    texts = (("a.txt", LIGHTHOUSE), ("b.txt", FERRY), ("c.txt", ORCHARD), ("d.txt", FERRY))
    put(home, engine, *texts)
    with home.corpus(engine) as corpus:
        nearest, *_ = corpus.search("When does the ferry leave?", 4)
    policy = policy_of("cachefocus", keep=1, nearness=1e6)  # attention hardly counts
    reply = question(home, engine, "When does the ferry leave?", policy=policy)
    (kept,) = [source for source in reply.sources if source.is_read]
    assert kept.text == nearest.text
    with pytest.raises(ConfigError, match="does not prune"):
        policy_of("plain", nearness=4.0)
    texts_only = [LIGHTHOUSE, FERRY]
    with pytest.raises(ConfigError, match=r"nearness=.*give pruning.nearer"):  # nobody searched
        engine.answer("\n".join([*texts_only, "When?"]), texts_only, policy=policy, sampling=SHORT)


def test_a_policy_keeps_what_is_not_set() -> None:
    plain, pruned = policy_of("plain"), policy_of("cachefocus", keep=3)
    assert plain == PRESETS["plain"]()
    assert pruned.placement == PRESETS["cachefocus"]().placement
    assert pruned.pruning == replace(PRESETS["cachefocus"]().pruning, keep=3)
    by_layers = policy_of("cachefocus", layers=(1, 2), rows="last").pruning
    assert by_layers is not None
    assert by_layers.start == 3
    assert by_layers.scorer == AttentionScore((1, 2), rows="last")


def test_one_text_in_two_files_names_both(home: Home, engine: Engine) -> None:
    put(home, engine, ("a.txt", LIGHTHOUSE), ("b.txt", LIGHTHOUSE))
    assert home.store().stats().entries == 1
    reply = question(home, engine)
    assert sorted(s.name for s in reply.sources) == ["a.txt", "b.txt"]
    assert len({s.id for s in reply.sources}) == 2


def test_chunks_of_one_file_stay_together_where_a_policy_wants_it(home: Home, engine: Engine) -> None:
    put(home, engine, ("a.txt", LIGHTHOUSE), ("b.txt", FERRY), ("a.txt", FERRY + " It is old."))
    plain = question(home, engine)
    whole = {s.id for s in plain.sources if s.name == "a.txt"}
    order = [use.key for use in plain.answer.documents]
    best = next(key for key in order if key in whole)
    scorer = GivenScore(tuple(1.0 + 2 * (key == best) for key in order))
    ways: tuple[Together | None, ...] = (None, "sum")
    for together in ways:
        pruning = Pruning(keep=1, scorer=scorer, together=together)
        reply = question(home, engine, policy=Policy(pruning=pruning))
        assert {s.id for s in reply.sources if s.is_read} == (whole if together else {best})
    assert 1 < len(whole) < len(order)


def test_the_text_begins_without_blanks(home: Home, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    put(home, engine, ("a.txt", LIGHTHOUSE))
    with home.corpus(engine) as corpus:
        asked = ask(engine, corpus, "Why?", sampling=Sampling(max_new_tokens=30))
        monkeypatch.setattr(type(asked._stream), "__iter__", lambda _: iter(["\n", "  ", " a", " b", ""]))
        assert list(asked) == ["a", " b"]
        asked.cancel()


# ---- what a folder remembers


def with_template(template: str | None, name: str) -> Model:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return Model(tiny_model("llama"), tokenizer, name=name)


def test_a_template_that_writes_the_date_keeps_that_of_ingestion(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    today = ["2026-01-01"]
    dated = with_template("", "dated")
    monkeypatch.setattr(type(dated.text), "has_template", True)
    monkeypatch.setattr(
        dated.text,
        "render",
        lambda messages, **_: f"Today is {today[0]}. " + " | ".join(m["content"] for m in messages),
    )
    with Engine(dated, home.store()) as engine:
        put(home, engine, ("a.txt", LIGHTHOUSE))
        today[0] = "2026-01-02"
        assert "2026-01-02" in RagPrompt.of(dated.text).prefix
        reply = question(home, engine)
        assert "Today is 2026-01-01. " in reply.answer.plan.text
        assert [s.is_hit for s in reply.sources] == [True]
        assert put(home, engine, ("a.txt", LIGHTHOUSE), ("b.txt", FERRY)).skipped == 1
        assert [s.is_hit for s in question(home, engine).sources] == [True, True]


def test_a_real_template_with_a_date_is_answered_from_caches(home: Home) -> None:
    messages = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    template = "Today is {{ strftime_now('%d %B %Y') }}. " + messages
    with Engine(with_template(template, "dated"), home.store()) as engine:
        put(home, engine, ("a.txt", LIGHTHOUSE))
        reply = question(home, engine)
    assert str(date.today().year) in reply.answer.plan.text
    assert [s.is_hit for s in reply.sources] == [True]


@pytest.mark.parametrize(
    ("template", "begins"),
    [
        (None, "<s>Answer from the documents.\n\n"),
        (
            "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
            "<s>{{ m['content'] }}</s>{% endfor %}",
            "<s>Answer from the documents.\n\n",
        ),
    ],
    ids=["none", "no system message"],
)
def test_models_with_other_templates_answer_from_caches(
    home: Home, template: str | None, begins: str
) -> None:
    with Engine(with_template(template, "other"), home.store()) as engine:
        put(home, engine, ("a.txt", LIGHTHOUSE), ("b.txt", FERRY))
        reply = question(home, engine)
        tokens = reply.answer.plan.tokens
        assert tokens.count(1) == 1
        assert engine.model.text.tokenizer.decode(list(tokens)).startswith(begins)
        assert "\n\nQuestion: Who built the lighthouse?" in reply.answer.plan.text
        assert [s.is_hit for s in reply.sources] == [True, True]


def test_nothing_ingested_yet(home: Home) -> None:
    assert not home.exists()
    assert home.model() == READER
    with pytest.raises(InputError, match=r"nothing was ingested in .*; run: kvrag ingest PATH"):
        home.settings()
    assert not home.path.exists()


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"model": "x"}', '{"model": "x", "forms": {"x": {"y": 1}}}', "\xff"]
)
def test_broken_settings_say_what_to_do(home: Home, content: str) -> None:
    home.path.mkdir()
    (home.path / "settings.json").write_bytes(content.encode("latin1"))
    with pytest.raises(InputError, match=r"settings.json is broken .*; remove it"):
        home.settings()


def test_a_file_in_the_folders_place_is_an_input_error(tmp_path: Path, engine: Engine) -> None:
    (tmp_path / "file").write_text("")
    place = Home(tmp_path / "file")
    with pytest.raises(InputError, match="cannot be read"):
        place.settings()
    with pytest.raises(StoreWriteError, match="cannot write"):
        put(place, engine, ("a.txt", LIGHTHOUSE))


def test_without_a_model_a_corpus_can_only_be_looked_at(home: Home, engine: Engine) -> None:
    put(home, engine, ("a.txt", LIGHTHOUSE))
    with home.corpus() as corpus:
        assert isinstance(corpus, Corpus)
        assert corpus.stats().documents == 1
        with pytest.raises(ConfigError, match="no model is loaded"):
            corpus.add([FERRY])


def test_layers_and_rows_choose_what_is_read_again_too() -> None:
    both = policy_of("cachefocus", layers=(1,), rows="last", repair=0.1)
    assert isinstance(both.repair, QueryDriven)
    assert (both.repair.share, both.repair.layers, both.repair.looked_by) == (0.1, (1,), "last")
    assert both.pruning is not None
    assert both.pruning.start == 2
    alone = policy_of("query-driven", layers=(2,))
    assert isinstance(alone.repair, QueryDriven)
    assert (alone.pruning, alone.repair.layers) == (None, (2,))


def test_chunks_can_be_encoded_behind_similar_ones(home: Home, engine: Engine) -> None:
    documents = [Document(LIGHTHOUSE, "a.txt"), Document(FERRY, "b.txt")]
    ingest(home, engine, documents, context=Context("similar", 1))
    with home.corpus(engine) as corpus:
        assert corpus.context == Context("similar", 1)
        ids = [record.id for record in corpus.documents()]
        assert set(corpus.contexts(ids).values()) == {(LIGHTHOUSE,), (FERRY,)}
        answer = ask(engine, corpus, "Why?", form=home.form(engine)).reply().answer
        assert all(use.is_hit for use in answer.documents)
    ingest(home, engine, documents)  # a later call leaves it so
    with home.corpus(engine) as corpus:
        assert corpus.context == Context("similar", 1)
    ingest(home, engine, documents, context=ALONE)
    with home.corpus(engine) as corpus:
        assert corpus.context == ALONE
        assert all(
            use.is_hit for use in ask(engine, corpus, "Why?", form=home.form(engine)).reply().answer.documents
        )


def test_parts_of_a_file_are_encoded_behind_those_before_them(home: Home, engine: Engine) -> None:
    text = f"{LIGHTHOUSE}\n\n{FERRY}\n\n{ORCHARD}"

    def contexts() -> dict[str, tuple[str, ...]]:
        with home.corpus(engine) as corpus:
            assert corpus.reconcile().was_equal
            records = list(corpus.documents())
            found = corpus.contexts([record.id for record in records])
            return {record.text: found[record.id] for record in records}

    def again(text: str) -> Any:
        report = ingest(home, engine, [Document(text, "a.txt")], by_paragraph=True)
        assert all(source.is_hit for source in question(home, engine).sources)
        return report

    again(text)
    assert contexts() == {LIGHTHOUSE: (), FERRY: (LIGHTHOUSE,), ORCHARD: (LIGHTHOUSE, FERRY)}
    report = again(text.replace(FERRY, "No ferry crosses the Mirrow."))
    assert (report.added, report.skipped) == (1, 2)
    assert contexts()[ORCHARD] == (LIGHTHOUSE, "No ferry crosses the Mirrow.")
    assert home.store().stats().entries == 3
    again(LIGHTHOUSE)
    assert contexts() == {LIGHTHOUSE: ()}
    with home.corpus(engine) as corpus:
        assert corpus.context == BEFORE


def test_pages_are_parts_of_their_file_and_lines_are_not(home: Home, engine: Engine) -> None:
    pages = [("a.pdf#page=1", LIGHTHOUSE), ("a.pdf#page=2", FERRY), ("b.jsonl#line=1", ORCHARD)]
    put(home, engine, *pages, ("b.jsonl#line=2", "The mill grinds."))
    with home.corpus(engine) as corpus:
        ids = {record.text: record.id for record in corpus.documents()}
        found = corpus.contexts(list(ids.values()))
    assert {text: found[i] for text, i in ids.items() if found[i]} == {FERRY: (LIGHTHOUSE,)}


def test_a_collection_keeps_its_choice(home: Home, engine: Engine) -> None:
    with home.corpus(engine, context=ALONE) as corpus:
        corpus.add([LIGHTHOUSE, FERRY], documents=["a.txt"] * 2)
    put(home, engine, ("b.txt", ORCHARD))
    with home.corpus(engine) as corpus:
        assert corpus.context == ALONE  # what was begun so, stays so
        assert corpus.reconcile().was_equal
    ingest(home, engine, [Document(ORCHARD, "b.txt")], context=Context("before", max_tokens=64))
    with home.corpus(engine) as corpus:
        ids = {record.text: record.id for record in corpus.documents()}
        assert corpus.contexts([ids[FERRY]]) == {ids[FERRY]: (LIGHTHOUSE,)}
        assert corpus.reconcile().was_equal
    put(home, engine, ("b.txt", ORCHARD))
    with home.corpus() as corpus:
        assert corpus.context == Context("before", max_tokens=64)
