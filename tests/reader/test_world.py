import re
from itertools import pairwise

import pytest

from kvrag.reader import chats, names, prose, questions, rows, tokenizer
from kvrag.reader.world import Mix, World, num_tokens


def contexts(*, held_out=True, num=30, size=6, **mix):
    world = World(11, held_out=held_out, mix=Mix(**mix))
    return world, [world.documents(size) for _ in range(num)]


def full_names(text):
    """Every pair of neighbouring words that is a full name of the world."""
    words = re.findall(r"[A-Za-z]+", text)
    firsts = {word for first, _ in names._NAMES.values() for word in first}
    seconds = {word for _, second in names._NAMES.values() for word in second}
    return {f"{a} {b}" for a, b in pairwise(words) if a in firsts and b in seconds}


def test_held_out_names_are_never_in_training_rows():
    made = tokenizer.build()
    encoder = tokenizer.Encoder(made)
    world = World(5, held_out=False)
    seen = set()
    for _ in range(15):
        seen |= full_names(made.decode(rows.document_row(world, encoder, 1024, share=0.6).ids))
        seen |= full_names(made.decode(rows.chat_row(world, encoder, 1024).ids))
    assert len(seen) > 100
    assert not [name for name in seen if names.is_held_out(name)]


def test_evaluation_uses_held_out_names_only():
    _, drawn = contexts()
    seen = set().union(*(full_names(document.text) for documents in drawn for document in documents))
    assert seen
    assert all(names.is_held_out(name) for name in seen)


def test_one_name_in_eight_is_held_out():
    firsts, seconds = names._NAMES["company"]
    held_out = [names.is_held_out(f"{a} {b}") for a in firsts for b in seconds]
    assert 0.1 < sum(held_out) / len(held_out) < 0.15


def test_same_seed_same_documents():
    assert contexts()[1] == contexts()[1]


def test_later_parts_do_not_name_the_entity():
    _, drawn = contexts(crossing=1.0)
    later = [(d, part) for documents in drawn for d in documents for part in d.parts[1:]]
    assert len(later) > 100
    assert not [part for d, part in later if d.entity.name in part]


def test_first_part_begins_with_the_name():
    _, drawn = contexts()
    assert all(d.text.startswith(f"{d.entity.name}. ") for documents in drawn for d in documents)


def test_documents_have_about_100_to_300_tokens():
    _, drawn = contexts()
    lengths = [num_tokens(document) for documents in drawn for document in documents]
    assert min(lengths) > 80
    assert max(lengths) < 320


@pytest.mark.parametrize("kind", questions.KINDS)
def test_every_kind_of_question_occurs(kind):
    world, drawn = contexts()
    assert any(questions.every_kind(world, documents)[kind] for documents in drawn)


def test_answers_stand_in_the_documents():
    world, drawn = contexts()
    for documents in drawn:
        by_title = {d.entity.name: d for d in documents}
        for kind, asked in questions.every_kind(world, documents).items():
            for question in asked:
                if kind == "unknown":
                    assert question.answer == prose.UNKNOWN
                    continue
                text = "\n".join(by_title[title].text for title in question.titles)
                for span in question.spans:
                    assert not span.is_value or span.text.removeprefix(" since ").strip() in text
                assert any(title in question.text for title in question.titles)


def test_crossing_answers_stand_in_a_later_part():
    world, drawn = contexts()
    for documents in drawn:
        by_title = {d.entity.name: d for d in documents}
        for question in questions.every_kind(world, documents)["crossing"]:
            later = "\n".join(by_title[question.titles[0]].parts[1:])
            assert question.spans[-2].text.strip() in later


def test_the_latest_dated_statement_wins():
    world, drawn = contexts(dated=1.0)
    asked = 0
    for documents in drawn:
        by_title = {d.entity.name: d for d in documents}
        for question in questions.every_kind(world, documents)["dated"]:
            year = next(int(s.text.split()[-1]) for s in question.spans if s.text.startswith(" since"))
            facts = by_title[question.titles[0]].facts
            noun = question.spans[0].text.removeprefix("The ").removesuffix(" of")
            assert year == max(f.since or 0 for f in facts if f.attribute.noun == noun)
            asked += 1
    assert asked > 100


def test_comparisons_name_the_right_winner():
    world, drawn = contexts(same_attributes=1.0)
    checked = 0
    for documents in drawn:
        for question in questions.every_kind(world, documents)["compare"]:
            values = [int(s.text) for s in question.spans if s.text.strip().isdigit()]
            pick = min if "older" in question.text or "earlier" in question.text else max
            winner = question.titles[values.index(pick(values))]
            assert question.answer.split(". ")[-1].startswith(winner)
            checked += 1
    assert checked > 50


def test_unknown_questions_cannot_be_answered():
    world, drawn = contexts()
    for documents in drawn:
        for question in questions.every_kind(world, documents, num_unknown=10)["unknown"]:
            known = [d for d in documents if d.entity.name in question.text]
            told = {f.attribute for d in known for f in d.facts}
            asked = {
                a
                for a in told
                for q in a.questions
                if q.format(e=known[0].entity.name, P=f"{known[0].entity.name}'s") == question.text
            }
            assert not asked


def test_chat_asks_for_what_was_told_the_given_number_of_turns_ago():
    world = World(9, held_out=True)
    for distance in (1, 5, 20):
        for _ in range(20):
            chat = chats.distant(world, distance)
            value = chat.turns[-1].question.spans[-2].text.strip()
            assert value in chat.turns[-1 - distance].user


def test_corrected_facts_give_the_corrected_value():
    world = World(9, held_out=True)
    for _ in range(20):
        chat = chats.distant(world, 5, kind="corrected")
        question = chat.turns[-1].question
        assert question.kind == "corrected"
        assert question.spans[-2].text.strip() in chat.turns[-6].user
        assert any(chat.turns[-6].user.startswith(words) for words in prose.CORRECTIONS)


def test_passkey_stands_in_one_document_of_hay():
    world = World(9, held_out=True)
    key, texts = prose.hay_documents(world.rng, 100)
    assert sum(key in text for text in texts) == 1


def test_answers_count_in_the_loss_and_nothing_else_does():
    made = tokenizer.build()
    row = rows.Row(tokenizer.Encoder(made))
    row.system("Answer from the documents.")
    row.turn(
        "Who?", [questions.Span("The mayor is"), questions.Span(" Jane", is_value=True), questions.Span(".")]
    )
    counted = made.decode([i for i, kind in zip(row.ids, row.kinds, strict=True) if kind != rows.OTHER])
    assert counted == " The mayor is Jane.<|end|>"
