from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvrag.archive.cutting import Cutter
from kvrag.archive.span import Mark, Span, local_rows
from kvrag.encoding import encode
from kvrag.errors import ConfigError
from kvrag.model import Model
from kvrag.rotary import LayerSpec, rotate
from kvrag.testing.models import tiny


@cache
def model() -> Model:
    return tiny()


def rows_of(tokens: tuple[int, ...], specs: tuple[LayerSpec, ...]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Rows that say which token they are of."""
    column = torch.tensor(tokens, dtype=torch.float32)[None, :, None]
    return [
        (column.expand(2, -1, 16) + layer, column.expand(2, -1, 16) - layer) for layer, _ in enumerate(specs)
    ]


def fed(cutter: Cutter, *said: tuple[str, str], size: int = 7) -> list[Span]:
    """Texts with their roles, in pieces of some tokens."""
    spans = []
    for role, text in said:
        tokens = model().text.tokenize(text)
        for at in range(0, len(tokens), size):
            piece = tokens[at : at + size]
            spans += cutter.feed(piece, rows_of(piece, model().specs), role)
    return spans


def texts(spans: list[Span]) -> list[str]:
    return [span.text for span in spans]


def test_messages_of_a_turn_are_joined_while_they_fit() -> None:
    cutter = Cutter(model().text, model().specs, max_tokens=60)
    assert fed(cutter, ("user", "<|user|>A pier."), ("assistant", "<|assistant|>I see.</s>")) == []
    (span,) = cutter.flush()
    assert (span.text, span.role, span.at.turn, span.at.position) == ("A pier.I see.", "user", 0, 0)
    assert cutter.mark == Mark(span.end, 0, cutter.mark.context)


def test_an_answer_closes_the_exchange_before_the_next_question() -> None:
    cutter = Cutter(model().text, model().specs, max_tokens=60)
    spans = fed(cutter, ("user", "One."), ("assistant", "Two."), ("user", "Three."), ("assistant", "Four."))
    assert texts(spans) == ["One.Two."]
    assert texts(cutter.flush()) == ["Three.Four."]


def test_what_is_too_long_is_cut_behind_a_message_then_a_sentence_then_before_a_word() -> None:
    cutter = Cutter(model().text, model().specs, max_tokens=40)
    said = "The pier is old. It has 3.5 lamps. Nobody goes there at night"
    spans = [*fed(cutter, ("user", said), ("assistant", "Yes.")), *cutter.flush()]
    assert texts(spans) == ["The pier is old. It has 3.5 lamps.", "Nobody goes there at nightYes."]
    cutter = Cutter(model().text, model().specs, max_tokens=20)
    said = "nobody goes there at night unless he has to"
    spans = [*fed(cutter, ("user", said)), *cutter.flush()]
    assert len(spans) > 1
    assert " ".join(texts(spans)) == said
    cutter = Cutter(model().text, model().specs, max_tokens=5)
    assert "".join(texts([*fed(cutter, ("user", "qqqqqqqqqqqq")), *cutter.flush()])) == "qqqqqqqqqqqq"


@given(
    said=st.lists(
        st.tuples(st.sampled_from(["user", "assistant"]), st.text("ab. \n5", min_size=1, max_size=60)),
        max_size=6,
    ),
    size=st.integers(1, 50),
    most=st.integers(1, 40),
)
def test_every_token_is_in_one_span_in_order_with_its_rows(
    said: list[tuple[str, str]], size: int, most: int
) -> None:
    cutter = Cutter(model().text, model().specs, max_tokens=most)
    spans = [*fed(cutter, *said, size=size), *cutter.flush()]
    every = [token for _, text in said for token in model().text.tokenize(text)]
    assert cutter.mark.position == len(every)
    at = 0
    for span in spans:
        assert 0 < span.kv.num_tokens <= most
        assert span.at.position >= at  # blanks between two spans may be in none
        assert list(span.tokens) == every[span.at.position : span.end]
        for layer, kv in enumerate(span.kv.layers):
            assert torch.equal(kv.values[0, :, 0], torch.tensor(span.tokens).float() - layer)
        at = span.end


def test_how_it_comes_does_not_matter() -> None:
    said = (("user", "The pier is old. It has lamps."), ("assistant", "I see. What else is there?"))
    one, other = (Cutter(model().text, model().specs, max_tokens=24) for _ in range(2))
    spans = [*fed(one, *said, size=1), *one.flush()]
    again = [*fed(other, *said, size=100), *other.flush()]
    assert [(s.at, s.text, s.tokens) for s in spans] == [(s.at, s.text, s.tokens) for s in again]


def test_a_context_stands_for_everything_before() -> None:
    def contexts(*said: str) -> list[str]:
        cutter = Cutter(model().text, model().specs)
        spans = []
        for text in said:
            spans += [*fed(cutter, ("user", text)), *cutter.flush()]
        return [span.at.context for span in spans]

    assert contexts("One.", "Three.")[0] == contexts("Two.", "Three.")[0]
    assert contexts("One.", "Three.")[1] != contexts("Two.", "Three.")[1]
    assert contexts("One.", "Three.") == contexts("One.", "Three.")


def test_a_cutter_goes_on_from_a_mark_and_forgets_what_came_behind() -> None:
    cutter = Cutter(model().text, model().specs)
    fed(cutter, ("user", "One."))
    cutter.flush()
    mark = cutter.mark
    fed(cutter, ("user", "Undone."))
    cutter.restart(mark)
    fed(cutter, ("user", "Two."))
    (span,) = cutter.flush()
    other = Cutter(model().text, model().specs, at=mark)
    fed(other, ("user", "Two."))
    assert (span.text, span.at) == ("Two.", other.flush()[0].at)


def test_rows_are_those_of_a_document() -> None:
    """A chat's first span has the rows that the text has as a document: the same positions, once rotated."""
    tokens = model().text.tokenize("The pier is old.")
    (read,) = encode(model(), [tokens])
    raw = []
    for spec, layer in zip(model().specs, read.layers, strict=True):
        assert spec.rotation is not None
        back = spec.rotation.turn(-torch.arange(len(tokens)))
        raw.append((rotate(layer.keys[None], back)[0], layer.values))
    for mine, theirs in zip(local_rows(tokens, raw, model().specs).layers, read.layers, strict=True):
        torch.testing.assert_close(mine.keys, theirs.keys, atol=1e-5, rtol=1e-5)
        assert torch.equal(mine.values, theirs.values)
        assert mine.values.data_ptr() != theirs.values.data_ptr()


def test_spans_of_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        Cutter(model().text, model().specs, max_tokens=0)
