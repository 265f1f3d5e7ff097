"""Digests of growing texts."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvrag.sessions import digest
from kvrag.sessions.digest import TextDigest, longest

texts = st.text(max_size=40)


def of(*parts: str) -> TextDigest:
    found = TextDigest()
    for part in parts:
        found = found.add(part)
    return found


@given(st.lists(texts, max_size=5), st.integers(0, 200))
def test_how_a_text_was_cut_does_not_matter(parts: list[str], cut: int) -> None:
    whole = "".join(parts)
    assert of(*parts) == of(whole) == of(whole[:cut], whole[cut:])


@given(texts, texts)
def test_other_texts_are_others(one: str, other: str) -> None:
    assert (of(one) == of(other)) == (one == other)


@given(st.lists(texts, min_size=1, max_size=5), texts)
def test_the_longest_beginning_is_found(known: list[str], text: str) -> None:
    found = longest([of(one) for one in known], text)
    fitting = [one for one in known if text.startswith(one)]
    assert (found is None) == (not fitting)
    if found is not None:
        assert known[found] in fitting
        assert len(known[found]) == max(map(len, fitting))


def test_a_digest_does_not_grow() -> None:
    one = of("word " * 100_000)
    assert (one.length, len(one.chain), len(one.tail)) == (500_000, 32, 500_000 % digest._BLOCK)
    assert one.add("x") != one.add("y")
    assert one.add("x") == of("word " * 100_000 + "x")
    assert of("wort " + "word " * 99_999) != one
