"""The fields that name a model's sessions, and the one that a conversation is a turn of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llama_index.core.bridge.pydantic import BaseModel, Field, PrivateAttr, field_serializer

from kvrag import Engine, Session
from kvrag.chats import Chats, ChatSettings, chats_of


class InSessions(BaseModel):
    """Fields of sessions; not used by itself."""

    session: Any = Field(
        default=None,
        description=(
            "A conversation whose memory does not grow, of which only what is new is read: a kvrag.Session, "
            "or its id. None: conversations are read as a whole, but for the nodes that have caches."
        ),
    )
    sessions: Any = Field(
        default=None,
        description="Where ids of sessions are looked up: kvrag.Sessions, or a folder; None: in memory.",
    )
    memory: Any = Field(
        default="cascade",
        description="What of a session stays in memory: a policy of kvrag.memory, or its name.",
    )
    memory_budget: int | str | None = Field(
        default=None,
        description="Of a memory that is named: tokens, or bytes such as '512MB'; None: as Engine.session.",
    )
    session_options: dict[str, Any] = Field(
        default_factory=dict,
        description="More arguments of kvrag.Engine.sessions, such as system, documents or budget_bytes.",
    )
    session_archive: Any = Field(
        default=None,
        description=(
            "Where all that sessions say is kept, to come back when it is needed: a folder (of its own) or "
            "address of a Chroma database, or what kvrag.Engine.archive gives; None: what is forgotten is "
            "lost."
        ),
    )

    _chats: Chats | None = PrivateAttr(default=None)

    @property
    def running(self) -> Engine:
        """The engine."""
        raise NotImplementedError

    @field_serializer("session", "sessions", "memory", "session_archive")
    def _serialize_session(self, value: Any) -> str | None:
        return None if value is None else value if isinstance(value, str) else str(value)

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

    def _session_of(self, options: Mapping[str, Any]) -> Session | None:
        """The session that a call is a turn of.

        Raises:
            ConfigError: it names none.
        """
        named = options.get("session", self.session)
        return None if named is None else self._start_chats().find(named)
