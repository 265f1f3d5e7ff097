"""A conversation on the terminal or through a pipe: lines in, answers out, commands behind a slash."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Console

from kvrag.answer import Answer
from kvrag.cli.chatting import print_sessions
from kvrag.config import Sampling
from kvrag.conversations import Conversations
from kvrag.engine import Engine
from kvrag.errors import EngineClosed, GenerationCancelled, InputError, KVRagError
from kvrag.rag import Source
from kvrag.sessions.lost import Forgotten
from kvrag.sessions.session import Session
from kvrag.terminal import count, print_sources, print_spans, size, stderr, stdout, tell

PROMPT = "> "
_MOST = 0.99  # of a forgotten part: what says nothing is not archived


class Conversation:
    """Reads lines until there are none, and answers them.

    A line is a message, unless it begins with a slash; with two, it is a message that begins with one. A
    conversation that has a name is written behind every turn.
    """

    def __init__(
        self,
        engine: Engine,
        kept: Conversations,
        session: Session,
        sampling: Sampling,
        *,
        names: Sequence[str] = (),
    ) -> None:
        """Talk in a session.

        Args:
            engine: that answers.
            kept: where conversations with names are written.
            session: the conversation.
            sampling: how answers are chosen.
            names: of the session's documents; none: they are shown by how they begin.
        """
        self._names = list(names) or [" ".join(text.split())[:40] for text in session.settings.documents]
        self._engine, self._kept, self._session, self._sampling = engine, kept, session, sampling
        self._out = stdout()
        self._is_shown = sys.stdin.isatty() and self._out.is_terminal
        self._is_over = False
        self._commands: dict[str, tuple[Callable[[str], None], str, str]] = {
            "save": (self._save, "[FILE]", "write the conversation, here or to a file"),
            "undo": (self._undo, "[N]", "take the last turns back"),
            "forgotten": (self._forgotten, "", "what is in memory no more"),
            "fork": (self._fork, "NAME", "go on in a copy that is kept under this name"),
            "sessions": (self._sessions, "", "conversations that are kept"),
            "delete": (self._delete, "[NAME]", "remove a conversation; this one begins anew"),
            "stats": (self._stats, "", "how much was said, and what memory holds"),
            "help": (self._help, "", "these commands"),
            "quit": (self._quit, "", "leave"),
        }

    def run(self) -> None:
        """Talk until the lines end, or `/quit`.

        Raises:
            KVRagError: a line of a pipe cannot be answered; on a terminal this is told, and it goes on.
        """
        self._greet()
        for line in self._lines():
            try:
                self._do(line)
            except (EngineClosed, BrokenPipeError):
                raise
            except KVRagError as error:
                if not self._is_shown:
                    raise
                tell("error", str(error))
            if self._is_over:
                break

    def _greet(self) -> None:
        if not self._is_shown:
            return
        session, turns = self._session, self._session.num_turns
        if session.name is None:
            self._out.print("a new conversation, which is not kept; /help says how it can be")
        else:
            state = f"goes on behind turn {turns}" if turns else "begins"
            self._out.print(f"{session.name} {state}; /help lists what can be done")

    def _lines(self) -> Iterator[str]:
        """What is typed, or comes through a pipe; Ctrl-C and Ctrl-D at the prompt end it."""
        if not self._is_shown:
            yield from (line.rstrip("\r\n") for line in sys.stdin)
            return
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401, PLC0415 - lets `input` edit and recall lines
        while True:
            try:
                yield input(PROMPT)
            except (EOFError, KeyboardInterrupt):
                self._out.print("")
                return

    def _do(self, line: str) -> None:
        said = line.strip()
        if not said:
            return
        if said.startswith("/") and not said.startswith("//"):
            name, _, rest = said[1:].partition(" ")
            if name not in self._commands:
                raise InputError(f"there is no /{name}; /help lists what there is")
            self._commands[name][0](rest.strip())
            return
        self._answer(said.removeprefix("/") if said.startswith("//") else said)

    def _answer(self, said: str) -> None:
        """One turn; Ctrl-C takes it back."""
        stream = self._session.stream(said, sampling=self._sampling)
        has_begun = False
        try:
            with stream:
                for piece in stream:
                    text = piece if has_begun else piece.lstrip()
                    has_begun = has_begun or bool(text)
                    self._out.print(text, end="")
                    self._out.file.flush()
        except (KeyboardInterrupt, GenerationCancelled):
            self._out.print("")
            stderr().print("stopped; the conversation is as it was before")
            if not self._is_shown:
                raise
            return
        self._out.print("")
        if stream.answer is not None:
            self._tell(stream.answer)
        self._write()

    def _tell(self, answer: Answer) -> None:
        """What an answer rests on: documents, and what came back from the archive."""
        texts = self._session.settings.documents
        uses = sorted(answer.documents, key=lambda use: use.focus, reverse=True)
        print_sources(
            self._beside,
            [
                Source(
                    use.key,
                    self._names[int(use.key)],
                    texts[int(use.key)],
                    use.num_tokens,
                    use.is_hit,
                    use.mass,
                    use.focus,
                    use.question_mass,
                )
                for use in uses
            ],
        )
        spans = answer.memory.spans if answer.memory is not None else ()
        told = [
            (f"recalled, {span.mass:.0%}, {span.role} in turn {span.turn + 1}", span.text) for span in spans
        ]
        print_spans(told, self._say)

    @property
    def _beside(self) -> Console:
        """Where what is no answer goes: to the terminal, or beside a pipe's answers."""
        return self._out if self._is_shown else stderr()

    def _write(self) -> None:
        """Keep the conversation, if it has a name."""
        if self._session.name is not None:
            self._kept.save(self._session)

    def _say(self, text: str) -> None:
        self._beside.print(text)

    # ---- commands

    def _save(self, where: str) -> None:
        if where:
            self._session.save(Path(where).expanduser())
            self._say(f"wrote {where}; kvrag chat --load {where} goes on from it")
            return
        if self._session.name is None:
            raise InputError("this conversation has no name; /save FILE writes a file, /fork NAME names it")
        self._write()
        self._say(f"kept as {self._session.name}")

    def _undo(self, number: str) -> None:
        if number and not number.isdecimal():
            raise InputError(f"/undo takes a number of turns, not {number!r}")
        self._session.undo(int(number or 1))
        self._write()
        left = self._session.num_turns
        self._say(f"took back {number or 1}; {count(left, 'turn')} {'is' if left == 1 else 'are'} left")

    def _forgotten(self, _: str) -> None:
        spans = self._session.forgotten()
        if not spans:
            self._say("nothing is forgotten")
            return
        lost = sum(span.end - span.start for span in spans)
        self._say(f"{lost} of {self._session.num_tokens} tokens are in no layer and head any more:")
        print_spans([(self._place(span), span.text) for span in spans], self._say)

    def _place(self, span: Forgotten) -> str:
        """Where something forgotten stood, and whether it can come back."""
        place = f"{span.start} to {span.end - 1}"
        if not self._session.is_archived:
            return place
        kept = "archived" if span.archived >= _MOST else "lost" if not span.archived else "in part archived"
        return f"{place}, {kept}"

    def _fork(self, name: str) -> None:
        if not name:
            raise InputError("/fork takes the name of the copy")
        self._session = self._kept.fork(self._session, name)
        self._write()
        self._say(f"goes on as {name}")

    def _sessions(self, _: str) -> None:
        print_sessions(self._kept.listed())

    def _delete(self, name: str) -> None:
        if name and name != self._session.name:
            if not self._kept.delete(name):
                raise InputError(f"no session is called {name}; /sessions lists them")
            self._say(f"removed {name}")
            return
        old = self._session
        self._session = self._kept.anew(self._engine, old)
        old.delete()
        if old.name is not None:
            self._kept.delete(old.name)
        self._say("all of it is forgotten; the next message begins anew")

    def _stats(self, _: str) -> None:
        session = self._session
        lost = sum(span.end - span.start for span in session.forgotten())  # waits for a turn that ends
        said = session.num_tokens
        policy = session.settings.policy
        limit = "no limit" if policy.budget is None else f"at most {policy.budget} tokens a head"
        self._say(f"memory: {policy.name}, {limit}; takes {size(session.num_bytes)}")
        self._say(
            f"said: {count(said, 'token')} in {count(session.num_turns, 'turn')}; "
            f"{said - lost:,} are still remembered somewhere"
        )

    def _help(self, _: str) -> None:
        for name, (_function, arguments, text) in self._commands.items():
            self._say(f"  {f'/{name} {arguments}'.rstrip():<16} {text}")
        self._say("  Ctrl-C stops an answer, or leaves; // begins a message with a slash")

    def _quit(self, _: str) -> None:
        self._is_over = True
