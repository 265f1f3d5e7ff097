"""The prompt plan: spans give the prompt back, and are those that a brute-force search finds."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvrag.errors import ConfigError
from kvrag.explain import explain, why_not
from kvrag.matching import ChunkMatcher, Match
from kvrag.plan import Cached, Literal, Prefix, PromptPlan, Tokenize, plan


def chars(text: str) -> tuple[int, ...]:
    """One token per character."""
    return tuple(map(ord, text))


def greedy_pairs(text: str) -> tuple[int, ...]:
    """Merges two characters where it can, so that tokens depend on where a text begins and ends."""
    return tuple(hash(text[i : i + 2]) for i in range(0, len(text), 2))


def with_bos(tokenize: Tokenize) -> Tokenize:
    """As `tokenize`, behind a beginning-of-text token."""
    return lambda text: (-1, *tokenize(text))


def oracle(prompt: str, chunks: dict[str, str], min_chars: int, start: int = 0) -> list[Match]:
    """Leftmost, longest, oldest: by trying every chunk at every place."""
    forms: dict[str, str] = {}
    for key, text in chunks.items():
        for form in (text, text.strip()):
            if text.strip() and len(form) >= min_chars:
                forms.setdefault(form, key)
    matches = []
    while start < len(prompt):
        here = [form for form in forms if prompt.startswith(form, start)]
        if here:
            longest = max(here, key=len)
            matches.append(Match(start, start + len(longest), forms[longest]))
            start += len(longest)
        else:
            start += 1
    return matches


def matcher_of(chunks: dict[str, str], min_chars: int = 1) -> ChunkMatcher:
    matcher = ChunkMatcher(min_chars=min_chars)
    for key, text in chunks.items():
        matcher.add(key, text)
    return matcher


# Few letters, so that chunks overlap, nest and repeat by themselves; and what text may hold besides letters.
ODD = ["a", "b", " ", "\n", "\r\n", "\0", "é", "e\u0301", "\u200d", "ß", "中", "🂡", "\u00a0", "\ufeff"]
letters = st.text(alphabet="ab ", max_size=24)
odd_text = st.lists(st.sampled_from(ODD), max_size=12).map("".join)


@st.composite
def situations(draw: st.DrawFn) -> tuple[str, dict[str, str]]:
    """A prompt with chunks that are likely to stand in it, whole, cut or nested."""
    text = draw(st.sampled_from([letters, odd_text, st.text(max_size=12)]))
    chunks = draw(st.lists(text, max_size=6))
    parts = draw(st.lists(st.sampled_from(chunks) | text if chunks else text, max_size=8))
    prompt = "".join(parts)
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(prompt)))
        chunks.append(prompt[start : draw(st.integers(start, len(prompt)))])
    return prompt, {f"k{i}": chunk for i, chunk in enumerate(chunks)}


# ---- the plan


@given(situations(), st.sampled_from([chars, greedy_pairs]), st.integers(1, 5), st.booleans(), letters)
def test_spans_give_the_prompt_and_its_tokens_back(
    situation: tuple[str, dict[str, str]], tokenize: Tokenize, min_chars: int, bos: bool, other: str
) -> None:
    prompt, chunks = situation
    first = with_bos(tokenize) if bos else None
    prefix = random.Random(len(prompt)).choice([None, "", prompt[:3], other])
    p = plan(prompt, chunks, prefix=prefix, tokenize=tokenize, first=first, min_chars=min_chars)

    assert p.text == prompt
    assert p.num_tokens == len(p.tokens)
    end = 0
    for i, span in enumerate(p.spans):
        assert span.start == end
        assert span.text == prompt[span.start : span.end]
        assert span.tokens == (first if first and i == 0 else tokenize)(span.text)
        end = span.end
    assert end == len(prompt)
    if tokenize is chars:
        assert p.tokens == (-1,) * bool(bos and p.spans) + chars(prompt)


@given(situations(), st.integers(1, 5))
def test_cached_spans_are_those_of_the_oracle(situation: tuple[str, dict[str, str]], min_chars: int) -> None:
    prompt, chunks = situation
    p = plan(prompt, chunks, tokenize=chars, min_chars=min_chars)
    found = [Match(span.start, span.end, span.key) for span in p.cached]
    assert found == oracle(prompt, chunks, min_chars)
    for span in p.cached:
        assert span.text in (chunks[span.key], chunks[span.key].strip())
        assert span.tokens == chars(span.text)


def kinds(p: PromptPlan) -> list[tuple[str, str]]:
    return [(span.kind, span.text) for span in p.spans]


def test_a_longer_chunk_goes_before_the_one_nested_in_it() -> None:
    chunks = {"in": "cat", "out": "the cat sat", "tail": "sat on"}
    p = plan("the cat sat on", chunks, tokenize=chars, min_chars=3)
    assert kinds(p) == [("cached", "the cat sat"), ("read", " on")]


def test_of_two_that_overlap_the_left_one_is_taken() -> None:
    p = plan("abcdefgh", {"right": "cdefgh", "left": "abcd"}, tokenize=chars, min_chars=3)
    assert kinds(p) == [("cached", "abcd"), ("read", "efgh")]


def test_a_long_chunk_that_fails_late_leaves_the_short_one_that_begins_with_it() -> None:
    chunks = {f"k{n}": "x" * n + "y" for n in range(1, 90)} | {"short": "x" * 20}
    p = plan("x" * 50 + "z", chunks, tokenize=chars)
    assert [(span.key, span.start, span.end) for span in p.cached] == [("short", 0, 20), ("short", 20, 40)]


def test_repeated_chunks_give_repeated_spans() -> None:
    p = plan("one two. one two. one two.", {"k": "one two."}, tokenize=chars, min_chars=4)
    assert [span.key for span in p.cached] == ["k", "k", "k"]
    assert len({span.tokens for span in p.cached}) == 1


def test_empty_blank_and_short_chunks_are_read() -> None:
    chunks = {"empty": "", "blank": " " * 40, "short": "word"}
    p = plan("word" + " " * 40 + "word", chunks, tokenize=chars)
    assert [span.kind for span in p.spans] == ["read"]


def test_a_chunk_is_found_with_and_without_its_surrounding_white_space() -> None:
    chunks = {"k": "\n  the text of a chunk\n"}
    assert plan("<\n  the text of a chunk\n>", chunks, tokenize=chars).cached[0].text == chunks["k"]
    assert plan("<the text of a chunk>", chunks, tokenize=chars).cached[0].text == chunks["k"].strip()


@pytest.mark.parametrize(
    ("stored", "pasted"),
    [
        pytest.param("caf\u00e9 in the harbour", "cafe\u0301 in the harbour", id="composed and combining"),
        pytest.param("first line\r\nsecond line", "first line\nsecond line", id="CRLF and LF"),
        pytest.param("a no-break\u00a0space, here", "a no-break space, here", id="no-break space"),
        pytest.param("a NUL \0 in the middle", "a NUL  in the middle", id="NUL"),
        pytest.param("one 👩‍👩‍👧 family emoji", "one 👩👩👧 family emoji", id="joiners"),
    ],
)
def test_texts_that_only_look_alike_do_not_match(stored: str, pasted: str) -> None:
    assert plan(stored, {"k": stored}, tokenize=chars).cached[0].text == stored
    assert not plan(pasted, {"k": stored}, tokenize=chars).cached


def test_leading_nul_characters_count() -> None:
    chunks = {"two": "\0\0" + "b" * 20, "one": "\0" + "b" * 20}
    assert [m.key for m in matcher_of(chunks).find("\0\0\0" + "b" * 20)] == ["two"]
    assert [m.key for m in matcher_of(chunks).find("x\0" + "b" * 20)] == ["one"]


def test_lone_surrogates_do_no_harm() -> None:
    text = "\ud800 a lone surrogate \udfff"
    assert [m.key for m in matcher_of({"k": text}).find(f"<{text}>")] == ["k"]


# ---- prefix and first piece


def test_the_prefix_goes_before_any_chunk() -> None:
    chunks = {"k": "Answer. Documents"}
    p = plan("Answer. Documents: one", chunks, prefix="Answer. ", tokenize=chars, min_chars=3)
    assert kinds(p) == [("prefix", "Answer. "), ("read", "Documents: one")]
    assert p.prefix == Prefix(0, 8, "Answer. ", chars("Answer. "))


def test_a_prefix_that_the_prompt_does_not_begin_with_is_not_used() -> None:
    p = plan("Hello", {}, prefix="Answer", tokenize=chars)
    assert p.prefix is None
    assert kinds(p) == [("read", "Hello")]


def test_only_the_first_piece_gets_the_beginning_of_text_token() -> None:
    p = plan("Q: the text", {"k": "the text"}, tokenize=chars, first=with_bos(chars), min_chars=3)
    assert [span.tokens for span in p.spans] == [(-1, *chars("Q: ")), chars("the text")]


def test_a_chunk_at_the_very_beginning_keeps_its_own_tokens() -> None:
    p = plan("the text, why?", {"k": "the text"}, tokenize=chars, first=with_bos(chars), min_chars=3)
    assert p.spans[0] == Literal(0, 0, "", (-1,))
    assert p.spans[1] == Cached(0, 8, "the text", chars("the text"), "k")
    assert p.spans[2].tokens == chars(", why?")


def test_an_empty_prefix_is_the_beginning_of_text_token() -> None:
    p = plan("the text", {"k": "the text"}, prefix="", tokenize=chars, first=with_bos(chars), min_chars=3)
    assert p.prefix == Prefix(0, 0, "", (-1,))
    assert p.cached[0].tokens == chars("the text")


def test_no_prompt_no_spans() -> None:
    assert plan("", {"k": "the text of a chunk"}, tokenize=chars).spans == ()


def test_counts() -> None:
    p = plan("P. the text. Why?", {"k": "the text."}, prefix="P. ", tokenize=chars, min_chars=3)
    assert (p.num_tokens, p.num_cached_tokens, p.num_read_tokens) == (17, 9, 5)


# ---- the matcher


class MatcherMachine(RuleBasedStateMachine):
    """Any order of adding, replacing, removing and finding agrees with the oracle."""

    def __init__(self) -> None:
        super().__init__()
        self.matcher = ChunkMatcher(min_chars=2)
        self.chunks: dict[str, str] = {}

    @rule(key=st.sampled_from("wxyz"), text=letters | odd_text)
    def add(self, key: str, text: str) -> None:
        self.matcher.add(key, text)
        if self.chunks.get(key) != text:
            self.chunks.pop(key, None)
            self.chunks[key] = text

    @rule(key=st.sampled_from("wxyz"))
    def remove(self, key: str) -> None:
        self.matcher.remove(key)
        self.chunks.pop(key, None)

    @rule(prompt=letters | odd_text, data=st.data())
    def find(self, prompt: str, data: st.DataObject) -> None:
        texts = st.sampled_from(sorted(self.chunks.values()) or [""])
        known = "".join(data.draw(st.lists(texts, max_size=3)))
        prompt = prompt + known + prompt
        found = [(m.start, m.end, self.chunks[m.key]) for m in self.matcher.find(prompt)]
        expected = [(m.start, m.end, self.chunks[m.key]) for m in oracle(prompt, self.chunks, 2)]
        assert [(a, b) for a, b, _ in found] == [(a, b) for a, b, _ in expected]
        assert all(prompt[a:b] in (text, text.strip()) for a, b, text in found)

    @invariant()
    def knows_what_was_added(self) -> None:
        assert {key: self.matcher.text(key) for key in self.matcher} == self.chunks
        assert len(self.matcher) == len(self.chunks)

    def teardown(self) -> None:
        for key in list(self.chunks):
            self.matcher.remove(key)
        leftovers = (self.matcher._anchors, self.matcher._markers, self.matcher._waiting, self.matcher._keys)
        assert not any(leftovers), "removing everything leaves nothing behind"


TestMatcher = MatcherMachine.TestCase


@given(situations(), st.integers(1, 4))
def test_a_lying_hash_costs_no_more_than_a_match(situation: tuple[str, dict[str, str]], modulus: int) -> None:
    prompt, chunks = situation
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvrag.matching._MODULUS", modulus)
        found = matcher_of(chunks).find(prompt)
    for match in found:
        assert prompt[match.start : match.end] in (chunks[match.key], chunks[match.key].strip())
    assert all(a.end <= b.start for a, b in pairwise(found))


def test_two_keys_with_one_text_leave_one_when_the_other_goes() -> None:
    matcher = matcher_of({"a": "the same text", "b": "the same text"})
    assert matcher.find("the same text")[0].key == "a"
    matcher.remove("a")
    assert matcher.find("the same text")[0].key == "b"
    assert "a" not in matcher
    assert "b" in matcher


def test_a_key_added_again_has_the_new_text() -> None:
    matcher = matcher_of({"a": "the old text"})
    matcher.find("the old text")
    matcher.add("a", "the new text")
    assert matcher.find("the old text, the new text") == [Match(14, 26, "a")]


def test_min_chars_must_be_positive() -> None:
    with pytest.raises(ConfigError, match="min_chars is 0"):
        ChunkMatcher(min_chars=0)


def test_many_threads_find_the_same() -> None:
    rng = random.Random(0)
    chunks = {f"k{i}": "header, the same for all. " + rng.choice("ab") * i for i in range(300)}
    prompt = " | ".join(chunks.values())
    expected = matcher_of(chunks, 16).find(prompt)
    matcher = matcher_of(chunks, 16)
    with ThreadPoolExecutor(8) as pool:
        assert all(found == expected for found in pool.map(matcher.find, [prompt] * 32))


# ---- linear time, counted in look-ups and not in seconds


class Counted(dict[Any, Any]):
    """A dictionary that counts how often it is asked."""

    asked = 0

    def get(self, key: Any, default: Any = None) -> Any:
        self.asked += 1
        return super().get(key, default)


def lookups(chunks: list[str], prompt: str) -> int:
    matcher = matcher_of({str(i): chunk for i, chunk in enumerate(chunks)}, 16)
    counted = matcher._markers = Counted()
    matcher.find(prompt)
    return counted.asked


def random_text(rng: random.Random, length: int) -> str:
    return "".join(rng.choices("abcdefgh ", k=length))


def boilerplate(n: int) -> tuple[list[str], str]:
    rng = random.Random(n)
    header = "CONFIDENTIAL - Example Corp - all rights reserved - "
    chunks = [header + random_text(rng, 200 + i) for i in range(n)]
    return chunks, "\n".join(rng.sample(chunks, 20))


PERIODIC: dict[str, Callable[[int], tuple[list[str], str]]] = {
    "one chunk that fails at its end": lambda n: (["a" * (n // 2) + "b"], "a" * n),
    "chunks that fail at every length": lambda n: (["a" * i + "b" for i in range(16, 400)], "a" * n),
    "nested chunks": lambda n: (["a" * i for i in range(16, 400)], "a" * n),
    "all too long": lambda n: (["a" * i for i in range(100, 400)], ("a" * 99 + "b") * (n // 100)),
    "two letters": lambda n: (["ab" * i + "c" for i in range(8, 200)], "ab" * (n // 2)),
}


@pytest.mark.parametrize("case", PERIODIC)
def test_periodic_texts_cost_a_handful_of_lookups_per_character(case: str) -> None:
    per_character = [lookups(*PERIODIC[case](n)) / n for n in (2_000, 8_000)]
    assert per_character[1] <= 2 * per_character[0] + 1
    assert per_character[1] <= 20


def test_chunks_that_share_a_header_cost_nothing_to_the_others() -> None:
    few, many = (lookups(*boilerplate(n)) for n in (50, 1_000))
    assert many <= 2 * few
    assert many <= 20 * 20, "about one look-up per doubling of the length, for each of 20 chunks"


def test_unknown_text_costs_no_lookup_at_all() -> None:
    rng = random.Random(0)
    assert lookups([random_text(rng, 500) for _ in range(100)], random_text(rng, 5_000)) == 0


# ---- explaining a plan


def test_explain_shows_every_span_and_why_a_chunk_is_missing() -> None:
    chunks = {"river": "The river rises in the hills.", "short": "Yes.", "gone": "A chunk that is nowhere."}
    matcher = matcher_of(chunks, 16)
    p = plan("Read. The river rises in the hills. Where?", matcher, prefix="Read.", tokenize=chars)
    assert explain(p, matcher).splitlines() == [
        "kind       characters  tokens  text",
        "prefix           0..5       5  'Read.'",
        "read             5..6       1  ' '",
        "cached          6..35      29  [river] 'The river rises in the hills.'",
        "read           35..42       7  ' Where?'",
        "42 tokens: 34 in 1 known chunks and the prefix, 8 to read",
        "[short] not used: it has 4 characters, and chunks shorter than 16 are read",
        "[gone] not used: it is not in the prompt",
    ]


CHUNK = 'The "old" harbour\nwas built in 1887 by <Ada>.'


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("See: " + CHUNK.replace("\n", " "), "other white space"),
        ("See: " + CHUNK.replace("\n", "\n> "), "quoted with '> '"),
        ("See: " + repr(CHUNK), "as a Python literal"),
        ('See: The \\"old\\" harbour\\nwas built in 1887 by <Ada>.', "JSON-escaped"),
        ("See: The &quot;old&quot; harbour\nwas built in 1887 by &lt;Ada&gt;.", "HTML-escaped"),
        ("See: " + CHUNK.lower(), "another letter case"),
        ("See: " + CHUNK[:30] + "...", "follows it for 30 of 45 characters"),
        ("Something else", "not in the prompt"),
    ],
)
def test_why_not_names_what_was_done_to_the_text(prompt: str, reason: str) -> None:
    p = plan(prompt, {"k": CHUNK}, tokenize=chars)
    assert not p.cached
    assert reason in why_not(p, CHUNK, min_chars=16)


def test_why_not_names_who_has_the_characters() -> None:
    p = plan("abcdefgh", {"left": "abcd", "right": "cdefgh"}, prefix=None, tokenize=chars, min_chars=3)
    assert "[left], which begins earlier" in why_not(p, "cdefgh")
    p = plan("abcdefgh", {}, prefix="abcd", tokenize=chars)
    assert "the prefix has its place 0..4" in why_not(p, "abcd")
    assert "not known" in why_not(p, "efgh")
    assert why_not(p, " ") == "it is empty"


def test_a_table_fits_where_it_is_told_to() -> None:
    words = "a chunk of\ttext\nwith much in it that has to be escaped and cut " * 3
    p = plan(
        f"{words} Why?", {"a-name-that-is-long-enough": words}, tokenize=lambda text: tuple(text.encode())
    )
    table = explain(p, fits=80).splitlines()[:-1]
    assert max(map(len, table)) <= 80
    assert "chunk" in table[1]
    assert max(map(len, explain(p).splitlines()[:-1])) > 80
