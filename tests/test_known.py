"""The registry of known texts: every tier against what it promises, many threads, and linear time."""

from __future__ import annotations

import html
import json
import logging
import random
import threading
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from kvrag.canonical import canonical, views
from kvrag.errors import ConfigError, CorpusError, InputError
from kvrag.explain import Missing, explain
from kvrag.known import KnownTexts
from kvrag.leftright import LeftRight
from kvrag.markers import mark, marked
from kvrag.matching import ChunkMatcher
from kvrag.pieces import PieceIndex
from kvrag.plan import Mark, PromptPlan, plan
from kvrag.testing.models import tiny
from kvrag.tiers import TIERS

TEXT = tiny().text
RIVER = 'The river "Mirrow" rises in the hills of Varn & flows\n  through <three> valleys to the sea.'
TOWER = "The lighthouse of Varn was built in 1871 by the\nbrothers O'Hara, who never saw it lit at all."


def planned(prompt: str, known: KnownTexts) -> PromptPlan:
    return plan(
        prompt, known, tokenize=TEXT.tokenize, ends=TEXT.ends, min_tokens=known.min_tokens, prefix=None
    )


def registry(texts: Sequence[str], *tiers: Any, **options: Any) -> KnownTexts:
    known = KnownTexts(tiers, **options)
    known.update({f"k{i}": text for i, text in enumerate(texts)})
    return known


def assert_sound(p: PromptPlan, prompt: str, known: KnownTexts) -> None:
    """What the plan claims of each span is so; nothing is taken for granted that the registry says."""
    assert p.text == prompt
    for span in p.cached:
        text = known.text(span.key)
        assert span.text == prompt[span.start : span.end]
        if span.tier == "canonical":
            assert span.seen == text
            assert canonical(text) in {canonical(view.text) for view in views(span.text)}
            assert span.tokens == TEXT.tokenize(text)
        elif span.whole is not None:
            assert span.whole == TEXT.tokenize(text)
            assert span.tokens == span.whole[span.row : span.row + len(span.tokens)]
            assert span.tokens == TEXT.tokenize(span.text)
            assert span.text in text
            assert (span.tier == "partial") == text.startswith(span.text) or span.tier == "middle"
            assert len(span.tokens) >= known.min_tokens
        else:
            assert span.text in (text, text.strip())
            assert span.tokens == TEXT.tokenize(span.text)
    assert all(a.end <= b.start for a, b in pairwise(p.cached))


# ---- any documents, any transformation, any prompt

CHANGES: dict[str, Callable[[str], str]] = {
    "none": str,
    "repr": repr,
    "json": json.dumps,
    "json as it is": lambda text: json.dumps(text, ensure_ascii=False),
    "html": html.escape,
    "repr in html": lambda text: html.escape(repr(text)),
    "one line": lambda text: text.replace("\n", " "),
    "indented": lambda text: text.replace("\n", "\n    "),
    "quoted": lambda text: "> " + text.replace("\n", "\n> "),
    "CRLF": lambda text: text.replace("\n", "\r\n"),
}
CUTS: dict[str, Callable[[str], str]] = {
    "head": lambda text: text[: len(text) * 2 // 3],
    "tail": lambda text: text[len(text) // 3 :],
    "middle": lambda text: text[len(text) // 6 : len(text) * 5 // 6],
}
odd = st.text(alphabet="abc \n\\\"'&<>;#xnu0é中🂡\u00a0", max_size=60)
words = st.lists(
    st.sampled_from(["river", "the", "and", "\n", "&amp;", "\\n", "of 1871", "“q”", "> "]), max_size=30
)
document = odd | words.map(" ".join)
dressed = st.sampled_from([*CHANGES.values(), *CUTS.values()])


@st.composite
def situations(draw: st.DrawFn) -> tuple[list[str], str]:
    texts = draw(st.lists(document, min_size=1, max_size=4))
    parts = st.tuples(st.sampled_from(texts), dressed).map(lambda pair: pair[1](pair[0]))
    return texts, "".join(draw(st.lists(parts | odd, max_size=6)))


@given(situations(), st.sets(st.sampled_from(TIERS)), st.integers(1, 20))
def test_what_is_matched_has_the_tokens_that_are_claimed(
    situation: tuple[list[str], str], tiers: set[Any], least: int
) -> None:
    texts, prompt = situation
    known = registry(texts, *tiers, min_chars=least, min_tokens=least)
    p = planned(prompt, known)
    assert_sound(p, prompt, known)
    assert planned(prompt, registry(texts, *tiers, min_chars=least, min_tokens=least)) == p
    assert {span.tier for span in p.cached} <= {*tiers, "exact"} | (
        {"partial"} if "middle" in tiers else set()
    )


@given(situations())
def test_the_default_finds_what_the_matcher_finds(situation: tuple[list[str], str]) -> None:
    texts, prompt = situation
    matcher = ChunkMatcher()
    for i, text in enumerate(texts):
        matcher.add(f"k{i}", text)
    found = registry(texts).find(prompt)
    assert [(f.start, f.end, f.key) for f in found] == [(m.start, m.end, m.key) for m in matcher.find(prompt)]
    assert {f.tier for f in found} <= {"exact"}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("text", [RIVER, TOWER])
def test_canonical_finds_every_way_to_dress_a_text(change: str, text: str) -> None:
    known = registry([RIVER, TOWER], "canonical")
    prompt = f"Read: [{CHANGES[change](text)}], then answer."
    p = planned(prompt, known)
    (span,) = p.cached
    assert known.text(span.key) == text
    assert_sound(p, prompt, known)
    assert text in p.seen
    assert p.num_tokens_by_tier == {span.tier: len(TEXT.tokenize(text))}
    assert not planned(prompt, registry([RIVER, TOWER])).cached or text in prompt


def test_canonical_takes_no_other_text_and_leaves_no_half_escape_behind() -> None:
    known = registry([RIVER], "canonical")
    assert not planned(f"Read: {RIVER.lower()!r}", known).cached
    assert not planned(f"Read: {RIVER.replace('sea', 'see')!r}", known).cached
    prompt = f"&foo;{html.escape(RIVER)}&bar;"
    assert planned(prompt, known).seen == f"&foo;{RIVER}&bar;"


def test_surrogate_pairs_of_json_are_one_character() -> None:
    text = "A family 👩‍👩‍👧 in a text of some length, with a 🂡"
    assert planned(json.dumps([text]), registry([text], "canonical")).seen == f'["{text}"]'


# ---- pieces


def test_a_text_that_was_cut_gives_its_first_rows() -> None:
    known = registry([TOWER], "partial")
    for end in range(len(TOWER)):
        prompt = f"Read: {TOWER[:end]} [...] Why?"
        p = planned(prompt, known)
        assert_sound(p, prompt, known)
        if end >= 60:
            assert [(span.row, span.tier) for span in p.cached] == [(0, "partial")]
            assert p.cached[0].end >= len("Read: ") + end - 12


def test_pieces_from_the_middle_are_found_only_if_they_are_asked_for() -> None:
    prompt = f"Read: {TOWER[10:]} Why?"
    assert not planned(prompt, registry([TOWER], "partial")).cached
    known = registry([TOWER], "middle")
    p = planned(prompt, known)
    assert_sound(p, prompt, known)
    (span,) = p.cached
    assert span.tier == "middle"
    assert span.row > 0
    assert len(span.text) > 60


def test_texts_that_overlap_give_one_whole_and_a_piece_of_the_other() -> None:
    whole = RIVER + TOWER + RIVER.upper()
    first, second = whole[:110], whole[70:]
    known = registry([first, second], "middle")
    p = planned(f"<{whole}>", known)
    assert_sound(p, f"<{whole}>", known)
    assert [(span.key, span.tier) for span in p.cached] == [("k0", "exact"), ("k1", "middle")]


def test_short_pieces_are_read() -> None:
    assert not planned(f"Read: {TOWER[:60]}", registry([TOWER], "partial", min_tokens=1000)).cached


@given(st.lists(st.text("ab", max_size=30), max_size=8), st.text("ab", max_size=60), st.data())
def test_an_index_of_pieces_forgets_all_that_it_knew(
    texts: list[str], prompt: str, data: st.DataObject
) -> None:
    index = PieceIndex(middles=True, width=3)
    for i, text in enumerate(texts):
        index.add(str(i), text)
    gone = data.draw(st.permutations(range(len(texts))))
    for at, i in enumerate(gone):
        index.remove(str(i))
        left = {j: texts[j] for j in gone[at + 1 :]}
        for piece in index.find(prompt, 0, len(prompt)):
            text = left[int(piece.key)]
            assert (
                text[piece.offset : piece.offset + piece.end - piece.start] == prompt[piece.start : piece.end]
            )
    assert not index._places
    assert not index._root.next


@given(st.lists(st.text("ab", min_size=3, max_size=30), min_size=1, max_size=8), st.text("ab", max_size=60))
def test_no_beginning_is_longer_by_a_block_than_the_one_that_is_found(texts: list[str], prompt: str) -> None:
    index, width = PieceIndex(width=3), 3
    for i, text in enumerate(texts):
        index.add(str(i), text)
    found = index.find(prompt, 0, len(prompt))
    for piece in found:
        rest = prompt[piece.start :]
        longest = max(n for text in texts for n in range(len(text) + 1) if rest.startswith(text[:n]))
        assert piece.end - piece.start >= longest // width * width
    taken = {at for piece in found for at in range(piece.start, piece.end)}
    for at in range(len(prompt) - width + 1):
        if at not in taken and not any(at + i in taken for i in range(width)):
            assert not any(text.startswith(prompt[at : at + width]) for text in texts)


# ---- marks


def test_a_mark_finds_even_a_short_text_and_is_not_seen() -> None:
    known = KnownTexts(["markers"])
    known.update({"a": "in 1871", "b": "in 1871"})
    prompt = f"It was built {mark('b')}in 1871. Why?"
    p = planned(prompt, known)
    assert [(span.key, span.tier) for span in p.cached] == [("b", "markers")]
    assert p.text == prompt
    assert p.seen == "It was built in 1871. Why?"
    assert [type(span) for span in p.spans][1] is Mark
    assert TEXT.decode(p.tokens) == p.seen


def test_a_forged_mark_is_text_like_any_other() -> None:
    known = registry([RIVER, TOWER], "markers")
    prompt = f"{mark('k0')}{TOWER} {mark('k9')}x [[kv:]] [[kv:k0]]"
    p = planned(prompt, known)
    assert [(span.key, span.tier) for span in p.cached] == [("k1", "exact")]
    assert p.seen == prompt


def test_marks_mean_nothing_unless_they_are_asked_for() -> None:
    prompt = f"{mark('k0')}{TOWER}"
    assert planned(prompt, registry([TOWER])).seen == prompt


@pytest.mark.parametrize("key", ["", "a b", "a]", "x" * 257])
def test_keys_that_cannot_be_marked(key: str) -> None:
    with pytest.raises(InputError, match="cannot stand in a mark"):
        mark(key)


# ---- what the registry holds


def test_texts_that_were_not_used_longest_go_first() -> None:
    known = KnownTexts(max_chars=100)
    for key in "abc":
        known.add(key, f"{key} text of thirty characters!")
    known.find("Read: a text of thirty characters!")
    known.add("d", "d text of thirty characters!")
    assert list(known) == ["a", "c", "d"]
    assert known.num_chars == sum(len(known.text(key)) for key in known) <= 100
    known.add("a", "x" * 101)
    assert "a" not in known
    assert list(known) == ["c", "d"]


def test_contexts_come_with_the_keys_and_can_be_asked_for_late() -> None:
    asked: list[list[str]] = []

    def tell(keys: Sequence[str]) -> dict[str, tuple[str, ...]]:
        asked.append(list(keys))
        return {key: (f"before {key}", "\n") for key in keys if key != "none"}

    def fail(keys: Sequence[str]) -> dict[str, tuple[str, ...]]:
        raise CorpusError("it is gone")

    known = KnownTexts()
    known.add("own", TOWER, ["one", "\n"])
    known.update({"late": RIVER, "later": "x", "none": "y"}, tell)
    known.add("broken", "z", fail)
    found = known.contexts(["own", "late", "later", "late", "none", "broken", "unknown"])
    assert found == {
        "own": ["one", "\n"],
        "late": ("before late", "\n"),
        "later": ("before later", "\n"),
    }
    assert asked == [["late", "later", "none"]]
    known.add("own", TOWER)
    assert known.contexts(["own"]) == {}


class RegistryMachine(RuleBasedStateMachine):
    """Whatever was added and removed, the registry finds what a new one with the same texts finds."""

    def __init__(self) -> None:
        super().__init__()
        self.known = KnownTexts(TIERS, min_chars=4, min_tokens=2)
        self.texts: dict[str, str] = {}

    @rule(key=st.sampled_from("wxyz"), text=document)
    def add(self, key: str, text: str) -> None:
        self.known.add(key, text)
        if self.texts.get(key) != text:
            self.texts.pop(key, None)
        self.texts[key] = text

    @rule(keys=st.sets(st.sampled_from("wxyz")))
    def remove(self, keys: set[str]) -> None:
        self.known.remove(*keys)
        for key in keys:
            self.texts.pop(key, None)

    @rule(parts=st.lists(st.tuples(st.sampled_from("wxyz"), dressed), max_size=4))
    def find(self, parts: list[tuple[str, Callable[[str], str]]]) -> None:
        prompt = "|".join(change(self.texts.get(key, "")) for key, change in parts)
        fresh = KnownTexts(TIERS, min_chars=4, min_tokens=2)
        fresh.update(self.texts)
        assert_sound(planned(prompt, self.known), prompt, self.known)
        assert self.known.find(prompt) == fresh.find(prompt)
        assert set(self.known) == set(self.texts)
        assert len(self.known) == len(self.texts)


TestRegistry = RegistryMachine.TestCase


@pytest.mark.parametrize("options", [{"max_chars": 0}, {"min_chars": 0}, {"min_tokens": 0}])
def test_impossible_settings(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="must be at least 1"):
        KnownTexts(**options)


@pytest.mark.parametrize("tiers", ["exact", ["fuzzy"]])
def test_unknown_tiers(tiers: Any) -> None:
    with pytest.raises(ConfigError, match="expected a list of some of"):
        KnownTexts(tiers)


# ---- many threads


def test_adding_removing_and_finding_at_once() -> None:
    """The texts that stay are always found; those that come and go are found whole or not at all."""
    rng = random.Random(0)
    staying = {f"s{i}": f"Shared beginning of all. This one stays: {i} {'x' * i}." for i in range(40)}
    coming = {f"c{i}": f"Shared beginning of all. It comes and goes: {i} {'y' * i}." for i in range(40)}
    known = KnownTexts(["canonical", "middle", "markers"])
    known.update(staying)
    prompt = " | ".join([*staying.values(), *coming.values()])
    problems: list[str] = []
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            found = [f for f in known.find(prompt) if f.tier == "exact"]
            if {f.key for f in found} & set(staying) != set(staying):
                problems.append("a text that stays was not found")
            texts = staying | coming
            if any(prompt[f.start : f.end] != texts[f.key] for f in found):
                problems.append("another text was found")

    def change(keys: list[str]) -> None:
        for _ in range(30):
            key = rng.choice(keys)
            known.add(key, coming[key], ["before"])
            known.remove(rng.choice(keys))

    lookers = [threading.Thread(target=look) for _ in range(3)]
    keys = list(coming)
    changers = [threading.Thread(target=change, args=(keys[i::3],)) for i in range(3)]
    for thread in [*lookers, *changers]:
        thread.start()
    for thread in changers:
        thread.join()
    stop.set()
    for thread in lookers:
        thread.join()
    assert not problems
    fresh = KnownTexts(["canonical", "middle", "markers"])
    fresh.update({key: known.text(key) for key in known})
    assert known.find(prompt) == fresh.find(prompt)


def test_a_reader_sees_no_change_and_holds_up_no_other_reader() -> None:
    copies: LeftRight[list[int]] = LeftRight(list)
    copies.change(lambda copy: copy.append(1))
    with copies.reading() as before:
        writer = threading.Thread(target=copies.change, args=(lambda copy: copy.append(2),))
        writer.start()
        while True:  # until the change is in sight of those who come now
            with copies.reading() as now:
                if now == [1, 2]:
                    break
        assert before == [1]
        assert writer.is_alive()
    writer.join()
    assert [list(copy) for copy in copies._copies] == [[1, 2], [1, 2]]


# ---- linear time, counted and not timed

HEADER = "header, the same for all. "


@pytest.mark.parametrize(
    ("texts", "unit"),
    [
        pytest.param(["a" * 1000], "a", id="one character"),
        pytest.param(
            [f"{'header, the same for all. ' * 8}{i}" for i in range(500)],
            "header, the same for all. ",
            id="headers",
        ),
        pytest.param([f"{'ab' * 60}{i}{'ab' * 60}" for i in range(300)], "ab", id="nearly the same"),
        pytest.param(["a" * 31 + "b" + "c" * 64], "a" * 31 + "b" + "c" * 3, id="fails late"),
    ],
)
def test_pieces_are_found_in_linear_time(texts: list[str], unit: str) -> None:
    index = PieceIndex(middles=True)
    for i, text in enumerate(texts):
        index.add(str(i), text)
    for size in (2000, 20_000):
        prompt = (unit * (size // len(unit) + 1))[:size]
        before = index.compared
        index.find(prompt, 0, size)
        assert index.compared - before <= 64 * size


def test_what_is_tokenised_for_pieces_and_other_forms_grows_with_the_prompt() -> None:
    long = {f"k{i}": f"{i:032}{'tail of it ' * 300}" for i in range(200)}
    wide = {"wide": f"a text of some{' ' * 100_000}length"}
    known = KnownTexts(TIERS)
    known.update(long | wide)
    prompt = "".join(f"{i:032}" for i in range(200)) + "\\n &amp; a text of some length"
    asked: list[int] = []

    def tokenize(text: str) -> tuple[int, ...]:
        asked.append(len(text))
        return tuple(map(ord, text))

    def ends(text: str) -> tuple[int, ...]:
        asked.append(len(text))
        return tuple(range(1, len(text) + 1))

    assert plan(prompt, known, tokenize=tokenize, ends=ends).text == prompt
    assert sum(asked) <= 128 * len(prompt)


class Compared(str):
    """A text that counts the characters that it is compared with, at most."""

    count = 0

    def startswith(self, prefix: Any, *places: Any) -> bool:
        Compared.count += len(prefix)
        return super().startswith(prefix, *places)


def test_marks_are_read_in_linear_time() -> None:
    unit = "[[kv:k]]"
    text = unit * 4000 + "x"
    for num in (500, 5000):
        prompt, Compared.count = Compared(unit * num), 0
        assert list(marked(prompt, 0, {"k": text}.get)) == []
        assert Compared.count <= 32 * len(prompt)


# ---- why not


def test_a_reason_is_logged_once_for_each_text(caplog: pytest.LogCaptureFixture) -> None:
    known = registry([TOWER])
    p = planned(f"Read: {TOWER} and {json.dumps(RIVER)}", known)
    missing = Missing()
    missing.log(p, [TOWER, RIVER])
    assert not caplog.records
    with caplog.at_level(logging.DEBUG, logger="kvrag.explain"):
        for _ in range(3):
            missing.log(p, [TOWER, RIVER, RIVER, "Something else altogether."])
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert "JSON-escaped" in lines[0]
    assert "it is not in the prompt" in lines[1]
    assert not any("\n" in line for line in lines)


def test_explain_shows_the_tiers() -> None:
    known = registry([TOWER, RIVER], "canonical", "partial")
    p = planned(f"Read: {TOWER[:70]} and {json.dumps(RIVER)}", known)
    shown = explain(p, known)
    assert "[k0: partial 0.." in shown
    assert "[k1: canonical] " in shown
    assert "not used" not in shown
