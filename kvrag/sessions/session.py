"""A conversation: what people and adapters hold."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from kvrag.answer import Answer, Piece
from kvrag.caches import Caches
from kvrag.config import Sampling
from kvrag.errors import ConfigError, GenerationCancelled, InputError, SessionDamaged, SessionError
from kvrag.memory.base import MemoryPolicy
from kvrag.messages import Message, Tool
from kvrag.model import Model
from kvrag.prefill import Read, Work
from kvrag.sessions import file
from kvrag.sessions.pinned import Opening, pinning
from kvrag.sessions.rendering import Rendering
from kvrag.sessions.talk import Talk
from kvrag.sessions.turn import Asked, Recalls, read_prompt, turn
from kvrag.streams import AnswerStream
from kvrag.worker import PAUSE, Ask, Worker

logger = logging.getLogger(__name__)

T = TypeVar("T")
History = str | Sequence[Message]


@dataclass(frozen=True, slots=True)
class Forgotten:
    """A run of tokens of a conversation that memory holds in few places, or nowhere.

    Attributes:
        start: number of its first token in the conversation, counted from 0.
        end: the number behind its last one.
        text: what they say.
        share: of layers and heads, which share holds one of these tokens on average; 0: nowhere.
    """

    start: int
    end: int
    text: str
    share: float


@dataclass(frozen=True, slots=True)
class Settings:
    """What a session is made with.

    Attributes:
        policy: of its memory.
        system: its system prompt; None: what a history brings.
        documents: texts that every conversation begins with; rows come from the store where it has them.
        stride: most tokens that are read before they are inserted into the memory.
        keeps_log: keep the tokens (4 bytes each), to say what was forgotten.
        max_undo: turns that can be taken back.
    """

    policy: MemoryPolicy
    system: str | None = None
    documents: tuple[str, ...] = ()
    stride: int = 128
    keeps_log: bool = True
    max_undo: int = 2

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ConfigError: names the setting, its value and what is allowed.
        """
        if self.stride < 1:
            raise ConfigError(f"stride is {self.stride}; expected at least 1")
        if self.max_undo < 0:
            raise ConfigError(f"max_undo is {self.max_undo}; expected 0 or more")
        if isinstance(self.documents, str) or not all(isinstance(d, str) for d in self.documents):
            raise ConfigError("documents is not a list of texts")


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
        recalls: Recalls | None = None,
    ) -> None:
        """Make an empty one; see `Engine.session`."""
        self.name, self.settings, self.recalls = name, settings, recalls
        self._caches, self._worker = caches, worker
        self._rendering = Rendering(caches.model.text, settings.system, settings.documents)
        self._talk: Talk | None = None
        self._parked: Path | None = None
        self._is_deleted = False
        self._turns: list[object] = []
        self._is_settled = False  # a turn is complete, and its session not yet free
        self._counts: tuple[int, int] | None = None  # tokens and turns of a parked one
        self.on_change: Callable[[Session], None] | None = None
        """Called on the model's thread behind every turn, while nothing else uses the session."""

    def send(self, message: str, *, sampling: Sampling | None = None) -> Answer:
        """Say something behind what was said, and wait for the answer.

        Args:
            message: what the user says; where the model has no chat template, text as it is.
            sampling: how the answer is chosen; greedy by default.

        Raises:
            InputError: nothing was said, or the template refuses it.
            ContextOverflow: a memory without a budget is full.
        """
        return _waited(self.stream(message, sampling=sampling))

    def stream(self, message: str, *, sampling: Sampling | None = None) -> AnswerStream:
        """The same as `send`, piece by piece; also with `async for`."""
        return self._submitted(partial(self._said, message), sampling)

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
        return self._submitted(partial(self._asked, history, tools), sampling, may_lose=True)

    async def asend(self, message: str, *, sampling: Sampling | None = None) -> Answer:
        """The same as `send`, without blocking the event loop."""
        return await _awaited(self.stream(message, sampling=sampling))

    async def areply_to(
        self, history: History, *, tools: Sequence[Tool] | None = None, sampling: Sampling | None = None
    ) -> Answer:
        """The same as `reply_to`, without blocking the event loop."""
        return await _awaited(self.stream_reply(history, tools=tools, sampling=sampling))

    def logits(self, message: str) -> torch.Tensor:
        """[V], float32: what would choose the first token of an answer; the session stays as it is."""

        def work() -> Work[torch.Tensor]:
            asked = yield from self._said(message)
            assert self._talk is not None
            return (yield from read_prompt(self._model, self._talk, asked, stride=self.settings.stride))

        return self._do(work)

    def undo(self, num_turns: int = 1) -> None:
        """Take back the last turns; the session is as it was before them.

        Raises:
            InputError: so many cannot be taken back.
        """

        def work() -> Work[None]:
            known = len(self._talk.snapshots) if self._talk else 0
            if not 1 <= num_turns <= known:
                raise InputError(
                    f"{num_turns} turns cannot be taken back; this session can take back {known} "
                    f"(it was made with max_undo={self.settings.max_undo})"
                )
            assert self._talk is not None
            for _ in range(num_turns):
                self._talk.undo()
            if self.recalls is not None:
                self.recalls.undone(self._talk)
            return
            yield  # a generator that asks for nothing

        self._do(work)

    def fork(self, name: str | None = None) -> Session:
        """Another session that goes on from here, independent of this one."""

        def work() -> Work[Session]:
            talk, recalls = self._talk, self.recalls
            known_as = name
            if recalls is not None:
                known_as = name or uuid.uuid4().hex
                recalls = recalls.fork(known_as, talk)
            other = Session(self._caches, self._worker, self.settings, name=known_as, recalls=recalls)
            other._talk = None if talk is None else talk.fork()
            return other
            yield

        return self._do(work)

    def save(self, path: str | Path) -> None:
        """Write the session to a file; `Engine.load_session` goes on from it, also in another process.

        Raises:
            StoreWriteError: disk full, read-only, no permission; a file that was there is still there.
            InputError: nothing was said yet.
        """

        def work() -> Work[None]:
            self._write(Path(path))
            return
            yield

        self._do(work)

    def delete(self) -> None:
        """Forget everything; the session cannot be used any more, and a file it is parked in is removed."""

        def work() -> Work[None]:
            if self.recalls is not None:
                self.recalls.delete()
            self._talk, self._is_deleted = None, True
            if self._parked is not None:
                file.delete(self._parked)
            self._parked = self._counts = None
            return
            yield

        self._do(work)

    def forgotten(self, *, at_most: float = 0.0) -> list[Forgotten]:
        """Parts of the conversation that the memory has lost, oldest first.

        Args:
            at_most: share of layers and heads that may still hold a token; 0: those that none holds.

        Raises:
            InputError: the session does not keep its tokens.
        """

        def work() -> Work[list[Forgotten]]:
            if not self.settings.keeps_log:
                raise InputError("this session was made with keeps_log=False, so nobody knows what it forgot")
            return [] if self._talk is None else _forgotten(self._talk, self._model.text.decode, at_most)
            yield

        return self._do(work)

    @property
    def num_tokens(self) -> int:
        """Tokens of the conversation so far, what is pinned left out."""
        return self._counted()[0]

    @property
    def num_turns(self) -> int:
        """Complete turns."""
        return self._counted()[1]

    def _counted(self) -> tuple[int, int]:
        if (talk := self._talk) is not None:
            return talk.state.seen, talk.num_turns
        if self._parked is not None and self._counts is None:  # by another process
            manifest = file.read(self._parked)[1]
            self._counts = int(manifest["num_tokens"]), int(manifest["num_turns"])
        return self._counts or (0, 0)

    @property
    def num_bytes(self) -> int:
        """Bytes of keys and values that this session keeps in memory, what is pinned left out."""
        talk = self._talk
        return talk.num_bytes if talk else 0

    @property
    def is_busy(self) -> bool:
        """A turn runs or waits."""
        return bool(self._turns)

    @property
    def is_waited_for(self) -> bool:
        """Somebody waits for his turn behind the one that runs, or that has just been complete."""
        return len(self._turns) > 1 or (bool(self._turns) and not self._is_settled)

    @property
    def is_deleted(self) -> bool:
        """`delete` was called."""
        return self._is_deleted

    @property
    def _model(self) -> Model:
        return self._caches.model

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
            assert self._talk is not None
            answer = yield from turn(
                self._model,
                self._talk,
                asked,
                sampling,
                stride=self.settings.stride,
                recalls=self.recalls,
            )
            self._is_settled = True
            if self.on_change is not None:
                self.on_change(self)
            return answer

        yield (yield from self._alone(work, may_lose=may_lose))

    def _do(self, work: Callable[[], Generator[Any, Any, T]]) -> T:
        """Work on the model's thread, when no turn runs."""
        return self._worker.do(lambda: self._alone(work))

    def _alone(
        self, work: Callable[[], Generator[Any, Any, T]], *, may_lose: bool = False
    ) -> Generator[Any, Any, T]:
        """Work that has the session to itself; who came first is first.

        Args:
            work: what is to be done.
            may_lose: a session that is parked in a damaged file begins anew: a history comes whole.
        """
        mine = object()
        self._turns.append(mine)
        try:
            while self._turns[0] is not mine:
                yield PAUSE
            if self._is_deleted:
                raise SessionError(
                    f"the session {self.name or ''} was deleted; make a new one".replace("  ", " ")
                )
            self._wake(may_lose)
            return (yield from work())
        finally:
            self._turns.remove(mine)
            self._is_settled = False

    def _said(self, message: str) -> Work[Asked]:
        """What a message adds."""
        if self._talk is None or not self._talk.digest.length:
            whole: History = (
                [{"role": "user", "content": message}] if self._rendering.has_template else message
            )
            return (yield from self._asked(whole, None))
        return Asked(self._rendering.addition(message), said=message)

    def _asked(self, history: History, tools: Sequence[Tool] | None) -> Work[Asked]:
        """What is new in a history; the session has a memory for it then."""
        writes = self._rendering
        if isinstance(history, str):
            opening, whole = writes.plain(history)
        else:
            whole = writes.whole(history, tools)
            opening = writes.opening(history, tools, whole)
        text = whole[len(opening.text) :]
        if not text:
            raise InputError("there is nothing to answer; say something")
        talk, known, anew = self._talk, None, False
        if talk is not None and talk.pinned.opening == opening:
            known = talk.known_beginning(text)
        if known is None:
            anew = talk is not None and talk.digest.length > 0
            yield from self._begin(opening)
            known = (0, 0)
        go_back, start = known
        at = len(opening.text) + start
        borders = {} if isinstance(history, str) else writes.borders(history, tools, whole, at)
        return Asked(
            text[start:],
            {border - at: role for border, role in borders.items()},
            go_back,
            anew,
            first=not opening.is_rendered and not at,
            said=_last_said(history),
        )

    def _begin(self, opening: Opening) -> Work[None]:
        """An empty conversation behind an opening; what was read before is let go first."""
        old, settings = self._talk, self.settings
        self._talk = None
        if old is not None and old.pinned.opening == opening:
            pinned = old.pinned
        else:
            pinned = yield from pinning(self._caches, opening, stride=settings.stride)
        del old
        self._talk = Talk(
            self._model, settings.policy, pinned, keeps_log=settings.keeps_log, max_undo=settings.max_undo
        )

    def _write(self, path: Path) -> None:
        if self._talk is None:
            raise InputError("nothing was said yet, so there is nothing to save")
        settings = self.settings
        about = {
            "name": self.name,
            "system": settings.system,
            "documents": list(settings.documents),
            "stride": settings.stride,
            "keeps_log": settings.keeps_log,
            "max_undo": settings.max_undo,
        }
        file.save(path, self._talk, settings.policy, self._model, about)

    def park(self, path: Path) -> None:
        """Write everything to a file and keep nothing; only on the model's thread, between turns.

        Raises:
            StoreWriteError: it cannot be written; the session stays in memory.
        """
        if self._talk is not None:
            self._write(path)
            self._counts = self._talk.state.seen, self._talk.num_turns
            self._talk = None
        self._parked = path

    def wait_in(self, path: Path) -> None:
        """Be the session that a file holds, from its next use on."""
        self._parked = path

    def _wake(self, may_lose: bool) -> None:
        """Come back from the file that the session is parked in."""
        if self._parked is None or self._talk is not None:
            return
        try:
            tensors, manifest = file.read(self._parked)
            self._take(tensors, manifest)
        except (SessionDamaged, ConfigError) as error:
            if not may_lose:
                raise
            logger.warning("session %s is read anew: %s", self.name, error)
        self._parked = None

    def _take(self, tensors: Mapping[str, torch.Tensor], manifest: Mapping[str, Any]) -> None:
        settings = self.settings
        self._talk = file.load(
            dict(tensors), manifest, self._model, settings.policy, max_undo=settings.max_undo
        )


def loaded_session(
    caches: Caches,
    worker: Worker,
    path: Path,
    policy: MemoryPolicy,
    *,
    recalls: Callable[[str | None], Recalls | None] = lambda _: None,
) -> Session:
    """The session that a file holds; see `Engine.load_session`."""
    tensors, manifest = file.read(path)
    about = manifest["about"]
    settings = Settings(
        policy,
        about["system"],
        tuple(about["documents"]),
        int(about["stride"]),
        bool(about["keeps_log"]),
        int(about["max_undo"]),
    )
    session = Session(caches, worker, settings, name=about["name"], recalls=recalls(about["name"]))
    worker.call(lambda: session._take(tensors, manifest))
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


def _last_said(history: History) -> str:
    """What the user said last."""
    if isinstance(history, str):
        return history
    said = [str(m.get("content") or "") for m in history if m.get("role") == "user"]
    return said[-1] if said else ""


def _forgotten(talk: Talk, decode: Callable[[Sequence[int]], str], at_most: float) -> list[Forgotten]:
    """Runs of neighbouring tokens that are held in at most this share of layers and heads."""
    assert talk.log is not None
    shares = talk.shares()
    lost = (shares <= at_most).tolist()
    borders = [i for i in range(len(lost) + 1) if (i < len(lost) and lost[i]) != (i > 0 and lost[i - 1])]
    return [
        Forgotten(start, end, decode(talk.log[start:end].tolist()), float(shares[start:end].mean()))
        for start, end in zip(borders[::2], borders[1::2], strict=True)
    ]
