import pytest

from kvrag.reader import collection, names


def test_deterministic():
    assert collection.documents(seed=2, num=25) == collection.documents(seed=2, num=25)
    assert collection.questions(seed=2, num=30) == collection.questions(seed=2, num=30)


def test_seeds_differ():
    assert collection.documents(seed=1, num=5) != collection.documents(seed=2, num=5)


def test_a_smaller_collection_is_the_beginning_of_a_larger_one():
    assert collection.documents(num=15) == collection.documents(num=40)[:15]


def test_titles_are_distinct_and_held_out():
    titles = [document.title for document in collection.documents(num=200)]
    assert len(set(titles)) == 200
    assert all(names.is_held_out(title) for title in titles)


def test_second_paragraphs_do_not_name_the_title():
    documents = collection.documents(num=100)
    paragraphs = [document.text.split("\n\n") for document in documents]
    assert max(len(p) for p in paragraphs) == 2
    assert sum(len(p) == 2 for p in paragraphs) > 30
    assert not [d for d, p in zip(documents, paragraphs, strict=True) if any(d.title in x for x in p[1:])]


def test_questions_lead_to_their_documents():
    texts = {document.title: document.text for document in collection.documents(num=100)}
    asked = collection.questions(num=100, num_documents=100)
    assert len({question.question for question in asked}) == 100
    assert len({question.kind for question in asked}) == 6
    for question in asked:
        assert set(question.titles) <= texts.keys()
        if question.kind in ("one", "crossing", "dated"):
            assert question.titles[0] in question.question
            value = question.answer.removesuffix(".").split(" is ")[-1]
            assert value in texts[question.titles[0]]


def test_strangers_have_no_document():
    titles = [document.title for document in collection.documents(num=100)]
    for question in collection.questions(num=100, num_documents=100):
        if question.kind == "unknown" and not question.titles:
            assert not any(title in question.question for title in titles)


def test_too_many_questions_are_refused():
    with pytest.raises(ValueError, match="give only"):
        collection.questions(num=10_000, num_documents=10)
