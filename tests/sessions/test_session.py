"""A conversation: only what is new is read, turns can be taken back, histories may be edited."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from kvrag import Engine, Sampling, Session
from kvrag.answer import MemoryUse
from kvrag.constrain import regex
from kvrag.errors import (
    ConfigError,
    ContextOverflow,
    EngineClosed,
    GenerationCancelled,
    InputError,
    SessionError,
)
from kvrag.memory.base import MemoryPolicy
from kvrag.memory.cascade import Cascade
from kvrag.memory.combined import LadderCascade
from kvrag.memory.full import Full
from kvrag.memory.ladder import Ladder
from kvrag.memory.salient import Salient
from kvrag.memory.window import Window
from kvrag.model import Model
from kvrag.testing.models import tiny

POLICIES: list[MemoryPolicy] = [
    Full(),
    Window(48),
    Cascade(52),
    Ladder(48, span=2),
    LadderCascade(52),
    Salient(52),
]
SHORT = Sampling(max_new_tokens=6)
SAID = ["Where is the ferry?", "And in winter?", "Who keeps the lighthouse of Varn?", "Since when?"]

every_policy = pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.name)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(tiny(), pass_tokens=16) as made:
        yield made


def memory(answer: Any) -> MemoryUse:
    found: MemoryUse = answer.memory
    return found


def talked(engine: Engine, policy: MemoryPolicy, num_turns: int = 3, **options: Any) -> Session:
    session = engine.session(policy, system="Be brief.", **options)
    for said in SAID[:num_turns]:
        session.send(said, sampling=SHORT)
    return session


def history_of(engine: Engine, policy: MemoryPolicy, num_turns: int) -> tuple[Session, list[dict[str, str]]]:
    """A session that was driven as a framework does it, and the history with the last answer."""
    session, history = engine.session(policy, system="Be brief."), []
    for said in SAID[:num_turns]:
        history.append({"role": "user", "content": said})
        answer = session.reply_to(history, sampling=SHORT)
        history.append({"role": "assistant", "content": answer.text})
    return session, history


@every_policy
def test_only_what_is_new_is_read(engine: Engine, policy: MemoryPolicy) -> None:
    session, history = history_of(engine, policy, 3)
    new = [*history, {"role": "user", "content": "Why?"}]
    use = memory(session.reply_to(new, sampling=SHORT))
    text = engine.render([{"role": "system", "content": "Be brief."}, *new])
    behind = text.rpartition(history[-1]["content"])[2]
    assert use.read == engine.count_tokens(behind)
    assert (use.went_back, use.anew) == (0, False)
    assert use.said == session.num_tokens
    assert use.remembered + use.forgotten == use.said
    if policy.budget is None:
        assert use.forgotten == 0
    else:
        assert use.remembered < use.said
        assert use.share <= policy.budget / use.said


def test_sending_and_handing_over_histories_is_the_same(engine: Engine) -> None:
    session, _ = history_of(engine, Window(48), 3)
    sent = talked(engine, Window(48))
    assert torch.equal(session.logits("Why?"), sent.logits("Why?"))


def test_a_full_memory_answers_as_the_engine_does(engine: Engine) -> None:
    history = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": SAID[0]},
        {"role": "assistant", "content": "At the pier, as always."},
        {"role": "user", "content": SAID[1]},
    ]
    expected = engine.answer(history, sampling=SHORT)
    assert engine.session(Full()).reply_to(history, sampling=SHORT).text == expected.text


@every_policy
def test_undo_gives_the_same_logits_as_before_the_turn(engine: Engine, policy: MemoryPolicy) -> None:
    session = talked(engine, policy, 2)
    before, num = session.logits("Why?"), session.num_tokens
    session.send(SAID[2], sampling=SHORT)
    session.send(SAID[3], sampling=SHORT)
    session.undo(2)
    assert torch.equal(session.logits("Why?"), before)
    assert (session.num_tokens, session.num_turns) == (num, 2)
    with pytest.raises(InputError, match="can take back 0"):
        session.undo()


@every_policy
def test_a_fork_is_independent(engine: Engine, policy: MemoryPolicy) -> None:
    session = talked(engine, policy, 2)
    before = session.logits("Why?")
    fork = session.fork("other")
    fork.send(SAID[2], sampling=SHORT)
    assert torch.equal(session.logits("Why?"), before)
    fork.undo()
    session.send(SAID[3], sampling=SHORT)
    assert torch.equal(fork.logits("Why?"), before)
    assert (fork.name, fork.num_turns) == ("other", 2)


@every_policy
def test_regeneration_takes_one_turn_back(engine: Engine, policy: MemoryPolicy) -> None:
    session, history = history_of(engine, policy, 3)
    again = session.reply_to(history[:-1], sampling=SHORT)
    assert again.text == history[-1]["content"]
    assert (memory(again).went_back, memory(again).anew) == (1, False)
    assert session.num_turns == 3


@every_policy
def test_an_edited_history_is_as_a_fresh_session_on_it(engine: Engine, policy: MemoryPolicy) -> None:
    """Bit for bit, as long as the tokens of the answers are those that their text is made into."""
    session, history = history_of(engine, policy, 3)
    canonical = [{**m, "content": m["content"]} for m in history]
    for message in canonical[1::2]:
        message["content"] = "It is at the pier, as always."
    edited = [*canonical[:4], {"role": "user", "content": "Another question?"}]
    expected = engine.session(policy, system="Be brief.").reply_to(edited, sampling=SHORT)
    answer = session.reply_to(edited, sampling=SHORT)
    assert answer.text == expected.text
    assert memory(answer).said == memory(expected).said
    other = engine.session(policy, system="Be brief.")
    other.reply_to([*edited, {"role": "assistant", "content": "So."}, edited[-1]], sampling=SHORT)
    assert other.reply_to(edited, sampling=SHORT).text == expected.text


def test_what_no_snapshot_has_is_read_anew(engine: Engine) -> None:
    session, history = history_of(engine, Window(48), 4)
    edited = [{"role": "user", "content": "Where was the ferry?"}, *history[1:-1]]
    answer = session.reply_to(edited, sampling=SHORT)
    assert memory(answer).anew
    fresh = engine.session(Window(48), system="Be brief.")
    assert fresh.reply_to(edited, sampling=SHORT).text == answer.text
    assert torch.equal(fresh.logits("Why?"), session.logits("Why?"))


def test_another_system_prompt_begins_anew(engine: Engine) -> None:
    session, history = history_of(engine, Window(48), 2)
    led = [{"role": "system", "content": "Be long."}, *history[:-1]]
    answer = session.reply_to(led, sampling=SHORT)
    assert memory(answer).anew
    expected = engine.session(Window(48)).reply_to(led, sampling=SHORT)
    assert expected.text == answer.text


def test_cancelling_leaves_the_session_as_it_was(engine: Engine) -> None:
    session = talked(engine, Cascade(52), 2)
    before = session.logits("Why?")
    stream = session.stream(SAID[2], sampling=Sampling(max_new_tokens=400, ignore_eos=True))
    next(iter(stream))
    stream.cancel()
    with pytest.raises(GenerationCancelled):
        for _ in stream:
            pass
    assert torch.equal(session.logits("Why?"), before)
    assert session.num_turns == 2


def test_cancelling_an_edit_brings_back_what_it_took(engine: Engine) -> None:
    session, history = history_of(engine, Cascade(52), 3)
    before, forgotten = session.logits("Why?"), session.forgotten()
    edited = [*history[:2], {"role": "user", "content": "No: " + "another " * 30}]
    stream = session.stream_reply(edited, sampling=Sampling(max_new_tokens=400, ignore_eos=True))
    next(iter(stream))
    stream.cancel()
    with pytest.raises(GenerationCancelled):
        for _ in stream:
            pass
    assert torch.equal(session.logits("Why?"), before)
    assert (session.num_turns, session.forgotten()) == (3, forgotten)
    session.undo(2)
    assert session.num_turns == 1


def test_a_second_turn_waits_for_the_first(engine: Engine) -> None:
    session = engine.session(Window(48))
    streams = [session.stream(said, sampling=SHORT) for said in SAID]
    threads = [threading.Thread(target=lambda s=s: [*s]) for s in streams]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert session.num_turns == 4
    one_by_one = engine.session(Window(48))
    texts = [one_by_one.send(said, sampling=SHORT).text for said in SAID]
    assert [stream.answer.text for stream in streams if stream.answer] == texts


def test_sessions_are_read_in_the_same_passes_as_others(engine: Engine) -> None:
    sessions = [engine.session(policy, system="Be brief.") for policy in POLICIES]
    streams = [session.stream(SAID[0], sampling=SHORT) for session in sessions]
    texts = [[*stream] and stream.answer for stream in streams]
    alone = [engine.session(p, system="Be brief.").send(SAID[0], sampling=SHORT).text for p in POLICIES]
    assert [answer.text for answer in texts if answer] == alone


def test_async(engine: Engine) -> None:
    async def talk() -> tuple[str, str]:
        session = engine.session(Window(48))
        pieces = [piece async for piece in session.stream(SAID[0], sampling=SHORT)]
        return "".join(pieces), (await session.asend(SAID[1], sampling=SHORT)).text

    session = engine.session(Window(48))
    expected = tuple(session.send(said, sampling=SHORT).text for said in SAID[:2])
    assert asyncio.run(talk()) == expected


@pytest.mark.parametrize("stop", ["b", "Rhl", "oRhl^"])
@pytest.mark.parametrize("stride", [2, 16])
def test_a_stop_string_is_not_remembered(engine: Engine, stop: str, stride: int) -> None:
    """What is in memory is what the answer says, whatever was decoded."""
    sampling = Sampling(max_new_tokens=60, temperature=1.5, seed=3, stop=(stop,))
    session = engine.session(Full(), stride=stride)
    answer = session.send(SAID[0], sampling=sampling)
    assert answer.finish_reason == "stop"
    assert session._talk is not None
    assert session._talk.log is not None
    log = session._talk.log.tolist()
    assert engine.model.text.decode(log[memory(answer).read :]) == answer.text
    assert session._talk.state.seen == len(log) == memory(answer).said
    history = [
        {"role": "user", "content": SAID[0]},
        {"role": "assistant", "content": answer.text},
        {"role": "user", "content": "Why?"},
    ]
    use = memory(session.reply_to(history, sampling=SHORT))
    assert (use.went_back, use.anew) == (0, False)


def test_forgotten_says_what_is_lost(engine: Engine) -> None:
    session = talked(engine, Window(24, sinks=0), 3)
    (lost,) = session.forgotten()
    assert (lost.start, lost.end, lost.share) == (0, session.num_tokens - 24, 0.0)
    assert lost.text.startswith(SAID[0])
    assert session.forgotten(at_most=1.0)[0].end == session.num_tokens
    assert engine.session(Window(24)).forgotten() == []
    silent = talked(engine, Window(24), 1, keeps_log=False)
    with pytest.raises(InputError, match="keeps_log=False"):
        silent.forgotten()


def test_white_space_around_an_answer_may_get_lost(engine: Engine) -> None:
    """As in templates that trim what was said: the answer is not read again."""
    tokenizer = copy.deepcopy(engine.model.text.tokenizer)
    tokenizer.chat_template = tokenizer.chat_template.replace("m['content']", "m['content'].strip()")
    with Engine(Model(engine.model.network, tokenizer), pass_tokens=16) as trimming:
        session, history = trimming.session(Full()), [{"role": "user", "content": SAID[0]}]
        sampling = Sampling(max_new_tokens=4, stop=(), seed=1, constraint=regex(" {2}[ab]{3} {3}"))
        answer = session.reply_to(history, sampling=sampling)
        assert answer.text.strip() != answer.text
        history += [{"role": "assistant", "content": answer.text}, {"role": "user", "content": SAID[1]}]
        use = memory(session.reply_to(history, sampling=SHORT))
        assert (use.went_back, use.anew) == (0, False)
        text = trimming.render(history)
        assert use.read == trimming.count_tokens(text.rpartition(answer.text.strip())[2])
        history += [{"role": "assistant", "content": "Oh."}, {"role": "user", "content": SAID[2]}]
        assert memory(session.reply_to(history, sampling=SHORT)).went_back == 1


def test_without_a_template_text_goes_on(engine: Engine) -> None:
    tokenizer = engine.model.text.tokenizer
    bare = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>", bos_token="<s>")
    with Engine(Model(engine.model.network, bare), pass_tokens=16) as plain:
        session = plain.session(Full(), system="A talk.")
        first = session.send("Question: where?\nAnswer:", sampling=SHORT)
        second = session.send("\nQuestion: why?\nAnswer:", sampling=SHORT)
        text = f"A talk.\n\nQuestion: where?\nAnswer:{first.text}\nQuestion: why?\nAnswer:"
        again = session.reply_to(text, sampling=SHORT)
        assert memory(again).went_back == 1
        assert again.text == second.text
        whole = "A talk.\n\nQuestion: where?\nAnswer: at the pier.\nQuestion: why?\nAnswer:"
        answer = plain.session(Full(), system="A talk.").reply_to(whole, sampling=SHORT)
        assert plain.answer(whole, sampling=SHORT).text == answer.text


def test_documents_are_pinned_and_come_from_the_store(engine: Engine, tmp_path: Any) -> None:
    documents = ["The ferry crosses the Mirrow twice a day.", "The lighthouse of Varn was built in 1871."]
    with Engine(engine.model, tmp_path / "store", pass_tokens=16, recompute="never") as kept:
        session = kept.session(Window(48), documents=documents)
        first = session.send(SAID[0], sampling=SHORT)
        text = kept.render(
            [
                {"role": "system", "content": "Answer from the documents.\n\n" + "\n\n".join(documents)},
                {"role": "user", "content": SAID[0]},
            ]
        )
        prefix = text.partition(documents[0])[0]
        expected = kept.stream_rendered(text, documents, prefix=prefix, sampling=SHORT)
        assert "".join(expected) == first.text
        assert expected.answer is not None
        assert all(use.is_hit for use in expected.answer.documents)
        for mine, theirs in zip(first.documents, expected.answer.documents, strict=True):
            assert (mine.key, mine.num_tokens, mine.is_hit) == (theirs.key, theirs.num_tokens, False)
            assert mine.mass == pytest.approx(theirs.mass, abs=1e-4)
            assert mine.focus == pytest.approx(theirs.focus, abs=1e-4)
            assert 0 < mine.question_mass < 1
        second = session.send(SAID[1], sampling=SHORT)
        assert all(use.is_hit for use in second.documents)
        assert (memory(first).pinned_read > 0, memory(second).pinned_read) == (True, 0)
        session.undo()
        logits = session.logits(SAID[2])
    with Engine(engine.model, tmp_path / "store", pass_tokens=16, recompute="never") as kept:
        other = kept.session(Window(48), documents=documents)
        other.send(SAID[0], sampling=SHORT)
        assert torch.equal(other.logits(SAID[2]), logits)
        assert other._talk is not None
        assert other._talk.pinned.is_hit == (True, True)


def test_what_cannot_work_is_refused(engine: Engine) -> None:
    with pytest.raises(ConfigError, match="leave nothing of the 4096 positions"):
        engine.session(Window(4096))
    session = engine.session(Window(4090), system="Be brief. " * 20)
    with pytest.raises(ConfigError, match="give a budget below"):
        session.send("Hello")
    with pytest.raises(ConfigError, match="stride is 0"):
        engine.session(Window(48), stride=0)
    with pytest.raises(InputError):
        engine.session(Window(48)).reply_to([])


def test_a_memory_without_a_budget_ends_where_the_model_does(engine: Engine) -> None:
    with Engine(Model(engine.model.network, engine.model.text.tokenizer, max_length=96)) as short:
        session = short.session(Full())
        answer = session.send("Hello", sampling=Sampling(max_new_tokens=500, ignore_eos=True))
        assert answer.finish_reason == "length"
        num = session.num_tokens
        with pytest.raises(ContextOverflow, match="give the session a memory with a budget"):
            session.send("And now for something else: a long message that does not fit.", sampling=SHORT)
        assert session.num_tokens == num


def test_a_deleted_session_is_over(engine: Engine) -> None:
    session = talked(engine, Window(48), 1)
    session.delete()
    with pytest.raises(SessionError, match="was deleted"):
        session.send("Hello")
    assert session.num_bytes == 0


def test_a_closed_engine_ends_its_sessions(engine: Engine) -> None:
    with Engine(engine.model) as short:
        session = short.session(Window(48))
    with pytest.raises(EngineClosed):
        session.send("Hello")
