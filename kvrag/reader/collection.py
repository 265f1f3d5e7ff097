"""A demo collection in the reader's world: documents, and questions that they answer.

Names are held out of the reader's training. A document has one or two paragraphs, and only the first one says
whom it is about: cut at the blank line, its second chunk speaks of "she" or "the company".
"""

from __future__ import annotations

from dataclasses import dataclass

from kvrag.reader.questions import Question, every_kind
from kvrag.reader.world import Document, Mix, World

# Documents that were written together, so that relations between them and comparisons exist.
_GROUP = 10

_MIX = Mix(crossing=0.6, dated=0.08, linked=0.7, confusable=0.25, max_parts=2)

# Share of each kind among the questions, in the order in which they alternate.
_KINDS = ("one", "crossing", "two_hop", "one", "crossing", "dated", "one", "two_hop", "compare", "unknown")


@dataclass(frozen=True, slots=True)
class DemoDocument:
    """A document: its title, with which the text begins, and the text, paragraphs set off by blank lines."""

    title: str
    text: str


@dataclass(frozen=True, slots=True)
class DemoQuestion:
    """A question, its answer, its kind (see `questions.Question`) and titles of the documents it needs."""

    question: str
    answer: str
    kind: str
    titles: tuple[str, ...]


def documents(*, seed: int = 0, num: int = 100) -> list[DemoDocument]:
    """Documents of about 100 to 300 tokens; the same for the same seed, no two about the same name.

    >>> first = documents(num=3)[0]
    >>> first.text.startswith(f"{first.title}. ")
    True
    """
    return [DemoDocument(d.entity.name, d.text) for group in _groups(seed, num) for d in group]


def questions(*, seed: int = 0, num: int = 50, num_documents: int = 100) -> list[DemoQuestion]:
    """Questions of mixed kinds over `documents(seed=seed, num=num_documents)`, no two the same.

    A document's title stands in the questions that it answers, so a lexical search finds it; questions of
    kind "unknown" ask for what no document of the collection tells.
    """
    groups = _groups(seed, num_documents)
    world = World(seed + 1, held_out=True, mix=_MIX)
    titles = [document.entity.name for group in groups for document in group]
    pools = [every_kind(world, group, num_unknown=len(group)) for group in groups]
    found: dict[str, DemoQuestion] = {}
    while len(found) < num and any(any(pool.values()) for pool in pools):
        for pool in pools:
            for kind in _KINDS:
                asked = _pop(pool[kind], titles)
                if asked is not None and len(found) < num:
                    found[asked.text] = DemoQuestion(asked.text, asked.answer, asked.kind, asked.titles)
    if len(found) < num:
        raise ValueError(f"{num} questions asked for, but {num_documents} documents give only {len(found)}")
    return list(found.values())


def _pop(offered: list[Question], titles: list[str]) -> Question | None:
    """The next question, unless it asks for a stranger to its group who has a document in another one."""
    if not offered:
        return None
    asked = offered.pop()
    if asked.titles or not any(title in asked.text for title in titles):
        return asked
    return None


def _groups(seed: int, num: int) -> list[list[Document]]:
    """The collection's documents in the groups that were drawn together."""
    world = World(seed, held_out=True, mix=_MIX)
    groups: list[list[Document]] = []
    taken: set[str] = set()
    while len(groups) * _GROUP < num:
        group = world.documents(_GROUP)
        titles = {document.entity.name for document in group}
        if not titles & taken:
            groups.append(group)
            taken |= titles
    groups[-1] = groups[-1][: num - _GROUP * (len(groups) - 1)]
    return groups
