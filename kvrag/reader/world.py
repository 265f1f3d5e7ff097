"""An endless supply of small made-up worlds: documents about entities, and questions that they answer.

Every context draws its facts anew, so that they can be known from the documents only.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from kvrag.reader import facts, names, prose
from kvrag.reader.facts import ATTRIBUTES, Attribute, Fact
from kvrag.reader.names import Entity
from kvrag.reader.tokenizer import BLANK_LINE, num_pieces


@dataclass(frozen=True, slots=True)
class Mix:
    """How documents are drawn; the defaults are those of the evaluation.

    Attributes:
        tokens: shortest and longest document, about.
        facts: fewest and most attributes in a document, where its kind has so many.
        crossing: share of documents in two or three parts, of which only the first has the name.
        dated: share of attributes stated with years, mostly more than once.
        linked: share of relations that point to an entity with a document in the same context.
        confusable: share of entities that share a word of their name with another one.
        same_attributes: share of contexts whose documents of a kind tell the same attributes.
        canonical: share of sentences in the words of the answers.
        pronouns: share of pronouns in a first part.
        max_parts: most parts of a document; long ones sometimes have three.
    """

    tokens: tuple[int, int] = (100, 300)
    facts: tuple[int, int] = (4, 9)
    crossing: float = 0.5
    dated: float = 0.08
    linked: float = 0.6
    confusable: float = 0.3
    same_attributes: float = 0.3
    canonical: float = 0.2
    pronouns: float = 0.5
    max_parts: int = 3


@dataclass(frozen=True, slots=True)
class Document:
    """Sentences about one entity.

    Attributes:
        entity: whom or what it is about.
        parts: its text in one to three parts; the first begins with the name, the others never have it.
        facts: everything it states, outdated statements too.
        part_of: for each fact, the part that states it.
    """

    entity: Entity
    parts: tuple[str, ...]
    facts: tuple[Fact, ...]
    part_of: tuple[int, ...]

    @property
    def text(self) -> str:
        """The whole document."""
        return BLANK_LINE.join(self.parts)

    def current(self) -> dict[Attribute, tuple[Fact, int]]:
        """The latest fact of each attribute and the part that states it."""
        latest: dict[Attribute, tuple[Fact, int]] = {}
        for fact, part in zip(self.facts, self.part_of, strict=True):
            known = latest.get(fact.attribute)
            if known is None or (fact.since or 0) > (known[0].since or 0):
                latest[fact.attribute] = (fact, part)
        return latest


class World:
    """Draws entities and documents.

    Args:
        seed: the same seed, mix and calls give the same documents.
        held_out: use the names kept for evaluation, and only those.
        mix: how documents are drawn; may be replaced at any time.
    """

    def __init__(self, seed: int, *, held_out: bool, mix: Mix | None = None) -> None:
        self.rng = random.Random(seed)
        self.held_out = held_out
        self.mix = mix or Mix()

    def entity(self, kind: str, *, like: Entity | None = None) -> Entity:
        """A random entity; with `like`, one that shares a word of its name."""
        return names.draw(self.rng, kind, held_out=self.held_out, like=like)

    def entities(self, num: int, kinds: list[str] | None = None) -> list[Entity]:
        """Distinct entities, some of which are easily confused."""
        kinds = kinds or self.rng.sample(names.KINDS, self.rng.randint(1, len(names.KINDS)))
        found: list[Entity] = []
        while len(found) < num:
            kind = self.rng.choice(kinds)
            alike = [e for e in found if e.kind == kind]
            like = self.rng.choice(alike) if alike and self.rng.random() < self.mix.confusable else None
            entity = self.entity(kind, like=like)
            if entity not in found:
                found.append(entity)
        return found

    def documents(self, num: int, kinds: list[str] | None = None) -> list[Document]:
        """Documents about distinct entities, as one context holds them."""
        entities = self.entities(num, kinds)
        common: dict[str, list[Attribute]] = {}
        if self.rng.random() < self.mix.same_attributes:
            common = {kind: self._some_attributes(kind) for kind in names.KINDS}
        return [
            self._document(e, common.get(e.kind) or self._some_attributes(e.kind), entities) for e in entities
        ]

    def _some_attributes(self, kind: str) -> list[Attribute]:
        table = ATTRIBUTES[kind]
        fewest, most = (min(n, len(table)) for n in self.mix.facts)
        return self.rng.sample(table, self.rng.randint(fewest, most))

    def _document(self, entity: Entity, attributes: list[Attribute], entities: list[Entity]) -> Document:
        stated = [fact for a in attributes for fact in self._facts(entity, a, entities)]
        shortest, longest = self.mix.tokens
        target = int(self.rng.triangular(shortest, longest, shortest + (longest - shortest) * 0.3))
        sentences: list[Fact | str] = list(stated)
        num_tokens = 3 + 8 * len(stated)
        while num_tokens < target:
            sentences.append(prose.filler(self.rng))
            num_tokens += 9
        self.rng.shuffle(sentences)
        return self._write(entity, sentences, self._cuts(len(sentences)))

    def _facts(self, entity: Entity, attribute: Attribute, entities: list[Entity]) -> list[Fact]:
        if not attribute.changes or self.rng.random() >= self.mix.dated:
            return [Fact(entity, attribute, self._value(entity, attribute, entities))]
        years = self.rng.sample(range(2000, 2026), self.rng.choice((1, 2, 2, 3)))
        return [Fact(entity, attribute, self._value(entity, attribute, entities), year) for year in years]

    def _value(self, entity: Entity, attribute: Attribute, entities: list[Entity]) -> str:
        present = [e for e in entities if e.kind == attribute.values and e != entity]
        if present and self.rng.random() < self.mix.linked:
            return self.rng.choice(present).name
        return facts.draw_value(self.rng, attribute, held_out=self.held_out)

    def _cuts(self, num_sentences: int) -> list[int]:
        """Indices of the sentences that begin a new part."""
        if num_sentences < 3 or self.rng.random() >= self.mix.crossing:
            return []
        is_long = num_sentences > 12 and self.rng.random() < 0.15
        num_cuts = min(2 if is_long else 1, self.mix.max_parts - 1)
        return sorted(self.rng.sample(range(1 + num_sentences // 4, num_sentences), num_cuts))

    def _write(self, entity: Entity, sentences: list[Fact | str], cuts: list[int]) -> Document:
        parts = [[f"{entity.name}."]]
        stated: list[Fact] = []
        part_of: list[int] = []
        for i, sentence in enumerate(sentences):
            if i in cuts:
                parts.append([])
            if isinstance(sentence, Fact):
                stated.append(sentence)
                part_of.append(len(parts) - 1)
                parts[-1].append(self._state(sentence, may_name=len(parts) == 1))
            else:
                parts[-1].append(sentence)
        return Document(entity, tuple(" ".join(part) for part in parts), tuple(stated), tuple(part_of))

    def _state(self, fact: Fact, *, may_name: bool) -> str:
        rng, mix = self.rng, self.mix
        names_it = may_name and rng.random() >= mix.pronouns
        pronouns = None if names_it else rng.choice(fact.entity.pronouns)
        if rng.random() < mix.canonical:
            template = fact.attribute.canonical if names_it else f"{{P}} {fact.attribute.noun} is {{v}}."
        else:
            template = rng.choice(fact.attribute.statements)
        sentence = facts.fill(template, fact.entity, fact.value, pronouns=pronouns)
        if fact.since is None:
            return sentence
        return facts.dated(sentence, fact.since, starts_with_name=sentence.startswith(fact.entity.name))


def num_tokens(document: Document) -> int:
    """Length of the document in tokens, the blank lines between its parts included."""
    return num_pieces(document.text)
