"""Sessions of those who answer whole histories: by id, in a folder or in memory."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvrag import ConfigError, Engine, Sampling
from kvrag.chats import Chats, ChatSettings
from kvrag.constrain import choice
from kvrag.conversations import Conversations
from kvrag.memory.window import Window
from kvrag.model import Model
from kvrag.testing.models import tiny

SHORT = Sampling(max_new_tokens=4)


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny()


@pytest.fixture
def engine(model: Model) -> Iterator[Engine]:
    with Engine(model) as made:
        yield made


def test_an_engine_writes_its_sessions_when_it_is_closed(model: Model, tmp_path: Path) -> None:
    with Engine(model) as engine:
        engine.sessions(tmp_path, Window(48))["jane"].send("Hello", sampling=SHORT)
    with Engine(model) as engine:
        assert engine.sessions(tmp_path, Window(48))["jane"].num_turns == 1


def test_a_folder_is_opened_once_and_written_with_its_last_holder(engine: Engine, tmp_path: Path) -> None:
    settings = ChatSettings(sessions=tmp_path / "a" / ".." / "a", memory=Window(48))
    one, two = (
        Chats(engine, settings),
        Chats(engine, ChatSettings(sessions=str(tmp_path / "a"), memory=Window(48))),
    )
    session = one.find("jane")
    assert two.find("jane") is session
    assert copy.deepcopy(one) is copy.copy(one) is one
    session.send("Hello", sampling=SHORT)
    del one, session
    gc.collect()
    assert not list((tmp_path / "a").glob("*.session"))
    del two
    gc.collect()
    assert len(list((tmp_path / "a").glob("*.session"))) == 1
    assert Chats(engine, settings).find("jane").num_turns == 1


def test_ids_without_a_folder_are_kept_in_memory(engine: Engine) -> None:
    chats = Chats(engine, ChatSettings(memory="window", budget=48, options={"budget_bytes": 1}))
    session = chats.find("jane")
    assert chats.find("jane") is session
    assert chats.find(session) is session
    assert (session.name, session.settings.policy) == ("jane", Window(48))
    session.delete()
    assert chats.find("jane") is not session


def test_what_is_said_is_archived(model: Model, tmp_path: Path) -> None:
    secret = "The treasure lies under the juniper."
    made: dict[str, Any] = {"memory": Window(48), "archive": tmp_path / "archive"}
    with Engine(model, tmp_path / "store") as engine:
        for place in (tmp_path / "chats", None):
            chats = Chats(engine, ChatSettings(sessions=place, **made))
            session = chats.find(f"jane {place is None}")
            session.send(secret, sampling=SHORT)
            assert session.is_archived
            del chats, session
            gc.collect()
        with engine.archive(tmp_path / "archive") as archive:
            assert archive.sessions() == {"jane False": 1, "jane True": 1}
            given = Chats(engine, ChatSettings(memory=Window(48), archive=archive)).find("bob")
            given.send(secret, sampling=SHORT)
            assert archive.sessions()["bob"] == 1
    with Engine(model, tmp_path / "store") as engine:
        chats = Chats(engine, ChatSettings(sessions=tmp_path / "chats", **made))
        again = chats.find("jane False")
        assert (again.num_turns, again.is_archived) == (1, True)
        with pytest.raises(ConfigError, match="give both the same settings"):
            Chats(engine, ChatSettings(sessions=tmp_path / "chats", memory=Window(48))).find("jane")


def test_an_archive_needs_a_store_and_is_given_once(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="keeps rows in the engine's store"):
        Chats(engine, ChatSettings(archive=tmp_path)).find("jane")
    with pytest.raises(ConfigError, match="is given twice"):
        ChatSettings(archive=tmp_path, options={"archive": None})
    wrong: Any = 3
    with pytest.raises(ConfigError, match="archive is 3; expected a folder"):
        ChatSettings(archive=wrong)
    with engine.sessions(tmp_path / "chats") as sessions, pytest.raises(ConfigError, match="have their own"):
        ChatSettings(sessions=sessions, archive=tmp_path)


def test_what_cannot_be_found(engine: Engine, tmp_path: Path) -> None:
    chats = Chats(engine, ChatSettings())
    for named in ("", 3, None):
        with pytest.raises(ConfigError, match="expected an id, or a"):
            chats.find(named)
    with Engine(tiny()) as other, pytest.raises(ConfigError, match="belongs to another engine"):
        chats.find(other.session(Window(48)))


def test_answers_that_begin_as_the_template_does_are_known() -> None:
    """The reader writes the space that its template puts in front of answers."""
    with Engine.from_pretrained() as engine:
        session, history = engine.session(Window(64)), []
        for said in ("Hello", "Who?", "Why?"):
            history.append({"role": "user", "content": said})
            answer = session.reply_to(history, sampling=Sampling(max_new_tokens=12))
            assert answer.memory is not None
            assert (answer.memory.went_back, answer.memory.anew) == (0, False)
            assert answer.text.startswith(" ")
            history.append({"role": "assistant", "content": answer.text})
        fresh = engine.session(Window(64)).reply_to(history[:-1], sampling=Sampling(max_new_tokens=12))
        assert fresh.text == answer.text


def test_answers_that_keep_to_a_form_are_known() -> None:
    """Their form begins without the space that the reader's template puts in front of them."""
    with Engine.from_pretrained() as engine:
        session, history = engine.session(Window(64)), []
        for said in ("Hello", "Who?", "Why?"):
            history.append({"role": "user", "content": said})
            answer = session.reply_to(history, sampling=Sampling(constraint=choice(["Yes.", "No."])))
            assert answer.text in ("Yes.", "No.")
            assert answer.memory is not None
            assert (answer.memory.went_back, answer.memory.anew) == (0, False)
            history.append({"role": "assistant", "content": answer.text})


def test_conversations_are_listed_and_damaged_ones_left_out(engine: Engine, tmp_path: Path) -> None:
    kept = Conversations(tmp_path / "kept")
    assert kept.listed() == []
    assert not kept.delete("jane")
    session = kept.open(engine, "jane", Window(48), system="Be brief.")
    assert not kept.save(session).exists(), "nothing was said"
    session.send("Hello", sampling=SHORT)
    path = kept.save(session)
    (tmp_path / "kept" / "damaged.session").write_bytes(b"nothing")
    (one,) = kept.listed()
    assert (one.name, one.memory, one.budget, one.num_turns) == ("jane", "window", 48, 1)
    assert one.num_bytes > path.stat().st_size, "and its log"
    session.undo()
    assert not kept.save(session).exists()
    kept.close()
