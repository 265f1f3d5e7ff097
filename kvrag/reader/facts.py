"""What can be known of an entity: attributes, how a document states them and how a question asks for them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from kvrag.reader import names
from kvrag.reader.names import Entity


@dataclass(frozen=True, slots=True, eq=False)
class Attribute:
    """One thing that can be known of every entity of a kind.

    Templates use {S} for the subject, {P} for its possessive, {e} for the full name and {v} for the value.

    Attributes:
        kind: kind of entity it belongs to.
        noun: what answers call it, as in "The {noun} of {e} is {v}."
        values: name of a value pool, or a kind of entity.
        statements: sentences that state it without repeating the full name, for any subject.
        questions: questions for it.
        versus: (question, verdict) if two entities can be compared by it, else None.
        larger_wins: whether the larger number wins the comparison.
        changes: whether it may change with time, so that dated statements make sense.
    """

    kind: str
    noun: str
    values: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    versus: tuple[str, str] | None = None
    larger_wins: bool = True
    changes: bool = True

    @property
    def is_relation(self) -> bool:
        """Whether the value is an entity that may have a document of its own."""
        return self.values in names.KINDS

    @property
    def canonical(self) -> str:
        """The sentence that answers restate."""
        return f"The {self.noun} of {{e}} is {{v}}."


@dataclass(frozen=True, slots=True)
class Fact:
    """An attribute's value for one entity, since a year where the document dates it."""

    entity: Entity
    attribute: Attribute
    value: str
    since: int | None = None


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split("|"))


def _table(kind: str, rows: dict[tuple[str, str], tuple[str, str]]) -> list[Attribute]:
    """Attributes of a kind from {(noun, values): (statements, questions)}."""
    fixed = {"birthplace", "birthday", "birth year", "first year"}
    return [
        Attribute(
            kind,
            noun,
            values,
            _split(statements),
            (*_split(questions), f"What is the {noun} of {{e}}?"),
            versus=_VERSUS.get((kind, noun)),
            larger_wins="year" not in noun,
            changes=noun not in fixed,
        )
        for (noun, values), (statements, questions) in rows.items()
    ]


_VERSUS = {
    ("person", "birth year"): ("Who is older, {a} or {b}?", "{w} is older."),
    ("company", "first year"): ("Which was founded earlier, {a} or {b}?", "{w} was founded earlier."),
    ("company", "staff"): ("Which employs more people, {a} or {b}?", "{w} employs more people."),
    ("village", "population"): ("Which has more inhabitants, {a} or {b}?", "{w} has more inhabitants."),
    ("project", "budget"): ("Which costs more, {a} or {b}?", "{w} costs more."),
}

_PERSON = {
    ("home city", "city"): (
        "{S} lives in {v}. | {P} home is in {v}. | {S} has a flat in {v}. | {P} home city is {v}.",
        "Where does {e} live? | In which city is {P} home? | Which city does {e} live in?",
    ),
    ("birthplace", "city"): (
        "{S} was born in {v}. | {P} birthplace is {v}. | {S} comes from {v}.",
        "Where was {e} born? | What is {P} birthplace? | Where does {e} come from?",
    ),
    ("birth year", "year"): (
        "{P} birth year is {v}. | {S} was born in the year {v}.",
        "In which year was {e} born? | What is {P} birth year?",
    ),
    ("job", "job"): (
        "{S} works as a {v}. | {P} job is {v}. | {S} earns money as a {v}.",
        "What is {P} job? | What does {e} work as? | How does {e} earn money?",
    ),
    ("employer", "company"): (
        "{S} works for {v}. | {P} employer is {v}. | {S} is employed by {v}.",
        "Who does {e} work for? | What is {P} employer? | Which company employs {e}?",
    ),
    ("favourite colour", "colour"): (
        "{P} favourite colour is {v}. | {S} likes the colour {v} best. | {S} paints everything {v}.",
        "What is {P} favourite colour? | Which colour does {e} like best?"
        " | What colour does {e} paint everything?",
    ),
    ("pet", "pet"): (
        "{P} pet is called {v}. | {S} named a pet {v}. | {S} has a pet with the name {v}. | {P} pet is {v}.",
        "What is {P} pet called? | What is the name of {P} pet? | Which pet name did {e} choose?",
    ),
    ("door code", "number"): (
        "{P} door code is {v}. | {S} opens the door with code {v}.",
        "What is {P} door code? | Which code opens the door of {e}? | How does {e} open the door?",
    ),
    ("phone number", "number"): (
        "{P} phone number is {v}. | {S} can be called at {v}.",
        "What is {P} phone number? | Under which number can {e} be called?"
        " | Which number does the phone of {e} have?",
    ),
    ("birthday", "date"): (
        "{P} birthday is on {v}. | {S} celebrates a birthday on {v}.",
        "When is {P} birthday? | On which day does {e} celebrate a birthday?",
    ),
    ("hobby", "hobby"): (
        "{S} enjoys {v}. | {P} hobby is {v}. | {S} spends weekends with {v}.",
        "What does {e} enjoy? | What is {P} hobby? | How does {e} spend weekends?",
    ),
    ("best friend", "person"): (
        "{P} best friend is {v}. | {S} is best friends with {v}.",
        "Who is {P} best friend? | Who is {e} best friends with?",
    ),
    ("favourite food", "food"): (
        "{S} loves to eat {v}. | {P} favourite food is {v}.",
        "What does {e} love to eat? | What is {P} favourite food?",
    ),
    ("room", "room"): (
        "{S} sits in room {v}. | {P} office is room {v}. | {P} room is {v}.",
        "In which room does {e} sit? | Which room is {P} office?",
    ),
}

_COMPANY = {
    ("director", "person"): (
        "{S} is led by {v}. | {P} director is {v}.",
        "Who leads {e}? | Who is {P} director? | Who is the director of {e}?",
    ),
    ("main office", "city"): (
        "{S} is based in {v}. | {P} main office is in {v}.",
        "Where is {e} based? | In which city is {P} main office?",
    ),
    ("first year", "year"): (
        "{S} was founded in {v}. | {P} first year was {v}.",
        "When was {e} founded? | What was {P} first year?",
    ),
    ("main product", "product"): (
        "{S} makes {v}. | {P} main product is {v}. | {S} sells {v}.",
        "What does {e} make? | What is {P} main product? | What does {e} sell?",
    ),
    ("logo", "colour"): (
        "{P} logo is {v}. | {S} has a {v} logo.",
        "What colour is {P} logo? | Which colour is the logo of {e}?",
    ),
    ("access code", "number"): (
        "{P} access code is {v}. | {S} uses the access code {v}.",
        "What is {P} access code? | Which access code does {e} use?",
    ),
    ("staff", "number"): (
        "{S} employs {v} people. | {P} staff counts {v} people.",
        "How many people does {e} employ? | How many people does {P} staff count?",
    ),
}

_VILLAGE = {
    ("mayor", "person"): (
        "{P} mayor is {v}. | {S} is governed by {v}.",
        "Who is {P} mayor? | Who governs {e}? | Who is the mayor of {e}?",
    ),
    ("river", "river"): (
        "{S} lies on the river {v}. | {P} river is the {v}.",
        "On which river does {e} lie? | What is {P} river?",
    ),
    ("population", "number"): (
        "{S} has {v} inhabitants. | {P} population is {v}.",
        "How many inhabitants does {e} have? | What is {P} population?",
    ),
    ("speciality", "food"): (
        "{S} is famous for {v}. | {P} speciality is {v}.",
        "What is {e} famous for? | What is {P} speciality?",
    ),
    ("festival", "month"): (
        "{P} festival takes place in {v}. | {S} holds a festival in {v}.",
        "When does {P} festival take place? | In which month does {e} hold a festival?",
    ),
    ("postal code", "number"): (
        "{P} postal code is {v}. | {S} has the postal code {v}.",
        "What is {P} postal code? | Which postal code does {e} have?",
    ),
}

_PROJECT = {
    ("manager", "person"): (
        "{P} manager is {v}. | {S} is managed by {v}.",
        "Who is {P} manager? | Who manages {e}? | Who is the manager of {e}?",
    ),
    ("deadline", "date"): (
        "{S} must be ready on {v}. | {P} deadline is {v}.",
        "When must {e} be ready? | What is {P} deadline?",
    ),
    ("status", "status"): (
        "{P} status is {v}. | {S} is currently {v}.",
        "What is {P} status? | How is {e} currently?",
    ),
    ("password", "number"): (
        "{P} password is {v}. | {S} is protected with password {v}.",
        "What is {P} password? | Which password protects {e}?",
    ),
    ("language", "language"): (
        "{S} is written in {v}. | {P} language is {v}.",
        "What is {e} written in? | What is {P} language?",
    ),
    ("budget", "number"): (
        "{S} costs {v} coins. | {P} budget is {v} coins.",
        "How many coins does {e} cost? | How many coins is {P} budget?",
    ),
}

ATTRIBUTES: dict[str, tuple[Attribute, ...]] = {
    "person": tuple(_table("person", _PERSON)),
    "company": tuple(_table("company", _COMPANY)),
    "village": tuple(_table("village", _VILLAGE)),
    "project": tuple(_table("project", _PROJECT)),
}

_POOLS = {
    "city": names.CITIES,
    "job": names.JOBS,
    "colour": names.COLOURS,
    "pet": names.PETS,
    "hobby": names.HOBBIES,
    "food": names.FOODS,
    "product": names.PRODUCTS,
    "river": names.RIVERS,
    "month": names.MONTHS,
    "status": names.STATUSES,
    "language": names.LANGUAGES,
}
_DRAWN: dict[str, Callable[[random.Random], str]] = {
    "number": lambda rng: f"{rng.randint(1000, 9999)}",
    "room": lambda rng: f"{rng.randint(10, 99)}",
    "year": lambda rng: f"{rng.randint(1800, 1999)}",
    "date": lambda rng: f"{rng.randint(1, 28)} {rng.choice(names.MONTHS)}",
}


def draw_value(rng: random.Random, attribute: Attribute, *, held_out: bool) -> str:
    """A random value of this attribute; names are drawn from the training or the held-out ones."""
    if attribute.is_relation:
        return names.draw(rng, attribute.values, held_out=held_out).name
    if attribute.values in _DRAWN:
        return _DRAWN[attribute.values](rng)
    return rng.choice(_POOLS[attribute.values])


def fill(template: str, entity: Entity, value: str = "", *, pronouns: tuple[str, str] | None = None) -> str:
    """The template with the entity's name, or the pronouns where given, and the value put in."""
    subject, possessive = pronouns or (entity.name, f"{entity.name}'s")
    return (
        template.replace("{S}", subject)
        .replace("{P}", possessive)
        .replace("{e}", entity.name)
        .replace("{v}", value)
    )


def dated(sentence: str, year: int, *, starts_with_name: bool) -> str:
    """The statement with the year since when it holds."""
    if not starts_with_name:
        sentence = sentence[0].lower() + sentence[1:]
    return f"Since {year}, {sentence}"
