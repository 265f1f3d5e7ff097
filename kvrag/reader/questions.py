"""Questions over documents, with their answers."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from kvrag.reader import prose
from kvrag.reader.facts import ATTRIBUTES, Attribute, Fact, fill
from kvrag.reader.world import Document, World

KINDS = ("one", "crossing", "dated", "two_hop", "compare", "unknown")


@dataclass(frozen=True, slots=True)
class Span:
    """Words of an answer; the values are what has to be found."""

    text: str
    is_value: bool = False


@dataclass(frozen=True, slots=True)
class Question:
    """A question, its answer, and the entities whose documents are needed for it.

    Kinds: "one" document's first part; "crossing": a later part, which does not name the entity; "dated": the
    latest of dated statements; "two_hop": over two documents; "compare": two documents; "unknown": not to be
    answered from the documents.
    """

    kind: str
    text: str
    spans: tuple[Span, ...]
    titles: tuple[str, ...] = ()

    @property
    def answer(self) -> str:
        """The answer as text."""
        return "".join(span.text for span in self.spans)


def restate(fact: Fact) -> tuple[Span, ...]:
    """The answer's sentence for a fact: what it is about, then the value."""
    since = () if fact.since is None else (Span(f" since {fact.since}", is_value=True),)
    return (
        Span(f"The {fact.attribute.noun} of"),
        Span(f" {fact.entity.name}", is_value=True),
        *since,
        Span(" is"),
        Span(f" {fact.value}", is_value=True),
        Span("."),
    )


def ask(rng: random.Random, fact: Fact, kind: str) -> Question:
    """A question for one fact; where the document dates it, for what holds now."""
    text = fill(rng.choice(fact.attribute.questions), fact.entity)
    if fact.since is not None:
        text = f"{text.removesuffix('?')} now?"
    return Question(kind, text, restate(fact), (fact.entity.name,))


def about_facts(rng: random.Random, documents: Sequence[Document]) -> Iterator[Question]:
    """One question for every attribute of every document: kinds "one", "crossing" and "dated"."""
    for document in documents:
        for fact, part in document.current().values():
            kind = "dated" if fact.since is not None else "crossing" if part else "one"
            yield ask(rng, fact, kind)


def two_hops(rng: random.Random, documents: Sequence[Document]) -> Iterator[Question]:
    """One question for every pair of documents of which the first names the second's entity."""
    by_name = {document.entity.name: document for document in documents}
    for document in documents:
        for relation, _ in document.current().values():
            target = by_name.get(relation.value)
            if not relation.attribute.is_relation or relation.since is not None or target is None:
                continue
            known = [fact for fact, _ in target.current().values() if fact.since is None]
            if known:
                yield _two_hop(rng, relation, rng.choice(known))


def _two_hop(rng: random.Random, relation: Fact, second: Fact) -> Question:
    template = rng.choice([t for t in second.attribute.questions if "{P}" not in t])
    text = template.replace("{e}", f"the {relation.attribute.noun} of {relation.entity.name}")
    spans = (*restate(relation), Span(" "), *restate(second))
    return Question("two_hop", text, _joined(spans), (relation.entity.name, second.entity.name))


def comparisons(rng: random.Random, documents: Sequence[Document]) -> Iterator[Question]:
    """One question for every two documents that can be compared, in random order."""
    comparable = [
        fact
        for document in documents
        for fact, _ in document.current().values()
        if fact.attribute.versus and fact.since is None
    ]
    for a, b in combinations(comparable, 2):
        if a.attribute == b.attribute and a.value != b.value:
            yield _comparison(*((a, b) if rng.random() < 0.5 else (b, a)))


def _comparison(a: Fact, b: Fact) -> Question:
    assert a.attribute.versus is not None
    question, verdict = a.attribute.versus
    larger, smaller = (a, b) if int(a.value) > int(b.value) else (b, a)
    winner = larger if a.attribute.larger_wins else smaller
    spans = (
        *restate(a),
        Span(" "),
        *restate(b),
        Span(f" {winner.entity.name}", is_value=True),
        Span(verdict.removeprefix("{w}")),
    )
    text = question.format(a=a.entity.name, b=b.entity.name)
    return Question("compare", text, _joined(spans), (a.entity.name, b.entity.name))


def _joined(spans: Sequence[Span]) -> tuple[Span, ...]:
    """The spans with lone spaces moved to the front of the next span, as a token begins with its space."""
    out: list[Span] = []
    for span in spans:
        if out and out[-1].text == " ":
            out[-1] = Span(f" {span.text}", is_value=span.is_value)
        else:
            out.append(span)
    return tuple(out)


def unknown(world: World, documents: Sequence[Document]) -> Question:
    """A question that no document answers: of an entity without a document, or of an attribute not told."""
    rng = world.rng
    document = rng.choice(documents)
    entity = document.entity
    table: list[Attribute] = list(ATTRIBUTES[entity.kind])
    told = {fact.attribute for fact in document.facts}
    not_told = [a for a in table if a not in told]
    if not_told and rng.random() < 0.5:
        return _unknown(rng, Fact(entity, rng.choice(not_told), ""), (entity.name,))
    present = {d.entity for d in documents}
    while entity in present:
        like = document.entity if rng.random() < 0.5 else None
        entity = world.entity(document.entity.kind, like=like)
    return _unknown(rng, Fact(entity, rng.choice(table), ""))


def _unknown(rng: random.Random, fact: Fact, titles: tuple[str, ...] = ()) -> Question:
    text = fill(rng.choice(fact.attribute.questions), fact.entity)
    return Question("unknown", text, (Span(prose.UNKNOWN, is_value=True),), titles)


def every_kind(
    world: World, documents: Sequence[Document], num_unknown: int = 1
) -> dict[str, list[Question]]:
    """Questions over these documents by kind, in random order."""
    rng = world.rng
    found: dict[str, list[Question]] = {kind: [] for kind in KINDS}
    for question in about_facts(rng, documents):
        found[question.kind].append(question)
    found["two_hop"] = list(two_hops(rng, documents))
    found["compare"] = list(comparisons(rng, documents))
    found["unknown"] = [unknown(world, documents) for _ in range(num_unknown)]
    for questions in found.values():
        rng.shuffle(questions)
    return found
