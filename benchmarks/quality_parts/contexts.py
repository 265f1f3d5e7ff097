"""Contexts of `benchmarks/quality.py`: documents, what is asked, and where the gold document stands.

A document has one to three parts; the part is the unit that is encoded apart, because what a later part says
is lost on whoever does not know whom the first one names. N counts documents.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from kvrag.model import Model
from kvrag.plan import Cached, Literal, Prefix, PromptPlan
from kvrag.prompt import RagPrompt
from kvrag.reader import questions
from kvrag.reader.questions import Question
from kvrag.reader.world import Document, World

KINDS = ("one", "crossing", "two_hop", "compare")
RANKS = ("first", "middle", "last", "random")

# Draws of documents until one offers a kind; two documents seldom name each other.
_MAX_DRAWS = 2000


@dataclass(frozen=True, slots=True)
class Asked:
    """A question over the units of a context.

    Attributes:
        question: with its kind and answer.
        gold: units that hold its facts.
        needed: the same, and the units that say whom those are about.
    """

    question: Question
    gold: frozenset[int]
    needed: frozenset[int]


@dataclass(frozen=True, slots=True)
class Context:
    """Documents in retrieval order, and questions whose gold document stands at one rank.

    Attributes:
        documents: in retrieval order.
        rank: of the gold document, one of `RANKS`.
        place: the same as an index.
        asked: questions of different kinds.
    """

    documents: tuple[Document, ...]
    rank: str
    place: int
    asked: tuple[Asked, ...]

    @property
    def parts(self) -> list[str]:
        """Texts of all units."""
        return [part for document in self.documents for part in document.parts]

    @property
    def sources(self) -> list[str]:
        """For each unit, the document that it is a part of."""
        return [str(i) for i, document in enumerate(self.documents) for _ in document.parts]


def kinds_of(num_documents: int) -> tuple[str, ...]:
    """Kinds of questions that so many documents can serve."""
    return KINDS if num_documents > 1 else KINDS[:2]


def rank_of(turn: int, num_documents: int, rng: random.Random) -> tuple[str, int]:
    """The rank whose turn it is, by name and as an index."""
    name = RANKS[turn % len(RANKS)]
    places = {"first": 0, "middle": num_documents // 2, "last": num_documents - 1}
    return name, places.get(name, rng.randrange(num_documents))


def draw(seed: int | str, num_documents: int, turn: int, kinds: Sequence[str] = KINDS) -> list[Context]:
    """Contexts with one question of every kind.

    Questions about one gold document share a context; where no document serves all kinds, there are several.
    The gold document is the one that serves most kinds, so it has later parts and relations more often than
    others do.

    Args:
        seed: of the run.
        num_documents: in each context.
        turn: the same seed, number and turn give the same contexts; decides the rank.
        kinds: of questions wanted.

    Raises:
        RuntimeError: no draw offers a kind.
    """
    rng = random.Random(f"{seed}/{num_documents}/{turn}")
    world = World(rng.getrandbits(48), held_out=True)
    left = [kind for kind in kinds_of(num_documents) if kind in kinds]
    found: list[Context] = []
    for _ in range(_MAX_DRAWS):
        if not left:
            return found
        documents = world.documents(num_documents)
        offered = questions.every_kind(world, documents, num_unknown=0)
        while by_gold := _by_gold(offered, left):
            title = max(by_gold, key=lambda name: len(by_gold[name]))
            found.append(_context(documents, title, list(by_gold[title].values()), turn, rng))
            left = [kind for kind in left if kind not in by_gold[title]]
    raise RuntimeError(f"{_MAX_DRAWS} draws of {num_documents} documents offer no question of kind {left[0]}")


def _by_gold(offered: dict[str, list[Question]], kinds: Sequence[str]) -> dict[str, dict[str, Question]]:
    """One question of each kind by its first document's title."""
    found: dict[str, dict[str, Question]] = {}
    for kind in kinds:
        for question in offered[kind]:
            found.setdefault(question.titles[0], {}).setdefault(kind, question)
    return found


def _context(
    documents: Sequence[Document], title: str, asked: list[Question], turn: int, rng: random.Random
) -> Context:
    gold = next(d for d in documents if d.entity.name == title)
    rank, place = rank_of(turn, len(documents), rng)
    ordered = [d for d in documents if d is not gold]
    ordered.insert(place, gold)
    return Context(tuple(ordered), rank, place, tuple(_asked(ordered, q) for q in asked))


def _asked(documents: Sequence[Document], question: Question) -> Asked:
    gold, needed, first = set(), set(), 0
    for document in documents:
        if document.entity.name in question.titles:
            for fact, part in document.current().values():
                if "".join(span.text for span in questions.restate(fact)) in question.answer:
                    gold.add(first + part)
                    needed |= {first, first + part}
        first += len(document.parts)
    return Asked(question, frozenset(gold), frozenset(needed))


class Form:
    """A model's prompts in tokens, span by span, as the engine makes them."""

    def __init__(self, model: Model) -> None:
        """Take the form from the model's chat template."""
        self.text = model.text
        self.prompt = RagPrompt.of(model.text)
        self.prefix = self.text.tokenize(self.prompt.prefix, first=not self.prompt.is_rendered)
        self.separator = self.text.tokenize(self.prompt.separator)
        ends = model.network.generation_config.eos_token_id
        self.end: int | None = ends[0] if isinstance(ends, list) else ends

    def question(self, question: str) -> tuple[int, ...]:
        """Tokens behind the documents."""
        return self.text.tokenize(f"{self.prompt.middle}{question}{self.prompt.suffix}")

    def answer(self, answer: str) -> tuple[int, ...]:
        """Tokens of an answer and its end mark."""
        return (*self.text.tokenize(f" {answer}"), *(() if self.end is None else (self.end,)))

    def plan(self, units: Sequence[Sequence[int]], question: str) -> PromptPlan:
        """The prompt over units of so many tokens each.

        The places of the spans in the text are left at 0: nothing reads them when a prompt is composed.
        """
        spans: list[Prefix | Literal | Cached] = [Prefix(0, 0, self.prompt.prefix, self.prefix)]
        for number, tokens in enumerate(units):
            if number:
                spans.append(Literal(0, 0, self.prompt.separator, self.separator))
            spans.append(Cached(0, 0, "", tuple(tokens), str(number)))
        spans.append(Literal(0, 0, question, self.question(question)))
        return PromptPlan(tuple(spans))
