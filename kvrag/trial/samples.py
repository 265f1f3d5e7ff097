"""Documents and questions for an examination, each question answered by one known document."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, islice

from kvrag.model import READER
from kvrag.reader.questions import about_facts
from kvrag.reader.world import World

_NUM_DOCUMENTS = 8
_PER_WORLD = 4  # questions over the same documents, which are then encoded once

_SAMPLES = (
    (
        "The lighthouse of Varn was built in 1871. Its keeper, Ada Holm, kept a journal of every ship that "
        "passed, and noted the weather in it each morning. She retired in 1903.",
        "When was the lighthouse of Varn built, and who kept it?",
    ),
    (
        "The library of Osted lends books on four floors. It opens at nine and closes at six, except on "
        "Mondays, when the reading room stays dark. The oldest book is a map of the coast from 1642.",
        "What is the oldest book in the library of Osted?",
    ),
    (
        "A ferry crosses the Mirrow twice a day. The trip takes forty minutes, and bicycles travel free. In"
        " winter the first boat leaves an hour later because of the ice near the northern pier.",
        "How long does the ferry take to cross the Mirrow?",
    ),
    (
        "The orchard at Lindal grows apples, pears and plums. In a good year it gives thirty tons of fruit,"
        " most of which is pressed into juice within two days of the harvest.",
        "How much fruit does the orchard at Lindal give in a good year?",
    ),
    (
        "The observatory on Mount Kest has a telescope with a mirror of two metres. It was moved there from "
        "the town in 1958, when street lamps had made the sky too bright. Visitors are let in on Fridays.",
        "Why was the telescope moved to Mount Kest?",
    ),
    (
        "Ruben Falk founded the bakery in Torre Street with a loan from his aunt. His rye bread is baked at "
        "night in an oven of brick, and sold out before eight. His daughter Mia runs the shop today.",
        "Who runs the bakery that Ruben Falk founded?",
    ),
    (
        "The tram line to Sandvik has eleven stops and ends at the harbour. It was closed for six years "
        "after the flood, and opened again in 1997 with yellow cars that were bought in Graz.",
        "What colour are the cars of the tram line to Sandvik?",
    ),
    (
        "The choir of Elmer Hill sings in the old mill on Thursdays. It has forty members, the youngest of "
        "whom is twelve. Its conductor, Jonas Petri, is a plumber and learned music from the radio.",
        "What is the profession of the conductor of the choir of Elmer Hill?",
    ),
)

TEXTS = tuple(text for text, _ in _SAMPLES)


@dataclass(frozen=True, slots=True)
class Case:
    """A question over documents.

    Attributes:
        documents: texts, in the order of the prompt.
        question: what is asked.
        gold: number of the document that answers it.
    """

    documents: tuple[str, ...]
    question: str
    gold: int


def cases(model: str, num: int, *, seed: int = 0) -> list[Case]:
    """Cases in random orders of the documents, so that no rank is right more often than another.

    Args:
        model: the shipped reader is asked about its own world, in names that it was not trained on.
        num: how many; beyond the number of built-in questions these come again, in other orders.
        seed: the same seed gives the same cases.
    """
    endless = _of_the_reader(seed) if model == READER else _built_in(seed)
    return list(islice(endless, num))


def _built_in(seed: int) -> Iterator[Case]:
    rng = random.Random(seed)
    for number in cycle(range(len(_SAMPLES))):
        yield _shuffled(rng, TEXTS, _SAMPLES[number][1], number)


def _of_the_reader(seed: int) -> Iterator[Case]:
    world = World(10_000 + seed, held_out=True)
    while True:
        documents = world.documents(_NUM_DOCUMENTS)
        texts = tuple(document.text for document in documents)
        titles = [document.entity.name for document in documents]
        # What a single document says outright: the kinds that need two have no one gold document.
        offered = [q for q in about_facts(world.rng, documents) if q.kind == "one"]
        for question in world.rng.sample(offered, min(_PER_WORLD, len(offered))):
            yield _shuffled(world.rng, texts, question.text, titles.index(question.titles[0]))


def _shuffled(rng: random.Random, texts: tuple[str, ...], question: str, gold: int) -> Case:
    order = list(range(len(texts)))
    rng.shuffle(order)
    return Case(tuple(texts[i] for i in order), question, order.index(gold))
