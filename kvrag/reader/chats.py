"""Chats: facts told, corrected and asked again many turns later, passkeys in hay, small talk."""

from __future__ import annotations

import random
from dataclasses import dataclass

from kvrag.reader import facts, prose
from kvrag.reader.facts import ATTRIBUTES, Attribute, Fact
from kvrag.reader.names import KINDS, Entity
from kvrag.reader.questions import Question, Span, ask
from kvrag.reader.world import World

# What the user says about himself is told as "My ..." and answered as "Your ...".
_MINE = Entity("person", "me")
_UNKNOWN = (Span(prose.UNKNOWN, is_value=True),)


def passkey_question(key: str | None) -> Question:
    """The question for a passkey, with its answer."""
    spans = (Span("The pass key is"), Span(f" {key}", is_value=True), Span("."))
    return Question("passkey", "What is the pass key?", spans if key else _UNKNOWN)


@dataclass(frozen=True, slots=True)
class Turn:
    """What the user says and the assistant answers; `question` is set where there is something to find."""

    user: str
    assistant: str
    question: Question | None = None


class Chat:
    """A chat that grows turn by turn and remembers what can be asked.

    Args:
        world: draws the names, values and everything random.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.turns: list[Turn] = []
        self.told: list[tuple[Fact, str]] = []  # what holds now, and its kind: "told", "corrected" or "mine"
        self.passkey: str | None = None

    @property
    def rng(self) -> random.Random:
        """The world's source of randomness."""
        return self.world.rng

    def talk(self) -> None:
        """Small talk."""
        self.turns.append(Turn(*self.rng.choice(prose.TALK)))

    def hay(self, *, with_passkey: bool = False) -> None:
        """Sentences about nothing, with a passkey among them or not."""
        most = self.rng.choice((5, 5, 5, 25))
        before, after = (prose.hay(self.rng, self.rng.randint(1, most)) for _ in range(2))
        middle = ""
        if with_passkey:
            self.passkey, middle = prose.passkey(self.rng)
        self._acknowledged(" ".join(filter(None, (before, middle, after))))

    def tell(self, num_facts: int = 1) -> list[Fact]:
        """The user tells facts of one person, company, village or project."""
        same = [fact.entity for fact, kind in self.told if kind != "mine"]
        kind = self.rng.choice(("person", *KINDS))
        if same and self.rng.random() < 0.35:
            entity = self.rng.choice(same)
        else:
            alike = [e for e in same if e.kind == kind]
            like = self.rng.choice(alike) if alike and self.rng.random() < 0.3 else None
            entity = self.world.entity(kind, like=like)
        known = {fact.attribute for fact, _ in self.told if fact.entity == entity}
        free = [a for a in ATTRIBUTES[entity.kind] if a not in known]
        new = [self._fact(entity, a) for a in self.rng.sample(free, min(num_facts, len(free)))]
        if new:
            self._acknowledged(" ".join(self._say(fact) for fact in new))
        self.told += [(fact, "told") for fact in new]
        return new

    def tell_mine(self) -> None:
        """The user tells a fact of himself, for the first time or anew."""
        fact = self._fact(_MINE, self.rng.choice(ATTRIBUTES["person"]))
        self.told = [(f, k) for f, k in self.told if not (k == "mine" and f.attribute is fact.attribute)]
        self.told.append((fact, "mine"))
        self._acknowledged(f"My {fact.attribute.noun} is {fact.value}.")

    def correct(self, index: int | None = None) -> Fact:
        """The user corrects something told: a random fact, or the one at `index` of `told`."""
        candidates = [i for i, (_, kind) in enumerate(self.told) if kind != "mine"]
        index = self.rng.choice(candidates) if index is None else index
        old, _ = self.told.pop(index)
        fact = self._fact(old.entity, old.attribute)
        while fact.value == old.value:
            fact = self._fact(old.entity, old.attribute)
        self.told.append((fact, "corrected"))
        self._acknowledged(f"{self.rng.choice(prose.CORRECTIONS)} {self._say(fact)}")
        return fact

    def ask(self, index: int | None = None) -> Question:
        """The user asks for something told: at random, or the fact at `index` of `told`."""
        fact, kind = self.told[index] if index is not None else self.rng.choice(self.told)
        if kind == "mine":
            spans = (Span(f"Your {fact.attribute.noun} is"), Span(f" {fact.value}", is_value=True), Span("."))
            return self._asked(Question("mine", f"What is my {fact.attribute.noun}?", spans))
        question = ask(self.rng, Fact(fact.entity, fact.attribute, fact.value), kind)
        return self._asked(question)

    def ask_passkey(self) -> Question:
        """The user asks for the passkey last told, if any."""
        return self._asked(passkey_question(self.passkey))

    def ask_unknown(self) -> Question:
        """The user asks for something never told."""
        known = {(fact.entity, fact.attribute) for fact, _ in self.told}
        entities = [fact.entity for fact, kind in self.told if kind != "mine"]
        while True:
            entity = self.rng.choice(entities) if entities and self.rng.random() < 0.5 else None
            entity = entity or self.world.entity(self.rng.choice(KINDS))
            attribute = self.rng.choice(ATTRIBUTES[entity.kind])
            if (entity, attribute) not in known:
                break
        text = facts.fill(self.rng.choice(attribute.questions), entity)
        return self._asked(Question("unknown", text, _UNKNOWN))

    def _fact(self, entity: Entity, attribute: Attribute) -> Fact:
        return Fact(entity, attribute, facts.draw_value(self.rng, attribute, held_out=self.world.held_out))

    def _say(self, fact: Fact) -> str:
        template = self.rng.choice((fact.attribute.canonical, *fact.attribute.statements))
        return facts.fill(template, fact.entity, fact.value)

    def _acknowledged(self, text: str) -> None:
        self.turns.append(Turn(text, self.rng.choice(prose.ACKNOWLEDGEMENTS)))

    def _asked(self, question: Question) -> Question:
        self.turns.append(Turn(question.text, question.answer, question))
        return question


def distant(world: World, distance: int, *, kind: str = "told") -> Chat:
    """A chat whose last turn asks for a fact told (or corrected) `distance` turns before.

    Args:
        world: draws everything.
        distance: turns from the one that tells to the one that asks.
        kind: "told" or "corrected"; what is corrected was first told three turns earlier.
    """
    chat = Chat(world)
    for _ in range(world.rng.randint(0, 3)):
        small_turn(chat)
    while not chat.tell():
        pass
    asked = chat.told[-1][0]
    if kind == "corrected":
        chat.talk()
        chat.hay()
        asked = chat.correct(len(chat.told) - 1)
    for _ in range(distance - 1):
        small_turn(chat, spare=asked)
    chat.ask(next(i for i, (fact, _) in enumerate(chat.told) if fact is asked))
    return chat


def small_turn(chat: Chat, spare: Fact | None = None) -> None:
    """Add a turn: small talk, hay, another fact, or a question that is not about `spare`."""
    others = [i for i, (fact, _) in enumerate(chat.told) if fact is not spare]
    choice = chat.rng.random()
    if choice < 0.3:
        chat.talk()
    elif choice < 0.4:
        chat.hay()
    elif choice < 0.5:
        chat.tell_mine()
    elif choice < 0.65 and others:
        chat.ask(chat.rng.choice(others))
    elif not chat.tell(chat.rng.choice((1, 1, 2))):
        chat.talk()


def random_turn(chat: Chat, *, questions: float, talk: float) -> None:
    """Add one turn of any kind, as training rows want them.

    Args:
        chat: grows by one turn.
        questions: share of questions, once there is something to ask.
        talk: share of small talk and hay among the other turns.
    """
    rng = chat.rng
    if chat.told and rng.random() < questions:
        choice = rng.random()
        if choice < 0.1:
            chat.ask_unknown()
        elif choice < 0.18:
            chat.ask_passkey()
        else:
            corrected = [i for i, (_, kind) in enumerate(chat.told) if kind == "corrected"]
            chat.ask(rng.choice(corrected) if corrected and rng.random() < 0.35 else None)
    elif rng.random() < talk:
        if rng.random() < 0.5:
            chat.talk()
        else:
            chat.hay(with_passkey=rng.random() < 0.4)
    elif rng.random() < 0.15:
        chat.tell_mine()
    elif rng.random() < 0.3 and any(kind != "mine" for _, kind in chat.told):
        chat.correct()
    else:
        chat.tell(rng.choice((1, 1, 2)))
