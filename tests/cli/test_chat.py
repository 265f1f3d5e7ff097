"""kvrag chat: through a pipe, on a terminal, with everything that can be typed."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvrag import Engine, Sampling
from kvrag.cli import chatting
from kvrag.conversations import Conversations
from kvrag.home import Home
from kvrag.memory.policies import POLICIES
from kvrag.memory.window import Window

Run = Callable[..., Any]
Refused = Callable[[Any, str], None]
SECRET = "The treasure lies under the juniper."
SAID = ["Where is the ferry?", "And in winter?", "Who keeps the lighthouse?"]
SHORT = ("--max-new-tokens", "6", "--memory", "window", "--budget", "48")


@pytest.fixture
def chat(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`kvrag chat` with lines from a pipe."""

    def call(lines: list[str], *options: str | Path) -> Any:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return run("chat", "--model", model, *options)

    return call


def answers(model: Path, said: list[str], **options: Any) -> str:
    """What a session says that is driven directly, as it is printed."""
    with Engine.from_pretrained(model) as engine:
        session = engine.session(Window(48), **options)
        texts = [session.send(one, sampling=Sampling(max_new_tokens=6)).text for one in said]
    return "".join(f"{text.lstrip()}\n" for text in texts)


def shown(text: str) -> str:
    """As rich prints it: without bells and the like."""
    return re.sub(r"[\x07\x08\x0b\x0c\r]", "", text)


def test_the_help_names_every_memory() -> None:
    assert set(re.findall(r"[a-z]{3,}", chatting.MEMORIES)) == set(POLICIES)


def test_a_line_is_a_message_and_an_answer_a_line(chat: Run, model: Path) -> None:
    done = chat(["", *SAID, ""], *SHORT)
    assert (done.status, done.err) == (0, "")
    assert done.out == shown(answers(model, SAID))
    assert not Path(".kvrag/sessions").exists()


def test_a_session_goes_on_by_its_name(chat: Run, run: Run, model: Path) -> None:
    whole = shown(answers(model, SAID, system="Be brief."))
    first = chat(SAID[:2], *SHORT, "--session", "jane", "--system", "Be brief.")
    second = chat(SAID[2:], "--session", "jane", "--max-new-tokens", "6")
    assert first.out + second.out == whole
    (one,) = run("sessions", "--json").object["sessions"]
    assert (one["name"], one["num_turns"], one["memory"], one["budget"]) == ("jane", 3, "window", 48)
    listed = run("sessions").out.splitlines()
    assert re.search(r"^jane +3 +\d+ +window 48 +[\d.]+ KiB +2\d{3}-", listed[1])


def test_turns_are_taken_back(chat: Run, model: Path) -> None:
    done = chat([*SAID[:2], "/undo", SAID[1], "/undo 2", SAID[0]], *SHORT, "--session", "jane")
    lines = answers(model, SAID[:2]).splitlines()
    assert done.out == shown("".join(f"{line}\n" for line in [*lines, lines[1], lines[0]]))
    assert "took back 1; 1 turn is left" in done.err
    assert Conversations(Path(".kvrag/sessions")).listed()[0].num_turns == 1


def test_forks_files_and_what_is_deleted(chat: Run, model: Path) -> None:
    done = chat(
        [SAID[0], "/fork two", SAID[1], "/save talk.session", "/sessions"], *SHORT, "--session", "one"
    )
    assert done.status == 0
    kept = Conversations(Path(".kvrag/sessions")).listed()
    assert [(one.name, one.num_turns) for one in kept] == [("one", 1), ("two", 2)]
    assert all(name in done.out for name in ("one", "two"))
    loaded = chat([SAID[2]], "--load", "talk.session", "--max-new-tokens", "6")
    assert loaded.out == shown(answers(model, SAID)).splitlines()[2] + "\n"
    named = chat(["/delete one", "/delete", SAID[0]], "--session", "two", "--max-new-tokens", "6")
    assert named.out == shown(answers(model, SAID[:1]))
    assert [(one.name, one.num_turns) for one in Conversations(Path(".kvrag/sessions")).listed()] == [
        ("two", 1)
    ]


def test_what_is_forgotten_is_shown(chat: Run) -> None:
    done = chat(
        [*SAID, "/forgotten", "/stats"], "--memory", "window", "--budget", "20", "--max-new-tokens", "6"
    )
    found = re.search(r"^(\d+) of (\d+) tokens are in no layer and head any more:$", done.err, re.MULTILINE)
    assert found is not None
    assert int(found[1]) == int(found[2]) - 20
    assert re.search(r"^  \d to \d+: ", done.err, re.MULTILINE)
    assert f"said: {found[2]} tokens in 3 turns; 20 are still remembered" in done.err
    assert all(len(line) <= 80 for line in done.err.splitlines())
    assert "nothing is forgotten" in chat(["/forgotten"], *SHORT).err


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (["--memory", "full"], "full, no limit"),
        (["--budget", "40"], "cascade, at most 40"),
        (["--sub-caches", "2", "--budget", "64"], "cascade, at most 64"),
        (["--memory", "ladder", "--span", "2", "--budget", "40"], "ladder, at most 40"),
        (["--memory", "combined", "--budget", "40KB"], "combined, at most "),
        ([], "cascade, at most "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_every_memory_talks(chat: Run, options: list[str], name: str) -> None:
    done = chat([SAID[0], "/stats"], *options, "--max-new-tokens", "2")
    assert done.status == 0, done.err
    assert f"memory: {name}" in done.err


def test_documents_are_always_there(chat: Run, notes: Path) -> None:
    options = (*SHORT, "--document", str(notes / "a.txt"), "--document", str(notes / "b.md"))
    first = chat([SAID[0]], *options, "--session", "jane")
    assert first.status == 0
    assert any(Path(".kvrag/store").rglob("*.kv*")) or any(Path(".kvrag/store").rglob("*.safetensors"))
    again = chat([SAID[1]], "--session", "jane", "--max-new-tokens", "6")
    assert again.status == 0
    shares = re.findall(r"^ +(\d+)% #* +(\S.*?) +\((\d+) tokens, (.*)\)$", first.err, re.MULTILINE)
    assert sorted(name.rpartition("/")[2] for _, name, _, _ in shares) == ["a.txt", "b.md"]
    assert [int(share) for share, *_ in shares] == sorted((int(s) for s, *_ in shares), reverse=True)
    assert 98 <= sum(int(share) for share, *_ in shares) <= 102
    assert all(state == "read now" for *_, state in shares)
    assert len(re.findall(r"% .*The lighthouse of Varn.*cached\)$", again.err, re.MULTILINE)) == 1


def archived(home: Path = Path(".kvrag")) -> dict[str, int]:
    with Home(home).archive() as archive:
        return archive.sessions()


def test_what_is_forgotten_is_archived_and_comes_back(chat: Run, run: Run) -> None:
    options = ("--session", "jane", "--memory", "window", "--budget", "20", "--max-new-tokens", "6")
    first = chat([SECRET, *SAID, "/forgotten"], *options, "--archive")
    assert first.status == 0
    places = re.findall(r"^  \d+ to \d+, (archived|in part archived|lost): ", first.err, re.MULTILINE)
    assert places
    assert "lost" not in places
    again = chat(["Where is the treasure of the juniper?"], "--session", "jane", "--max-new-tokens", "6")
    assert re.search(r"^  recalled, \d+%, user in turn 1: .*treasure lies", again.err, re.MULTILINE)
    assert all(len(line) <= 80 for line in again.err.splitlines())
    assert run("sessions", "--json").object["sessions"][0]["is_archived"] is True
    assert "window 20 + archive" in run("sessions").out
    assert archived().keys() == {"jane"}
    chat(["/fork bob", "/save talk.session"], "--session", "jane")
    assert chat(["/forgotten"], "--load", "talk.session", "--session", "carl").status == 0
    assert archived().keys() == {"jane", "bob", "carl"}
    unnamed = chat(["/forgotten"], "--load", "talk.session")
    assert "archived" not in unnamed.err
    assert run("sessions", "--rm", "jane").status == 0
    assert archived().keys() == {"bob", "carl"}
    chat(["/delete carl", "/delete", SAID[0]], "--session", "bob", "--max-new-tokens", "6")
    assert archived() == {"bob": 1}
    assert b"juniper" not in b"".join(f.read_bytes() for f in Path(".kvrag").rglob("*") if f.is_file())


def test_a_conversation_can_be_archived_from_some_turn_on(chat: Run) -> None:
    options = ("--session", "jane", "--max-new-tokens", "6")
    assert chat([SECRET, SAID[0]], *options, "--memory", "window", "--budget", "20").status == 0
    done = chat([*SAID[1:], "/forgotten"], *options, "--archive")
    assert done.status == 0
    assert re.search(r"^  \d+ to \d+, in part archived: ", done.err, re.MULTILINE)
    assert not any("juniper" in span.text for span in spans("jane"))


def spans(name: str) -> Any:
    with Home(".kvrag").archive() as archive:
        return archive.spans(name)


def test_a_copy_takes_along_what_was_said_in_it_only(chat: Run) -> None:
    options = ("--session", "jane", "--max-new-tokens", "6")
    chat([SECRET, "/save talk.session"], *options, "--memory", "window", "--budget", "40", "--archive")
    chat(["/undo", "The weather is fine, and the sea is calm."], *options)
    assert not any("juniper" in span.text for span in spans("jane"))
    chat(["/stats"], "--load", "talk.session", "--session", "copy")
    assert spans("copy") == []


def test_a_key_encrypts_what_is_kept(
    chat: Run, run: Run, assert_refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVRAG_STORE_KEY", "ab" * 32)
    first = chat([SECRET], *SHORT, "--session", "jane", "--archive")
    assert (first.status, first.err) == (0, "")
    raw = b"".join(f.read_bytes() for f in Path(".kvrag").rglob("*") if f.is_file())
    assert b"juniper" not in raw
    assert b"jane" not in raw
    assert chat(["/undo"], "--session", "jane").status == 0
    assert chat([SECRET], *SHORT, "--session", "jane", "--archive").status == 0
    assert [one["name"] for one in run("sessions", "--json").object["sessions"]] == ["jane"]
    monkeypatch.setenv("KVRAG_STORE_KEY", "cd" * 32)
    assert_refused(run("sessions"), "is encrypted with the key")
    assert_refused(chat([SAID[0]], "--session", "jane"), "is encrypted with the key")
    monkeypatch.delenv("KVRAG_STORE_KEY")
    assert_refused(run("sessions"), "open it with the key that it was saved with")
    monkeypatch.setenv("KVRAG_STORE_KEY", "ab" * 32)
    assert run("sessions", "--rm", "jane").status == 0
    assert archived() == {}


def test_tenants_have_conversations_of_their_own(
    chat: Run, run: Run, assert_refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_refused(chat([SAID[0]], *SHORT, "--tenant", "acme"), "KVRAG_TENANT_KEY is not")
    assert_refused(run("sessions", "--tenant", "acme"), "KVRAG_TENANT_KEY is not")
    assert chat(SAID[:2], *SHORT, "--session", "jane").status == 0
    monkeypatch.setenv("KVRAG_TENANT_KEY", "ab" * 32)
    acme = ("--tenant", "acme")
    assert_refused(run("sessions"), "--tenant is not")
    assert run("sessions", *acme, "--json").object["sessions"] == []
    assert chat([SAID[0]], *SHORT, *acme, "--session", "jane", "--archive").status == 0
    (one,) = run("sessions", *acme, "--json").object["sessions"]
    assert (one["name"], one["num_turns"]) == ("jane", 1)
    assert_refused(run("sessions", *acme, "--rm", "bob"), "no session is called bob")
    assert run("sessions", *acme, "--rm", "jane").status == 0
    monkeypatch.delenv("KVRAG_TENANT_KEY")
    (one,) = run("sessions", "--json").object["sessions"]
    assert (one["name"], one["num_turns"]) == ("jane", 2)


def test_what_cannot_be_done(chat: Run, run: Run, assert_refused: Refused) -> None:
    assert_refused(chat(["/bogus"], *SHORT), "there is no /bogus; /help")
    assert_refused(chat(["/undo"], *SHORT), "can take back 0")
    assert_refused(chat(["/undo x"], *SHORT), "takes a number of turns")
    assert_refused(chat(["/save"], *SHORT), "no name")
    assert_refused(chat(["/fork"], *SHORT), "takes the name")
    assert_refused(chat(["/delete bob"], *SHORT), "no session is called bob")
    assert_refused(chat([], "--memory", "none"), "memory policy is 'none'; expected one of")
    assert_refused(chat([], "--budget", "much"), "expected tokens such as 4096, or bytes")
    assert_refused(chat([], "--memory", "full", "--budget", "8"), "full has no budget")
    assert_refused(chat([], "--memory", "ladder"), "ladder needs the setting 'span'")
    assert_refused(chat([], "--load", "nowhere"), "there is no session at nowhere")
    assert_refused(run("sessions", "--rm", "bob"), "no session is called bob")
    assert chat([SAID[0]], *SHORT, "--session", "jane").status == 0
    refused = chat([SAID[0]], "--session", "jane", "--budget", "64")
    assert_refused(refused, "the session 'jane' was made with memory")
    assert_refused(chat([], "--session", "jane", "--system", "Hi"), "was made with system prompt None")
    assert_refused(chat([], "--session", " "), "name of a session is empty")
    assert_refused(chat([], *SHORT, "--archive"), "name it with --session NAME")
    assert_refused(chat([], "--load", "nowhere", "--session", "bob", "--archive"), "leave the others out")


def test_one_process_at_a_time_has_a_session(chat: Run, assert_refused: Refused) -> None:
    assert chat([SAID[0]], *SHORT, "--session", "jane").status == 0
    other = Conversations(Path(".kvrag/sessions"))
    other._hold("jane")
    assert_refused(chat([SAID[0]], "--session", "jane"), "another process has the session 'jane'")
    assert chat([SAID[0]], *SHORT, "--session", "bob").status == 0
    other.close()
    assert chat(["/quit", SAID[0]], "--session", "jane").out == ""


class Terminal:
    """A program on a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self.leader, follower = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kvrag.cli", *arguments],
            stdin=follower,
            stdout=follower,
            stderr=follower,
            start_new_session=True,
            env={**os.environ, "TERM": "dumb", "PYTHONWARNINGS": "ignore"},
        )
        os.close(follower)
        self.seen = ""

    def wait_for(self, pattern: str) -> str:
        """What was printed until this came, which is then forgotten."""
        end = time.monotonic() + 120
        while not (found := re.search(pattern, self.seen)):
            assert time.monotonic() < end, f"{pattern!r} never came: {self.seen!r}"
            if select.select([self.leader], [], [], 1)[0]:
                try:
                    self.seen += os.read(self.leader, 65536).decode(errors="replace")
                except OSError:  # it has ended
                    assert re.search(pattern, self.seen), self.seen
        before, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return before

    def type(self, text: str) -> None:
        os.write(self.leader, text.encode())

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such terminals")
def test_an_interruption_stops_the_answer_and_a_second_one_leaves(model: Path, tmp_path: Path) -> None:
    home = ("--home", str(tmp_path / "home"), "--session", "jane")
    shell = Terminal("chat", *home, "--model", str(model), "--budget", "48", "--max-new-tokens", "100000")
    try:
        shell.wait_for(r"jane begins; /help lists what can be done\s+> ")
        shell.type("Where is the ferry?\n")
        shell.wait_for(r"ferry\?\s+\S{3}")
        shell.interrupt()
        shell.wait_for(r"stopped; the conversation is as it was before\s+> ")
        shell.type("/stats\n")
        shell.wait_for(r"said: 0 tokens in 0 turns[^>]*> ")
        shell.type("/nonsense\n")
        shell.wait_for(r"error:(\x1b\[0m)? there is no /nonsense[^>]*> ")
        shell.interrupt()
        assert shell.process.wait(60) == 0
    finally:
        shell.process.kill()
        shell.process.wait()
        os.close(shell.leader)
