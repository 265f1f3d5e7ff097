"""Saved sessions: the same bits in another process, whole or the old one after a crash, or a clear error."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kvrag import Engine, Sampling, Session
from kvrag.errors import ConfigError, InputError, SessionDamaged, StoreWriteError
from kvrag.memory.base import MemoryPolicy
from kvrag.memory.cascade import Cascade
from kvrag.memory.combined import LadderCascade
from kvrag.memory.full import Full
from kvrag.memory.ladder import Ladder
from kvrag.memory.window import Window
from kvrag.sessions import file
from kvrag.sessions.vault import vault_of
from kvrag.testing.models import tiny
from kvrag.testing.rings import Ring

POLICIES: list[MemoryPolicy] = [Full(), Window(48), Cascade(52), Ladder(48, span=2), LadderCascade(52)]
SHORT = Sampling(max_new_tokens=6)
SAID = ["Where is the ferry?", "And in winter?", "Who keeps the lighthouse of Varn?", "Since when?"]
CALLS = ("open", "replace", "unlink", "fsync", "mkdir", "write", "writev")

every_policy = pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.name)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(tiny(), pass_tokens=16) as made:
        yield made


def talked(engine: Engine, policy: MemoryPolicy, num_turns: int = 3, **options: Any) -> Session:
    session = engine.session(policy, system="Be brief.", **options)
    for said in SAID[:num_turns]:
        session.send(said, sampling=SHORT)
    return session


RESUMED = """
import sys
import torch
from kvrag import Engine, Sampling
from kvrag.testing.models import tiny

torch.set_num_threads(int(sys.argv[2]))
with Engine(tiny(), pass_tokens=16) as engine:
    for name in sys.argv[3:]:
        session = engine.load_session(f"{sys.argv[1]}/{name}.session")
        logits = session.logits("Since when?")
        answer = session.send("Since when?", sampling=Sampling(max_new_tokens=6))
        print(logits.numpy().tobytes().hex(), answer.text.encode().hex())
"""


def test_a_session_goes_on_in_another_process_with_the_same_bits(engine: Engine, tmp_path: Path) -> None:
    expected: list[str] = []
    for policy in POLICIES:
        session = talked(engine, policy)
        session.save(tmp_path / f"{policy.name}.session")
        logits = session.logits(SAID[3]).numpy().tobytes().hex()
        expected.append(f"{logits} {session.send(SAID[3], sampling=SHORT).text.encode().hex()}")
    names = [policy.name for policy in POLICIES]
    command = [sys.executable, "-c", RESUMED, str(tmp_path), str(torch.get_num_threads()), *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:-1] == expected


@every_policy
def test_a_loaded_session_can_do_what_the_other_could(
    engine: Engine, tmp_path: Path, policy: MemoryPolicy
) -> None:
    session = talked(engine, policy, name="mine")
    session.save(tmp_path / "a.session")
    other = engine.load_session(tmp_path / "a.session")
    assert other.settings == session.settings
    assert (other.name, other.num_tokens, other.num_turns) == ("mine", session.num_tokens, 3)
    assert other.forgotten() == session.forgotten()
    session.undo(2)
    other.undo(2)
    assert torch.equal(other.logits("Why?"), session.logits("Why?"))


@every_policy
def test_the_file_is_bounded_by_the_budget(engine: Engine, tmp_path: Path, policy: MemoryPolicy) -> None:
    if policy.budget is None:
        return
    path, sizes = tmp_path / "a.session", []
    session = engine.session(policy, system="Be brief.", max_undo=0)
    for _ in range(5):
        for said in SAID:
            session.send(said, sampling=SHORT)
        session.save(path)
        sizes.append(path.stat().st_size)
        (log,) = tmp_path.glob("*.tokens")
        assert log.stat().st_size == 4 * session.num_tokens
    assert max(sizes[1:]) - min(sizes[1:]) < 4096  # texts of digests, digits of numbers
    assert max(sizes) < engine.model.bytes_per_token * (policy.budget + 32) + 40_000


def test_a_log_is_begun_anew_where_turns_were_taken_back(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "a.session"
    session = talked(engine, Window(48))
    session.save(path)
    session.undo()
    session.send("Another one?", sampling=SHORT)
    session.save(path)
    assert [p.name for p in tmp_path.glob("*.tokens")] == ["a.session.2.tokens"]
    other = engine.load_session(path)
    assert torch.equal(other.logits("Why?"), session.logits("Why?"))
    assert other.forgotten() == session.forgotten()


class _Dies:
    """Kills the process at its n-th call of the operating system; counts them otherwise."""

    def __init__(self, at: int, act: Callable[[], None]) -> None:
        self.at, self.act, self.count = at, act, 0

    def __enter__(self) -> _Dies:
        self.real = {name: getattr(os, name) for name in CALLS}
        for name, function in self.real.items():
            setattr(os, name, self._wrapped(function))
        return self

    def __exit__(self, *_: object) -> None:
        for name, function in self.real.items():
            setattr(os, name, function)

    def _wrapped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            self.count += 1
            if self.count == self.at:
                self.act()
            return function(*arguments, **named)

        return call


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def saving(engine: Engine, session: Session, path: Path) -> Callable[[], None]:
    """What `Session.save` does, on this thread: a forked process has no other."""
    assert session._talk is not None
    talk = session._talk
    about = {"name": None, **session.settings.told()}
    vault = vault_of(session.house.caches)
    return lambda: file.save(path, talk, session.settings.policy, engine.model, about, vault)


@pytest.mark.parametrize(
    ("policy", "key"),
    [*((policy, "") for policy in POLICIES), (Cascade(52), "ab" * 32)],
    ids=[*(policy.name for policy in POLICIES), "encrypted"],
)
def test_killed_at_every_step_of_saving(
    engine: Engine, tmp_path: Path, policy: MemoryPolicy, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old session or the new one: with the logits of the one that was never interrupted."""
    monkeypatch.setenv("KVRAG_STORE_KEY", key)
    path = tmp_path / "a.session"
    session = talked(engine, policy, 2)
    session.save(path)
    old = session.logits("Why?")
    session.send(SAID[2], sampling=SHORT)
    new, save = session.logits("Why?"), saving(engine, session, path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with _Dies(0, kill) as steps:
        save()
    found = []
    for step in range(1, steps.count + 1):
        for left in tmp_path.iterdir():
            left.unlink()
        for name, data in before.items():
            (tmp_path / name).write_bytes(data)
        child = os.fork()
        if child == 0:
            with _Dies(step, kill):
                save()
            os._exit(1)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        loaded = engine.load_session(path)
        logits = loaded.logits("Why?")
        found.append("old" if torch.equal(logits, old) else "new" if torch.equal(logits, new) else "none")
        assert loaded._talk is not None
        assert loaded._talk.log is not None
        assert len(loaded._talk.log) == loaded.num_tokens
        save()  # whatever was left does not stand in the way, and is gone
        assert torch.equal(engine.load_session(path).logits("Why?"), new)
        assert len(list(tmp_path.iterdir())) == 2
    assert found == sorted(found, reverse=True)
    assert set(found) == {"old", "new"}


def test_a_full_disk_leaves_the_old_file(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "a.session"
    session = talked(engine, Window(48), 2)
    session.save(path)
    old = session.logits("Why?")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    session.send(SAID[2], sampling=SHORT)
    new, save = session.logits("Why?"), saving(engine, session, path)
    with _Dies(0, kill) as steps:
        save()

    def full() -> None:
        raise OSError(28, "No space left on device")

    def outcome(step: int) -> str | None:
        try:
            with _Dies(step, full):
                save()
        except StoreWriteError as error:
            return str(error)
        return None

    failed, found = [], []
    for step in range(1, steps.count + 1):
        for left in tmp_path.iterdir():
            left.unlink()
        for name, data in before.items():
            (tmp_path / name).write_bytes(data)
        said = outcome(step)
        assert said is None or "free some space" in said
        logits = engine.load_session(path).logits("Why?")
        found.append("old" if torch.equal(logits, old) else "new" if torch.equal(logits, new) else "none")
        assert said is not None or found[-1] == "new"
        failed.append(said is not None)
    # Only where the folder could not be synced has the file its new name already.
    assert found == sorted(found, reverse=True)
    assert failed.count(True) - found.count("old") <= 2


@pytest.mark.parametrize("place", [3, 20, 5000, -30, -5])
def test_damage_is_a_clear_error(engine: Engine, tmp_path: Path, place: int) -> None:
    path = tmp_path / "a.session"
    talked(engine, Window(48), 2).save(path)
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)
    with pytest.raises(SessionDamaged, match="is not a session, or is damaged"):
        engine.load_session(path)


def test_what_is_no_session_is_a_clear_error(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "a.session"
    with pytest.raises(SessionDamaged, match="there is no session at"):
        engine.load_session(path)
    for content in (b"", b"hello", b"\xff" * 100, bytes(1000)):
        path.write_bytes(content)
        with pytest.raises(SessionDamaged):
            engine.load_session(path)
    talked(engine, Window(48), 2).save(path)
    whole = path.read_bytes()
    for size in (10, 1000, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(SessionDamaged):
            engine.load_session(path)
    path.write_bytes(whole)
    (log,) = tmp_path.glob("*.tokens")
    log.write_bytes(bytes(len(log.read_bytes())))
    with pytest.raises(SessionDamaged, match="its tokens are other ones"):
        engine.load_session(path)
    log.unlink()
    with pytest.raises(SessionDamaged):
        engine.load_session(path)


def test_another_model_or_memory_is_refused(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "a.session"
    talked(engine, Window(48), 2).save(path)
    with Engine(tiny(seed=1)) as other, pytest.raises(ConfigError, match="saved with another model"):
        other.load_session(path)
    with pytest.raises(ConfigError, match="open it with that one"):
        engine.load_session(path, Window(49))
    with pytest.raises(InputError, match="nothing to save"):
        engine.session(Window(48)).save(path)
    talked(engine, Ring(48), 2).save(path)
    with pytest.raises(ConfigError, match="which has to be given"):
        engine.load_session(path)
    assert engine.load_session(path, Ring(48)).num_turns == 2


def test_documents_come_from_the_store_again(engine: Engine, tmp_path: Path) -> None:
    documents = ["The ferry crosses the Mirrow twice a day.", "The lighthouse of Varn was built in 1871."]
    path = tmp_path / "a.session"
    with Engine(engine.model, tmp_path / "store", pass_tokens=16, recompute="never") as kept:
        session = kept.session(Window(48), documents=documents)
        session.send(SAID[0], sampling=SHORT)
        session.save(path)
        logits = session.logits("Why?")
    with Engine(engine.model, tmp_path / "store", pass_tokens=16, recompute="never") as kept:
        other = kept.load_session(path)
        assert torch.equal(other.logits("Why?"), logits)
        assert other._talk is not None
        assert other._talk.pinned.is_hit == (True, True)
        twin = kept.session(Window(48), documents=documents)
        twin.send(SAID[0], sampling=SHORT)
        assert twin._talk is not None
        assert twin._talk.pinned is other._talk.pinned
