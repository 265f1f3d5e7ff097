"""The sessions of those who answer whole histories: by id, in a folder or in memory, opened once."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvrag.engine import Engine
from kvrag.errors import ConfigError, KVRagError
from kvrag.memory.base import MemoryPolicy
from kvrag.sessions.many import Sessions
from kvrag.sessions.session import Session

if TYPE_CHECKING:  # without an archive there is no need for Chroma
    from kvrag.archive.archive import Archive

logger = logging.getLogger(__name__)

_OF_MANY = "budget_bytes"


@dataclass(frozen=True, kw_only=True)
class ChatSettings:
    """Where an adapter's sessions are, and what they are made with.

    Attributes:
        sessions: where ids are looked up: sessions that are open, or a folder for them; None: in memory.
        memory: of each: a policy, or the name of one.
        budget: of a policy that is given by name.
        options: more arguments of `Engine.sessions`, such as `system` or `budget_bytes`.
        archive: where all that is said is kept, to come back when it is needed: one that is open, or a folder
            or address for `Engine.archive`; None: what is forgotten is lost.
    """

    sessions: Sessions | str | Path | None = None
    memory: MemoryPolicy | str = "cascade"
    budget: int | str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    archive: Archive | str | Path | None = None

    def __post_init__(self) -> None:
        """Check what belongs to what.

        Raises:
            ConfigError: two settings contradict each other, or one is of a wrong kind.
        """
        if not isinstance(self.sessions, Sessions | str | Path | None):
            raise ConfigError(
                f"sessions is a {type(self.sessions).__name__}; expected kvrag.Sessions, or a folder"
            )
        if isinstance(self.sessions, Sessions) and self.told != ("cascade", None, {}, None):
            raise ConfigError(
                "memory, its budget, options and archive are for sessions that are made here; "
                "those that were given have their own"
            )
        if self.archive is not None and "archive" in self.options:
            raise ConfigError("archive is given twice, also among the options of sessions; leave one out")
        if not isinstance(self.archive, str | Path | None):
            from kvrag.archive.archive import Archive  # noqa: PLC0415 - needs Chroma

            if not isinstance(self.archive, Archive):
                raise ConfigError(
                    f"archive is {self.archive!r}; expected a folder, or what Engine.archive gives"
                )

    @property
    def told(self) -> tuple[Any, ...]:
        """What sessions are made with."""
        return self.memory, self.budget, dict(self.options), self.archive


class Chats:
    """Finds the session of a call; may be called from any thread.

    Sessions in a folder are opened when the first one is asked for, once for all who name the folder on one
    engine; they are written to it when nobody holds them any more, and when the engine is closed.
    """

    def __init__(self, engine: Engine, settings: ChatSettings, holder: object = None) -> None:
        """Serve one adapter.

        Args:
            engine: that answers.
            settings: which sessions.
            holder: what keeps the engine open; kept until the sessions are written.
        """
        self._engine, self._settings, self._holder = engine, settings, holder
        self._lock = threading.Lock()
        self._folder: _Folder | None = None
        self._archive: _Archive | None = None
        self._alone: dict[str, Session] = {}

    def __copy__(self) -> Chats:
        """The same: what holds it and is copied shares its sessions."""
        return self

    def __deepcopy__(self, _: dict[int, Any]) -> Chats:
        """The same."""
        return self

    @property
    def settings(self) -> ChatSettings:
        """What it was made with."""
        return self._settings

    def find(self, named: Any) -> Session:
        """The session of a call.

        Args:
            named: its id, or itself.

        Raises:
            ConfigError: it is neither, belongs to another engine, or cannot be made.
            SessionError: another process has the folder.
        """
        if not isinstance(named, Session | str) or not named:
            raise ConfigError(f"session is {named!r}; expected an id, or a kvrag.Session")
        session = self._named(named) if isinstance(named, str) else named
        if session.model is not self._engine.model:
            raise ConfigError(
                f"the session {session.name or ''} belongs to another engine; make it with the one that "
                "answers, and give that as engine=..."
            )
        return session

    def _named(self, name: str) -> Session:
        place = self._settings.sessions
        if isinstance(place, Sessions):
            return place[name]
        with self._lock:
            if place is None:
                if name not in self._alone or self._alone[name].house.is_deleted:
                    self._alone[name] = self._made(name)
                return self._alone[name]
            if self._folder is None:
                self._folder = _opened(self._engine, Path(place), self._settings, self._holder)
            return self._folder.sessions[name]

    def _made(self, name: str) -> Session:
        settings = self._settings
        options = {key: value for key, value in settings.options.items() if key != _OF_MANY}
        if settings.archive is not None:
            self._archive = self._archive or _archived(self._engine, settings.archive)
            options["archive"] = self._archive.archive
        return self._engine.session(settings.memory, budget=settings.budget, name=name, **options)


class _Folder:
    """Sessions of a folder, written when nobody holds this any more; their archive is closed behind them."""

    def __init__(
        self, sessions: Sessions, settings: ChatSettings, archive: _Archive | None, holder: object
    ) -> None:
        self.sessions, self.settings, self.holder = sessions, settings, holder
        weakref.finalize(self, _let_go, sessions.close, archive)


class _Archive:
    """An archive; closed when nobody holds this any more, if it was opened here."""

    def __init__(self, archive: Archive, *, is_mine: bool) -> None:
        self.archive = archive
        if is_mine:
            weakref.finalize(self, _let_go, archive.close, None)


def _let_go(close: Callable[[], None], behind: object) -> None:
    """Close, whichever thread has dropped the last share: the model's must not wait for itself.

    Args:
        close: of what is let go of.
        behind: held until that is done.
    """
    if threading.current_thread() is threading.main_thread():
        _close(close, behind)
    else:
        threading.Thread(target=_close, args=(close, behind), name="kvrag sessions").start()


def _close(close: Callable[[], None], _: object) -> None:
    try:
        close()
    except KVRagError as error:  # nobody is there to be told
        logger.warning("sessions were not written, and are read anew the next time: %s", error)


_folders: weakref.WeakValueDictionary[tuple[int, str], _Folder] = weakref.WeakValueDictionary()
_archives: weakref.WeakValueDictionary[tuple[int, str], _Archive] = weakref.WeakValueDictionary()
_lock = threading.RLock()


def _archived(engine: Engine, archive: Archive | str | Path) -> _Archive:
    """An archive, opened unless it is.

    Raises:
        ConfigError: the engine has no store, or another key.
        CorpusError: it cannot be opened.
    """
    if not isinstance(archive, str | Path):
        return _Archive(archive, is_mine=False)
    place = str(archive)
    key = (id(engine), place if place.startswith("http") else str(Path(place).resolve()))
    with _lock:
        found = _archives.get(key)
        if found is None:
            found = _archives[key] = _Archive(engine.archive(archive), is_mine=True)
        return found


def _opened(engine: Engine, path: Path, settings: ChatSettings, holder: object) -> _Folder:
    """The sessions of a folder, opened unless they are.

    Raises:
        ConfigError: they were opened with other settings.
        SessionError: another process has the folder.
    """
    key = (id(engine), str(path.resolve()))
    with _lock:
        found = _folders.get(key)
        if found is None:
            options = dict(settings.options)
            archive = None if settings.archive is None else _archived(engine, settings.archive)
            if archive is not None:
                options["archive"] = archive.archive
            sessions = engine.sessions(path, settings.memory, budget=settings.budget, **options)
            found = _folders[key] = _Folder(sessions, settings, archive, holder)
        told, known = settings.told, found.settings.told
        if told != known:
            raise ConfigError(
                f"the sessions in {path} were opened with {known}, not {told}; give both the same settings"
            )
        return found


def chats_of(
    current: Chats | None,
    engine: Engine,
    settings: ChatSettings,
    session: Session | str | None,
    holder: object = None,
) -> Chats:
    """What an adapter finds its sessions with; nothing is opened yet.

    Args:
        current: what it had; kept unless its settings changed.
        engine: that answers.
        settings: which sessions.
        session: the one that the adapter names; None: none.
        holder: see `Chats`.

    Raises:
        ConfigError: session and settings contradict each other.
    """
    # What a copy of an adapter holds is shared with it.
    chats = current if current is not None and current.settings == settings else None
    chats = chats or Chats(engine, settings, holder=holder)
    if isinstance(session, Session) and settings.sessions is not None:
        raise ConfigError("session is a kvrag.Session, and sessions says where ids are; give one of both")
    if session is not None and not isinstance(session, str):
        chats.find(session)  # checks it
    return chats
