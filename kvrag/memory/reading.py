"""Reading tokens into a memory: stride by stride, over what is pinned, recalled and remembered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from kvrag.attention import Looking
from kvrag.errors import ContextOverflow
from kvrag.fresh import FreshRows
from kvrag.memory.base import MemoryState, Seen
from kvrag.memory.rows import MemoryRows
from kvrag.memory.surprise import MOST_LOGITS, Surprise
from kvrag.memory.watch import Watch
from kvrag.model import Model
from kvrag.prefill import Read, Want, Work, alone
from kvrag.segments import SegmentTable


@dataclass(frozen=True, slots=True)
class StrideRows:
    """What a stride read, just before its rows are inserted: all heads of all layers are still there.

    Attributes:
        first: number of the first token among all that the memory has taken, counted from 0.
        tokens: of the stride.
        keys: of each layer, [K, q, D], not rotated.
        values: of each layer, [K, q, Dv]; copy what is to last.
        role: who says them, as the reader was told.
    """

    first: int
    tokens: tuple[int, ...]
    keys: Sequence[torch.Tensor]
    values: Sequence[torch.Tensor]
    role: str = "user"


Listener = Callable[[StrideRows], None]


class MemoryReader:
    """Reads one conversation's tokens; they see everything that is in memory and the tokens of their stride.

    A stride is inserted when it is full and more is to be read, or when `insert` is called: so the memory
    never holds more than its budget and one stride.

    Attributes:
        state: which entry is where.
        rows: the entries.
        fresh: rows of the stride that is not inserted yet.
        extra_mass: of each pass [L, E, T], float32: attention to each extra segment, mean over heads.
        pinned_mass: of each pass [L, P, T], float32: the same for pinned segments, if a document is pinned.
        role: who says what is read; told to the listeners.
    """

    def __init__(
        self,
        model: Model,
        state: MemoryState,
        rows: MemoryRows,
        *,
        pinned: SegmentTable | None = None,
        extra: SegmentTable | None = None,
        stride: int = 128,
        listeners: Sequence[Listener] = (),
    ) -> None:
        """Go on where a memory ends.

        Args:
            model: the decoder.
            state: of the policy; changed.
            rows: of the memory; changed.
            pinned: what always stands in front, from position 0 on.
            extra: segments between those and the memory, in this reading only; their targets follow.
            stride: most tokens that are read before they are inserted.
            listeners: told of every stride.
        """
        self.model, self.state, self.rows = model, state, rows
        self.stride, self._listeners = stride, tuple(listeners)
        self._pinned, self._extra = pinned or SegmentTable(), extra or SegmentTable()
        self.offset = max(self._pinned.end, self._extra.end)
        self.extra_mass: list[torch.Tensor] = []
        self.pinned_mass: list[torch.Tensor] = []
        self._has_documents = any(segment.document is not None for segment in self._pinned)
        watching = state.watching
        self._surprise = Surprise(model) if watching is not None and watching.surprise else None
        self.role = "user"
        self._begin()

    def _begin(self) -> None:
        """An empty stride over what is there now."""
        self.fresh = FreshRows(self.model.num_layers, reserve=min(self.stride, 64))
        self._tokens: list[int] = []
        self._watch = Watch(self.model.specs, None if self._surprise else self.state.watching)
        self._runs = tuple(run for run in self.state.runs if run.length)
        memory = self.rows.segments(self._runs, self.offset)
        self._table = SegmentTable((*self._pinned, *self._extra, *memory))
        self._start = self.offset + sum(run.length for run in self._runs)

    @property
    def table(self) -> SegmentTable:
        """What the stride reads beside itself."""
        return self._table

    @property
    def position(self) -> int:
        """Where the next token appears."""
        return self._start + self.fresh.num_rows

    @property
    def num_tokens(self) -> int:
        """Tokens read so far, inserted or not."""
        return self.state.seen + self.fresh.num_rows

    def reading(self, tokens: Sequence[int]) -> Work[Read]:
        """Read tokens, in order.

        Args:
            tokens: at least one.

        Returns:
            What the last pass gave: the logits behind the last token.

        Raises:
            ContextOverflow: the next position is one that the model does not have.
        """
        at, last = 0, None
        while at < len(tokens):
            if self.fresh.num_rows >= self.stride:
                self.insert()
            room = self.stride - self.fresh.num_rows
            piece = tokens[at : at + (min(room, MOST_LOGITS) if self._surprise else room)]
            last = yield self._want(piece)
            self._tokens.extend(piece)
            if self._surprise:
                self._surprise.note(piece, last.logits)
                last = replace(last, logits=last.logits[-1:])
            first = len(self._pinned)
            if self._has_documents:
                self.pinned_mass.append(last.mass[:, :first])
            if len(self._extra):
                self.extra_mass.append(last.mass[:, first : first + len(self._extra)])
            at += len(piece)
        if last is None:
            raise ValueError("there is no token to read")
        return last

    def _want(self, tokens: Sequence[int]) -> Want:
        start = self.position
        end = start + len(tokens)
        if end > self.model.max_length:
            raise ContextOverflow(
                f"the conversation takes {end} positions and the model reads {self.model.max_length}; "
                "give the session a memory with a budget, or begin a new one"
            )
        looking = Looking(watch=self._watch)
        num_logits = len(tokens) if self._surprise else 1
        return Want(self._table, tokens, range(start, end), self.fresh, looking, num_logits)

    @torch.inference_mode()
    def insert(self) -> None:
        """Put the stride into the memory, as it is so far."""
        num = self.fresh.num_rows
        if not num:
            return
        keys = self._watch.keys()
        values = [self.fresh.values(layer) for layer in range(self.model.num_layers)]
        for listener in self._listeners:
            listener(StrideRows(self.state.seen, tuple(self._tokens), keys, values, self.role))
        if self._surprise:
            seen: Seen | None = self._surprise.seen(self.state.ids.shape)
        else:
            seen = self._watch.seen(self._table, self._runs, self.state.capacity, self.fresh)
        moves = self.state.take(num, seen)
        self.rows.apply(moves, keys, values, capacity=self.state.capacity)
        self._begin()

    def drop(self, num_tokens: int) -> bool:
        """Take back the last tokens that were read; False, and nothing changes, if they are inserted."""
        left = self.fresh.num_rows - num_tokens
        if left < 0:
            return False
        self.fresh.cut(left)
        self._watch.cut(left)
        del self._tokens[left:]
        if self._surprise:
            self._surprise.cut(left)
        return True

    def read(self, tokens: Sequence[int]) -> Read:
        """Read tokens at once; see `reading`."""
        return alone(self.model, self.reading(tokens))
