"""What both models know of sessions: the fields that name them, and the one that a call is a turn of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from langchain_core.runnables import RunnableConfig
from pydantic import BaseModel, Field, PrivateAttr

from kvrag import ConfigError, Engine, Session, Sessions
from kvrag.chats import Chats, ChatSettings, chats_of
from langchain_kvrag._threads import Threaded, thread_of, with_thread


class InSessions(Threaded, BaseModel):
    """Fields of sessions; not used by itself."""

    session: Any = None
    """A conversation whose memory does not grow, of which only what is new is read: a `kvrag.Session`, or its
    id. None: with `sessions`, the run's `thread_id` or `session_id`, if there is one."""
    sessions: Any = None
    """Where ids of sessions are looked up: `kvrag.Sessions`, or a folder. None: no call has a session, unless
    `session` names one, which is then kept in memory."""
    memory: Any = "cascade"
    """What of a session stays in memory: a policy of `kvrag.memory`, or its name."""
    memory_budget: int | str | None = None
    """Of a memory that is named: tokens, or bytes such as "512MB"; None: see `kvrag.Engine.session`."""
    session_options: dict[str, Any] = Field(default_factory=dict)
    """More arguments of `kvrag.Engine.sessions`, such as `system`, `documents` or `budget_bytes`."""
    session_archive: Any = None
    """Where all that sessions say is kept, to come back when it is needed: a folder (of its own) or address
    of a Chroma database, or what `kvrag.Engine.archive` gives. None: what is forgotten is lost."""

    _chats: Chats | None = PrivateAttr(default=None)

    @property
    def running(self) -> Engine:
        """The engine."""
        raise NotImplementedError

    @property
    def _is_in_sessions(self) -> bool:
        return self.sessions is not None or self.session is not None

    def _start_chats(self) -> Chats:
        """The sessions that the fields name; none is opened yet, and nothing changes unless the fields did.

        Raises:
            ConfigError: the fields contradict each other.
        """
        settings = ChatSettings(
            sessions=self.sessions,
            memory=self.memory,
            budget=self.memory_budget,
            options=self.session_options,
            archive=self.session_archive,
        )
        holder = getattr(self, "_share", None)
        self._chats = chats_of(self._chats, self.running, settings, self.session, holder)
        return self._chats

    def _session_of(self, options: dict[str, Any], run_manager: Any) -> Session | None:
        """The session that a call is a turn of; takes what it says of it out of its options.

        Raises:
            ConfigError: it names none.
        """
        if "session" in options:
            named = options.pop("session")
        elif self.session is not None:
            named = self.session
        else:
            named = thread_of(run_manager) if self.sessions is not None else None
        return None if named is None else self._start_chats().find(named)

    def _of_thread(self, config: RunnableConfig | None) -> RunnableConfig | None:
        return with_thread(config) if self._is_in_sessions else config

    def _check_travel(self) -> None:
        """Refuse what cannot be pickled."""
        is_open = not isinstance(self.session_archive, str | Path | None)
        if is_open or isinstance(self.session, Session) or isinstance(self.sessions, Sessions):
            raise ConfigError(
                "made with open sessions, this cannot be pickled; name a folder and an id instead"
            )
