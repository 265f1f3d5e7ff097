"""One conversation's memory and what it is a memory of; turns that can be taken back."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from kvrag.errors import ConfigError, UnsupportedModel
from kvrag.memory.base import MemoryPolicy, MemoryState
from kvrag.memory.holding import Holding
from kvrag.memory.reading import Listener, MemoryReader, StrideRows
from kvrag.memory.rows import Journal, MemoryRows
from kvrag.model import Model
from kvrag.segments import SegmentTable
from kvrag.sessions.digest import TextDigest, longest
from kvrag.sessions.pinned import Pinned


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A conversation as it was between two turns, and what brings it back.

    Attributes:
        digests: of its text, and of forms in which it may come back.
        state: of the policy.
        num_tokens: of the conversation.
        journal: what the turn behind it wrote over.
    """

    digests: tuple[TextDigest, ...]
    state: dict[str, torch.Tensor]
    num_tokens: int
    journal: Journal


@dataclass(frozen=True, slots=True)
class _Undone:
    """A turn that was taken back for another one, until that is complete."""

    before: Snapshot
    after: Snapshot
    log: array[int]


class Talk:
    """A conversation between its turns; only the thread that owns the model may call it.

    Attributes:
        pinned: what stands in front.
        behind: tokens of what stood in front when it was begun.
        digests: of the text behind that, read and answered, and of forms in which it may come back.
        state: which entry is where.
        rows: the entries.
        log: every token of the conversation, 4 bytes each; None if they are not kept.
        snapshots: of the last turns, the oldest first.
        num_turns: complete ones.
    """

    def __init__(
        self,
        model: Model,
        policy: MemoryPolicy,
        pinned: Pinned,
        *,
        keeps_log: bool,
        max_undo: int,
        behind: int | None = None,
    ) -> None:
        """An empty one.

        Args:
            model: the decoder.
            policy: what stays in memory.
            pinned: what stands in front.
            keeps_log: keep the tokens.
            max_undo: turns that can be taken back.
            behind: tokens of what stood in front when it was begun; None: of what stands there now.

        Raises:
            ConfigError: the memory, full, has more positions than the model.
            UnsupportedModel: layers with different numbers of key heads.
        """
        heads = {shape[0] for shape in model.shapes}
        if len(heads) != 1:
            raise UnsupportedModel(
                f"the layers of {model.name} have {sorted(heads)} key heads; a memory needs one number"
            )
        self._model, self._policy, self._max_undo = model, policy, max_undo
        self.pinned = pinned
        self.behind = pinned.num_tokens if behind is None else behind
        check_room(model, policy, pinned.num_tokens)
        self.state: MemoryState = policy.start(
            model.num_layers, heads.pop(), pinned=self.behind, device=model.device
        )
        self.rows = MemoryRows(model.specs, model.shapes, dtype=model.dtype, device=model.device)
        self.digests: tuple[TextDigest, ...] = (TextDigest(),)
        self.log: array[int] | None = array("i") if keeps_log else None
        self.snapshots: list[Snapshot] = []
        self.num_turns = 0
        self._mark: Snapshot | None = None
        self._front: Pinned | None = None  # what stood in front before the turn that is under way
        self._undone: list[_Undone] = []

    def reader(
        self, stride: int, *, extra: SegmentTable | None = None, listeners: Sequence[Listener] = ()
    ) -> MemoryReader:
        """Reads on where the conversation ends."""
        limit = stride
        if self._policy.budget is not None:
            taken = max(self.pinned.num_tokens, extra.end if extra else 0) + self._policy.budget
            limit = max(1, min(stride, self._model.max_length - taken))
        return MemoryReader(
            self._model,
            self.state,
            self.rows,
            pinned=self.pinned.table,
            extra=extra,
            stride=limit,
            listeners=(self._note, *listeners),
        )

    def _note(self, stride: StrideRows) -> None:
        if self.log is not None:
            self.log.extend(stride.tokens)

    @property
    def budget(self) -> int | None:
        """Most entries of the memory; None: no limit."""
        return self._policy.budget

    @property
    def num_bytes(self) -> int:
        """Bytes of the rows, and of what takes turns back."""
        return self.rows.num_bytes + sum(snapshot.journal.num_bytes for snapshot in self.snapshots)

    @property
    def is_empty(self) -> bool:
        """Nothing was said."""
        return not self.digests[0].length

    def known_beginning(self, text: str) -> tuple[int, TextDigest] | None:
        """How many turns to take back, and the text's beginning that is known then; None: nothing fits.

        Something of the text is always left to be read.
        """
        states = [*(snapshot.digests for snapshot in self.snapshots), self.digests]
        known = [
            (len(states) - 1 - i, digest)
            for i, digests in enumerate(states)
            for digest in digests
            if digest.length < len(text)
        ]
        number = longest([digest for _, digest in known], text)
        return None if number is None else known[number]

    @property
    def num_leant_on(self) -> int:
        """How many pinned tokens the memory has in place of first tokens of its own (attention sinks)."""
        return min(self.behind, int(getattr(self._policy, "sinks", 0)))

    @property
    def went_back(self) -> bool:
        """Whether the turn that is under way has taken back others, which come back if it fails."""
        return bool(self._undone)

    def begin(self, go_back: int = 0, pinned: Pinned | None = None) -> None:
        """Begin a turn, behind taking back some; `commit` or `fail` ends it.

        Args:
            go_back: turns that are taken back.
            pinned: what stands in front from now on; None: what did before.
        """
        self._front = self.pinned
        self.pinned = pinned or self.pinned
        self._undone = [self._undo() for _ in range(go_back)]
        self._mark = self._snapshot(self.rows.begin())

    def commit(self, before: TextDigest | None, said: str, answer: str, lead: str = "") -> None:
        """The turn is complete, and its text part of the conversation.

        Args:
            before: the text behind which it was said; None: the conversation's own.
            said: the turn's new text.
            answer: what stands behind it. Many templates leave out white space around it when it comes back.
            lead: white space that the template puts in front of answers when they come back; one that keeps
                to a form may not have begun with it.
        """
        assert self._mark is not None
        self.rows.end()
        self.snapshots = [*self.snapshots, self._mark][-self._max_undo :] if self._max_undo else []
        bare = answer.lstrip()
        forms = dict.fromkeys(
            (answer, answer.strip(), answer.rstrip(), bare, lead + bare, lead + bare.rstrip())
        )
        start = (self.digests[0] if before is None else before).add(said)
        self.digests = tuple(start.add(form) for form in forms)
        self._mark, self._front, self._undone = None, None, []
        self.num_turns += 1

    def again(self) -> None:
        """Take back what the turn has done so far, and begin it once more."""
        mark = self._mark
        assert mark is not None
        self._restore(mark)
        self._mark = replace(mark, journal=self.rows.begin())

    def fail(self) -> None:
        """Everything is as it was before `begin`."""
        if self._mark is None:
            return
        self._restore(self._mark)
        self.rows.end()
        self.pinned = self._front or self.pinned
        for undone in reversed(self._undone):
            self._restore(undone.after)
            if self.log is not None:
                self.log.extend(undone.log)
            self.snapshots.append(undone.before)
            self.num_turns += 1
        self._mark, self._front, self._undone = None, None, []

    def undo(self) -> None:
        """Take back the last turn for good."""
        self._undo()

    def _undo(self) -> _Undone:
        before = self.snapshots.pop()
        now = self._snapshot(Journal())
        log = array("i") if self.log is None else self.log[before.num_tokens :]
        back = self._restore(before)
        self.num_turns -= 1
        return _Undone(before, replace(now, journal=back), log)

    def _snapshot(self, journal: Journal) -> Snapshot:
        return Snapshot(self.digests, self.state.state(), self.state.seen, journal)

    def _restore(self, snapshot: Snapshot) -> Journal:
        """Go to a snapshot; gives what goes the other way."""
        self.rows.end()
        back = self.rows.revert(snapshot.journal)
        self.state.restore(snapshot.state)
        self.digests = snapshot.digests
        if self.log is not None:
            del self.log[snapshot.num_tokens :]
        return back

    def fork(self) -> Talk:
        """The same conversation, from now on independent."""
        model, policy = self._model, self._policy
        other = Talk(model, policy, self.pinned, keeps_log=False, max_undo=self._max_undo, behind=self.behind)
        other.state.restore(self.state.state())
        other.rows, other.digests = self.rows.copy(), self.digests
        other.log = None if self.log is None else self.log[:]
        other.snapshots, other.num_turns = list(self.snapshots), self.num_turns
        return other

    def num_remembered(self) -> tuple[int, float]:
        """Tokens that at least one layer and head holds, and the share that an average one holds."""
        holding = self.holding()
        return holding.num_tokens, holding.share

    def holding(self) -> Holding:
        """Which tokens are held, and in how many layers and heads."""
        return Holding(self.state.ids, self.state.seen)

    def held(self) -> torch.Tensor:
        """[L, tokens], float32: which share of a layer's heads holds each token of the conversation."""
        ids = self.state.ids.cpu()
        counts = torch.zeros(ids.shape[0], self.state.seen)
        for layer, held in enumerate(ids):
            counts[layer] = torch.bincount(held[held >= 0], minlength=self.state.seen)
        return counts / ids.shape[1]

    def shares(self) -> torch.Tensor:
        """[tokens], float32: for each token of the conversation, which share of layers and heads holds it."""
        return self.held().mean(0)


def check_room(model: Model, policy: MemoryPolicy, num_pinned: int) -> None:
    """Refuse a memory for which the model has no positions.

    Raises:
        ConfigError: there is none left for a token to be read.
    """
    taken = num_pinned + (policy.budget or 0)
    if taken >= model.max_length:
        raise ConfigError(
            f"{num_pinned} pinned tokens and a budget of {policy.budget} leave nothing of the "
            f"{model.max_length} positions that {model.name} reads; give a budget below "
            f"{max(1, model.max_length - num_pinned)}, or pin less"
        )
