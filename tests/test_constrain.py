"""Answers that keep to a form: whatever the model would say, only that form is written."""

from __future__ import annotations

import json
import pickle
import re
import sys
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kvrag.config import Sampling
from kvrag.constrain import Constraint, choice, json_schema, lark, regex
from kvrag.engine import Engine
from kvrag.errors import ConfigError, MissingExtra
from kvrag.grammars import Grammars
from kvrag.model import Model
from kvrag.testing.models import tiny

SCHEMA = {
    "type": "object",
    "properties": {
        "year": {"type": "integer", "minimum": 1800, "maximum": 1999},
        "kind": {"enum": ["ferry", "lighthouse"]},
        "sure": {"type": "boolean"},
    },
    "required": ["year", "kind", "sure"],
    "additionalProperties": False,
}


@cache
def model() -> Model:
    return tiny()


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(model()) as made:
        yield made


@pytest.fixture(scope="module")
def reader() -> Iterator[Engine]:
    with Engine.from_pretrained() as made:
        yield made


def said(engine: Engine, constraint: Constraint, **settings: Any) -> Any:
    sampling = Sampling(**{"max_new_tokens": 80, "constraint": constraint, **settings})
    return engine.answer("When was it built?", ["The lighthouse of Varn."], sampling=sampling)


SAMPLED = [{}, *({"temperature": 2.0, "seed": seed, "top_k": 3} for seed in range(4))]


@pytest.mark.parametrize("settings", SAMPLED, ids=str)
def test_json_is_that_of_the_schema(engine: Engine, settings: dict[str, Any]) -> None:
    answer = said(engine, json_schema(SCHEMA), **settings)
    found = json.loads(answer.text)
    assert list(found) == ["year", "kind", "sure"]
    assert 1800 <= found["year"] <= 1999
    assert found["kind"] in ("ferry", "lighthouse")
    assert isinstance(found["sure"], bool)
    assert answer.text == json.dumps(found)
    assert answer.finish_reason == "stop"


@pytest.mark.parametrize("settings", SAMPLED, ids=str)
def test_the_reader_keeps_to_a_schema_too(reader: Engine, settings: dict[str, Any]) -> None:
    answer = said(reader, json_schema(SCHEMA), **settings)
    assert set(json.loads(answer.text)) == {"year", "kind", "sure"}
    assert answer.finish_reason == "stop"


@pytest.mark.parametrize("settings", SAMPLED, ids=str)
@pytest.mark.parametrize("pattern", [r"[0-9]{4}-[0-9]{2}", r"(yes|no), [a-z]+\.", "é中+!"])
def test_text_matches_the_expression(engine: Engine, pattern: str, settings: dict[str, Any]) -> None:
    answer = said(engine, regex(pattern), **settings)
    if answer.finish_reason == "stop":
        assert re.fullmatch(pattern, answer.text)
    else:
        assert len(answer.tokens) == 80


def test_the_answer_ends_where_the_form_does(engine: Engine) -> None:
    """Without an end mark: nothing can follow."""
    answer = said(engine, regex("[0-9]{3}"), ignore_eos=True)
    assert re.fullmatch("[0-9]{3}", answer.text)
    assert (len(answer.tokens), answer.finish_reason) == (3, "stop")
    again = said(engine, regex("[0-9]{3}"), max_new_tokens=3)
    assert again.finish_reason == "stop"


def test_length_ends_it_earlier(engine: Engine) -> None:
    answer = said(engine, json_schema(SCHEMA), max_new_tokens=5)
    assert (len(answer.tokens), answer.finish_reason) == (5, "length")
    endless = said(engine, regex("(ab)*"), max_new_tokens=7, ignore_eos=True)
    assert endless.finish_reason == "length" or "abababa".startswith(endless.text)


CHOICES = ["yes", "no", "I do not know.", 'a "quoted" \\ text', "zwölf\n中", "</s>", "<|user|>"]


@pytest.mark.parametrize("text", CHOICES)
def test_a_choice_is_taken_word_for_word(engine: Engine, text: str) -> None:
    """Texts that look like special tokens are written as text, so they are not left out."""
    answer = said(engine, choice([text]))
    assert answer.text == text
    assert not set(answer.tokens[:-1]) & set(range(6))


@given(st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=4), st.integers(0, 999))
@settings(max_examples=25, deadline=None)
def test_one_of_the_choices_is_written(texts: list[str], seed: int) -> None:
    with Engine(model()) as engine:
        answer = said(engine, choice(texts), temperature=3.0, seed=seed, max_new_tokens=200)
    assert answer.text in texts


def test_a_grammar_is_kept_to(engine: Engine) -> None:
    grammar = 'start: "(" inner ")"\ninner: "x" | "(" inner ")" "y"'
    for how in SAMPLED:
        text = said(engine, lark(grammar), **how).text
        inner = text[1:]
        while inner.startswith("("):
            inner = inner[1:]
        depth = len(text) - 1 - len(inner)
        assert text == "(" * (depth + 1) + "x" + ")y" * depth + ")" or len(text) >= 80


def test_special_tokens_never_follow() -> None:
    """Where any text may stand, none of them may, except the end mark."""
    keeper = Grammars(model().text.tokenizer).keeper(regex("(.|\n)*"), (2,))
    logits = torch.zeros(1, model().network.config.vocab_size)
    masked = keeper.mask(logits)
    assert torch.equal(logits, torch.zeros_like(logits))
    possible = set(masked[0].isfinite().nonzero()[:, 0].tolist())
    assert possible & set(range(6)) == {2}
    assert len(possible) > 100
    assert max(possible) < len(model().text.tokenizer)


def test_logprobs_are_the_models_own(engine: Engine) -> None:
    answer = said(engine, choice(["zebra"]), logprobs=2)
    assert answer.logprobs is not None
    assert all(x.top[0].logprob >= x.logprob for x in answer.logprobs)
    assert min(x.logprob for x in answer.logprobs) < -0.1


def test_stop_strings_still_stop(engine: Engine) -> None:
    answer = said(engine, choice(["one two three"]), stop=(" two",))
    assert (answer.text, answer.finish_reason) == ("one", "stop")


# ---- values


def test_constraints_are_values() -> None:
    a, b = json_schema(SCHEMA), json_schema(dict(SCHEMA))
    assert a == b
    assert hash(a) == hash(b)
    assert a != json_schema({"type": "string"})
    assert pickle.loads(pickle.dumps(a)) == a
    assert json_schema(json.dumps(SCHEMA)) == json_schema(SCHEMA)
    assert Sampling(constraint=a) == Sampling(constraint=b)
    assert hash(Sampling(constraint=a)) == hash(Sampling(constraint=b))


def test_equal_ones_are_compiled_once_and_answers_do_not_disturb_each_other() -> None:
    grammars = Grammars(model().text.tokenizer)
    first = grammars.keeper(regex("ab"), (2,))
    first.take(model().text.tokenize("a")[0])
    second = grammars.keeper(regex("ab"), (2,))
    assert len(grammars._compiled) == 1
    second.take(model().text.tokenize("a")[0])
    for keeper in (first, second):
        assert not keeper.is_complete
        keeper.take(model().text.tokenize("b")[0])
        assert keeper.is_complete
    for i in range(100):
        grammars.keeper(regex(f"a{i}"), (2,))
    assert len(grammars._compiled) == 64


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: regex("("), "unclosed group"),
        (lambda: regex("(?=x)y"), "look-around"),
        (lambda: lark("start: nothing"), "unknown name"),
        (lambda: lark("ab"), "cannot be kept to"),
        (lambda: json_schema({"type": "nonsense"}), "Invalid type"),
        (lambda: json_schema({"unevaluatedProperties": {}}), "Unimplemented"),
        (lambda: json_schema({"type": {1, 2}}), "no JSON"),
        (lambda: json_schema("{"), "JSON|kept to"),
        (lambda: choice([]), "choices are"),
        (lambda: choice(["a", ""]), "are not empty"),
        (lambda: choice("abc"), "choices are 'abc'"),
        (lambda: Sampling(constraint="[0-9]+"), "constraint is a str"),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_kept_to_is_a_config_error(make: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_what_only_the_tokenizer_lacks_is_one_too(engine: Engine) -> None:
    named = lark('start: "a" <|user|>')
    assert said(engine, named).text == "a"
    with pytest.raises(ConfigError, match="unknown special token"):
        said(engine, lark('start: "a" <|nobody|>'))
    with pytest.raises(ConfigError, match="fast tokenizer"):
        Grammars(object()).keeper(regex("a"), (2,))
    assert said(engine, regex("b")).text == "b"


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    known = regex("a")
    monkeypatch.setitem(sys.modules, "llguidance", None)
    for make in (lambda: regex("a"), lambda: json_schema({}), lambda: choice(["a"]), lambda: lark("a")):
        with pytest.raises(MissingExtra, match=r"kvrag\[constrained\]"):
            make()
    with pytest.raises(MissingExtra):
        Grammars(model().text.tokenizer).keeper(known, (2,))


# ---- tokenizers that put a blank before every text

BLANK = "\u2581"


def blank_first(kind: str) -> Any:
    """As Llama 2's: blanks are a character, the first one is added, unknown letters are bytes."""
    pieces = [BLANK, *'abdefx{}":,0123456789</>', f"{BLANK}a", f"{BLANK}b", "ab", f"{BLANK}ab"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces]
    merges = [(BLANK, "a"), (BLANK, "b"), ("a", "b"), (BLANK, "ab")]
    vocabulary = {name: i for i, name in enumerate(names)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>"))
    backend.add_special_tokens([AddedToken(name, special=True) for name in names[:3]])
    if kind == "prepend":
        steps = [normalizers.Prepend(BLANK), normalizers.Replace(" ", BLANK)]
        backend.normalizer = normalizers.Sequence(steps)
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("kind", ["prepend", "metaspace"])
@pytest.mark.parametrize("text", ["ab a", "</s>x", '{"a": 12}', "zwölf\nab", "b"])
def test_tokenizers_that_begin_with_a_blank_write_none(kind: str, text: str) -> None:
    tokenizer = blank_first(kind)
    for seed in range(3):
        keeper, tokens = Grammars(tokenizer).keeper(choice([text]), (2,)), []
        generator = torch.Generator().manual_seed(seed)
        while not keeper.is_complete:
            masked = keeper.mask(torch.randn(1, len(tokenizer), generator=generator))
            tokens.append(int(masked.argmax()))
            keeper.take(tokens[-1])
        assert tokenizer.decode(tokens, skip_special_tokens=True) == text
