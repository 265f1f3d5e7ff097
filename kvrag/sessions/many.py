"""Many sessions under one budget: those used least recently wait on disk."""

from __future__ import annotations

import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from weakref import WeakValueDictionary, ref

from kvrag.errors import ConfigError, SessionError, StoreError
from kvrag.sessions import file
from kvrag.sessions.session import Session
from kvrag.sessions.vault import PLAIN, Vault
from kvrag.store.files import make_folder, try_lock
from kvrag.worker import Worker

logger = logging.getLogger(__name__)


class Sessions:
    """Conversations by id; `Engine.sessions` makes it.

    Whoever asks for an id gets the same session as long as anybody holds it. Behind every turn those that
    were used least recently are written to the folder until the others fit into the budget; a parked one
    comes back when it is used. Any thread may call any method; one process at a time has the folder.
    """

    def __init__(
        self,
        make: Callable[[str], Session],
        worker: Worker,
        folder: str | Path,
        *,
        budget_bytes: int | None,
        vault: Vault = PLAIN,
    ) -> None:
        """Serve the sessions of one folder; see `Engine.sessions`."""
        if budget_bytes is not None and budget_bytes < 0:
            raise ConfigError(f"budget_bytes is {budget_bytes}; expected 0 or more, or None for no limit")
        self._make, self._worker, self._folder = make, worker, Path(folder)
        self._budget, self._vault = budget_bytes, vault
        self._lock = threading.Lock()
        self._all: WeakValueDictionary[str, Session] = WeakValueDictionary()
        self._awake: OrderedDict[str, Session] = OrderedDict()  # least recently used first
        make_folder(self._folder)
        held = try_lock(vault.lock(self._folder))
        if held is None:
            raise SessionError(
                f"another process has the sessions in {self._folder}; close it, or use another folder"
            )
        self._held: int | None = held

    def __getitem__(self, name: str) -> Session:
        """The session of this id, a new one if there is none."""
        with self._lock:
            self._check_open()
            session = self._all.get(name)
            if session is None or session.house.is_deleted:
                session = self._make(name)
                session.house.on_change = self._listener(session)
                path = self._path(name)
                if path.exists():
                    session.house.wait_in(path)
                self._all[name] = session
            return session

    def __contains__(self, name: object) -> bool:
        """Whether something was said in it."""
        if not isinstance(name, str):
            return False
        with self._lock:
            session = self._all.get(name)
            return name in self._awake or self._path(name).exists() or bool(session and session.is_busy)

    def names(self) -> list[str]:
        """Ids of those in which something was said, sorted.

        Raises:
            SessionDamaged: a file cannot be read at all.
            SessionSealed: a file is encrypted with another key.
        """
        with self._lock:
            awake = set(self._awake)
        files = file.files_of(self._folder, self._vault)
        parked = {str(file.claimed(path, self._vault)[0]) for path in files}
        return sorted(awake | parked)

    def fork(self, name: str, new_name: str) -> Session:
        """Another session that goes on from here.

        Raises:
            SessionError: there is one of the new id.
        """
        if new_name in self:
            raise SessionError(f"there is a session {new_name!r}; delete it first, or take another id")
        other = self[name].fork(new_name)
        other.house.on_change = self._listener(other)
        with self._lock:
            self._all[new_name] = self._awake[new_name] = other
        self._worker.call(self._make_room)
        return other

    def delete(self, name: str) -> bool:
        """Forget a session everywhere; False if there was none."""
        existed = name in self
        self[name].delete()
        with self._lock:
            self._awake.pop(name, None)
            self._all.pop(name, None)
        return file.delete(self._path(name)) or existed

    def save(self) -> None:
        """Write all that are awake; they stay so.

        Raises:
            StoreWriteError: a file cannot be written; the one that was there before still is.
        """
        with self._lock:
            awake = dict(self._awake)
        for name, session in awake.items():
            session.save(self._path(name))

    def close(self) -> None:
        """Write all that are awake, and let go of the folder.

        Raises:
            StoreWriteError: a file cannot be written; the folder is kept then.
        """
        if self._held is None:
            return
        if not self._worker.is_closed:
            self.save()
        with self._lock:
            held, self._held = self._held, None
            self._awake.clear()
        if held is not None:
            os.close(held)

    def __enter__(self) -> Sessions:
        """Close on exit."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    @property
    def num_bytes(self) -> int:
        """Bytes that all sessions that are awake keep in memory."""
        with self._lock:
            return sum(session.num_bytes for session in self._awake.values())

    @property
    def num_awake(self) -> int:
        """Sessions in memory."""
        return len(self._awake)

    def _path(self, name: str) -> Path:
        return self._vault.path(self._folder, name)

    def _check_open(self) -> None:
        if self._held is None:
            raise SessionError("these sessions were closed; make new ones from the engine")

    def _listener(self, session: Session) -> Callable[[], None]:
        """What a session tells of itself; holds it no longer than others do."""
        known = ref(session)

        def changed() -> None:
            if (found := known()) is not None:
                self._changed(found)

        return changed

    def _changed(self, session: Session) -> None:
        """Behind a turn, on the model's thread."""
        if session.name is None:
            return
        with self._lock:
            self._awake[session.name] = session
            self._awake.move_to_end(session.name)
        self._make_room()

    def _make_room(self) -> None:
        """Park those used least recently, on the model's thread: nobody begins a turn meanwhile."""
        if self._budget is None:
            return
        with self._lock:
            left = list(self._awake.items())
        total = sum(session.num_bytes for _, session in left)
        for number, (name, session) in enumerate(left):
            if total <= self._budget:
                return
            if session.house.is_waited_for:
                continue
            size = session.num_bytes
            try:
                session.house.park(self._path(name))
            except StoreError as error:  # the answer is there all the same
                logger.warning("%d sessions stay in memory beyond the budget: %s", len(left) - number, error)
                return
            total -= size
            with self._lock:
                self._awake.pop(name, None)
