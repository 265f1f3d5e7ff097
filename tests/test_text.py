"""Text and tokens: streamed decoding is decoding, stop strings never show, templates fail with one error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from kvrag.errors import InputError
from kvrag.prompt import RagPrompt
from kvrag.testing.models import tiny_tokenizer
from kvrag.text import Decoding, Text

TINY = Text(tiny_tokenizer())
BYTES = [
    id_ for token, id_ in sorted(tiny_tokenizer().get_vocab().items(), key=lambda x: x[1]) if len(token) == 1
]


class PiecesTokenizer:
    """Decodes token i to piece i; has no fast tokenizer behind it, so texts are decoded as a whole."""

    def __init__(self, pieces: Sequence[str]) -> None:
        self.pieces = pieces

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool) -> str:
        return "".join(self.pieces[i] for i in tokens)


def fast_tokenizer_of(pieces: Sequence[str]) -> PreTrainedTokenizerFast:
    """Decodes the i-th different piece to that piece; streamed by the tokenizers library."""
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))} or {"?": 0}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocab, unk_token=next(iter(vocab))))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def run(decoding: Decoding, tokens: Sequence[int]) -> list[str]:
    """What a caller is handed, piece by piece, the last piece from `finish`."""
    shown = []
    for token in tokens:
        shown.append(decoding.push(token))
        if decoding.stopped:
            break
    return [*shown, decoding.finish()]


def before_first_stop(text: str, stop: Sequence[str]) -> str:
    """The text before the stop string that is complete first, found by trying every end."""
    for end in range(1, len(text) + 1):
        if found := [s for s in stop if s and text[:end].endswith(s)]:
            return text[: end - max(map(len, found))]
    return text


@st.composite
def pieces_and_stops(draw: st.DrawFn) -> tuple[list[str], list[str]]:
    """A text of few letters cut at random places, and stop strings that overlap, nest and repeat."""
    letters = draw(st.sampled_from(["ab", "ab\n", "aé中"]))
    text = draw(st.text(letters, max_size=20))
    cuts = sorted(draw(st.sets(st.integers(1, max(1, len(text) - 1)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True) if text[a:b]]
    stop = draw(st.lists(st.text(letters, max_size=5), max_size=4))
    return pieces, stop


@given(pieces_and_stops(), st.booleans())
@example((["xab", "cd"], ["abcd", "bc"]), True)
@example((["a", "b", "a", "b", "c"], ["ababd", "abc"]), False)
def test_the_text_ends_before_the_stop_that_is_complete_first(
    case: tuple[list[str], list[str]], is_fast: bool
) -> None:
    """However the text was cut into tokens; nothing of the stop string was ever handed out."""
    pieces, stop = case
    tokens: Sequence[int] = range(len(pieces))
    tokenizer: Any = PiecesTokenizer(pieces)
    if is_fast:
        tokenizer = fast_tokenizer_of(pieces)
        tokens = [tokenizer.get_vocab()[piece] for piece in pieces]
    decoding = Decoding(Text(tokenizer), stop)
    expected = before_first_stop("".join(pieces), stop)
    shown = ""
    for piece in run(decoding, tokens):
        shown += piece
        assert expected.startswith(shown)
    assert shown == expected == decoding.text
    assert decoding.stopped == (expected != "".join(pieces))
    assert decoding.finish() == ""


def test_nothing_is_held_back_without_need() -> None:
    decoding = Decoding(Text(PiecesTokenizer(["one", " two", "\n", "three", "\n", "\nfour"])), ["\n\n"])
    assert run(decoding, range(6)) == ["one", " two", "", "\nthree", "", "", ""]


def test_empty_stop_strings_stop_nothing() -> None:
    assert "".join(run(Decoding(TINY, ["", ""]), TINY.tokenize("abc"))) == "abc"


@given(st.text(max_size=12), st.data())
def test_characters_come_whole(text: str, data: st.DataObject) -> None:
    """A byte-level tokenizer needs up to four tokens per character; no half of one is ever shown."""
    assume(not any(special in text for special in TINY.tokenizer.all_special_tokens))  # not shown
    stop = data.draw(st.lists(st.text(max_size=3), max_size=2))
    tokens = TINY.tokenize(text)
    shown = run(Decoding(TINY, stop), tokens)
    assert "".join(shown) == before_first_stop(text, stop)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in shown)


@pytest.mark.parametrize("character", ["é", "中", "🂡", "👩\u200d👩\u200d👧"])
def test_an_incomplete_character_waits(character: str) -> None:
    tokens = TINY.tokenize(f"a{character}")
    decoding = Decoding(TINY)
    assert decoding.push(tokens[0]) == "a"
    assert [decoding.push(t) for t in tokens[1 : len(TINY.tokenize("a" + character[0])) - 1]] == [""] * (
        len(TINY.tokenize(character[0])) - 1
    )
    shown = "".join(decoding.push(t) for t in tokens[len(TINY.tokenize("a" + character[0])) - 1 :])
    assert shown == character
    assert decoding.finish() == ""


def test_what_never_becomes_a_character_is_shown_at_the_end() -> None:
    tokens = [*TINY.tokenize("ab"), *TINY.tokenize("中")[:-1]]
    decoding = Decoding(TINY)
    assert "".join(decoding.push(t) for t in tokens) == "ab"
    assert decoding.finish() == "\ufffd"
    assert decoding.text == "ab\ufffd" == TINY.decode(tokens)


@given(st.lists(st.sampled_from(BYTES), max_size=30))
def test_any_bytes_stream_to_what_they_decode_to(tokens: list[int]) -> None:
    """A model with random weights, or one cut short, writes bytes that are no text."""
    assert "".join(run(Decoding(TINY), tokens)) == TINY.decode(tokens)


def test_special_tokens_are_left_out() -> None:
    tokens = [1, *TINY.tokenize("a</s>b<|user|>"), 2]
    assert "".join(run(Decoding(TINY), tokens)) == TINY.decode(tokens) == "ab"


def test_a_stop_string_may_span_a_special_token() -> None:
    tokens = TINY.tokenize("a.\n</s>\nb")
    assert "".join(run(Decoding(TINY, ["\n\n"]), tokens)) == "a."


# ---- tokens of pieces


def test_only_the_first_piece_gets_the_lead() -> None:
    assert TINY.lead == (1,)
    assert TINY.tokenize("ab", first=True) == (1, *TINY.tokenize("ab"))
    assert TINY.tokenize("", first=True) == (1,)
    assert TINY.tokenize("") == ()


def test_a_text_that_begins_with_the_lead_gets_no_second_one() -> None:
    assert TINY.tokenize("<s>ab", first=True) == TINY.tokenize("<s>ab") == (1, *TINY.tokenize("ab"))


def test_a_tokenizer_that_only_ends_texts_has_no_lead() -> None:
    class Closing:
        def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
            return [ord(c) for c in text] + [2] * add_special_tokens

    assert Text(Closing()).lead == ()


def test_the_digest_is_that_of_the_vocabulary() -> None:
    assert TINY.digest == Text(tiny_tokenizer()).digest
    other = tiny_tokenizer()
    other.add_tokens(["xyz"])
    assert Text(other).digest != TINY.digest


# ---- chat templates


def with_template(template: str | None) -> Text:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return Text(tokenizer)


USER = [{"role": "user", "content": "Hi"}]
NO_SYSTEM = (
    "{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('no system message') }}{% endif %}"
    "[{{ m['role'] }}] {{ m['content'] }} {% endfor %}"
)


def test_messages_are_rendered_by_the_template() -> None:
    assert TINY.render(USER) == "<s><|user|>\nHi</s>\n<|assistant|>\n"
    assert TINY.render(USER, add_generation_prompt=False) == "<s><|user|>\nHi</s>\n"


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        (None, USER, "no chat template"),
        (NO_SYSTEM, [{"role": "system", "content": "x"}], "no system message"),
        ("{{ messages[0]['content'] + 1 }}", USER, "refuses"),
        ("{{ messages[0].nothing.at_all }}", USER, "refuses"),
        ("{% for %}", USER, "refuses"),
        (NO_SYSTEM, [], "no messages"),
        (NO_SYSTEM, ["Hi"], "refuses"),
    ],
)
def test_what_cannot_be_rendered_is_an_input_error(template: str | None, messages: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        with_template(template).render(messages)


def test_documents_go_into_the_system_message() -> None:
    form = RagPrompt.of(TINY, instruction="Read.")
    assert form.render(["one", "two"], "Who?") == (
        "<s><|system|>\nRead.\n\none\n\ntwo</s>\n<|user|>\nWho?</s>\n<|assistant|>\n"
    )
    assert form.is_rendered


@pytest.mark.parametrize(
    "template",
    [
        NO_SYSTEM,
        "{% for m in messages if m['role'] == 'user' %}[user] {{ m['content'] | trim }} {% endfor %}",
    ],
    ids=["refuses", "drops"],
)
def test_templates_without_system_messages_get_documents_from_the_user(template: str) -> None:
    form = RagPrompt.of(with_template(template), instruction="Read.")
    assert form.render(["one", "two"], "Who?") == "[user] Read.\n\none\n\ntwo\n\nQuestion: Who? "


def test_a_model_without_template_gets_plain_text() -> None:
    form = RagPrompt.of(with_template(None), instruction="Read.")
    assert form.render(["one"], "Who?") == "Read.\n\none\n\nQuestion: Who?\nAnswer:"
    assert not form.is_rendered


def test_a_template_that_drops_what_was_said_is_refused() -> None:
    with pytest.raises(InputError, match="leaves out"):
        RagPrompt.of(with_template("Hello!"))
