"""A conversation's text: what stands in front, what one more message adds, where messages begin and end."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from kvrag.errors import InputError
from kvrag.known import KnownTexts
from kvrag.messages import Message, Tool, from_user, normalized
from kvrag.prompt import INSTRUCTION
from kvrag.sessions.pinned import Opening
from kvrag.text import Text

_SAID, _HEARD = "\u2063said\u2063", "\u2063heard\u2063"


class Rendering:
    """Writes one session's conversations as the model's template does; without a template, as they come."""

    def __init__(
        self, text: Text, system: str | None, documents: Sequence[str], known: KnownTexts | None = None
    ) -> None:
        """Write for one session.

        Args:
            text: the tokenizer and its template.
            system: the session's system prompt; None: what a history brings.
            documents: texts that every conversation begins with.
            known: texts that may stand in front of one, too, and have caches.
        """
        self._text, self._known = text, known
        self._documents = tuple(document.strip() for document in documents)
        self._joined = "\n\n".join(self._documents)
        lead = system if system is not None or not documents else INSTRUCTION
        self._system = "\n\n".join(part for part in (lead, self._joined) if part)
        self._lead: str | None = None

    @property
    def has_template(self) -> bool:
        """Whether conversations are messages."""
        return self._text.has_template

    def whole(self, history: Sequence[Message], tools: Sequence[Tool] | None) -> str:
        """A history, up to where the next answer begins.

        Raises:
            InputError: it has no message, or the template refuses it.
        """
        return self._render(self._led(history), tools)

    def opening(self, history: Sequence[Message], tools: Sequence[Tool] | None, whole: str) -> Opening:
        """What stands in front of a history's first message that is not the system's.

        Args:
            history: the messages.
            tools: that may be called.
            whole: the history as it was written; what it does not begin with is no opening.
        """
        lead = [m for m in self._led(history)[:1] if m.get("role") == "system"]
        text = self._render([*lead, {"role": "user", "content": _SAID}], tools).partition(_SAID)[0]
        if not whole.startswith(text):
            text = ""
        return self._opening(text, is_rendered=True)

    def begun(self) -> Opening:
        """What stands in front of a conversation that the user begins."""
        if not self.has_template:
            return self._plain_opening()
        history = [{"role": "user", "content": _SAID}]
        return self.opening(history, None, self.whole(history, None))

    def plain(self, history: str) -> tuple[Opening, str]:
        """Opening and whole of a text that is used as it comes; the session's own opening is put in front."""
        opening = self._plain_opening()
        return opening, history if history.startswith(opening.text) else opening.text + history

    def _plain_opening(self) -> Opening:
        return self._opening(f"{self._system}\n\n" if self._system else "", is_rendered=False)

    def _opening(self, text: str, *, is_rendered: bool) -> Opening:
        if not self._documents or self._joined not in text:
            return self._among_known(text, is_rendered=is_rendered)
        prefix = text.partition(self._joined)[0]
        return Opening(text, self._documents, prefix, is_rendered)

    def _among_known(self, text: str, *, is_rendered: bool) -> Opening:
        """An opening whose documents are known texts that stand in it verbatim."""
        bare = Opening(text, is_rendered=is_rendered)
        if self._known is None:
            return bare
        found = {one.key: text[one.start : one.end] for one in self._known.find(text) if one.tier == "exact"}
        contexts = self._known.contexts(found)
        return replace(
            bare,
            documents=tuple(found.values()),
            prefix=self._known.prefix if found else "",
            names=tuple(found),
            contexts=tuple(tuple(contexts.get(key, ())) for key in found),
        )

    def addition(self, message: str) -> str:
        """What a message from the user adds behind an answer, up to where the next answer begins.

        Raises:
            InputError: the template leaves something out.
        """
        if not self.has_template:
            return message
        talk = [
            {"role": "user", "content": _SAID},
            {"role": "assistant", "content": _HEARD},
            {"role": "user", "content": message},
        ]
        _, found, added = self._render(self._led(talk), None).rpartition(_HEARD)
        if not found:
            raise InputError("the model's chat template leaves out what the assistant says")
        return added

    def borders(
        self, history: Sequence[Message], tools: Sequence[Tool] | None, whole: str, start: int
    ) -> dict[int, str]:
        """Places in a history where an answer begins or ends, behind `start`, and who speaks from there on.

        There the text is cut before it becomes tokens and strides, as it was when the answers were written.
        They come in order.
        """
        talk, before = self._led(history), ""
        found: dict[int, str] = {}
        for number in range(len(talk) - 1, -1, -1):
            if talk[number].get("role") != "assistant" or not number:
                continue
            with suppress(InputError):  # what no template writes has no place where it begins
                before = self._render(talk[:number], tools)
            if not before or not whole.startswith(before):
                continue
            said = str(talk[number]["content"])
            ends = {len(before): "assistant"}
            rest = whole[len(before) :]
            leads = (0, len(rest) - len(rest.lstrip()))  # some templates write a blank in front
            # Many leave out white space around it.
            forms = ((lead, form) for form in (said, said.strip()) for lead in leads)
            for lead, form in forms:
                if form and rest.startswith(form, lead):
                    ends[len(before) + lead + len(form)] = "user"
                    break
            found |= {end: role for end, role in ends.items() if start < end < len(whole)}
            if len(before) <= start:
                break
        return dict(sorted(found.items()))

    def _led(self, history: Sequence[Message]) -> list[dict[str, Any]]:
        """The messages with the session's system prompt in front, unless they bring their own."""
        talk = normalized(history)
        for message in talk:
            if message.get("role") == "assistant" and isinstance(said := message["content"], str):
                message["content"] = said.strip() if said and self.lead else said
        if not self._system:
            return talk
        if talk[0].get("role") == "system":
            own = talk[0]["content"]
            if not self._documents or self._joined in own:
                return talk
            return [{**talk[0], "content": f"{own}\n\n{self._joined}"}, *talk[1:]]
        return [{"role": "system", "content": self._system}, *talk]

    @property
    def lead(self) -> str:
        """White space that the template writes in front of answers, where the model is to write it itself.

        Answers begin with it then, and the template would write it twice.
        """
        if self._lead is None:
            self._lead = ""
            talk = [{"role": "user", "content": _SAID}, {"role": "assistant", "content": _HEARD}]
            with suppress(InputError):
                before, whole = self._render(talk[:1], None), self._render(talk, None)
                if whole.startswith(before):
                    between = whole[len(before) :].partition(_HEARD)[0]
                    self._lead = "" if between.strip() else between
        return self._lead

    def _render(self, talk: Sequence[Message], tools: Sequence[Tool] | None) -> str:
        """As the template writes it; for one that knows no system message, the user says it."""
        try:
            return self._text.render(talk, tools)
        except InputError:
            if not talk or talk[0].get("role") != "system":
                raise
            said = str(talk[0]["content"])
            return self._text.render(from_user(talk[1:], said), tools)
