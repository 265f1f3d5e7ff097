import pytest

from kvrag.reader import rows, tokenizer
from kvrag.reader.tokenizer import BLANK_LINE, Encoder
from kvrag.reader.world import World


@pytest.fixture(scope="module")
def made():
    return tokenizer.build()


def ids_of(made, text):
    return made(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    "text",
    [
        "Jane Doe. She lives in Oakburg.",
        "two  spaces,\ttabs\nlines\n\nand\n\n\nmore",
        "Müller's naïve 東京 — 5 % of 12345.60 €",
        "'s 's Doe's <b>&amp;</b> {x} [y] \\n",
        " leading and trailing ",
        "",
    ],
)
def test_any_text_comes_back(made, text):
    assert made.decode(ids_of(made, text)) == text


def test_pieces_joined_by_a_blank_line_encode_like_the_whole(made):
    world = World(3, held_out=True)
    texts = ["Answer from the documents."]
    for _ in range(20):
        texts += [part for document in world.documents(5) for part in document.parts]
    texts += ["plain words, unknown to it", "12345", "ends in a number 7", "Ünïcode ends with é"]
    apart = ids_of(made, texts[0])
    for text in texts[1:]:
        apart += ids_of(made, BLANK_LINE) + ids_of(made, text)
    assert apart == ids_of(made, BLANK_LINE.join(texts))


def test_blank_line_is_one_token_and_known_words_are_too(made):
    assert len(ids_of(made, BLANK_LINE)) == 1
    for document in World(5, held_out=True).documents(10):
        for part in document.parts:
            tokens = made.convert_ids_to_tokens(ids_of(made, part))
            assert not [
                t
                for t in tokens
                if len(t.strip(" ")) == 1 and t.strip(" ").isalpha() and t not in " A" and t not in " a"
            ]


def test_fast_encoder_agrees(made):
    encoder = Encoder(made)
    world = World(4, held_out=False)
    for row in (
        rows.document_row(world, encoder, 800, share=0.6),
        rows.chat_row(world, encoder, 800),
    ):
        assert ids_of(made, made.decode(row.ids)) == row.ids


def test_template_with_documents(made):
    system = "Answer from the documents.\n\nJane Doe. She sings."
    messages = [{"role": "system", "content": system}, {"role": "user", "content": "Who sings?"}]
    text = made.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == f"<s><|system|> {system}<|end|><|user|> Who sings?<|end|><|assistant|>"


def test_template_of_a_chat_without_system_message(made):
    messages = [
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "Hello, how can I help?"},
        {"role": "user", "content": "Thank you."},
    ]
    text = made.apply_chat_template(messages, tokenize=False)
    assert text == (
        "<s><|system|> You are a helpful assistant.<|end|><|user|> Hello.<|end|>"
        "<|assistant|> Hello, how can I help?<|end|><|user|> Thank you.<|end|>"
    )


def test_template_gives_the_prompts_of_training(made):
    encoder = Encoder(made)
    row = rows.Row(encoder)
    documents = World(1, held_out=True).documents(2)
    row.system(rows.system_text(documents))
    row.turn("Who?", [])
    messages = [
        {"role": "system", "content": rows.system_text(documents)},
        {"role": "user", "content": "Who?"},
    ]
    asked = made.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert asked == row.ids[: len(asked)]
    assert made.decode(row.ids[len(asked) :]) == "<|end|>"
