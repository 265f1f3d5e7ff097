"""What a session is made with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvrag.errors import ConfigError
from kvrag.memory.base import MemoryPolicy


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
        swaps_opening: what stands in front may be another text in every turn: it is put in the place of the
            one before, and the conversation is kept as it was read.
    """

    policy: MemoryPolicy
    system: str | None = None
    documents: Sequence[str] = ()
    stride: int = 128
    keeps_log: bool = True
    max_undo: int = 2
    swaps_opening: bool = False

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
            raise ConfigError(f"documents is {self.documents!r}; expected a list of texts")
        object.__setattr__(self, "documents", tuple(self.documents))

    def told(self) -> dict[str, Any]:
        """Everything but the policy, in JSON."""
        return {
            "system": self.system,
            "documents": list(self.documents),
            "stride": self.stride,
            "keeps_log": self.keeps_log,
            "max_undo": self.max_undo,
            "swaps_opening": self.swaps_opening,
        }
