"""One turn of a conversation: find what is new, read it, answer, remember; runs on the model's thread."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from kvrag.answer import Answer, DocumentUse, MemoryUse, Piece, RecalledSpan, Usage
from kvrag.config import Sampling
from kvrag.decode import Chooser, Step, choice, end_tokens
from kvrag.errors import ContextOverflow, InputError
from kvrag.laps import Laps
from kvrag.memory.reading import MemoryReader, StrideRows
from kvrag.model import Model
from kvrag.plan import Literal, PromptPlan
from kvrag.prefill import Read, Work
from kvrag.segments import SegmentTable
from kvrag.sessions.digest import TextDigest
from kvrag.sessions.pinned import Pinned
from kvrag.sessions.resting import Resting
from kvrag.sessions.talk import Talk
from kvrag.worker import Ask
from kvrag.written import Written

ANSWERS = "assistant"
"""Who answers."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What a turn begins with.

    Attributes:
        new: text that nobody has read yet.
        borders: places in it at which it is cut before it becomes tokens and strides, ascending, and who
            speaks from there on; before them it is the user.
        go_back: turns that are taken back first.
        before: the text that it stands behind, in the form in which it came; None: as the talk has it.
        anew: the conversation is a new one.
        first: the text begins with what the tokenizer puts in front of one (BOS).
        said: what the user said last, as an archive is to be searched for it.
        lead: white space that the template will put in front of the answer.
        pinned: what stands in front from this turn on; None: what did before.
        pinned_read: tokens that were read of what stands in front.
    """

    new: str
    borders: Mapping[int, str] = field(default_factory=dict)
    go_back: int = 0
    before: TextDigest | None = None
    anew: bool = False
    first: bool = False
    said: str = ""
    lead: str = ""
    pinned: Pinned | None = None
    pinned_read: int = 0


class Recalls(Protocol):
    """Brings back for one turn what a memory has lost: segments between what is pinned and the memory.

    A turn is `begin`, then any number of `note` with `recall` before the last message, then `looked` and
    `settle`; or it ends anywhere with `drop`.
    """

    def begin(self, talk: Talk) -> None:
        """A turn begins behind what was said in a talk."""
        ...

    def recall(self, said: str, tokens: Sequence[int], talk: Talk, room: int) -> Work[SegmentTable]:
        """Segments for this turn, targets from `talk.pinned.num_tokens` on.

        Args:
            said: what the user said last.
            tokens: of the last message, up to where the answer begins.
            talk: the conversation behind which it was said, what this turn has read so far included.
            room: most positions that they may take.
        """
        ...

    def note(self, stride: StrideRows) -> None:
        """Take a stride that was read, before it is inserted; also of a turn that may yet fail."""
        ...

    def looked(self, mass: Sequence[torch.Tensor]) -> tuple[RecalledSpan, ...]:
        """What came back, by what the turn's tokens looked at.

        Args:
            mass: pass by pass [L, E, T], see `MemoryReader.extra_mass`.
        """
        ...

    def settle(self, talk: Talk) -> None:
        """The turn is complete, and nothing that the talk had behind its beginning is said any more."""
        ...

    def drop(self, talk: Talk) -> None:
        """The turn has failed; the talk is what it was before."""
        ...

    def undone(self, talk: Talk) -> None:
        """Turns were taken back: what stands behind `talk.state.seen` was never said."""
        ...

    def kept(self, talk: Talk) -> list[tuple[int, int]]:
        """Places of the talk that could come back: first token and the one behind the last, in order."""
        ...

    def fork(self, session: str, talk: Talk | None) -> Recalls:
        """The same for a copy of the talk, under another id."""
        ...

    def delete(self) -> None:
        """The talk is deleted, and all that was ever said in it."""
        ...


def turn(
    model: Model, talk: Talk, asked: Asked, sampling: Sampling, *, stride: int, recalls: Recalls | None = None
) -> Generator[Piece | Ask, Read, Answer]:
    """Pieces of the answer as they become certain; gives the answer once everything is remembered.

    The talk is what it was before if this raises or is closed.

    Args:
        model: the decoder.
        talk: the conversation; changed.
        asked: what is new.
        sampling: how the answer is chosen.
        stride: most tokens of a stride.
        recalls: brings back what was lost.

    Raises:
        InputError: nothing new is asked.
        ContextOverflow: there are no positions left for an answer.
    """
    laps = Laps()
    pieces = _pieces(model, asked)
    if not pieces:
        raise InputError("there is nothing to read: the history is what was said and answered before")
    laps.lap("plan")
    talk.begin(asked.go_back, asked.pinned)
    try:
        return (yield from _turn(model, talk, asked, pieces, sampling, stride, recalls, laps))
    except BaseException:
        talk.fail()
        if recalls is not None:
            recalls.drop(talk)
        raise


def _turn(
    model: Model,
    talk: Talk,
    asked: Asked,
    pieces: Sequence[Literal],
    sampling: Sampling,
    stride: int,
    recalls: Recalls | None,
    laps: Laps,
) -> Generator[Piece | Ask, Read, Answer]:
    extra = None
    if recalls is not None:
        recalls.begin(talk)
    listeners = () if recalls is None else (recalls.note,)
    *earlier, question = _roles(asked, pieces)
    yield from read_pieces(talk.reader(stride, listeners=listeners), earlier)
    if recalls is not None:
        laps.lap("prefill")
        room = _room(model, talk, stride)
        extra = yield from recalls.recall(asked.said, question[0].tokens, talk, room)
    laps.lap("load")

    def reader() -> MemoryReader:
        return talk.reader(stride, extra=extra, listeners=listeners)

    reading = reader()
    last = yield from read_pieces(reading, [question])
    assert last is not None
    resting = Resting(talk.pinned, reading.pinned_mass)
    reading.role = ANSWERS
    sampling = _within(model, talk, reading, sampling)
    context = _context(talk, pieces)
    written = Written(model.text, sampling.stop)
    chooser = Chooser(choice(model, context, sampling), context, device=model.device)
    while True:
        step = chooser.step(last, resting.documents)
        resting.note(step)
        if not written.tokens:
            laps.lap("prefill")
        piece = written.add(step.token, step.logprobs)
        if piece is not None:
            yield piece
        if step.is_last or written.stopped:
            break
        last = yield from reading.reading([step.token])
    if (rest := written.finish()) is not None:
        yield rest
    left = _left(model, written)
    if not reading.drop(max(0, len(written.tokens) - 1 - left.num_kept)):
        talk.again()  # a part of a stop string is in memory already
        yield from read_pieces(talk.reader(stride, listeners=listeners), earlier)
        reading = reader()
        yield from read_pieces(reading, [question])
        reading.role = ANSWERS
        left = replace(left, unread=tuple(written.tokens[: left.num_kept]) + left.unread_text)
    if left.unread:
        yield from reading.reading(left.unread)
    reading.insert()
    spans = recalls.looked(reading.extra_mass) if recalls is not None else ()
    uses = resting.uses(is_new=bool(asked.pinned_read))
    talk.commit(asked.before, asked.new, written.text, asked.lead)
    if recalls is not None:
        recalls.settle(talk)
    return _answer(model, talk, asked, pieces, sampling, written, step, laps, spans, uses)


def read_prompt(model: Model, talk: Talk, asked: Asked, *, stride: int) -> Work[torch.Tensor]:
    """[V], float32: the logits behind a turn's new text; the talk is what it was before."""
    talk.begin(asked.go_back, asked.pinned)
    try:
        last = yield from read_pieces(talk.reader(stride), _roles(asked, _pieces(model, asked)))
        assert last is not None
        return last.logits[-1].float().clone()
    finally:
        talk.fail()


def read_pieces(reading: MemoryReader, pieces: Sequence[tuple[Literal, str]]) -> Work[Read | None]:
    """Read pieces of text, with who says them; each is inserted before the next one is read."""
    last = None
    for piece, reading.role in pieces:
        last = yield from reading.reading(piece.tokens)
        reading.insert()
    return last


def _roles(asked: Asked, pieces: Sequence[Literal]) -> list[tuple[Literal, str]]:
    """Pieces of the new text, and who says them."""
    return [(piece, asked.borders.get(piece.start, "user")) for piece in pieces]


def _pieces(model: Model, asked: Asked) -> list[Literal]:
    """The new text, cut at its borders; pieces without tokens are left out."""
    found: list[Literal] = []
    ends = [*asked.borders, len(asked.new)]  # in order
    for start, end in zip([0, *asked.borders], ends, strict=True):
        text = asked.new[start:end]
        tokens = model.text.tokenize(text, first=asked.first and not start)
        if tokens:
            found.append(Literal(start, end, text, tokens))
    return found


def _room(model: Model, talk: Talk, stride: int) -> int:
    """Positions that recalled segments may take."""
    taken = talk.pinned.num_tokens + stride
    budget = talk.budget
    return max(0, model.max_length - taken - (talk.state.seen + stride if budget is None else budget))


def _context(talk: Talk, pieces: Sequence[Literal]) -> tuple[int, ...]:
    """Tokens that penalties count: of the conversation as many as the memory is large, or what is new."""
    new = tuple(token for piece in pieces for token in piece.tokens)
    if talk.log is None:
        return new
    return tuple(talk.log if talk.budget is None else talk.log[-max(talk.budget, len(new)) :])


def _within(model: Model, talk: Talk, reading: MemoryReader, sampling: Sampling) -> Sampling:
    """No more tokens than there are positions for; only a memory without a budget can run out of them."""
    if talk.budget is not None:
        return sampling
    room = model.max_length - reading.position
    if room < 1:
        raise ContextOverflow(
            f"the conversation takes {reading.position} positions, which is all that the model reads; "
            "give the session a memory with a budget, or begin a new one"
        )
    return replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))


@dataclass(frozen=True, slots=True)
class _Left:
    """Where an answer's text ends among its tokens.

    Attributes:
        num_kept: tokens that are all text of the answer.
        unread: what is still to be read so that memory and text are the same.
        unread_text: of that, what stands for a part of a token.
    """

    num_kept: int
    unread: tuple[int, ...]
    unread_text: tuple[int, ...]


def _left(model: Model, written: Written) -> _Left:
    """All tokens but the last were read; those of an end mark or a stop string are not to be remembered."""
    num_kept, num_characters = written.certain
    rest, tokens = written.text[num_characters:], written.tokens
    if rest and not written.stopped:  # pieces of a character, as replacement characters
        num_kept, rest = len(tokens), ""
    half = model.text.tokenize(rest) if rest else ()
    return _Left(num_kept, tuple(tokens[len(tokens) - 1 : num_kept]) + half, half)


def _answer(
    model: Model,
    talk: Talk,
    asked: Asked,
    pieces: Sequence[Literal],
    sampling: Sampling,
    written: Written,
    last: Step,
    laps: Laps,
    spans: tuple[RecalledSpan, ...],
    uses: tuple[DocumentUse, ...],
) -> Answer:
    num_read = sum(len(piece.tokens) for piece in pieces)
    num_pinned, said = talk.pinned.num_tokens, talk.state.seen
    remembered, share = talk.num_remembered()
    ended = last.is_complete or (not sampling.ignore_eos and last.token in end_tokens(model))
    before = num_pinned - asked.pinned_read + max(0, said - num_read - len(written.tokens))
    return Answer(
        written.text,
        tuple(written.tokens),
        "stop" if written.stopped or ended else "length",
        uses,
        Usage(before + asked.pinned_read + num_read, before, len(written.tokens)),
        laps.timing(),
        PromptPlan(tuple(pieces)),
        "",
        logprobs=None if sampling.logprobs is None else tuple(written.logprobs),
        memory=MemoryUse(
            num_pinned,
            num_read,
            said,
            remembered,
            share,
            sum(span.num_tokens for span in spans),
            asked.go_back,
            asked.anew,
            spans,
            asked.pinned_read,
        ),
    )
