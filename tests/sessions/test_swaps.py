"""Sessions in which every turn brings its own documents: what is read, what stays, what is never mixed up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kvrag import Answer, Engine, Sampling, Session
from kvrag.answer import MemoryUse
from kvrag.errors import ConfigError, GenerationCancelled
from kvrag.memory.base import MemoryPolicy
from kvrag.memory.cascade import Cascade
from kvrag.memory.full import Full
from kvrag.memory.ladder import Ladder
from kvrag.memory.window import Window
from kvrag.testing.models import tiny

SHORT = Sampling(max_new_tokens=6)
DOCUMENTS = [
    "The ferry crosses the Mirrow twice a day.",
    "The lighthouse of Varn was built in 1871, and painted red a hundred years later.",
    "The bakery of Old Harn sells bread with caraway and salt.",
]
SAID = ["Where is the ferry?", "And in winter?", "Who keeps the lighthouse of Varn?", "Since when?"]
POLICIES: list[MemoryPolicy] = [Full(), Window(48), Cascade(52), Ladder(48, span=2)]


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    """With a store that has the documents, as a corpus would have put them there."""
    with Engine(tiny(), tmp_path / "store", pass_tokens=16, recompute="never") as made:
        made.session(Window(48), documents=DOCUMENTS).send("Hello", sampling=SHORT)
        yield made


def use(answer: Answer) -> MemoryUse:
    assert answer.memory is not None
    return answer.memory


def rows(session: Session) -> list[torch.Tensor]:
    """Keys and values of what is remembered; other slots may hold anything."""
    assert session._talk is not None
    segments = session._talk.rows.segments(session._talk.state.runs, 0)
    return [tensor.clone() for s in segments for kv in s.kv.layers for tensor in (kv.keys, kv.values)]


def added(engine: Engine, said: str) -> int:
    """Tokens that a message adds behind an answer."""
    talk = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "\u2063"}]
    text = engine.render([*talk, {"role": "user", "content": said}])
    return engine.count_tokens(text.rpartition("\u2063")[2])


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.name)
def test_only_messages_and_the_words_around_documents_are_read(engine: Engine, policy: MemoryPolicy) -> None:
    session = engine.session(policy, swaps_opening=True)
    for number, said in enumerate(SAID):
        documents = [DOCUMENTS[number % 3], DOCUMENTS[(number + 1) % 3]]
        answer = session.send(said, documents=documents, sampling=SHORT)
        told = use(answer)
        assert [one.key for one in answer.documents] == ["0", "1"]
        assert all(one.is_hit for one in answer.documents), "they come from the store"
        assert sum(one.focus for one in answer.documents) == pytest.approx(1)
        assert (told.went_back, told.anew) == (0, False)
        if number:
            assert told.read == added(engine, said)
        assert told.pinned_read < min(one.num_tokens for one in answer.documents)
        assert answer.usage.read_tokens == told.read + told.pinned_read
    assert session.num_turns == len(SAID)


def test_histories_that_bring_another_system_prompt_are_not_read_anew(engine: Engine) -> None:
    read = {}
    for swaps in (True, False):
        session, history = engine.session(Window(64), swaps_opening=swaps), []
        told = []
        for number, said in enumerate(SAID):
            system = {"role": "system", "content": f"Today is day {number}. Be brief."}
            history.append({"role": "user", "content": said})
            answer = session.reply_to([system, *history], sampling=SHORT)
            told.append(use(answer))
            history.append({"role": "assistant", "content": answer.text})
        assert [one.anew for one in told] == [False, *[not swaps] * 3]
        read[swaps] = sum(one.read + one.pinned_read for one in told)
        if swaps:
            assert [one.read for one in told[1:]] == [added(engine, said) for said in SAID[1:]]
    assert read[True] < read[False]


def test_known_texts_in_a_system_prompt_come_from_the_store(engine: Engine) -> None:
    first = engine.render(
        [{"role": "system", "content": f"Context:\n\n{DOCUMENTS[0]}"}, {"role": "user", "content": "x"}]
    )
    engine.known.prefix = first.partition("Context")[0]
    engine.known.update({f"doc {i}": text for i, text in enumerate(DOCUMENTS)})
    session, history, told = engine.session(Window(64), swaps_opening=True), [], []
    for number in (0, 1, 0, 1):
        system = {"role": "system", "content": f"Context:\n\n{DOCUMENTS[number]}\n\nBe brief."}
        history.append({"role": "user", "content": SAID[len(told)]})
        answer = session.reply_to([system, *history], sampling=SHORT)
        told.append(use(answer))
        history.append({"role": "assistant", "content": answer.text})
        assert [one.key for one in answer.documents] == [f"doc {number}"]
        assert [one.is_hit for one in answer.documents] == [len(told) > 2]
    assert not any(one.anew for one in told)
    assert told[2].pinned_read < told[0].pinned_read


def test_a_swap_changes_no_row_of_the_memory(engine: Engine) -> None:
    """What was said stays as it was read, under the documents that stood there then."""
    session = engine.session(Window(64), documents=DOCUMENTS[:1], swaps_opening=True)
    plain = engine.session(Window(64), documents=DOCUMENTS[:1])
    for one in (session, plain):
        one.send(SAID[0], sampling=SHORT)
    before = rows(session)
    assert torch.equal(session.logits("Why?"), plain.logits("Why?"))

    def logits(documents: list[str]) -> torch.Tensor:
        stream = session.stream("Why?", documents=documents, sampling=SHORT)
        list(stream)
        found = session.logits("So?")
        session.undo()
        return found

    one, two = logits(DOCUMENTS[:1]), logits(DOCUMENTS[1:])
    assert not torch.equal(one, two)
    assert all(torch.equal(a, b) for a, b in zip(rows(session), before, strict=True))
    assert torch.equal(logits(DOCUMENTS[:1]), one)
    plain.send("Why?", sampling=SHORT)
    assert torch.equal(plain.logits("So?"), one)


def test_the_memory_follows_the_documents(engine: Engine) -> None:
    """Longer documents push it back, shorter ones let it move up; nothing of it is rotated anew."""
    session = engine.session(Window(64), documents=DOCUMENTS[:1], swaps_opening=True)
    session.send(SAID[0], sampling=SHORT)
    assert session._talk is not None
    for documents in (DOCUMENTS, DOCUMENTS[2:]):
        session.send("Why?", documents=documents, sampling=SHORT)
        talk = session._talk
        reader = talk.reader(16)
        assert reader.offset == talk.pinned.num_tokens == talk.pinned.table.end
        memory = list(reader.table)[len(talk.pinned.table) :]
        assert [segment.native for segment in memory] == [run.slot for run in talk.state.runs]
        assert memory[0].target == reader.offset


def test_a_failed_turn_leaves_the_documents_as_they_were(engine: Engine) -> None:
    session = engine.session(Window(64), documents=DOCUMENTS[:1], swaps_opening=True)
    session.send(SAID[0], sampling=SHORT)
    before = session.logits("Why?")
    stream = session.stream(
        SAID[1], documents=DOCUMENTS, sampling=Sampling(max_new_tokens=500, ignore_eos=True)
    )
    next(iter(stream))
    stream.cancel()
    with pytest.raises(GenerationCancelled):
        session_of(stream)
    assert torch.equal(session.logits("Why?"), before)


def session_of(stream: Any) -> None:
    for _ in stream:
        pass
    if stream.answer is None:
        raise GenerationCancelled("the answer was cancelled")


def test_a_saved_session_goes_on_with_its_last_documents(engine: Engine, tmp_path: Path) -> None:
    session = engine.session(Cascade(52), swaps_opening=True)  # begun behind a few tokens
    session.send(SAID[0], sampling=SHORT)
    session.send(SAID[1], documents=DOCUMENTS, sampling=SHORT)
    session.save(tmp_path / "a.session")
    logits = session.logits("Why?")
    copy = session.fork()
    assert torch.equal(copy.logits("Why?"), logits)
    again = engine.load_session(tmp_path / "a.session")
    assert again.settings == session.settings
    assert torch.equal(again.logits("Why?"), logits)
    for one in (again, copy, session):
        one.send("Why?", documents=DOCUMENTS[:1], sampling=SHORT)
    assert torch.equal(again.logits("So?"), session.logits("So?"))
    assert torch.equal(copy.logits("So?"), session.logits("So?"))


def test_an_opening_too_short_for_the_memory_is_read_anew(engine: Engine) -> None:
    """A memory that was begun behind a system prompt has no first tokens of its own."""
    session = engine.session(Window(64, sinks=8), swaps_opening=True)
    history = [{"role": "user", "content": SAID[0]}]
    answer = session.reply_to(
        [{"role": "system", "content": "Be very, very brief."}, *history], sampling=SHORT
    )
    history += [{"role": "assistant", "content": answer.text}, {"role": "user", "content": SAID[1]}]
    assert use(session.reply_to(history, sampling=SHORT)).anew


def test_what_cannot_be_swapped_is_refused(engine: Engine) -> None:
    session = engine.session(Window(64), documents=DOCUMENTS[:1])
    with pytest.raises(ConfigError, match="make it with swaps_opening=True"):
        session.send("Hello", documents=DOCUMENTS)
    session = engine.session(Window(64), swaps_opening=True)
    session.send("Hello", sampling=SHORT)
    with pytest.raises(ConfigError, match="leave nothing of the"):
        session.send("Hello", documents=[" ".join(DOCUMENTS * 200)])
    assert session.num_turns == 1
