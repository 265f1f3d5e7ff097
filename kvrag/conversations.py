"""Conversations by name in a folder, each with a memory of its own kind; what `kvrag chat` keeps."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvrag.archive.archive import Archive
from kvrag.engine import Engine
from kvrag.errors import InputError, SessionDamaged, SessionError
from kvrag.memory.base import MemoryPolicy
from kvrag.sessions import file
from kvrag.sessions.session import Session
from kvrag.sessions.vault import PLAIN, Vault
from kvrag.store.files import make_folder, remove, try_lock

_LOCK = ".lock"
Archives = Callable[[bool], Archive | None]
"""Opens the archive of what conversations have said; told True, it makes one if there is none."""


@dataclass(frozen=True, slots=True)
class Kept:
    """A saved conversation, as its file describes it.

    Attributes:
        name: its id.
        memory: name of its policy.
        budget: of that, in tokens; None: no limit.
        num_turns: complete turns.
        num_tokens: of the conversation, what is pinned left out.
        num_bytes: of its file.
        saved_at: seconds since 1970.
        is_archived: what it says is kept in an archive.
    """

    name: str
    memory: str
    budget: int | None
    num_turns: int
    num_tokens: int
    num_bytes: int
    saved_at: float
    is_archived: bool = False


class Conversations:
    """Opens, writes and removes the conversations of a folder; one process at a time has each of them.

    The files are those of `kvrag.Sessions`, which has a whole folder to itself and one kind of memory.
    """

    def __init__(self, folder: Path, vault: Vault = PLAIN, *, archives: Archives | None = None) -> None:
        """Name the folder; it is made when something is written to it.

        Args:
            folder: where files are.
            vault: whose conversations these are, and what they are encrypted with.
            archives: opens the archive when one is needed; None: there is none.
        """
        self.folder, self._vault, self._archives = folder, vault, archives
        self._archive: Archive | None = None
        self._held: dict[str, int] = {}

    def open(
        self,
        engine: Engine,
        name: str,
        memory: MemoryPolicy | None,
        *,
        system: str | None = None,
        documents: Sequence[str] = (),
        is_archived: bool = False,
    ) -> Session:
        """The conversation of this name, a new one if there is none.

        Args:
            engine: that answers.
            name: its id.
            memory: of a new one; None: as it was made, or the engine's usual one.
            system: its system prompt; None: as it was made.
            documents: that it begins with; none: as it was made.
            is_archived: keep what is said from now on; False: as it was made.

        Raises:
            InputError: it was made with something else than what is given.
            SessionError: another process has it.
            SessionDamaged: its file is not whole.
            SessionSealed: it is encrypted with another key.
            ConfigError: it was made with another model.
        """
        self._hold(name)
        path = self._vault.path(self.folder, name)
        if not path.exists():
            options: dict[str, Any] = {"name": name, "system": system, "documents": documents}
            options["archive"] = self._opened(create=True) if is_archived else None
            return engine.session(memory, **options) if memory else engine.session(**options)
        is_archived = is_archived or _is_archived(file.claimed(path, self._vault)[1])
        session = engine.load_session(path, archive=self._opened(create=True) if is_archived else None)
        _check(name, "memory", session.settings.policy, memory)
        _check(name, "system prompt", session.settings.system, system)
        _check(name, "documents", session.settings.documents, tuple(documents) or None)
        return session

    def load(self, engine: Engine, path: Path, name: str | None) -> Session:
        """The conversation of a file that `Session.save` has written, as one of its own.

        Args:
            engine: that answers.
            path: of the file.
            name: that it gets; None: it is not kept, and has no archive.

        Raises:
            SessionError: there is one of this name, or another process has it.
            SessionDamaged: the file is not whole.
            SessionSealed: it is encrypted with another key.
            ConfigError: it was made with another model.
            StoreWriteError: it cannot be kept.
        """
        if name is None:
            return engine.load_session(path).fork()
        archive = self._opened(create=True) if _is_archived(file.claimed(path, self._vault)[1]) else None
        session = self.fork(engine.load_session(path, archive=archive), name)
        self.save(session)  # at once: the copy of its archive must not be nobody's
        return session

    def fork(self, session: Session, name: str) -> Session:
        """A conversation that goes on from here under another name.

        Raises:
            SessionError: there is one of this name, or another process has it.
        """
        if self._vault.path(self.folder, name).exists() or name in self._held:
            raise SessionError(f"there is a session {name!r} already; delete it first, or take another name")
        self._hold(name)
        return session.fork(name)

    def anew(self, engine: Engine, session: Session) -> Session:
        """An empty conversation that is made like another one, and has its name."""
        made = session.settings
        return engine.session(
            made.policy,
            name=session.name,
            system=made.system,
            documents=made.documents,
            stride=made.stride,
            keeps_log=made.keeps_log,
            max_undo=made.max_undo,
            swaps_opening=made.swaps_opening,
            archive=self._opened(create=True) if session.is_archived else None,
        )

    def save(self, session: Session) -> Path:
        """Write a conversation; nothing is written for one in which nothing was said.

        Raises:
            StoreWriteError: it cannot be written; a file that was there is still there.
        """
        path = self._vault.path(self.folder, str(session.name))
        if session.num_turns:
            session.save(path)
        else:  # all of it was taken back
            file.delete(path)
        return path

    def delete(self, name: str) -> bool:
        """Remove a conversation and its archive; False if there is none.

        Raises:
            SessionError: another process has it.
            CorpusLocked: another process is writing to the archive; nothing was removed.
        """
        path = self._vault.path(self.folder, name)
        if not path.exists():
            return False
        self._hold(name)
        # First: without the file, nobody would know whose archive it is.
        if (archive := self._opened(create=False)) is not None:
            archive.delete(name)
        return file.delete(path)

    def listed(self) -> list[Kept]:
        """What is saved, by name; files that cannot be read are left out.

        Raises:
            SessionSealed: one is encrypted with another key.
        """
        found = []
        for path in file.files_of(self.folder, self._vault):
            try:
                found.append(self._described(path))
            except (SessionDamaged, OSError, KeyError, TypeError, ValueError):
                continue
        return sorted(found, key=lambda kept: kept.name)

    def close(self) -> None:
        """Let go of the conversations, and close their archive."""
        if self._archive is not None:
            self._archive.close()
            self._archive = None
        for name, descriptor in self._held.items():
            remove(self._lock_of(name))
            os.close(descriptor)
        self._held.clear()

    def _hold(self, name: str) -> None:
        """Have a conversation for this process.

        Raises:
            InputError: a name that is none.
            SessionError: another process has it.
        """
        if not name.strip():
            raise InputError("the name of a session is empty; give it one")
        if name in self._held:
            return
        make_folder(self.folder)
        held = try_lock(self._lock_of(name))
        if held is None:
            raise SessionError(f"another process has the session {name!r}; leave it there first")
        self._held[name] = held

    def _lock_of(self, name: str) -> Path:
        return self._vault.path(self.folder, name).with_suffix(_LOCK)

    def _opened(self, *, create: bool) -> Archive | None:
        """The archive; None if there is none.

        Raises:
            ConfigError: it is encrypted with another key.
        """
        if self._archive is None and self._archives is not None:
            self._archive = self._archives(create)
        return self._archive

    def _described(self, path: Path) -> Kept:
        name, manifest = file.claimed(path, self._vault)
        fields, about = manifest["policy"]["fields"], path.stat()
        return Kept(
            str(name),
            str(manifest["policy"]["name"]),
            fields.get("budget"),
            int(manifest["num_turns"]),
            int(manifest["num_tokens"]),
            sum(part.stat().st_size for part in path.parent.glob(f"{path.name}*")),
            about.st_mtime,
            _is_archived(manifest),
        )


def _is_archived(manifest: Mapping[str, Any]) -> bool:
    """Whether the conversation of a file has an archive."""
    return bool(manifest["about"].get("is_archived", False))


def _check(name: str, what: str, made: Any, given: Any) -> None:
    """Refuse to go on with something else than what a session was made with."""
    if given is not None and given != made:
        raise InputError(
            f"the session {name!r} was made with {what} {made!r}; leave it out to go on, or take another name"
        )
