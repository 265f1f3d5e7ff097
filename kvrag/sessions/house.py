"""Where a conversation lives: in memory or in a file, used by one at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, TypeVar

from kvrag.caches import Caches
from kvrag.errors import ConfigError, InputError, SessionDamaged, SessionError
from kvrag.prefill import Work
from kvrag.sessions import file
from kvrag.sessions.pinned import Opening, Openings, Pinned, pinning
from kvrag.sessions.settings import Settings
from kvrag.sessions.talk import Talk, check_room
from kvrag.sessions.turn import Recalls
from kvrag.sessions.vault import Vault, vault_of
from kvrag.worker import PAUSE, Worker

logger = logging.getLogger(__name__)

T = TypeVar("T")


class House:
    """A conversation and who uses it; everything but `do` and counts is for the model's thread.

    Attributes:
        talk: the conversation; None before the first turn, and while it is in a file.
        recalls: brings back what the memory has lost; None: nothing does.
        on_change: called whenever something was done, while nothing else uses the conversation.
        is_deleted: nothing can be done any more.
    """

    def __init__(
        self, caches: Caches, worker: Worker, settings: Settings, name: str | None, openings: Openings
    ) -> None:
        """An empty one.

        Args:
            caches: of the model.
            worker: that runs it.
            settings: of the session.
            name: of the session.
            openings: what sessions of this engine have pinned.
        """
        self.caches, self.worker, self.settings = caches, worker, settings
        self.name, self.openings = name, openings
        self.talk: Talk | None = None
        self.recalls: Recalls | None = None
        self.on_change: Callable[[], None] | None = None
        self.is_deleted = False
        self._parked: Path | None = None
        self._turns: list[object] = []
        self._is_settled = False  # a turn is complete, and the next one has not begun
        self._counts: tuple[int, int] | None = None  # tokens and turns of a parked one

    def do(self, work: Callable[[], Generator[Any, Any, T]], *, wakes: bool = True) -> T:
        """Work on the model's thread, when no turn runs; from any thread."""
        return self.worker.do(lambda: self.alone(work, wakes=wakes))

    def alone(
        self, work: Callable[[], Generator[Any, Any, T]], *, may_lose: bool = False, wakes: bool = True
    ) -> Generator[Any, Any, T]:
        """Work that has the conversation to itself; who came first is first.

        Args:
            work: what is to be done.
            may_lose: one that is in a damaged file begins anew: its history comes whole.
            wakes: it needs the conversation in memory.
        """
        mine = object()
        self._turns.append(mine)
        try:
            while self._turns[0] is not mine:
                yield PAUSE
            if self.is_deleted:
                raise SessionError(f"the session {self.name!r} was deleted; make a new one")
            if wakes:
                yield from self._wake(may_lose)
            return (yield from work())
        finally:
            self._settle(mine)

    def _settle(self, mine: object) -> None:
        """End a turn: whoever looks after many sessions has his turn, then the next one who waits."""
        try:
            if self._turns[0] is mine and self.talk is not None and self.on_change is not None:
                self._is_settled = True
                self.on_change()
        finally:
            self._is_settled = False
            self._turns.remove(mine)

    @property
    def is_busy(self) -> bool:
        """A turn runs or waits."""
        return bool(self._turns)

    @property
    def is_waited_for(self) -> bool:
        """A turn runs, or waits for one that has just been complete."""
        return len(self._turns) > 1 or (bool(self._turns) and not self._is_settled)

    @property
    def vault(self) -> Vault:
        """What its files are encrypted with.

        Raises:
            ConfigError: the engine's store is encrypted, and its key is not here.
        """
        return vault_of(self.caches)

    @property
    def counted(self) -> tuple[int, int]:
        """Tokens and turns, in memory or not."""
        if (talk := self.talk) is not None:
            return talk.state.seen, talk.num_turns
        if self._parked is not None and self._counts is None:  # by another process
            manifest = file.claimed(self._parked, self.vault)[1]
            self._counts = int(manifest["num_tokens"]), int(manifest["num_turns"])
        return self._counts or (0, 0)

    def begin(self, opening: Opening) -> Work[int]:
        """An empty conversation behind an opening; what was read before is let go first.

        Returns:
            Tokens of the opening that were read.
        """
        settings, model = self.settings, self.caches.model
        pinned, num_read = yield from self._pinned(opening)
        check_room(model, settings.policy, pinned.num_tokens)
        self.talk = None
        self.talk = Talk(
            model, settings.policy, pinned, keeps_log=settings.keeps_log, max_undo=settings.max_undo
        )
        return num_read

    def other(self, opening: Opening) -> Work[tuple[Pinned, int]]:
        """What is to stand in front of the conversation instead, for its next turn to take.

        Returns:
            It, and how many tokens of it were read.

        Raises:
            ConfigError: beside the memory it takes more positions than the model has.
            InputError: it is shorter than what the memory leans on.
        """
        talk = self.talk
        assert talk is not None
        pinned, num_read = yield from self._pinned(opening)
        check_room(self.caches.model, self.settings.policy, pinned.num_tokens)
        if pinned.num_tokens < talk.num_leant_on:
            raise InputError(
                f"{pinned.num_tokens} tokens cannot stand in front of a conversation that was begun behind "
                f"{talk.behind}: its memory has no first tokens of its own, and needs {talk.num_leant_on}"
            )
        return pinned, num_read

    def _pinned(self, opening: Opening) -> Work[tuple[Pinned, int]]:
        if self.talk is not None and self.talk.pinned.opening == opening:
            return self.talk.pinned, 0
        return (yield from pinning(self.caches, opening, self.openings, stride=self.settings.stride))

    def write(self, path: Path) -> None:
        """Save the conversation.

        Raises:
            InputError: there is none.
            StoreWriteError: it cannot be written.
        """
        if self.talk is None:
            raise InputError("nothing was said yet, so there is nothing to save")
        about = {"name": self.name, **self.settings.told(), "is_archived": self.recalls is not None}
        file.save(path, self.talk, self.settings.policy, self.caches.model, about, self.vault)

    def park(self, path: Path) -> None:
        """Write everything to a file and keep nothing, between turns.

        Raises:
            StoreWriteError: it cannot be written; the conversation stays in memory.
        """
        if self.talk is not None:
            self.write(path)
            self._counts, self.talk = self.counted, None
        self._parked = path

    def wait_in(self, path: Path) -> None:
        """Be the conversation that a file holds, from the next use on."""
        self._parked = path

    def take(self, saved: file.Saved) -> Work[None]:
        """Become what was saved."""
        model = self.caches.model
        file.check_model(saved.manifest, model)
        pinned, _ = yield from self._pinned(file.opening_of(saved.manifest))
        settings = self.settings
        self.talk = file.load(saved, model, settings.policy, pinned, max_undo=settings.max_undo)

    def delete(self) -> None:
        """Forget everything, and remove its archive and the file it waits in."""
        if self.recalls is not None:
            self.recalls.delete()
        self.talk, self.is_deleted = None, True
        if self._parked is not None:
            file.delete(self._parked)
        self._parked = self._counts = None

    def _wake(self, may_lose: bool) -> Work[None]:
        """Come back from the file that the conversation waits in."""
        if self._parked is None or self.talk is not None:
            return
        try:
            yield from self.take(file.read(self._parked, self.vault))
        except (SessionDamaged, ConfigError) as error:
            if not may_lose:
                raise
            logger.warning("session %r is read anew: %s", self.name, error)
        self._parked = None
