"""Between text and tokens: piecewise tokenising, chat templates, streamed decoding, stop strings."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property, lru_cache
from typing import Any

from jinja2 import TemplateError
from tokenizers.decoders import DecodeStream

from kvrag.errors import InputError
from kvrag.grammars import Grammars
from kvrag.messages import (
    Message,
    Tool,
    as_documents,
    from_user,
    normalized,
    plain_documents,
    plain_tools,
    plain_turns,
    specifications,
    with_system,
)
from kvrag.store.key import tagged_digest

_MARK = "\u2063text\u2063"


class Text:
    """A tokenizer that works piece by piece.

    A prompt is tokenised span by span and the tokens are joined; the encoding of a whole prompt is never
    cut, because merges across a border would change the tokens on both sides of it.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Wrap a transformers tokenizer."""
        self.tokenizer = tokenizer
        self._encoded = lru_cache(maxsize=4096)(self._encode)  # chunks come again with every question

    def tokenize(self, text: str, *, first: bool = False) -> tuple[int, ...]:
        """Tokens of one piece.

        Args:
            text: the piece.
            first: put in front what the tokenizer puts in front of a text (BOS), unless the text already
                begins with it.
        """
        ids = self._encoded(text)
        lead = self.lead if first else ()
        return ids if not lead or ids[: len(lead)] == lead else lead + ids

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def ends(self, text: str) -> tuple[int, ...]:
        """For each token of a piece, the place behind its last character; empty if nobody can tell."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return ()
        return tuple(end for _, end in backend.encode(text, add_special_tokens=False).offsets)

    @cached_property
    def lead(self) -> tuple[int, ...]:
        """What the tokenizer puts in front of a text (BOS); often nothing."""
        bare = self.tokenizer.encode("a", add_special_tokens=False)
        full = self.tokenizer.encode("a")
        for i in range(len(full)):
            if full[i : i + len(bare)] == bare:
                return tuple(full[:i])
        return ()

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of an answer's tokens, special tokens left out."""
        text: str = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text

    def name(self, token: int) -> str:
        """Text of one token on its own; special tokens by their names."""
        text: str = self.tokenizer.decode([token], skip_special_tokens=False)
        return text

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None = None,
        documents: Sequence[str | Mapping[str, str]] | None = None,
        *,
        add_generation_prompt: bool = True,
    ) -> str:
        """A conversation as the model's chat template writes it.

        Tools, calls, their results, and documents go to the template if it writes them; else they are written
        the plain way (`kvrag.messages`): tools and documents at the end of the system message, or before what
        the user says first where a template knows no system message.

        Args:
            messages: see `kvrag.messages.normalized`.
            tools: functions that may be called, as JSON schemas.
            documents: texts, or dicts with `text` and `title`.
            add_generation_prompt: end with the beginning of an answer.

        Raises:
            InputError: the model has no chat template, or it refuses these messages.
        """
        if not self.has_template:
            raise InputError("this model has no chat template; give the prompt as text")
        talk, begin = normalized(messages), add_generation_prompt
        functions, texts = specifications(tools or ()), as_documents(documents or ())
        needs_tools = bool(functions) or any(m.get("role") == "tool" or "tool_calls" in m for m in talk)
        is_native = not needs_tools or self._knows_tools
        kept = texts if texts and self._knows_documents else []
        said = [plain_tools(functions)] if functions and not is_native else []
        said += [plain_documents(texts)] if texts and not kept else []
        if not is_native:
            talk = plain_turns(talk)
        if not said:
            return self._apply(talk, functions if is_native else [], kept, begin=begin)
        added = "\n\n".join(said)
        with suppress(InputError):
            text = self._apply(with_system(talk, added), functions if is_native else [], kept, begin=begin)
            if added.strip() in text:
                return text
        return self._apply(from_user(talk, added), functions if is_native else [], kept, begin=begin)

    def _apply(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] = (),
        documents: Sequence[Mapping[str, str]] = (),
        *,
        begin: bool = True,
    ) -> str:
        """What the template itself writes."""
        try:
            text: str = self.tokenizer.apply_chat_template(
                [dict(m) for m in messages],
                tools=list(tools) or None,
                documents=list(documents) or None,
                tokenize=False,
                add_generation_prompt=begin,
            )
        except (TemplateError, LookupError, TypeError, ValueError) as error:  # all that templates fail with
            raise InputError(f"the model's chat template refuses these messages: {error}") from error
        return text

    @cached_property
    def _knows_tools(self) -> bool:
        """Whether the template writes tools, calls and results: tried with names that no template has."""
        names = ["kvragtool", "kvragargument", "kvragvalue", "kvragresult"]
        tool, argument, value, result = names
        schema = {"type": "object", "properties": {argument: {"type": "string"}}}
        function = {"name": tool, "description": "d", "parameters": schema}
        call = {"id": "abcdefghi", "function": {"name": f"{tool}called", "arguments": {argument: value}}}
        talk: list[Message] = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": result, "name": tool, "tool_call_id": "abcdefghi"},
        ]
        with suppress(InputError):
            written = self._apply(normalized(talk), specifications([function]))
            return all(name in written for name in [*names, f"{tool}called"])
        return False

    @cached_property
    def _knows_documents(self) -> bool:
        """Whether the template writes documents."""
        with suppress(InputError):
            return "kvragtext" in self._apply(
                [{"role": "user", "content": "a"}], (), as_documents(["kvragtext"])
            )
        return False

    @cached_property
    def grammars(self) -> Grammars:
        """Constraints compiled for this tokenizer."""
        return Grammars(self.tokenizer)

    @cached_property
    def opening(self) -> str:
        """What the chat template writes before the text of a first message: what all conversations share.

        Of a system message, where the template knows such. It ends before a date that the template writes,
        because that is another one tomorrow, and before blanks, which tokenizers join to the next word;
        without a template it is empty.
        """
        if not self.has_template:
            return ""
        # In the template's own language: transformers hands no functions to templates.
        dateless = f"{{% macro strftime_now(format) %}}{_MARK}{{% endmacro %}}"
        for role in ("system", "user"):
            try:
                whole: str = self.tokenizer.apply_chat_template(
                    [{"role": role, "content": _MARK}],
                    chat_template=dateless + self.tokenizer.get_chat_template(),
                    tokenize=False,
                )
            except (TemplateError, LookupError, TypeError, ValueError):  # as in `render`
                continue
            return whole.partition(_MARK)[0].rstrip()
        return ""

    @property
    def has_template(self) -> bool:
        """Whether conversations can be rendered."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    @cached_property
    def digest(self) -> str:
        """256-bit digest of everything that turns text into tokens."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None:
            made = backend.to_str()
        else:
            made = json.dumps([self.tokenizer.get_vocab(), type(self.tokenizer).__name__], sort_keys=True)
        return tagged_digest({"tokenizer": made, "special": json.dumps(self.tokenizer.all_special_tokens)})


def joined_tokens(text: Text, pieces: Iterable[str]) -> tuple[int, ...]:
    """Tokens of pieces one behind the other, each tokenised on its own like the spans of a prompt."""
    return tuple(token for piece in pieces for token in text.tokenize(piece))


class Decoding:
    """Turns tokens into text as they come, never a piece of a character, never a piece of a stop string."""

    def __init__(self, text: Text, stop: Sequence[str] = ()) -> None:
        """Start an answer that ends before the first of `stop` appears."""
        self._text = text
        self._stop = tuple(s for s in stop if s)
        backend = getattr(text.tokenizer, "backend_tokenizer", None)
        self._backend: Any = backend
        self._stream = DecodeStream(skip_special_tokens=True) if backend is not None else None
        self._tokens: list[int] = []
        self._decoded = ""  # everything decoded so far
        self._given = 0  # how much of it was handed out
        self._ends: list[int] = []  # how much was decoded when each token's text was complete
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token; returns the text that is now certain, maybe empty."""
        self._tokens.append(token)
        if self._stream is not None:
            self._decoded += self._stream.step(self._backend, token) or ""
        else:
            whole = self._text.decode(self._tokens)
            self._decoded = whole if not whole.endswith("\ufffd") else self._decoded
        if len(self._decoded) > max(self._ends, default=0):  # else it is a piece of a character, or special
            self._ends += [len(self._decoded)] * (len(self._tokens) - len(self._ends))
        return self._release(final=False)

    def finish(self) -> str:
        """The rest of the text, once no token follows."""
        if not self.stopped:
            whole = self._text.decode(self._tokens)
            if whole.startswith(self._decoded):
                self._decoded = whole
        return self._release(final=True)

    @property
    def text(self) -> str:
        """Everything handed out so far."""
        return self._decoded[: self._given]

    @property
    def num_told(self) -> int:
        """How many tokens, from the first on, have all their text handed out."""
        return bisect_right(self._ends, self._given)

    @property
    def certain(self) -> tuple[int, int]:
        """`num_told`, and how many characters of `text` these tokens make."""
        return self.num_told, self._ends[self.num_told - 1] if self.num_told else 0

    def _release(self, *, final: bool) -> str:
        if self.stopped:
            return ""
        # The one that is complete first: then it does not matter how the text was cut into tokens.
        found = ((at + len(s), at) for s in self._stop if (at := self._decoded.find(s, self._given)) >= 0)
        first = min(found, default=None)
        if first is not None:
            self.stopped = True
            end = first[1]
        else:
            end = len(self._decoded) - (0 if final else self._held_back())
        piece = self._decoded[self._given : end]
        self._given = max(self._given, end)
        return piece

    def _held_back(self) -> int:
        """Length of the longest end of the text that may be the beginning of a stop string."""
        for size in range(min(max(map(len, self._stop), default=1) - 1, len(self._decoded)), 0, -1):
            tail = self._decoded[-size:]
            if any(s.startswith(tail) for s in self._stop):
                return size
        return 0
