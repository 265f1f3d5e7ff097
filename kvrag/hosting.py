"""The sessions of an engine and their archives: how they are made, loaded, and closed with it."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakSet, WeakValueDictionary

from kvrag.caches import Caches
from kvrag.errors import ConfigError
from kvrag.known import KnownTexts
from kvrag.memory.base import MemoryPolicy
from kvrag.memory.policies import memory_policy
from kvrag.model import Model
from kvrag.sessions.many import Sessions
from kvrag.sessions.pinned import Openings
from kvrag.sessions.session import Session, loaded_session
from kvrag.sessions.settings import Settings
from kvrag.sessions.talk import check_room
from kvrag.sessions.turn import Recalls
from kvrag.sessions.vault import vault_of
from kvrag.store.base import KVStore
from kvrag.worker import Worker

if TYPE_CHECKING:  # an engine without an archive does without Chroma
    from kvrag.archive.archive import Archive
    from kvrag.archive.recall import Recall
    from kvrag.collection import Embedding

_USUAL_BUDGET = 4096


class SessionHost:
    """What an engine knows of conversations; `kvrag.engine.Engine` is one.

    Attributes:
        model: the decoder.
        store: where documents' and archives' rows are kept; None: nowhere.
        known: texts that are looked for in prompts of which no chunks are named.
        pass_tokens: most tokens that are read in one pass with other answers' tokens.
    """

    def __init__(
        self,
        model: Model,
        store: KVStore | None,
        caches: Caches,
        worker: Worker,
        *,
        known: KnownTexts,
        pass_tokens: int,
    ) -> None:
        """Host the sessions that one model's thread runs.

        Args:
            model: the decoder.
            store: see the class.
            caches: of the model.
            worker: its thread.
            known: see the class.
            pass_tokens: see the class.
        """
        self.model, self.store, self.known, self.pass_tokens = model, store, known, pass_tokens
        self._caches, self._worker = caches, worker
        self._openings: Openings = WeakValueDictionary()
        self._many: WeakSet[Sessions] = WeakSet()

    def session(
        self,
        memory: MemoryPolicy | str = "cascade",
        *,
        budget: int | str | None = None,
        name: str | None = None,
        system: str | None = None,
        documents: Sequence[str] = (),
        stride: int | None = None,
        keeps_log: bool = True,
        max_undo: int = 2,
        swaps_opening: bool = False,
        archive: Archive | None = None,
        recall: Recall | None = None,
    ) -> Session:
        """A conversation with a memory of its own.

        Args:
            memory: what of the conversation stays in memory: a policy, or the name of one with its usual
                settings: "full", "window", "cascade", "combined", "salient".
            budget: of a policy that is given by name: tokens, or bytes such as "512MB"; None: 4096 tokens, or
                half of the model's positions if those are fewer.
            name: its id.
            system: its system prompt; None: what a history brings.
            documents: texts that it begins with, behind the system prompt; always in memory, and loaded from
                the store where it has them.
            stride: most tokens that are read before they are inserted into the memory; None: `pass_tokens`.
            keeps_log: keep the tokens, 4 bytes each, to say what was forgotten.
            max_undo: turns that can be taken back, each of which may keep as much as the memory itself.
            swaps_opening: system prompt and documents may be others in every turn: they are put in the place
                of those before, and the conversation stays as it was read; False: it is read anew then.
                Documents are those of `Session.send`, and known texts in a history's system prompt.
            archive: where everything that is said is kept, to come back when it is needed; None: what is
                forgotten is lost. A session without an id gets one then.
            recall: what comes back; None: the defaults.

        Raises:
            ConfigError: the memory needs more positions than the model has.
        """
        if archive is not None and name is None:
            name = uuid.uuid4().hex
        settings = Settings(
            self._memory(memory, budget),
            system,
            documents,
            self.pass_tokens if stride is None else stride,
            keeps_log,
            max_undo,
            swaps_opening,
        )
        check_room(self.model, settings.policy, 0)
        recalls = self._recalls(archive, name, recall)
        return Session(
            self._caches,
            self._worker,
            settings,
            name=name,
            openings=self._openings,
            recalls=recalls,
            known=self.known,
        )

    def sessions(
        self,
        folder: str | Path,
        memory: MemoryPolicy | str = "cascade",
        *,
        budget: int | str | None = None,
        budget_bytes: int | None = None,
        system: str | None = None,
        documents: Sequence[str] = (),
        stride: int | None = None,
        keeps_log: bool = True,
        max_undo: int = 2,
        swaps_opening: bool = False,
        archive: Archive | None = None,
        recall: Recall | None = None,
    ) -> Sessions:
        """Many conversations by id, of which those used least recently wait in a folder.

        Args:
            folder: for what does not fit into memory, and for `Sessions.close`.
            memory: see `session`, also for the rest.
            budget: of each.
            budget_bytes: what all of them may keep in memory between turns; None: no limit.
            system: system prompt of each.
            documents: that each begins with.
            stride: most tokens that are read before they are inserted.
            keeps_log: keep the tokens.
            max_undo: turns that can be taken back.
            swaps_opening: see `session`.
            archive: see `session`.
            recall: see `session`.

        Raises:
            SessionError: another process has the folder.
            ConfigError: the memory needs more positions than the model has.
        """
        policy = self._memory(memory, budget)

        def make(name: str) -> Session:
            return self.session(
                policy,
                name=name,
                system=system,
                documents=documents,
                stride=stride,
                keeps_log=keeps_log,
                max_undo=max_undo,
                swaps_opening=swaps_opening,
                archive=archive,
                recall=recall,
            )

        check_room(self.model, policy, 0)
        sessions = Sessions(
            make, self._worker, folder, budget_bytes=budget_bytes, vault=vault_of(self._caches)
        )
        self._many.add(sessions)
        return sessions

    def load_session(
        self,
        path: str | Path,
        memory: MemoryPolicy | None = None,
        *,
        archive: Archive | None = None,
        recall: Recall | None = None,
    ) -> Session:
        """A session as `Session.save` wrote it; its next token's logits are the same bits.

        Args:
            path: of the file.
            memory: as it was made with; None: one of this package's, which the file names.
            archive: the one that it was made with.
            recall: see `session`.

        Raises:
            SessionDamaged: there is no such file, or it is not whole.
            ConfigError: it was made with another model or memory.
        """
        return loaded_session(
            self._caches,
            self._worker,
            Path(path),
            memory,
            openings=self._openings,
            recalls=lambda name: self._recalls(archive, name, recall),
            known=self.known,
        )

    def archive(
        self,
        path_or_url: str | Path,
        *,
        collection: str = "kvrag-archive",
        embedding: Embedding | None = None,
        ttl_seconds: float | None = None,
    ) -> Archive:
        """Open what chats have said, to go on with: texts in a Chroma database, rows in the engine's store.

        Args:
            path_or_url: folder of a Chroma database, or address of a Chroma server; best a folder of its own,
                because of one folder only one process writes at a time.
            collection: its name; nothing but the archive's spans may be in it.
            embedding: any Chroma embedding function; None: the collection's, at first `HashedEmbedding`.
            ttl_seconds: time to live of its entries; None: the store's.

        Raises:
            ConfigError: the engine has no store, or the collection was made with another embedding.
            CorpusError: the database cannot be opened.
        """
        if self.store is None:
            raise ConfigError("an archive keeps rows in the engine's store; give the engine store='folder'")
        from kvrag.archive.archive import Archive  # noqa: PLC0415 - needs Chroma

        return Archive.open(
            path_or_url,
            self.store,
            self._caches.fingerprint_behind(()),
            collection=collection,
            embedding=embedding,
            ttl_seconds=ttl_seconds,
        )

    def _close_sessions(self) -> None:
        """Write those that have a folder.

        Raises:
            StoreWriteError: they cannot be written.
        """
        for sessions in list(self._many):
            sessions.close()

    def _memory(self, memory: MemoryPolicy | str, budget: int | str | None) -> MemoryPolicy:
        """A policy as callers name it."""
        if not isinstance(memory, str):
            if budget is not None:
                raise ConfigError(f"budget is {budget!r}, but {memory} has its own; give one of both")
            return memory
        if budget is None and memory != "full":
            budget = min(_USUAL_BUDGET, self.model.max_length // 2)
        return memory_policy(memory, budget, bytes_per_token=self.model.bytes_per_token)

    def _recalls(self, archive: Archive | None, name: str | None, recall: Recall | None) -> Recalls | None:
        if archive is None or name is None:
            return None
        from kvrag.archive.recall import SpanRecalls  # noqa: PLC0415 - needs Chroma

        return SpanRecalls(archive, self.model, name, recall)
