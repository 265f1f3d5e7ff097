"""Conversations by name in a folder, each with a memory of its own kind; what `kvrag chat` keeps."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvrag.engine import Engine
from kvrag.errors import ConfigError, InputError, SessionDamaged, SessionError
from kvrag.memory.base import MemoryPolicy
from kvrag.sessions import file
from kvrag.sessions.many import SUFFIX, session_path
from kvrag.sessions.session import Session
from kvrag.store.files import make_folder, remove, try_lock

_LOCK = ".lock"


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
    """

    name: str
    memory: str
    budget: int | None
    num_turns: int
    num_tokens: int
    num_bytes: int
    saved_at: float


class Conversations:
    """Opens, writes and removes the conversations of a folder; one process at a time has each of them.

    The files are those of `kvrag.Sessions`, which has a whole folder to itself and one kind of memory.
    """

    def __init__(self, folder: Path) -> None:
        """Name the folder; it is made when something is written to it."""
        self.folder = folder
        self._held: dict[str, int] = {}

    def open(
        self,
        engine: Engine,
        name: str,
        memory: MemoryPolicy | None,
        *,
        system: str | None = None,
        documents: Sequence[str] = (),
    ) -> Session:
        """The conversation of this name, a new one if there is none.

        Args:
            engine: that answers.
            name: its id.
            memory: of a new one; None: as it was made, or the engine's usual one.
            system: its system prompt; None: as it was made.
            documents: that it begins with; none: as it was made.

        Raises:
            InputError: it was made with something else than what is given.
            SessionError: another process has it.
            SessionDamaged: its file is not whole.
            ConfigError: it was made with another model.
        """
        self._hold(name)
        path = session_path(self.folder, name)
        if not path.exists():
            options: dict[str, Any] = {"name": name, "system": system, "documents": documents}
            return engine.session(memory, **options) if memory else engine.session(**options)
        session = engine.load_session(path)
        _check(name, "memory", session.settings.policy, memory)
        _check(name, "system prompt", session.settings.system, system)
        _check(name, "documents", session.settings.documents, tuple(documents) or None)
        return session

    def fork(self, session: Session, name: str) -> Session:
        """A conversation that goes on from here under another name.

        Raises:
            SessionError: there is one of this name, or another process has it.
        """
        if session_path(self.folder, name).exists() or name in self._held:
            raise SessionError(f"there is a session {name!r} already; delete it first, or take another name")
        self._hold(name)
        return session.fork(name)

    def save(self, session: Session) -> Path:
        """Write a conversation; nothing is written for one in which nothing was said.

        Raises:
            StoreWriteError: it cannot be written; a file that was there is still there.
        """
        path = session_path(self.folder, str(session.name))
        if session.num_turns:
            session.save(path)
        else:  # all of it was taken back
            file.delete(path)
        return path

    def delete(self, name: str) -> bool:
        """Remove a conversation; False if there is none.

        Raises:
            SessionError: another process has it.
        """
        path = session_path(self.folder, name)
        if not path.exists():
            return False
        self._hold(name)
        return file.delete(path)

    def listed(self) -> list[Kept]:
        """What is saved, by name; files that cannot be read are left out."""
        found = []
        for path in self.folder.glob(f"*{SUFFIX}"):
            try:
                found.append(_kept(path))
            except (SessionDamaged, OSError, KeyError, TypeError, ValueError):
                continue
        return sorted(found, key=lambda kept: kept.name)

    def close(self) -> None:
        """Let go of the conversations."""
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
        return session_path(self.folder, name).with_suffix(_LOCK)


def _kept(path: Path) -> Kept:
    name, manifest = file.claimed(path)
    fields, about = manifest["policy"]["fields"], path.stat()
    return Kept(
        str(name),
        str(manifest["policy"]["name"]),
        fields.get("budget"),
        int(manifest["num_turns"]),
        int(manifest["num_tokens"]),
        sum(part.stat().st_size for part in path.parent.glob(f"{path.name}*")),
        about.st_mtime,
    )


def _check(name: str, what: str, made: Any, given: Any) -> None:
    """Refuse to go on with something else than what a session was made with."""
    if given is not None and given != made:
        raise InputError(
            f"the session {name!r} was made with {what} {made!r}; leave it out to go on, or take another name"
        )


def no_key(key: bytes | None) -> None:
    """Refuse to write conversations where everything else is encrypted.

    Raises:
        ConfigError: there is a key.
    """
    if key is not None:
        raise ConfigError(
            "KVRAG_STORE_KEY is set, and saved conversations are not encrypted; unset it for kvrag chat"
        )
