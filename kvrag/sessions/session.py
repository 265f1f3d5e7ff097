"""A conversation: what people and adapters hold."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Generator, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar
from weakref import WeakValueDictionary

import torch

from kvrag.answer import Answer, Piece
from kvrag.caches import Caches
from kvrag.config import Sampling
from kvrag.errors import ConfigError, GenerationCancelled, InputError
from kvrag.known import KnownTexts
from kvrag.memory.base import MemoryPolicy
from kvrag.messages import Tool
from kvrag.model import Model
from kvrag.prefill import Read, Work
from kvrag.sessions import file
from kvrag.sessions.asking import Asking, History
from kvrag.sessions.house import House
from kvrag.sessions.lost import Forgotten, forgotten
from kvrag.sessions.pinned import Openings
from kvrag.sessions.settings import Settings
from kvrag.sessions.talk import Talk
from kvrag.sessions.turn import Asked, Recalls, read_prompt, turn
from kvrag.sessions.vault import vault_of
from kvrag.streams import AnswerStream
from kvrag.worker import Ask, Worker

T = TypeVar("T")


class Session:
    """One conversation with a memory that does not grow; `Engine.session` makes it.

    Turns of one session never run at the same time: one that is asked for while another runs begins when that
    is complete. Any thread may call any method.

    A turn that fails or is cancelled leaves the session as it was before, except that a conversation that had
    to be read anew (`MemoryUse.anew`) is empty then. A turn is complete once its answer is written, whether
    or not its stream was read to the end.

    Attributes:
        name: its id; None for one without.
        settings: what it was made with.
    """

    def __init__(
        self,
        caches: Caches,
        worker: Worker,
        settings: Settings,
        *,
        name: str | None = None,
        openings: Openings | None = None,
        recalls: Recalls | None = None,
        known: KnownTexts | None = None,
    ) -> None:
        """Make an empty one; see `Engine.session`.

        Args:
            caches: of the model.
            worker: that runs it.
            settings: what it is made with.
            name: its id.
            openings: what sessions of this engine have pinned.
            recalls: brings back what the memory has lost.
            known: texts with caches that may stand in front of a turn, if `settings.swaps_opening`.
        """
        self.name, self.settings = name, settings
        shared: Openings = WeakValueDictionary() if openings is None else openings
        self.house = House(caches, worker, settings, name, shared)
        """Where it lives; for whoever looks after many sessions."""
        self.house.recalls = recalls
        self._model, self._worker = caches.model, worker
        self._asking = Asking(self.house, known if settings.swaps_opening else None)

    def send(
        self, message: str, *, documents: Sequence[str] | None = None, sampling: Sampling | None = None
    ) -> Answer:
        """Say something behind what was said, and wait for the answer.

        Args:
            message: what the user says; where the model has no chat template, text as it is.
            documents: texts that stand in front from this turn on, in the place of those before, loaded from
                the store where it has them; for sessions with `swaps_opening` only. None: as they are.
            sampling: how the answer is chosen; greedy by default.

        Raises:
            InputError: nothing was said, or the template refuses it.
            ConfigError: the session does not swap documents, or these leave no positions.
            ContextOverflow: a memory without a budget is full.
        """
        return _waited(self.stream(message, documents=documents, sampling=sampling))

    def stream(
        self, message: str, *, documents: Sequence[str] | None = None, sampling: Sampling | None = None
    ) -> AnswerStream:
        """The same as `send`, piece by piece; also with `async for`."""
        if documents is not None and not self.settings.swaps_opening:
            raise ConfigError(
                "this session keeps the documents that it began with; make it with swaps_opening=True to "
                "give a turn others"
            )
        return self._submitted(partial(self._asking.said, message, documents), sampling)

    def reply_to(
        self, history: History, *, tools: Sequence[Tool] | None = None, sampling: Sampling | None = None
    ) -> Answer:
        """Answer a history that comes whole every time; only what is new in it is read.

        What was read before is known by the digest of its text. If the history begins with all of it, the
        rest is read; if it was edited, or an answer is to be written anew, turns are taken back as far as
        needed; if it begins another way than any known state, everything is read.

        Args:
            history: messages, the last one not the assistant's; or the whole text.
            tools: functions that may be called, as JSON schemas.
            sampling: how the answer is chosen.

        Raises:
            InputError: there is nothing to answer, or the template refuses it.
            ContextOverflow: a memory without a budget is full.
        """
        return _waited(self.stream_reply(history, tools=tools, sampling=sampling))

    def stream_reply(
        self, history: History, *, tools: Sequence[Tool] | None = None, sampling: Sampling | None = None
    ) -> AnswerStream:
        """The same as `reply_to`, piece by piece; also with `async for`."""
        return self._submitted(partial(self._asking.asked, history, tools), sampling, may_lose=True)

    async def asend(
        self, message: str, *, documents: Sequence[str] | None = None, sampling: Sampling | None = None
    ) -> Answer:
        """The same as `send`, without blocking the event loop."""
        return await _awaited(self.stream(message, documents=documents, sampling=sampling))

    async def areply_to(
        self, history: History, *, tools: Sequence[Tool] | None = None, sampling: Sampling | None = None
    ) -> Answer:
        """The same as `reply_to`, without blocking the event loop."""
        return await _awaited(self.stream_reply(history, tools=tools, sampling=sampling))

    def logits(self, message: str) -> torch.Tensor:
        """[V], float32: what would choose the first token of an answer; the session stays as it is."""

        def work() -> Work[torch.Tensor]:
            asked = yield from self._asking.said(message)
            return (yield from read_prompt(self._model, self._talked, asked, stride=self.settings.stride))

        return self.house.do(work)

    def undo(self, num_turns: int = 1) -> None:
        """Take back the last turns; the session is as it was before them.

        Raises:
            InputError: so many cannot be taken back.
        """

        def undone() -> None:
            talk = self._talk
            known = len(talk.snapshots) if talk else 0
            if talk is None or not 1 <= num_turns <= known:
                raise InputError(
                    f"{num_turns} turns cannot be taken back; this session can take back {known} "
                    f"(it was made with max_undo={self.settings.max_undo})"
                )
            for _ in range(num_turns):
                talk.undo()
            if self.house.recalls is not None:
                self.house.recalls.undone(talk)

        self.house.do(partial(_at_once, undone))

    def fork(self, name: str | None = None) -> Session:
        """Another session that goes on from here, independent of this one.

        Args:
            name: its id; None: it has none, or with an archive a new one.
        """
        house = self.house
        if house.recalls is not None and name is None:
            name = uuid.uuid4().hex
        other = Session(
            house.caches,
            self._worker,
            self.settings,
            name=name,
            openings=house.openings,
            known=self._asking.known,
        )

        def forked() -> None:
            if house.recalls is not None and name is not None:
                other.house.recalls = house.recalls.fork(name, self._talk)
            other.house.talk = None if self._talk is None else self._talk.fork()

        house.do(partial(_at_once, forked))
        return other

    def save(self, path: str | Path) -> None:
        """Write the session to a file; `Engine.load_session` goes on from it, also in another process.

        The tokens, if they are kept, lie in a file beside it: it is bounded by the budget.

        Raises:
            StoreWriteError: disk full, read-only, no permission; what was there is still there.
            InputError: nothing was said yet.
        """
        self.house.do(partial(_at_once, lambda: self.house.write(Path(path))))

    def delete(self) -> None:
        """Forget everything, archive and parked file included; the session cannot be used any more."""
        self.house.do(partial(_at_once, self.house.delete), wakes=False)

    def forgotten(self, *, at_most: float = 0.0) -> list[Forgotten]:
        """Parts of the conversation that the memory has lost, oldest first.

        Args:
            at_most: share of layers and heads that may still hold a token; 0: those that none holds.

        Raises:
            InputError: the session does not keep its tokens.
        """
        if not self.settings.keeps_log:
            raise InputError("this session was made with keeps_log=False, so nobody knows what it forgot")

        def lost() -> list[Forgotten]:
            talk, recalls = self._talk, self.house.recalls
            if talk is None:
                return []
            kept = [] if recalls is None else recalls.kept(talk)
            return forgotten(talk, self._model.text.decode, at_most, kept)

        return self.house.do(partial(_at_once, lost))

    def held(self) -> torch.Tensor:
        """[L, tokens], float32: which share of a layer's heads holds each token of the conversation."""

        def found() -> torch.Tensor:
            return torch.zeros(self._model.num_layers, 0) if self._talk is None else self._talk.held()

        return self.house.do(partial(_at_once, found))

    @property
    def num_tokens(self) -> int:
        """Tokens of the conversation so far, what is pinned left out."""
        return self.house.counted[0]

    @property
    def num_turns(self) -> int:
        """Complete turns."""
        return self.house.counted[1]

    @property
    def num_bytes(self) -> int:
        """Bytes of keys and values that this session keeps in memory, what is pinned left out."""
        talk = self._talk
        return talk.num_bytes if talk else 0

    @property
    def is_archived(self) -> bool:
        """Whether what it says is kept in an archive."""
        return self.house.recalls is not None

    @property
    def is_busy(self) -> bool:
        """A turn runs or waits."""
        return self.house.is_busy

    @property
    def _talk(self) -> Talk | None:
        return self.house.talk

    @property
    def model(self) -> Model:
        """The model that reads and answers."""
        return self._model

    @property
    def _talked(self) -> Talk:
        """The conversation, where there is one for sure."""
        assert self.house.talk is not None
        return self.house.talk

    def _submitted(
        self, ask: Callable[[], Work[Asked]], sampling: Sampling | None, *, may_lose: bool = False
    ) -> AnswerStream:
        work = partial(self._turn, ask, sampling or Sampling(), may_lose)
        return AnswerStream(self._worker.submit(work, in_line=True))

    def _turn(
        self, ask: Callable[[], Work[Asked]], sampling: Sampling, may_lose: bool
    ) -> Generator[Piece | Answer | Ask, Read, None]:
        def work() -> Generator[Piece | Ask, Read, Answer]:
            asked = yield from ask()
            return (
                yield from turn(
                    self._model,
                    self._talked,
                    asked,
                    sampling,
                    stride=self.settings.stride,
                    recalls=self.house.recalls,
                )
            )

        yield (yield from self.house.alone(work, may_lose=may_lose))


def loaded_session(
    caches: Caches,
    worker: Worker,
    path: Path,
    policy: MemoryPolicy | None,
    *,
    openings: Openings,
    recalls: Callable[[str | None], Recalls | None] = lambda _: None,
    known: KnownTexts | None = None,
) -> Session:
    """The session that a file holds; see `Engine.load_session`."""
    saved = file.read(path, vault_of(caches))
    about = saved.manifest["about"]
    settings = Settings(
        file.policy_of(saved.manifest) if policy is None else policy,
        about["system"],
        tuple(about["documents"]),
        int(about["stride"]),
        bool(about["keeps_log"]),
        int(about["max_undo"]),
        bool(about.get("swaps_opening", False)),
    )
    name = about["name"]
    session = Session(
        caches, worker, settings, name=name, openings=openings, recalls=recalls(name), known=known
    )
    worker.do(lambda: session.house.take(saved))
    return session


def _waited(stream: AnswerStream) -> Answer:
    for _ in stream.events():
        pass
    if stream.answer is None:
        raise GenerationCancelled("the answer was cancelled")
    return stream.answer


async def _awaited(stream: AnswerStream) -> Answer:
    async for _ in stream.aevents():
        pass
    if stream.answer is None:
        raise GenerationCancelled("the answer was cancelled")
    return stream.answer


def _at_once(function: Callable[[], T]) -> Work[T]:
    """Work that asks for nothing."""
    yield from ()
    return function()
