"""Sessions with an archive: what comes back, what is undone, and what never mixes."""

from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

import pytest
import torch

from kvrag.archive.archive import Archive
from kvrag.archive.recall import Recall
from kvrag.config import Sampling
from kvrag.engine import Engine
from kvrag.errors import ConfigError, GenerationCancelled, InputError, SessionError
from kvrag.memory.cascade import Cascade
from kvrag.memory.full import Full
from kvrag.memory.window import Window
from kvrag.messages import Message
from kvrag.model import Model
from kvrag.reader import prose
from kvrag.reader.chats import Chat, distant
from kvrag.reader.tokenizer import SYSTEM_CHAT
from kvrag.reader.world import World
from kvrag.sessions.session import Session
from kvrag.store.disk import DiskStore
from kvrag.testing.files import holding
from kvrag.testing.models import tiny

BUDGET = 128
SHORT = Sampling(max_new_tokens=6)
FACT, QUESTION, ANSWER = "Bron Poberg lives in Vouport.", "Where does Bron Poberg live?", "Vouport"
ECHO = "Where does Bron Poberg live, I asked."


@cache
def reader() -> Model:
    return Model.load()


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    with Engine(reader(), tmp_path / "store") as engine:
        yield engine


@pytest.fixture
def archive(engine: Engine, tmp_path: Path) -> Iterator[Archive]:
    with engine.archive(tmp_path / "chats") as archive:
        yield archive


def session_of(
    engine: Engine, archive: Archive | None, name: str = "a", recall: Recall | None = None
) -> Session:
    return engine.session(Window(BUDGET), name=name, system=SYSTEM_CHAT, archive=archive, recall=recall)


def history(chat: Chat) -> list[Message]:
    """All of a chat but its last answer."""
    said = [
        message
        for turn in chat.turns
        for message in (
            {"role": "user", "content": turn.user},
            {"role": "assistant", "content": turn.assistant},
        )
    ]
    return said[:-1]


def bury(session: Session, num_turns: int = 14) -> None:
    """Talk until what was said before is forgotten."""
    for number in range(num_turns):
        session.send(prose.TALK[number % len(prose.TALK)][0], sampling=SHORT)


def texts(archive: Archive, name: str = "a") -> str:
    return " ".join(span.text for span in archive.spans(name))


def test_facts_told_far_beyond_the_budget_are_answered_with_an_archive_and_not_without(
    engine: Engine, archive: Archive
) -> None:
    world, right = World(500, held_out=True), {True: 0, False: 0}
    for number in range(8):
        chat = distant(world, 40)
        asked = chat.turns[-1].question
        assert asked is not None
        for with_archive in right:
            session = session_of(engine, archive if with_archive else None, f"chat {number}")
            answer = session.reply_to(history(chat), sampling=Sampling(max_new_tokens=24))
            assert answer.memory is not None
            right[with_archive] += answer.text.strip() == asked.answer
            assert answer.memory.remembered <= BUDGET
            assert session.num_bytes <= 1.1 * BUDGET * _bytes_per_token()
    assert right[False] <= 1
    assert right[True] >= 7


def _bytes_per_token() -> int:
    config = reader().network.config
    return 2 * 4 * int(config.num_hidden_layers * config.num_key_value_heads * config.head_dim)


def test_the_reply_says_what_came_back(engine: Engine, archive: Archive) -> None:
    session = session_of(engine, archive)
    session.send(FACT, sampling=SHORT)
    bury(session)
    answer = session.send(QUESTION)
    assert ANSWER in answer.text
    assert answer.memory is not None
    (span,) = [span for span in answer.memory.spans if ANSWER in span.text]
    assert (span.turn, span.role, span.start, span.is_hit) == (0, "user", 0, True)
    assert answer.memory.recalled == sum(s.num_tokens for s in answer.memory.spans)
    assert span.mass == max(s.mass for s in answer.memory.spans) > 0
    bury(session, 1)
    later = session.send("The weather is fine.", sampling=SHORT).memory
    assert later is not None  # what came back served that turn only
    assert later.remembered <= BUDGET


def test_the_least_looked_at_do_not_come_back(engine: Engine, archive: Archive) -> None:
    session = session_of(engine, archive, recall=Recall(search=6, below=0.0, keep=6))
    strict = session_of(engine, archive, "strict", recall=Recall(search=6, below=0.9))
    for one in (session, strict):
        one.send(FACT, sampling=SHORT)
        bury(one)
    every, few = session.send(QUESTION).memory, strict.send(QUESTION).memory
    assert every is not None
    assert few is not None
    assert len(every.spans) == 6
    assert [ANSWER in span.text for span in few.spans] == [True]


def test_search_and_attention_decide_together(engine: Engine, archive: Archive) -> None:
    found = {}
    for nearness in (0.0, 1e6):
        session = session_of(engine, archive, str(nearness), recall=Recall(keep=1, nearness=nearness))
        for said in (FACT, ECHO):
            session.send(said, sampling=SHORT)
            bury(session)
        memory = session.send(QUESTION).memory
        assert memory is not None
        (span,) = memory.spans
        found[nearness] = span.text
    assert ANSWER in found[0.0]  # what the question looks at
    assert ECHO in found[1e6]  # what repeats its words


def test_what_memory_holds_is_not_brought_back(engine: Engine, archive: Archive) -> None:
    whole = engine.session(Full(), name="whole", system=SYSTEM_CHAT, archive=archive)
    plain = engine.session(Full(), system=SYSTEM_CHAT)
    for one in (whole, plain):
        one.send(FACT, sampling=SHORT)
        bury(one, 3)
    assert torch.equal(whole.logits(QUESTION), plain.logits(QUESTION))
    answer = whole.send(QUESTION)
    assert answer.memory is not None
    assert answer.memory.spans == ()
    assert answer.tokens == plain.send(QUESTION).tokens
    assert archive.counts["hits"] == 0


def test_undone_turns_are_not_found(engine: Engine, archive: Archive) -> None:
    session = session_of(engine, archive)
    session.send("The weather is fine.", sampling=SHORT)
    before = texts(archive)
    session.send(FACT, sampling=SHORT)
    assert ANSWER in texts(archive)
    session.undo()
    assert texts(archive) == before
    bury(session)
    assert ANSWER not in session.send(QUESTION).text


def test_a_turn_that_is_edited_replaces_its_spans(engine: Engine, archive: Archive) -> None:
    session = session_of(engine, archive)
    said: list[Message] = [{"role": "user", "content": "The weather is fine."}]
    first = session.reply_to(said, sampling=SHORT).text
    said += [{"role": "assistant", "content": first}, {"role": "user", "content": FACT}]
    session.reply_to(said, sampling=SHORT)
    said[-1] = {"role": "user", "content": FACT.replace("Vouport", "Mafield")}
    edited = session.reply_to(said, sampling=SHORT).memory
    assert edited is not None
    assert edited.went_back == 1
    assert "Mafield" in texts(archive)
    assert ANSWER not in texts(archive)
    assert set(archive._store.ids()) == set(archive._references.of(archive.index.id).values())


def test_a_failed_turn_leaves_the_archive_as_it_was(engine: Engine, archive: Archive) -> None:
    session = session_of(engine, archive)
    said: list[Message] = [{"role": "user", "content": FACT}]
    session.reply_to(said, sampling=SHORT)
    before = archive.spans("a")
    edited: list[Message] = [{"role": "user", "content": "Another beginning, said in a longer turn."}]
    for change in (edited, [*said, {"role": "assistant", "content": "No."}, *edited]):
        stream = session.stream_reply(change, sampling=Sampling(max_new_tokens=500, ignore_eos=True))
        next(iter(stream))
        stream.cancel()
        with suppress(GenerationCancelled):
            list(stream)
    session.send("The weather is fine.", sampling=SHORT)
    assert archive.spans("a")[: len(before)] == before or session.num_turns == 1


def test_a_copy_has_what_was_said_before_and_nothing_said_behind(engine: Engine, archive: Archive) -> None:
    session = session_of(engine, archive)
    session.send(FACT, sampling=SHORT)
    copy = session.fork("b")
    session.send("Only here: Peor Tools sells boats.", sampling=SHORT)
    copy.send("Only there: Peor Tools sells lamps.", sampling=SHORT)
    assert "boats" not in texts(archive, "b")
    assert "lamps" not in texts(archive, "a")
    session.delete()
    assert archive.sessions().keys() == {"b"}
    bury(copy)
    answer = copy.send(QUESTION)
    assert ANSWER in answer.text
    assert answer.memory is not None
    assert answer.memory.spans[0].is_hit


def test_a_copy_without_an_id_gets_one(engine: Engine, archive: Archive) -> None:
    session = session_of(engine, archive)
    session.send(FACT, sampling=SHORT)
    copy = session.fork()
    assert copy.name
    assert copy.name in archive.sessions()
    assert engine.session(Window(BUDGET), archive=archive).name


def test_sessions_of_one_archive_hear_nothing_of_each_other(engine: Engine, archive: Archive) -> None:
    one, other = session_of(engine, archive, "one"), session_of(engine, archive, "other")
    one.send(FACT, sampling=SHORT)
    bury(one), bury(other)
    assert ANSWER in one.send(QUESTION).text
    answer = other.send(QUESTION)
    assert answer.memory is not None
    assert ANSWER not in answer.text + "".join(span.text for span in answer.memory.spans)


def test_deleting_a_session_deletes_what_it_said(engine: Engine, archive: Archive, tmp_path: Path) -> None:
    session = session_of(engine, archive)
    session.send(FACT, sampling=SHORT)
    session.delete()
    assert list(archive._store.ids()) == []
    archive.index.close()
    assert not holding(tmp_path / "chats", b"Vouport")
    with pytest.raises(SessionError, match="deleted"):
        session.send(QUESTION)


def test_a_saved_session_goes_on_with_its_archive(engine: Engine, archive: Archive, tmp_path: Path) -> None:
    session = session_of(engine, archive)
    session.send(FACT, sampling=SHORT)
    bury(session)
    session.save(tmp_path / "a.session")
    session.send("Never saved: Peor Tools sells boats.", sampling=SHORT)
    assert "boats" in texts(archive)
    again = engine.load_session(tmp_path / "a.session", Window(BUDGET), archive=archive)
    answer = again.send(QUESTION)
    assert ANSWER in answer.text
    assert "boats" not in texts(archive)  # a course that was never saved


def test_what_the_store_has_lost_is_read_anew_and_counted(engine: Engine, archive: Archive) -> None:
    session = session_of(engine, archive)
    session.send(FACT, sampling=SHORT)
    bury(session)
    for key_id in list(archive._store.ids()):
        archive._store.delete(key_id)
    answer = session.send(QUESTION)
    assert ANSWER in answer.text
    assert answer.memory is not None
    assert not any(span.is_hit for span in answer.memory.spans)
    assert archive.counts["read anew"] == archive.counts["misses"] > 0


def test_what_the_store_has_lost_can_be_left_out(engine: Engine, archive: Archive) -> None:
    session = session_of(engine, archive, recall=Recall(reread=False))
    session.send(FACT, sampling=SHORT)
    bury(session)
    for key_id in list(archive._store.ids()):
        archive._store.delete(key_id)
    memory = session.send(QUESTION).memory
    assert memory is not None
    assert memory.spans == ()
    assert archive.counts["misses"] > 0


def test_a_whole_history_is_written_on_the_way_and_removed_if_the_turn_fails(
    engine: Engine, archive: Archive
) -> None:
    session = session_of(engine, archive)
    chat = Chat(World(3, held_out=True))
    for _ in range(100):
        chat.tell()
    stream = session.stream_reply(history(chat), sampling=Sampling(max_new_tokens=400, ignore_eos=True))
    next(iter(stream))
    assert archive.counts["added"] >= 64
    stream.cancel()
    with suppress(GenerationCancelled):
        list(stream)
    with pytest.raises(InputError):
        session.undo()
    assert archive.spans("a") == []
    assert list(archive._store.ids()) == []


def test_only_what_fits_comes_back(tmp_path: Path) -> None:
    model = Model(reader().network, reader().text.tokenizer, max_length=BUDGET + 11 + 64 + 40)
    with Engine(model, tmp_path / "store") as engine, engine.archive(tmp_path / "chats") as archive:
        session = engine.session(
            Window(BUDGET),
            name="a",
            system=SYSTEM_CHAT,
            archive=archive,
            stride=64,
            recall=Recall(search=8, keep=8, below=0.0),
        )
        session.send(FACT, sampling=SHORT)
        bury(session)
        memory = session.send(QUESTION).memory
        assert memory is not None
        assert 0 < memory.recalled <= 40


def test_the_users_last_messages_are_searched_with(engine: Engine, archive: Archive) -> None:
    found = []
    for messages in (1, 2):
        session = session_of(engine, archive, f"{messages}", Recall(search=1, messages=messages))
        session.send(FACT, sampling=SHORT)
        bury(session)
        session.send(QUESTION, sampling=SHORT)
        memory = session.send("And what else?", sampling=SHORT).memory
        assert memory is not None
        found.append(any(ANSWER in span.text for span in memory.spans))
    assert found[1]


def test_random_models_and_other_memories_work_too(tmp_path: Path) -> None:
    model = tiny("gemma3")
    memory = Cascade(96)
    with Engine(model, DiskStore(tmp_path / "store")) as engine, engine.archive(tmp_path / "c") as archive:
        session = engine.session(memory, name="a", archive=archive, stride=32)
        for number in range(5):
            session.send(
                f"The pier of number {number} is old and long, and nobody knows why.", sampling=SHORT
            )
        answer = session.send("What is known of the pier of number 0?", sampling=SHORT)
        assert answer.memory is not None
        assert answer.memory.spans


def test_an_archive_needs_a_store(tmp_path: Path) -> None:
    with Engine(reader()) as engine, pytest.raises(ConfigError, match="store="):
        engine.archive(tmp_path / "chats")


@pytest.mark.parametrize(
    "settings",
    [
        *({name: 0} for name in ("search", "keep", "messages", "max_tokens")),
        *({"below": 1.5}, {"held": -0.1}, {"nearness": -1.0}, {"nearness": float("nan")}),
    ],
)
def test_settings_without_a_meaning_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        Recall(**settings)
