"""A decode step over buffers that never move: captured once as a CUDA graph, then replayed.

A step of the ordinary way is several hundred launches, each of which Python prepares; on a GPU that takes
longer than the work. Here everything that changes from token to token (the token, its position, how many rows
there are) lies in memory of the device, where the kernels read it: one graph serves all tokens of an answer,
or of several requests' answers that are written together, until one of them ends or another joins.

Without a GPU nothing can be captured; the same code runs as it stands then, with Triton's interpreter, which
is how it is tested.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import ref

import torch

from kvrag.attention import Looking, Tables
from kvrag.fresh import FreshRows
from kvrag.model import Model
from kvrag.prefill import Read, Want
from kvrag.rotary import LayerSpec
from kvrag.segments import SegmentTable
from kvrag.static import StaticReading, Unreadable
from kvrag_kernels import Group, backend

_ROOM = 512  # tokens that one graph serves before another is made
_BEFORE = 2  # tokens of an answer that are read the ordinary way: shorter ones are not worth a graph


def can_replay(
    table: SegmentTable | Tables,
    fresh: FreshRows,
    specs: Sequence[LayerSpec],
    looking: Looking | None,
    device: torch.device,
) -> bool:
    """Whether decode steps over a table can be replayed.

    Not those whose masks move with the position (windows), whose tables change from step to step, or of which
    the attention to single rows is wanted; and only where the Triton kernel runs.
    """
    return (
        backend(device) == "triton"
        and isinstance(table, SegmentTable)
        and fresh.parts is None
        and all(spec.window is None for spec in specs)
        and all(segment.first_row == 0 and not segment.standing for segment in table)
        and (looking is None or not looking.column_layers)
    )


class DecodeStep:
    """Reads one token of each request at a time as `Want.read` does; once captured, without Python's part."""

    def __init__(
        self,
        model: Model,
        tables: Sequence[SegmentTable],
        several: Sequence[FreshRows],
        group: Group | None = None,
    ) -> None:
        """Make room for tokens behind those that the requests have, which are at least one each.

        Args:
            model: the decoder.
            tables: what every token of each request reads.
            several: rows of their prompts and of the answers so far; extended, and possible to extend
                otherwise. They then lie in common buffers.
            group: how documents are attended to; None for the plain way.

        Raises:
            ValueError: nothing was read yet in a request.
        """
        self._model, self._tables, self._several = model, tables, tuple(several)
        held = FreshRows.together(several, _ROOM)
        self._held = [fresh.held(0)[0] for fresh in several]
        # Tokens, positions and numbers of rows: one copy to the device for all three.
        self._numbers = torch.zeros((3, len(several)), dtype=torch.int64, device=model.device)
        places = (self._numbers[1], self._numbers[2])
        self._reading = StaticReading(model, tables, held, places, group)
        self._logits: torch.Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._is_refused = False

    @property
    def is_captured(self) -> bool:
        """Whether the next tokens are read by replaying a graph."""
        return self._graph is not None

    @property
    def is_usable(self) -> bool:
        """Whether every request has room for one more row where the graph writes it."""
        return all(
            fresh.held(0)[0] is keys and fresh.num_rows < keys.shape[2]
            for fresh, keys in zip(self._several, self._held, strict=True)
        )

    def read(self, tokens: Sequence[int], positions: Sequence[int]) -> list[Read]:
        """Read a token of each request, at positions behind all that it read before."""
        rows = [fresh.num_rows for fresh in self._several]
        self._numbers.copy_(torch.tensor([list(tokens), list(positions), rows]))
        if self._graph is not None:
            self._graph.replay()
        else:
            self._run()  # compiles what is to be captured
            if self._model.device.type == "cuda" and not self._is_refused:
                self._capture()
        assert self._logits is not None
        logits, mass, focus = (x.clone() for x in (self._logits, self._reading.mass, self._reading.focus))
        found = []
        for i, (fresh, table) in enumerate(zip(self._several, self._tables, strict=True)):
            fresh.took(positions[i])
            own = (slice(None), i, slice(len(table)), None)
            found.append(Read(logits[i], mass[own], focus[own], {}))
        return found

    def _run(self) -> None:
        self._reading.begin()
        logits = self._model.run(self._numbers[0, :, None], self._reading)
        if self._logits is None:
            self._logits = torch.empty_like(logits)
        self._logits.copy_(logits)

    def _capture(self) -> None:
        """Record the launches of a step, whose buffers exist by now; nothing is computed.

        A model whose code waits for the device in between cannot be recorded; it goes on as it is.
        """
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.device(self._model.device), torch.cuda.graph(graph):
                self._run()
        except RuntimeError:
            self._is_refused = True
            return
        self._graph = graph


class Replays:
    """The decode steps of one answer, or of several that are written together, once they have begun.

    The first ones are read the ordinary way, and so are all where the kernel cannot read the rows.
    """

    def __init__(self) -> None:
        """Begin an answer, or go on with one over another table."""
        self._step: DecodeStep | None = None
        self._num_read = 0
        self._is_refused = False

    @torch.inference_mode()
    def read(self, model: Model, wants: Sequence[Want]) -> list[Read] | None:
        """Read what is wanted, one token each; None where the ordinary way is to do it.

        Args:
            model: the decoder.
            wants: of the same requests in the same order each time, with `SegmentTable`s.
        """
        self._num_read += 1
        if self._num_read <= _BEFORE or self._is_refused:
            return None
        if self._step is None or not self._step.is_usable:
            tables = [want.table for want in wants if isinstance(want.table, SegmentTable)]
            self._step = DecodeStep(model, tables, [want.fresh for want in wants], group_of(wants[0]))
        try:
            return self._step.read([want.tokens[0] for want in wants], [want.positions[0] for want in wants])
        except Unreadable:  # before anything was counted
            self._is_refused, self._step = True, None
            return None


def group_of(want: Want) -> Group | None:
    """How a request attends to its documents."""
    return want.looking.group if want.looking is not None else None


@dataclass(frozen=True, slots=True)
class ReplayedWant(Want):
    """One token that is read by replaying a step, of this request alone or of all that are read together."""

    replays: Replays | None = None

    def read(self, model: Model) -> Read:
        """Read it in a pass of its own."""
        found = self.replays.read(model, [self]) if self.replays is not None else None
        return Want.read(self, model) if found is None else found[0]


class SharedReplays:
    """The steps of requests whose answers are written together, as long as they are the same ones."""

    def __init__(self) -> None:
        """Nobody is there yet."""
        self._forget()

    def _forget(self, _: object = None) -> None:
        """Let go of the buffers and of all documents' rows; called when one of the answers is no more."""
        self._order: dict[int, int] = {}
        self._members: list[ref[Replays]] = []
        self._replays = Replays()

    def read(self, model: Model, wants: Sequence[Want]) -> list[Read] | None:
        """Read what is wanted; None where the ordinary way is to do it.

        Args:
            model: the decoder.
            wants: of a pass, in any order.
        """
        members = [want.replays for want in wants if isinstance(want, ReplayedWant)]
        present = [replays for replays in members if replays is not None]
        if len(present) < len(wants) or len({group_of(want) for want in wants}) > 1:
            return None
        numbers = [id(replays) for replays in present]
        if set(numbers) != set(self._order):
            self._forget()
            self._members = [ref(replays, self._forget) for replays in present]
            self._order = {number: i for i, number in enumerate(numbers)}
        places = [self._order[number] for number in numbers]
        ordered = sorted(range(len(wants)), key=lambda i: places[i])
        found = self._replays.read(model, [wants[i] for i in ordered])
        return None if found is None else [found[place] for place in places]
