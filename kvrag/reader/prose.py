"""Sentences that state nothing anybody asks for: filler of documents, small talk, hay around passkeys."""

from __future__ import annotations

import random

from kvrag.reader import names

_FILLER = """
The weather was calm that year. | Nothing else is known about this. | Many people talk about it.
The rest is still unclear. | This was written some time ago. | More details will follow later.
Visitors are always welcome. | The old books tell another story. | Not everybody agrees with that.
A longer report was lost in a fire. | The first page is hard to read. | There are a few pictures of it.
Some letters were found in an old house. | It took a long time to find this out.
The papers were checked twice. | Most of it was written by hand. | The next part is about other things.
The summer was warm and the winter was long. | Children learn about it at school.
Nobody remembers how it began. | A short film was made about it. | The road to it is narrow and steep.
In the evening the lights go on. | Two old trees stand by the gate. | The garden is open all year.
It is a quiet place in the morning. | There was a great storm some years ago.
Good things take time, people say. | Every story has two sides. | The bridge was closed for a while.
On Sunday there is music in the square. | A small map hangs on the wall.
The bus stops there twice a day. | This page was last changed in {month}. | Few trains go to {city} now.
The way from {city} to {city} is long. | In {month} the days feel different.
Some say that {colour} is a fine colour. | A {colour} door leads to the garden.
At the market they sell {food} and {food}. | People often speak of {hobby} there.
A {job} and a {job} told the same story. | The shop has {product} and {product}.
The window was painted {colour} long ago. | Many guests come from {city} in {month}.
There is {food} on the table every day. | An old friend once came from {city}.
"""

_TALK = """
How are you today? > I am fine, thank you. | Tell me something nice. > Every day is a new chance.
The sun is out again. > Enjoy the sun today. | I slept well last night. > That is good to hear.
I think it will rain. > Take a coat with you. | Can you help me later? > Of course, just ask me.
I am a little tired. > Take a short break. | My train was late again. > That is not nice.
I had tea this morning. > Tea is always good. | What a long week. > The weekend is near.
Hello. > Hello, how can I help? | Thank you. > You are welcome. | Good morning. > Good morning to you.
The shop was closed. > Try again tomorrow. | I read a good book. > Books are good friends.
We had a walk in the park. > A walk is always good.
"""

_HAY = """
The grass is green. | The sky is blue. | The sun is yellow. | Here we go. | There and back again.
The road is long. | Birds sing in the trees. | The wind is cold today. | Snow falls on the hills.
The old clock ticks.
"""


def _lines(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for line in text.strip().splitlines() for part in line.split("|"))


FILLER = _lines(_FILLER)
HAY = _lines(_HAY)
TALK = tuple((turn.split(" > ")[0], turn.split(" > ")[1]) for turn in _lines(_TALK))
UNKNOWN = "I do not know."
ACKNOWLEDGEMENTS = ("Okay, noted.", "I will remember that.", "Thank you, noted.")
CORRECTIONS = ("Correction:", "Sorry, that was wrong.", "I made a mistake.", "That has changed.")

_SLOTS = {
    "{city}": names.CITIES,
    "{colour}": names.COLOURS,
    "{month}": names.MONTHS,
    "{food}": names.FOODS,
    "{hobby}": names.HOBBIES,
    "{job}": names.JOBS,
    "{product}": names.PRODUCTS,
}


def filler(rng: random.Random) -> str:
    """A filler sentence; some mention cities, colours and the like without saying whose."""
    sentence = rng.choice(FILLER)
    for slot, pool in _SLOTS.items():
        while slot in sentence:
            sentence = sentence.replace(slot, rng.choice(pool), 1)
    return sentence


def hay(rng: random.Random, num_sentences: int) -> str:
    """Sentences of the kind in which passkeys are hidden."""
    return " ".join(rng.choice(HAY) for _ in range(num_sentences))


def passkey(rng: random.Random) -> tuple[str, str]:
    """A passkey of four to six digits and the sentences that tell it."""
    num_digits = rng.randint(4, 6)
    key = f"{rng.randint(10 ** (num_digits - 1), 10**num_digits - 1)}"
    return key, f"The pass key is {key}. Remember it. {key} is the pass key."


def hay_documents(rng: random.Random, num_sentences: int) -> tuple[str, list[str]]:
    """A passkey, and documents of hay of which one tells it."""
    key, telling = passkey(rng)
    sentences = [rng.choice(HAY) for _ in range(num_sentences)]
    sentences.insert(rng.randint(0, num_sentences), telling)
    size = rng.randint(10, 30)
    cuts = range(0, len(sentences), size)
    return key, [" ".join(["Notes.", *sentences[i : i + size]]) for i in cuts]
