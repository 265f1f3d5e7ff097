"""Engines that several holders use at once, and that are closed with the last of them."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvrag.engine import Engine
from kvrag.errors import ConfigError
from kvrag.focus.policy import PLAIN, Policy
from kvrag.known import KnownTexts
from kvrag.model import READER
from kvrag.store.base import KVStore
from kvrag.tiers import Tier


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How an engine is made; equal settings mean one engine. See `Engine.from_pretrained`.

    Attributes:
        model: folder or hub name of a decoder.
        store: a folder, a store, or None to keep nothing.
        device: where it computes; None: the GPU if there is one.
        dtype: of its weights.
        max_length: longest prompt plus answer in tokens; None: the model's own limit.
        policy: what answers do with their documents, unless they have one of their own.
        codec: how rows are written to the store.
        tiers: what counts as finding a text in a prompt, beside its exact words (`kvrag.KnownTexts`).
        options: more arguments of `Engine.from_pretrained`, by name.
    """

    model: str = READER
    store: str | Path | KVStore | None = None
    device: str | None = None
    dtype: str = "auto"
    max_length: int | None = None
    policy: Policy | str = PLAIN
    codec: str = "raw"
    tiers: tuple[Tier, ...] = ()
    options: tuple[tuple[str, Any], ...] = field(default=())

    def load(self) -> Engine:
        """A new engine."""
        return Engine.from_pretrained(
            self.model,
            store=self.store,
            device=self.device,
            dtype=self.dtype,
            max_length=self.max_length,
            policy=self.policy,
            codec=self.codec,
            known=KnownTexts(self.tiers),
            **dict(self.options),
        )

    @property
    def identity(self) -> tuple[object, ...]:
        """What makes two settings one engine: a folder by its full path, a store by itself."""
        store: object = self.store
        if isinstance(self.store, (str, Path)):
            store = str(Path(self.store).resolve())
        elif self.store is not None:
            store = id(self.store)
        return (
            self.model,
            store,
            self.device,
            self.dtype,
            self.max_length,
            self.policy if isinstance(self.policy, str) else repr(self.policy),
            self.codec,
            self.tiers,
            self.options,
        )


class SharedEngine:
    """A share of an engine: while one of them lives, the engine does.

    Copies, deep ones included, are the same share. An engine that the caller made (`own`) is the
    caller's to close.
    """

    def __init__(self, engine: Engine, *, own: bool = True) -> None:
        """Hold an engine.

        Args:
            engine: the engine.
            own: close it when nobody holds this share any more.
        """
        self.engine = engine
        if own:
            weakref.finalize(self, engine.close)

    def __copy__(self) -> SharedEngine:
        """The same share."""
        return self

    def __deepcopy__(self, _: dict[int, object]) -> SharedEngine:
        """The same share."""
        return self

    def __reduce__(self) -> Any:
        """Refused: a thread and a model in memory do not travel.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "a running engine cannot be pickled; name model and store, so that the other side loads them"
        )


_shares: weakref.WeakValueDictionary[tuple[object, ...], SharedEngine] = weakref.WeakValueDictionary()
_lock = threading.Lock()


def shared_engine(settings: EngineSettings) -> SharedEngine:
    """The engine with these settings; loaded if nobody holds it yet.

    Raises:
        ConfigError: no such model here, damaged files, or an impossible setting.
        UnsupportedModel: a model that cannot be re-positioned exactly.
    """
    with _lock:  # two that ask at once wait for one load instead of loading twice
        share = _shares.get(settings.identity)
        if share is None or share.engine.is_closed:
            share = _shares[settings.identity] = SharedEngine(settings.load())
        return share
