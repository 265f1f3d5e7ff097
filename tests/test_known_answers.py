"""Answers whose documents are found by the engine's registry: the same as with rows encoded on the spot."""

from __future__ import annotations

import html
import json
import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from kvrag.answer import Answer
from kvrag.config import BEFORE, Context, Sampling
from kvrag.corpus import Corpus
from kvrag.encoding import Run, encode_runs
from kvrag.engine import Engine
from kvrag.errors import DocumentNotFound
from kvrag.focus.policy import preset
from kvrag.found import CutLayers, cut
from kvrag.index import Index
from kvrag.known import KnownTexts
from kvrag.model import Model
from kvrag.prompt import RagPrompt
from kvrag.rotary import rotate
from kvrag.segments import KV
from kvrag.store.disk import DiskStore
from kvrag.store.key import EntryKey
from kvrag.store.memory import MemoryStore
from kvrag.testing.models import tiny

SHORT = Sampling(max_new_tokens=6, ignore_eos=True)
RIVER = "The river Mirrow rises in the hills of Varn and flows through three valleys to the sea."
TOWER = "The lighthouse of Varn was built in 1871 by the\nbrothers O'Hara, who never saw it lit."
TEXTS = {"river": RIVER, "tower": TOWER}


@cache
def model(family: str = "llama") -> Model:
    return tiny(family)


def lead() -> str:
    """What every conversation of the model's template begins with, whatever the system message says."""
    one, other = (
        model().text.render([{"role": "system", "content": c}, {"role": "user", "content": "?"}])
        for c in ("a", "b")
    )
    return one[: next(i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)]


def known_texts(*tiers: Any, prefix: str = "", **options: Any) -> KnownTexts:
    known = KnownTexts(tiers, prefix=prefix, **options)
    known.update(TEXTS)
    return known


def warm(prefix: str = "", is_rendered: bool = True) -> MemoryStore:
    """A store with both texts, as they were read long before the prompt was known."""
    store = MemoryStore()
    with Engine(model(), store) as engine:
        prompt = f"{prefix}{RIVER} {TOWER} Ready?"
        for _ in engine.stream_rendered(
            prompt, TEXTS, prefix=prefix, is_rendered=is_rendered, sampling=SHORT
        ):
            pass
    return store


def ask(store: Any, prompt: Any, known: KnownTexts, **options: Any) -> Answer:
    with Engine(model(), store, known=known) as engine:
        return engine.answer(prompt, sampling=SHORT, **options)


def conversation(system: str, user: str = "Why?") -> list[dict[str, str]]:
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


PROMPTS = {
    "another system message": conversation(f"You are someone else. {RIVER}\n\n{TOWER}"),
    "twice": conversation(f"{RIVER}\n{TOWER}\n{RIVER}"),
    "at the beginning": conversation(RIVER),
    "adjacent": conversation(f"Be short. {RIVER}{TOWER}"),
    "in JSON": conversation(json.dumps([{"text": RIVER, "id": 3}])),
    "from the user": conversation("Be short.", f"Context:\n{TOWER}\n\n{RIVER}\nQuestion: why?"),
    "from a tool": [
        {"role": "user", "content": "Why?"},
        {"role": "tool", "content": f"Source: x\nContent: {RIVER}\n\nSource: y\nContent: {TOWER}"},
    ],
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_unknown_at_ingestion_use_rows_behind_the_lead(name: str) -> None:
    prompt, prefix = PROMPTS[name], lead()
    if name == "from a tool":
        prefix = "<s>"  # this conversation has no system message; the BOS token is what they all share
    known = known_texts(prefix=prefix)
    on, off = ask(warm(prefix), prompt, known), ask(None, prompt, known)
    assert on.tokens == off.tokens
    assert on.plan == off.plan
    assert on.plan.prefix is not None
    assert on.plan.prefix.text == prefix
    assert [use.is_hit for use in on.documents] == [True] * len(on.plan.cached)
    assert not any(use.is_hit for use in off.documents)
    assert len(on.documents) == sum(m["content"].count(t) for m in prompt for t in TEXTS.values()) > 0
    assert on.usage.cached_by_tier == {"exact": on.plan.num_cached_tokens}
    assert off.usage.cached_by_tier == {}
    masses = [[use.mass for use in answer.documents] for answer in (on, off)]
    assert masses[0] == pytest.approx(masses[1], abs=1e-6)


@pytest.mark.parametrize("prompt", [RIVER, f"{RIVER}{TOWER}", f"{TOWER} Why?"])
def test_plain_prompts_that_begin_with_a_text(prompt: str) -> None:
    known = known_texts()
    on, off = ask(warm(is_rendered=False), prompt, known), ask(None, prompt, known)
    assert on.tokens == off.tokens
    assert all(use.is_hit for use in on.documents)


def test_chunks_that_are_named_work_alone() -> None:
    with Engine(model(), known=known_texts()) as engine:
        assert [u.key for u in engine.answer(f"{RIVER} Why?", {"own": RIVER}, sampling=SHORT).documents] == [
            "own"
        ]
        assert engine.answer(f"{RIVER} Why?", (), sampling=SHORT).documents == ()
        assert [u.key for u in engine.answer(f"{RIVER} Why?", sampling=SHORT).documents] == ["river"]
        engine.known.remove("river")
        assert engine.answer(f"{RIVER} Why?", sampling=SHORT).documents == ()


# ---- tiers


@pytest.mark.parametrize("dress", [repr, json.dumps, html.escape])
def test_canonical_answers_as_if_the_text_had_been_pasted_as_it_is(dress: Any) -> None:
    known = known_texts("canonical")
    store = warm()
    plain = ask(store, f"So: {TOWER} Why?", known, prefix="")
    with Engine(model(), store, known=known) as engine:
        inner = dress(TOWER)[1:-1] if dress is not html.escape else dress(TOWER)
        stream = engine.stream_rendered(f"So: {inner} Why?", sampling=SHORT)
        list(stream)
        rendered = engine.stream_rendered(f"So: {TOWER} Why?", sampling=SHORT)
        list(rendered)
    assert stream.answer is not None
    assert rendered.answer is not None
    assert stream.answer.tokens == rendered.answer.tokens
    assert stream.answer.plan.seen == f"So: {TOWER} Why?"
    assert stream.answer.plan.text == f"So: {inner} Why?"
    assert [use.is_hit for use in stream.answer.documents] == [True]
    assert sum(stream.answer.usage.cached_by_tier.values()) == len(model().text.tokenize(TOWER))
    assert plain.plan.seen == plain.plan.text


def rendered(store: Any, prompt: str, known: KnownTexts, policy: str = "plain") -> Answer:
    with Engine(model(), store, known=known) as engine:
        stream = engine.stream_rendered(prompt, sampling=SHORT, policy=preset(policy))
        list(stream)
    assert stream.answer is not None
    return stream.answer


def test_a_beginning_has_the_rows_that_it_would_have_alone() -> None:
    prompt = f"So: {TOWER[:64]} [...] Why?"
    on = rendered(warm(), prompt, known_texts("partial"))
    (span,) = on.plan.cached
    assert on.usage.cached_by_tier == {"partial": len(span.tokens)}
    alone = KnownTexts()
    alone.add("piece", span.text)
    off = rendered(None, prompt, alone)
    assert on.tokens == off.tokens
    assert [use.mass for use in on.documents] == pytest.approx([use.mass for use in off.documents], abs=1e-6)


@pytest.mark.parametrize("policy", ["plain", "cachefocus"])
@pytest.mark.parametrize("on_disk", [True, False])
def test_a_middle_answers_as_if_encoded_behind_the_text_before_it(
    policy: str, on_disk: bool, tmp_path: Path
) -> None:
    store: Any = warm()
    if on_disk:
        store = DiskStore(tmp_path)
        with Engine(model(), store) as engine:
            list(engine.stream_rendered(f"{RIVER} {TOWER} Why?", TEXTS, sampling=SHORT))
            prompt = f"So: {TOWER[12:]} And: {RIVER[:70]} Why?"
            engine.known = known_texts("middle")
            stream = engine.stream_rendered(prompt, sampling=SHORT, policy=preset(policy))
            list(stream)
            on = stream.answer
    else:
        prompt = f"So: {TOWER[12:]} And: {RIVER[:70]} Why?"
        on = rendered(store, prompt, known_texts("middle"), policy)
    assert on is not None
    middle, head = on.plan.cached
    assert (middle.tier, head.tier) == ("middle", "partial")
    assert [use.is_hit for use in on.documents] == [True, True]
    alone = KnownTexts()
    assert middle.whole is not None
    alone.add("middle", middle.text, [TOWER[: TOWER.index(middle.text)]])
    alone.add("head", head.text)
    off = rendered(None, prompt, alone, policy)
    assert on.tokens == off.tokens
    assert [use.mass for use in on.documents] == pytest.approx([use.mass for use in off.documents], abs=1e-5)


def test_a_piece_whose_text_is_in_no_store_is_read() -> None:
    prompt = f"So: {TOWER[12:]} Why?"
    for store in (None, MemoryStore()):
        answer = rendered(store, prompt, known_texts("middle"))
        assert answer.documents == ()
        assert answer.plan.text == prompt
        assert store is None or store.stats().entries == 0


@pytest.mark.parametrize("family", ["llama", "llama-yarn", "qwen2", "mistral-window"])
@pytest.mark.parametrize("start", [0, 1, 7])
def test_rows_cut_from_the_middle_are_those_of_a_text_behind_the_rest(family: str, start: int) -> None:
    network = model(family)
    tokens = network.text.tokenize(TOWER)
    end = len(tokens) - 3
    ((whole, wanted),) = encode_runs(
        network, [Run(tokens, ((0, len(tokens)), (start, end)))], None, token_budget=2048
    )
    got = cut(whole, start, end, network.specs)
    assert got.tokens == wanted.tokens == tokens[start:end]
    for one, other in zip(got.layers, wanted.layers, strict=True):
        torch.testing.assert_close(one.keys, other.keys, atol=1e-5, rtol=1e-5)
        assert torch.equal(one.values, other.values)
    assert got.num_bytes == wanted.num_bytes == got.num_bytes_touched
    assert got.head(3).tokens == tokens[start:end][:3]


def test_lazy_layers_are_cut_when_they_are_touched(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    with Engine(model(), store) as engine:
        list(engine.stream_rendered(f"{TOWER} Why?", {"tower": TOWER}, sampling=SHORT))
        (name,) = store.ids()
        key = engine.encoder(RagPrompt("")).fingerprint
        entry = EntryKey(key, model().text.tokenize(TOWER))
        assert entry.id == name
        lazy, eager = store.get(entry, by_layer=True), store.get(entry)
        got: KV = cut(lazy, 5, 20, model().specs)
        assert isinstance(got.layers, CutLayers)
        assert got.num_bytes_touched == 0
        assert got.num_bytes == eager.num_bytes * 15 // eager.num_tokens
        got.read_soon(0)
        rotation = model().specs[1].rotation
        assert rotation is not None
        forth = rotation.turn(torch.full((15,), 5))
        back = rotate(got.layers[1].keys[None], forth)[0]
        torch.testing.assert_close(back, eager.layers[1].keys[:, 5:20], atol=1e-5, rtol=1e-5)
        assert got.num_bytes_touched == got.num_bytes // len(eager.layers)
        head = got.head(4)
        assert isinstance(head.layers, CutLayers)
        assert torch.equal(head.layers[1].keys, got.layers[1].keys[:, :4])


# ---- a corpus

PARTS = [
    "Part one tells of the river Mirrow.",
    "Part two tells of the lighthouse.",
    "Part three tells of nobody at all.",
]
FORM = RagPrompt("Read.\n\n", "\n\nQuestion: ", "\nAnswer:", is_rendered=False)


@pytest.mark.parametrize("context", [None, BEFORE])
def test_a_corpus_is_known_with_what_its_documents_stand_behind(
    tmp_path: Path, context: Context | None
) -> None:
    store = DiskStore(tmp_path / "store")
    with Engine(model(), store) as engine:
        index = Index.open(tmp_path / "chroma")
        with Corpus(index, store, engine.encoder(FORM), context=context) as corpus:
            one, two = corpus.add(PARTS[:2], metadatas=[{"source": "a"}] * 2)
            engine.known = corpus.known()
            (three,) = corpus.add(PARTS[2:], metadatas=[{"source": "a"}])
            assert engine.known.prefix == FORM.prefix
            prompt = f"Read.\n\nSomething else first. {PARTS[1]}\n{PARTS[2]} Why?"
            answer = engine.answer(prompt, sampling=SHORT)
            assert [(use.key, use.is_hit) for use in answer.documents] == [(two, True), (three, True)]
            assert engine.known.contexts([three]) == (
                {three: (PARTS[0], "\n\n", PARTS[1], "\n\n")} if context else {}
            )
            entries = store.stats().entries
            corpus.update([two], texts=["Part two tells of another lighthouse."])
            assert engine.known.text(two) == "Part two tells of another lighthouse."
            again = engine.answer(f"Read.\n\n{PARTS[2]} Why?", sampling=SHORT)
            assert [(use.key, use.is_hit) for use in again.documents] == [(three, True)]
            corpus.delete([two])
            assert list(engine.known) == [one, three]
            with pytest.raises(DocumentNotFound):
                corpus.get([two])
            assert engine.answer(prompt, sampling=SHORT).usage.cached_by_tier.keys() == {"exact"}
            assert store.stats().entries == entries - 1


def test_answers_go_on_while_a_corpus_grows(tmp_path: Path) -> None:
    """The registry asks the collection on the engine's thread, which the corpus waits for."""
    store = DiskStore(tmp_path / "store")
    problems: list[BaseException] = []
    with Engine(model(), store) as engine:
        index = Index.open(tmp_path / "chroma")
        with Corpus(index, store, engine.encoder(FORM), context=BEFORE, batch_size=1) as corpus:
            corpus.add(PARTS, metadatas=[{"source": "a"}] * 3)
            engine.known = corpus.known()

            def grow() -> None:
                try:
                    for i in range(8):
                        corpus.add([f"One more part, of number {i}."], metadatas=[{"source": "a"}])
                except BaseException as error:
                    problems.append(error)

            thread = threading.Thread(target=grow)
            thread.start()
            while thread.is_alive():
                answer = engine.answer(f"Read.\n\n{PARTS[2]} Why?", sampling=SHORT)
                assert [use.is_hit for use in answer.documents] == [True]
            thread.join()
    assert not problems
    assert len(engine.known) == 11


def test_a_registry_that_is_there_is_extended(tmp_path: Path) -> None:
    known = known_texts()
    with Engine(model(), DiskStore(tmp_path / "store"), known=known) as engine:
        assert engine.store is not None
        with Corpus(Index.open(tmp_path / "chroma"), engine.store, engine.encoder(FORM)) as corpus:
            ids: Sequence[str] = corpus.ingest(PARTS).ids
            assert corpus.known(into=known) is known
            assert corpus.known(into=known) is known
            assert set(known) == {*TEXTS, *ids}
            corpus.ingest(PARTS[:1], instead_of=ids)
            assert set(known) == {*TEXTS, ids[0]}
