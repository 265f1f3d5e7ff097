"""From a message or a whole history to what a turn has to read, and what is to stand in front of it."""

from __future__ import annotations

from collections.abc import Sequence

from kvrag.errors import InputError
from kvrag.known import KnownTexts
from kvrag.messages import Message, Tool
from kvrag.prefill import Work
from kvrag.sessions.digest import TextDigest
from kvrag.sessions.house import House
from kvrag.sessions.pinned import Opening, Pinned
from kvrag.sessions.rendering import Rendering
from kvrag.sessions.turn import Asked

History = str | Sequence[Message]


class Asking:
    """Finds out what is new for one session; only the thread that owns the model may call it."""

    def __init__(self, house: House, known: KnownTexts | None) -> None:
        """Serve one session.

        Args:
            house: where its conversation lives.
            known: texts with caches that may stand in front of a turn; None: they are not looked for.
        """
        self._house, self._settings, self.known = house, house.settings, known
        self._rendering = self._writing(house.settings.documents)

    def _writing(self, documents: Sequence[str]) -> Rendering:
        return Rendering(self._house.caches.model.text, self._settings.system, documents, self.known)

    def said(self, message: str, documents: Sequence[str] | None = None) -> Work[Asked]:
        """What a message adds.

        Args:
            message: what the user says.
            documents: that stand in front from now on; None: those that do.

        Raises:
            InputError: the template leaves something out, or these documents cannot stand there.
            ConfigError: they leave no positions.
        """
        writes = self._rendering if documents is None else self._writing(documents)
        talk = self._house.talk
        if talk is None or talk.is_empty:
            whole: History = [{"role": "user", "content": message}] if writes.has_template else message
            return (yield from self.asked(whole, None, writes))
        pinned, num_read = None, 0
        if documents is not None:
            pinned, num_read = yield from self._house.other(writes.begun())
        added = writes.addition(message)
        return Asked(added, said=message, lead=writes.lead, pinned=pinned, pinned_read=num_read)

    def asked(
        self, history: History, tools: Sequence[Tool] | None, writes: Rendering | None = None
    ) -> Work[Asked]:
        """What is new in a history; the session has a memory for it then.

        Args:
            history: messages, or the whole text.
            tools: that may be called.
            writes: renders it; None: as the session was made.

        Raises:
            InputError: there is nothing to answer, or the template refuses it.
        """
        writes = writes or self._rendering
        if isinstance(history, str):
            opening, whole = writes.plain(history)
        else:
            whole = writes.whole(history, tools)
            opening = writes.opening(history, tools, whole)
        text = whole[len(opening.text) :]
        if not text:
            raise InputError("there is nothing to answer; say something")
        known, pinned, num_read = yield from self._known_behind(opening, text)
        anew = False
        if known is None:
            anew = self._house.talk is not None and not self._house.talk.is_empty
            num_read = yield from self._house.begin(opening)
            known = (0, TextDigest())
        go_back, before = known
        start = before.length
        at = len(opening.text) + start
        borders = {} if isinstance(history, str) else writes.borders(history, tools, whole, at)
        return Asked(
            text[start:],
            {border - at: role for border, role in borders.items()},
            go_back,
            before,
            anew,
            first=not opening.is_rendered and not at,
            said=_last_said(history),
            lead="" if isinstance(history, str) else writes.lead,
            pinned=pinned,
            pinned_read=num_read,
        )

    def _known_behind(
        self, opening: Opening, text: str
    ) -> Work[tuple[tuple[int, TextDigest] | None, Pinned | None, int]]:
        """What of a text is known, as `Talk.known_beginning` says; what is to stand in front; tokens read."""
        talk = self._house.talk
        if talk is None:
            return None, None, 0
        if talk.pinned.opening == opening:
            return talk.known_beginning(text), None, 0
        known = talk.known_beginning(text) if self._settings.swaps_opening else None
        if known is None or not known[1].length:
            return None, None, 0
        try:
            return known, *(yield from self._house.other(opening))
        except InputError:  # too short for this memory
            return None, None, 0


def _last_said(history: History) -> str:
    """What the user said last."""
    if isinstance(history, str):
        return history
    said = [str(m.get("content") or "") for m in history if m.get("role") == "user"]
    return said[-1] if said else ""
