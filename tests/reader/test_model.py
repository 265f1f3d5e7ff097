import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvrag import reader
from kvrag.reader import collection, evaluate, start, tokenizer


@pytest.fixture(scope="module")
def shipped():
    return AutoTokenizer.from_pretrained(reader.path()), AutoModelForCausalLM.from_pretrained(reader.path())


def test_tokenizer_is_the_one_in_the_code(shipped):
    made = tokenizer.build()
    assert shipped[0].get_vocab() == made.get_vocab()
    assert shipped[0].chat_template == made.chat_template
    assert shipped[1].config.vocab_size == len(made)


def test_shape_is_the_one_in_the_code(shipped):
    config = start.config(tokenizer.build())
    for name in (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    ):
        assert getattr(shipped[1].config, name) == getattr(config, name)


def test_the_folder_is_small_and_says_nothing_of_the_machine():
    files = [file for file in reader.path().parent.rglob("*") if file.is_file() and file.suffix != ".pyc"]
    assert sum(file.stat().st_size for file in files) < 25e6
    texts = [file for file in files if file.suffix in (".json", ".md", ".jinja")]
    assert texts
    for file in texts:
        assert not any(folder in file.read_text() for folder in ("/home/", "/root/", "/tmp/", "/work/"))


def test_answers_questions_about_the_demo_collection(shipped):
    made, model = shipped
    texts = {document.title: document.text for document in collection.documents(num=20)}
    asked = [q for q in collection.questions(num=25, num_documents=20) if q.kind in ("one", "crossing")][:10]
    right = 0
    for question in asked:
        system = "\n\n".join([tokenizer.SYSTEM_DOCUMENTS, *(texts[title] for title in question.titles)])
        messages = [
            {"role": "system", "content": system},
            {"role": "user", "content": question.question},
        ]
        prompt = made.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
        out = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        right += made.decode(out, skip_special_tokens=True).strip() == question.answer
    assert right >= 8


def test_evaluation_counts_what_generation_gives(shipped):
    cells = evaluate.document_cells(evaluate.Reader(reader.path()), 1, 6)
    assert cells[0]["task"].startswith("one")
    assert cells[0]["right"] >= 4


def test_reports_are_json():
    for name in ("learning_curve.json", "evaluation.json"):
        assert json.loads((reader.path().parent / name).read_text())
