"""Many sessions under one budget: the least recently used wait on disk and come back as they were."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kvrag import Engine, Sampling
from kvrag.errors import ConfigError, SessionDamaged, SessionError
from kvrag.memory.cascade import Cascade
from kvrag.memory.window import Window
from kvrag.testing.models import tiny

SHORT = Sampling(max_new_tokens=5)
POLICY = Cascade(36)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(tiny(), pass_tokens=16) as made:
        yield made


def said(name: str, turn: int) -> str:
    return f"Turn {turn} of {name}: where is the ferry?"


def test_parked_sessions_come_back_as_they_were(engine: Engine, tmp_path: Path) -> None:
    names = ["anna", "bert", "carl", "dora/../x"]
    one = engine.session(POLICY)
    one.send("Hello there, how are you all today?", sampling=SHORT)
    with engine.sessions(tmp_path, POLICY, budget_bytes=2 * one.num_bytes) as sessions:
        for turn in range(4):
            for name in names:
                sessions[name].send(said(name, turn), sampling=SHORT)
                assert sessions.num_bytes <= 2 * one.num_bytes
        assert sessions.num_awake < len(names)
        assert sessions.names() == sorted(names)
        for name in names:
            alone = engine.session(POLICY)
            for turn in range(4):
                alone.send(said(name, turn), sampling=SHORT)
            assert torch.equal(sessions[name].logits("Why?"), alone.logits("Why?"))
            assert (sessions[name].num_tokens, sessions[name].num_turns) == (alone.num_tokens, 4)
            assert sessions[name].forgotten() == alone.forgotten()
            sessions[name].undo()
            alone.undo()
            assert torch.equal(sessions[name].logits("Why?"), alone.logits("Why?"))


def test_all_of_them_are_there_after_a_restart(engine: Engine, tmp_path: Path) -> None:
    logits = {}
    with engine.sessions(tmp_path, "window", budget=40) as sessions:
        for name in ("anna", "bert"):
            sessions[name].send(said(name, 0), sampling=SHORT)
            logits[name] = sessions[name].logits("Why?")
    with engine.sessions(tmp_path, "window", budget=40) as sessions:
        assert sessions.names() == ["anna", "bert"]
        assert "anna" in sessions
        assert "carl" not in sessions
        assert sessions["anna"].num_turns == 1
        for name in ("anna", "bert"):
            assert torch.equal(sessions[name].logits("Why?"), logits[name])
    with pytest.raises(SessionError, match="were closed"):
        sessions["anna"]


def test_deleting_one_leaves_nothing_of_it(engine: Engine, tmp_path: Path) -> None:
    with engine.sessions(tmp_path, POLICY, budget_bytes=0) as sessions:
        for name in ("anna", "bert"):
            sessions[name].send(said(name, 0), sampling=SHORT)
        held = sessions["anna"]
        assert sessions.delete("anna")
        assert not sessions.delete("anna")
        assert sessions.names() == ["bert"]
        assert len(list(tmp_path.iterdir())) == 3  # one session, its tokens, the lock
        with pytest.raises(SessionError, match="was deleted"):
            held.send("Hello")
        sessions["anna"].send(said("anna", 1), sampling=SHORT)
        assert sessions["anna"].num_turns == 1


def test_a_fork_has_an_id_of_its_own(engine: Engine, tmp_path: Path) -> None:
    with engine.sessions(tmp_path, POLICY) as sessions:
        sessions["anna"].send(said("anna", 0), sampling=SHORT)
        sessions.fork("anna", "bert")
        with pytest.raises(SessionError, match="there is a session 'bert'"):
            sessions.fork("anna", "bert")
        before = sessions["anna"].logits("Why?")
        sessions["bert"].send(said("bert", 1), sampling=SHORT)
        assert torch.equal(sessions["anna"].logits("Why?"), before)
    with engine.sessions(tmp_path, POLICY) as sessions:
        assert (sessions["anna"].num_turns, sessions["bert"].num_turns) == (1, 2)


def test_a_damaged_one_is_read_anew_from_its_history_and_refuses_more(engine: Engine, tmp_path: Path) -> None:
    history = [{"role": "user", "content": "Hello, where is the ferry?"}]
    with engine.sessions(tmp_path, POLICY, budget_bytes=0) as sessions:
        answer = sessions["anna"].reply_to(history, sampling=SHORT)
        history += [
            {"role": "assistant", "content": answer.text},
            {"role": "user", "content": "And in winter?"},
        ]
        expected = sessions["anna"].reply_to(history, sampling=SHORT)
        (path,) = tmp_path.glob("*.session")
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(SessionDamaged):
            sessions["anna"].send("Hello")
        again = sessions["anna"].reply_to(history, sampling=SHORT)
        assert again.memory is not None
        assert expected.memory is not None
        assert again.memory.read > expected.memory.read


def test_many_threads(engine: Engine, tmp_path: Path) -> None:
    names = [f"user {i}" for i in range(6)]
    with engine.sessions(tmp_path, Window(30), budget_bytes=60_000) as sessions:

        def talk(name: str) -> None:
            for turn in range(3):
                sessions[name].send(said(name, turn), sampling=SHORT)

        threads = [threading.Thread(target=talk, args=(name,)) for name in names for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(sessions[name].num_turns == 6 for name in names)
        assert sessions.num_bytes <= 60_000


def test_one_process_has_the_folder(engine: Engine, tmp_path: Path) -> None:
    with (
        engine.sessions(tmp_path, POLICY),
        pytest.raises(SessionError, match="another process has the sessions"),
    ):
        engine.sessions(tmp_path, POLICY)
    engine.sessions(tmp_path, POLICY).close()


def test_a_negative_budget_is_refused(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="budget_bytes is -1"):
        engine.sessions(tmp_path, POLICY, budget_bytes=-1)
