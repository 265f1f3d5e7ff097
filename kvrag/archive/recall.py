"""Bringing back for one turn what a chat's memory has lost, confirmed by what the turn's words look at."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from kvrag.answer import RecalledSpan
from kvrag.archive.archive import Archive
from kvrag.archive.cutting import MAX_TOKENS, Cutter
from kvrag.archive.records import Archived
from kvrag.archive.span import Mark, Span
from kvrag.encoding import Run, encoding_runs
from kvrag.errors import ConfigError, CorpusLocked, StoreWriteError
from kvrag.focus.scoring import AttentionScore, Scorer, weighed
from kvrag.fresh import FreshRows
from kvrag.memory.reading import StrideRows
from kvrag.model import Model
from kvrag.prefill import Want, Work
from kvrag.segments import KV, Segment, SegmentTable
from kvrag.sessions.talk import Talk
from kvrag.store.key import tagged_digest

logger = logging.getLogger(__name__)

_BATCH = 64  # spans that are kept back at most until they are written


@dataclass(frozen=True, slots=True, kw_only=True)
class Recall:
    """How a chat gets back what its memory has lost.

    Attributes:
        search: spans that are looked at for a turn, the nearest to what the user says.
        keep: spans that come back at most.
        below: those come back that get at least this share of the best one's score; 0: all.
        nearness: a score is multiplied by the similarity that the search saw, as a share of the nearest
            candidate's, to this power; 0: attention alone decides. Search and attention are misled by
            different look-alikes, so that what both find is the right one more often than what either finds.
        held: a span counts as lost if an average layer and head holds less than this share of it.
        scorer: what confirms; the default is the attention of the turn's last row, over all layers.
        messages: how many of the user's last messages are searched with, one by one.
        reread: read spans anew whose entries the store has lost; else they are left out.
        max_tokens: of a span.
    """

    search: int = 16
    keep: int = 4
    below: float = 0.5
    nearness: float = 4.0
    held: float = 0.5
    scorer: Scorer = field(default_factory=lambda: AttentionScore(rows="last"))
    messages: int = 1
    reread: bool = True
    max_tokens: int = MAX_TOKENS

    def __post_init__(self) -> None:
        """Refuse settings without a meaning.

        Raises:
            ConfigError: names the setting, its value and what is allowed.
        """
        if min(self.search, self.keep, self.messages, self.max_tokens) < 1:
            raise ConfigError(
                f"search={self.search}, keep={self.keep}, messages={self.messages}, "
                f"max_tokens={self.max_tokens}: expected at least 1"
            )
        for name in ("below", "held"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)}: expected a share from 0 to 1")
        if not self.nearness >= 0:
            raise ConfigError(f"nearness={self.nearness}: expected 0 or more")


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A span with its rows.

    Attributes:
        is_hit: they came from the store.
    """

    span: Archived
    kv: KV
    is_hit: bool


class SpanRecalls:
    """Writes one chat into an archive and brings back what is needed (see `kvrag.sessions.turn.Recalls`).

    A turn's spans are written when it is complete, so what was read for a turn that failed is never found; of
    a turn that brings very much, such as a whole history, parts are written on the way and removed again if
    it fails. Only the thread that owns the model may call it.

    What is looked for is what the memory holds less than half of. Candidates stand between what is pinned
    and the memory, in the order of the chat, and the end of the user's message is read over all of them once,
    to see which ones it looks at; the turn is then read over those only.
    """

    def __init__(self, archive: Archive, model: Model, session: str, recall: Recall | None = None) -> None:
        """Serve one chat.

        Args:
            archive: where its spans are kept.
            model: the decoder.
            session: the chat's id.
            recall: what comes back; None: the defaults.
        """
        self._archive, self._model, self.session = archive, model, session
        self._recall = recall or Recall()
        self._cutter = Cutter(model.text, model.specs, max_tokens=self._recall.max_tokens)
        self._said: deque[str] = deque(maxlen=self._recall.messages)
        self._base = Mark()  # where the turn began
        self._spans: list[Span] = []  # of the turn
        self._is_direct = self._has_written = False  # this turn's spans may be, or were, written on the way
        self._settled: list[Span] = []  # of complete turns, not yet written
        self._known: int | None = None  # end of the complete turns; None: nobody has looked
        self._due: int | None = None  # what the archive has behind this place is to be removed
        self._returned: list[tuple[_Candidate, float]] = []
        self._clock = 0.0

    def begin(self, talk: Talk) -> None:
        """See `Recalls`."""
        self._base = _mark(talk)
        self._cutter.restart(self._base)
        self._spans, self._returned, self._has_written = [], [], False
        if not talk.went_back and self._known != self._base.position:
            self._cut_off(self._base.position)  # of a course that was never saved, or that begins anew
        self._write()
        self._is_direct = not talk.went_back and self._due is None
        self._clock = time.perf_counter()

    def recall(self, said: str, tokens: Sequence[int], talk: Talk, room: int) -> Work[SegmentTable]:
        """See `Recalls`."""
        if talk.state.seen > self._base.position:
            self._spans += self._cutter.flush()
            self._write_direct(1)
        if said.strip():
            self._said.append(said)
            found = self._search(talk)
            candidates = yield from self._with_rows(talk, found, room)
            scores = yield from self._scores(talk, candidates, tokens)
            self._returned = _confirmed(candidates, scores, self._recall)
        self._clock = time.perf_counter()
        return _placed([one.kv for one, _ in self._returned], talk)

    def _search(self, talk: Talk) -> list[Archived]:
        """Spans that are lost, nearest first, and each once."""
        holding = talk.holding()
        lost = holding.last_below(self._recall.held)
        if lost is None:
            return []
        end = min(talk.state.seen, lost + self._recall.max_tokens)
        end = end if self._due is None else min(end, self._due)

        def is_lost(span: Archived) -> bool:
            return holding.share_of(span.start, span.end) < self._recall.held

        found: dict[int, Archived] = {}
        for said in self._said:
            for span in self._archive.search(
                self.session, said, self._recall.search, before=end, is_wanted=is_lost
            ):
                nearer = span.start not in found or span.similarity > found[span.start].similarity
                if nearer:
                    found[span.start] = span
        return sorted(found.values(), key=lambda span: -span.similarity)[: self._recall.search]

    def _with_rows(self, talk: Talk, found: Sequence[Archived], room: int) -> Work[list[_Candidate]]:
        """Those of the spans that fit, with their rows, in the order of the chat."""
        fitting = []
        for span in found:
            if len(span.tokens) <= room:
                fitting.append(span)
                room -= len(span.tokens)
        fitting.sort(key=lambda span: span.start)
        loaded = self._archive.load(fitting)
        missing = [span for span, kv in zip(fitting, loaded, strict=True) if kv is None]
        rows: Iterator[KV] = iter(())
        if missing and self._recall.reread:
            self._archive.counts["read anew"] += len(missing)
            runs = [Run(span.tokens, ((0, len(span.tokens)),)) for span in missing]
            read = yield from encoding_runs(self._model, runs, _prefix(talk))
            rows = iter([kv for (kv,) in read])
        candidates = []
        for span, kv in zip(fitting, loaded, strict=True):
            own = kv.to(self._model.device) if kv is not None else next(rows, None)
            if own is not None:
                candidates.append(_Candidate(span, own, kv is not None))
        return candidates

    def _scores(
        self, talk: Talk, candidates: Sequence[_Candidate], tokens: Sequence[int]
    ) -> Work[list[float]]:
        """What the end of the user's message looks at."""
        if len(candidates) < 2:
            return [1.0] * len(candidates)
        reader = talk.reader(MAX_TOKENS, extra=_placed([one.kv for one in candidates], talk))
        tail = list(tokens[-reader.stride :])
        places = range(reader.position, reader.position + len(tail))
        read = yield Want(reader.table, tail, places, FreshRows(self._model.num_layers))
        first = len(talk.pinned.table)
        own = slice(first, first + len(candidates))
        scores = [0.0] * len(candidates)
        for layer, (mass, focus) in enumerate(zip(read.mass[:, own], read.focus[:, own], strict=True)):
            added = self._recall.scorer.score(layer, mass, focus)
            scores = [score + more for score, more in zip(scores, added, strict=True)]
        if not self._recall.nearness:
            return scores
        return weighed(scores, [one.span.similarity for one in candidates], self._recall.nearness)

    def note(self, stride: StrideRows) -> None:
        """See `Recalls`."""
        if stride.first == self._base.position and self._cutter.position != stride.first:
            # The turn is begun once more; what was written of it may end elsewhere now.
            self._cutter.restart(self._base)
            self._spans, self._is_direct = [], False
        now = time.perf_counter()
        rows = list(zip(stride.keys, stride.values, strict=True))
        self._spans += self._cutter.feed(stride.tokens, rows, stride.role, seconds=now - self._clock)
        self._clock = now
        self._write_direct(_BATCH)

    def _write_direct(self, at_least: int) -> None:
        """Write spans of a turn that is not complete, if it takes nothing back and there are so many."""
        if self._is_direct and len(self._spans) >= at_least:
            self._archive.add(self.session, self._spans)
            self._spans, self._has_written = [], True

    def looked(self, mass: Sequence[torch.Tensor]) -> tuple[RecalledSpan, ...]:
        """See `Recalls`."""
        if not self._returned:
            return ()
        means = torch.cat([part.mean(0) for part in mass], dim=1).mean(1).tolist()
        return tuple(
            RecalledSpan(
                one.span.at.turn,
                one.span.role,
                one.span.text,
                one.span.start,
                len(one.span.tokens),
                share,
                one.is_hit,
            )
            for (one, _), share in zip(self._returned, means, strict=True)
        )

    def settle(self, talk: Talk) -> None:
        """See `Recalls`."""
        if self._known != self._base.position or (self._has_written and not self._is_direct):
            self._cut_off(self._base.position)
        self._settled += [*self._spans, *self._cutter.flush()]
        self._spans, self._known = [], talk.state.seen
        self._write()

    def drop(self, talk: Talk) -> None:
        """See `Recalls`."""
        self._spans = []
        if self._has_written:
            self._cut_off(self._base.position)
        self._write()

    def undone(self, talk: Talk) -> None:
        """See `Recalls`."""
        self._known = talk.state.seen
        self._cut_off(self._known)
        self._write()

    def fork(self, session: str, talk: Talk | None) -> SpanRecalls:
        """See `Recalls`."""
        other = SpanRecalls(self._archive, self._model, session, self._recall)
        if talk is not None:
            self._write()
            self._archive.delete(session, forget=False)
            self._archive.fork(
                self.session, session, end=talk.state.seen, is_wanted=lambda span: _was_said(span, talk)
            )
            other._known = talk.state.seen
        return other

    def kept(self, talk: Talk) -> list[tuple[int, int]]:
        """See `Recalls`."""
        end = talk.state.seen if self._due is None else min(self._due, talk.state.seen)
        kept = [(span.start, span.end) for span in self._archive.spans(self.session)]
        waiting = [(span.at.position, span.end) for span in self._settled]
        return sorted({*(place for place in kept if place[1] <= end), *waiting})

    def delete(self) -> None:
        """See `Recalls`."""
        self._settled, self._spans = [], []
        self._archive.delete(self.session)

    def _cut_off(self, end: int) -> None:
        """What stands behind this place of the chat is no part of it any more."""
        self._settled = [span for span in self._settled if span.end <= end]
        self._due = end if self._due is None else min(end, self._due)
        self._known = end if self._known is None else min(end, self._known)

    def _write(self) -> None:
        """Bring the archive up to date; what cannot be done now is done with a later turn."""
        try:
            if self._due is not None:
                gone = self._archive.delete(self.session, start=self._due, forget=False).ids
                if gone and not self._due:
                    logger.warning(
                        "session %s begins anew: %d archived spans removed", self.session, len(gone)
                    )
                self._due = None
            self._archive.add(self.session, self._settled)
            self._settled = []
        except (CorpusLocked, StoreWriteError) as error:
            logger.warning("the archive of session %s waits to be written: %s", self.session, error)


def _was_said(span: Archived, talk: Talk) -> bool:
    """Whether a talk has a span: another one that was saved earlier may have gone on differently."""
    return talk.log is None or tuple(talk.log[span.start : span.end]) == span.tokens


def _mark(talk: Talk) -> Mark:
    """Where a talk is, and all that was said in it."""
    digest = talk.digests[0]
    context = tagged_digest(
        {
            "opening": talk.pinned.opening.text,
            "length": digest.length,
            "chain": digest.chain,
            "tail": digest.tail.encode("utf-8", "surrogatepass"),
        }
    )
    return Mark(talk.state.seen, talk.num_turns, context)


def _prefix(talk: Talk) -> KV | None:
    """What a span is read behind when it has to be read anew: the beginning of what is pinned."""
    first = next(iter(talk.pinned.table), None)
    is_beginning = first is not None and first.document is None and not (first.target or first.native)
    return first.kv if first is not None and is_beginning else None


def _confirmed(
    candidates: Sequence[_Candidate], scores: Sequence[float], recall: Recall
) -> list[tuple[_Candidate, float]]:
    """Those that are looked at, in the order of the chat."""
    border = recall.below * max(scores, default=0.0)
    best = sorted(range(len(scores)), key=lambda i: -scores[i])[: recall.keep]
    return [(candidates[i], scores[i]) for i in sorted(best) if scores[i] >= border]


def _placed(rows: Sequence[KV], talk: Talk) -> SegmentTable:
    """Segments one behind the other, behind what is pinned."""
    at, segments = talk.pinned.num_tokens, []
    for kv in rows:
        segments.append(Segment(kv, at))
        at += kv.num_tokens
    return SegmentTable(tuple(segments))
