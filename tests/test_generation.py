"""Answers are what transformers' own generate gives: tokens, scores, ends, counts."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils import logging as logging_of_transformers

from kvrag import decode
from kvrag.attention import Looking
from kvrag.baseline import ordinary_answer
from kvrag.compose import compose
from kvrag.config import Sampling
from kvrag.decode import Behind, choice, configuration, steps
from kvrag.encoding import encode
from kvrag.engine import Engine
from kvrag.errors import ConfigError, ContextOverflow, InputError
from kvrag.fresh import FreshRows
from kvrag.model import Model
from kvrag.plan import plan
from kvrag.prefill import Read, read_prompt
from kvrag.segments import Segment, SegmentTable
from kvrag.store.memory import MemoryStore
from kvrag.testing.models import FAMILIES, randomize, tiny, tiny_tokenizer

PROMPTS = [
    "Hi",
    "The lighthouse of Varn was built in 1871 by the keepers of the northern road.",
    "Ünïcödé 中文 🂡 and\n\nlines\n",
    "<s>The same, and the beginning is written out.",
    "the " * 120,
]
DOCUMENTS = [
    "The lighthouse of Varn was built in 1871.",
    "A ferry crosses the Mirrow twice a day.",
    "The orchard at Lindal grows apples and plums.",
]


@cache
def model(family: str = "llama") -> Model:
    return tiny(family)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(model()) as made:
        yield made


def generated(found: Model, prompt: Sequence[int], **settings: Any) -> tuple[int, ...]:
    """What `generate` makes of a prompt, by its own arguments."""
    ids = torch.tensor([list(prompt)])
    with torch.no_grad():
        out: Any = found.network.generate(
            ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **{"do_sample": False, **settings}
        )
    return tuple(out[0, len(prompt) :].tolist())


# ---- without caches: generate, token for token


@pytest.mark.parametrize("prompt", PROMPTS, ids=range(len(PROMPTS)))
def test_a_full_prompt_gives_the_tokens_of_generate(engine: Engine, prompt: str) -> None:
    answer = engine.answer(prompt, sampling=Sampling(max_new_tokens=24))
    tokens = model().text.tokenize(prompt, first=True)
    assert answer.plan.tokens == tokens
    assert tokens[0] == 1
    assert tokens[1] != 1
    assert answer.tokens == generated(model(), tokens, max_new_tokens=24)
    assert answer.tokens == ordinary_answer(model(), tokens, Sampling(max_new_tokens=24)).tokens
    assert answer.text == model().text.decode(answer.tokens)
    lead = 0 if prompt.startswith("<s>") else 1  # a BOS that is added is the prefix of every document
    assert (answer.usage.prompt_tokens, answer.usage.cached_tokens) == (len(tokens), lead)
    assert answer.documents == ()


@pytest.mark.parametrize("family", ["gemma2", "smollm3", "gpt_neox", "cohere2"])
def test_other_families_give_the_tokens_of_generate(family: str) -> None:
    tokens = model(family).text.tokenize(PROMPTS[4], first=True)
    with Engine(model(family)) as engine:
        answer = engine.answer(PROMPTS[4], sampling=Sampling(max_new_tokens=12))
    assert answer.tokens == generated(model(family), tokens, max_new_tokens=12)


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_the_repetition_penalty_counts_the_prompt(engine: Engine, penalty: float) -> None:
    tokens = model().text.tokenize(PROMPTS[1], first=True)
    found = engine.answer(PROMPTS[1], sampling=Sampling(max_new_tokens=24, repetition_penalty=penalty))
    assert found.tokens == generated(model(), tokens, max_new_tokens=24, repetition_penalty=penalty)


def test_the_repetition_penalty_counts_cached_documents(engine: Engine) -> None:
    """A prompt whose only document stands at its native place is read as generate reads it."""
    prompt = f"{DOCUMENTS[0]} Why?"
    found = engine.answer(prompt, DOCUMENTS[:1], sampling=Sampling(max_new_tokens=24, repetition_penalty=1.5))
    assert [d.key for d in found.documents] == ["0"]
    assert found.tokens == generated(model(), found.plan.tokens, max_new_tokens=24, repetition_penalty=1.5)


# ---- sampling


SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.7},
    {"temperature": 1.5, "top_k": 5},
    {"temperature": 1.0, "top_p": 0.6},
    {"temperature": 0.9, "min_p": 0.3},
    {"temperature": 1.1, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2},
]


@pytest.mark.parametrize("settings", SETTINGS, ids="-".join)
def test_scores_are_processed_as_generate_processes_them(settings: dict[str, Any]) -> None:
    prompt = model().text.tokenize(PROMPTS[1], first=True)
    chosen = choice(model(), prompt, Sampling(seed=1, max_new_tokens=1, **settings))
    ids = torch.tensor([prompt])
    with torch.no_grad():
        theirs: Any = model().network.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=1,
            do_sample=True,
            output_scores=True,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=0,
            **settings,
        )
    ours = chosen.processors(ids, theirs.logits[0].clone())
    assert torch.equal(ours, theirs.scores[0])
    assert 1 <= ours.isfinite().sum() < len(ours[0])


def test_a_seed_makes_sampling_repeatable(engine: Engine) -> None:
    def sampled(seed: int | None) -> tuple[int, ...]:
        return engine.answer("Hi", sampling=Sampling(temperature=1.0, seed=seed, max_new_tokens=16)).tokens

    assert sampled(7) == sampled(7)
    assert sampled(7) != sampled(8)
    assert sampled(None) != sampled(None)


def test_sampling_leaves_the_global_generator_alone(engine: Engine) -> None:
    before = torch.get_rng_state()
    engine.answer("Hi", sampling=Sampling(temperature=1.0, seed=7, max_new_tokens=4))
    assert torch.equal(before, torch.get_rng_state())


def test_sampling_from_one_token_is_greedy(engine: Engine) -> None:
    greedy = engine.answer(PROMPTS[1], sampling=Sampling(max_new_tokens=16)).tokens
    for only_one in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}):
        sampling = Sampling(max_new_tokens=16, temperature=2.0, **only_one)  # type: ignore[arg-type]
        assert engine.answer(PROMPTS[1], sampling=sampling).tokens == greedy


def test_sampled_tokens_follow_the_distribution() -> None:
    prompt = model().text.tokenize("Hi", first=True)
    logits = torch.full((model().network.config.vocab_size,), -1e9)
    logits[[10, 11]] = torch.tensor([0.0, 1.0986])  # odds of one to three
    nothing = torch.zeros(model().num_layers, 0, 1)
    last = Read(logits[None], nothing, nothing, {})
    behind = Behind(SegmentTable(), FreshRows(model().num_layers), model().specs)
    found = []
    for seed in range(300):
        chosen = choice(model(), prompt, Sampling(temperature=1.0, seed=seed, max_new_tokens=1))
        (step,) = steps(model(), behind, prompt, last, (), chosen, position=len(prompt))
        found.append(step.token)
    assert set(found) == {10, 11}
    assert 0.65 < found.count(11) / 300 < 0.85


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"repetition_penalty": 0.0},
        {"seed": -1},
        {"seed": 2**64},
        {"stop": "END"},
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ConfigError, match=name):
        Sampling(**wrong)


def test_the_largest_seed_works() -> None:
    choice(model(), (1, 10), Sampling(temperature=1.0, seed=2**64 - 1))


def test_settings_left_open_are_the_models_own() -> None:
    network = copy.copy(model().network)
    network.generation_config = copy.deepcopy(network.generation_config)
    network.generation_config.update(
        do_sample=True, temperature=0.3, top_k=7, top_p=0.8, repetition_penalty=1.1
    )
    sampled = configuration(network, Sampling(temperature=0.9, top_k=3))
    assert (sampled.do_sample, sampled.temperature, sampled.top_k, sampled.top_p) == (True, 0.9, 3, 0.8)
    greedy = configuration(network, Sampling())
    assert (greedy.do_sample, greedy.repetition_penalty) == (False, 1.1)
    assert network.generation_config.max_new_tokens is None


def test_transformers_has_nothing_to_warn_of(engine: Engine) -> None:
    """A model without padding token, too: its generation would be announced at every answer."""
    said: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    network = model().network
    own = network.generation_config
    network.generation_config = copy.deepcopy(own)
    network.generation_config.update(
        pad_token_id=None, do_sample=True, temperature=0.6, top_k=20, top_p=0.9, repetition_penalty=1.05
    )
    ear, logger = Ear(logging.WARNING), logging_of_transformers.get_logger("transformers")
    logger.addHandler(ear)
    try:
        engine.answer("Hi", sampling=Sampling(max_new_tokens=2))
        engine.answer("Hi", sampling=Sampling(max_new_tokens=2, temperature=0.5, top_k=4))
    finally:
        logger.removeHandler(ear)
        network.generation_config = own
    assert said == []


# ---- where answers end


def greedy_tokens(engine: Engine, prompt: str, num: int) -> tuple[int, ...]:
    return engine.answer(prompt, sampling=Sampling(max_new_tokens=num, ignore_eos=True)).tokens


def test_length_ends_an_answer(engine: Engine) -> None:
    answer = engine.answer("Hi", sampling=Sampling(max_new_tokens=5))
    assert (len(answer.tokens), answer.finish_reason, answer.usage.new_tokens) == (5, "length", 5)


@pytest.mark.parametrize("as_list", [False, True])
def test_the_end_mark_ends_an_answer(engine: Engine, monkeypatch: pytest.MonkeyPatch, as_list: bool) -> None:
    tokens = greedy_tokens(engine, "Hi", 12)
    last = tokens[6]
    end = tokens.index(last) + 1
    monkeypatch.setattr(model().network.generation_config, "eos_token_id", [last, 319] if as_list else last)
    answer = engine.answer("Hi", sampling=Sampling(max_new_tokens=12))
    assert answer.tokens == tokens[:end]
    assert (answer.finish_reason, answer.usage.new_tokens) == ("stop", end)
    ignoring = engine.answer("Hi", sampling=Sampling(max_new_tokens=12, ignore_eos=True))
    assert (ignoring.tokens, ignoring.finish_reason) == (tokens, "length")


def test_full_prefill_ignores_the_end_mark_too(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = greedy_tokens(engine, "Hi", 12)
    monkeypatch.setattr(model().network.generation_config, "eos_token_id", tokens[4])
    prompt = model().text.tokenize("Hi", first=True)
    sampling = Sampling(max_new_tokens=12, ignore_eos=True)
    assert ordinary_answer(model(), prompt, sampling).tokens == tokens


def test_a_model_without_end_mark_ends_by_length(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model().network.generation_config, "eos_token_id", None)
    assert engine.answer("Hi", sampling=Sampling(max_new_tokens=3)).finish_reason == "length"


def test_a_stop_string_ends_an_answer_and_is_not_part_of_it(engine: Engine) -> None:
    whole = engine.answer(PROMPTS[1], sampling=Sampling(max_new_tokens=40))
    stop = whole.text[7:10]
    stream = engine.stream(PROMPTS[1], sampling=Sampling(max_new_tokens=40, stop=(stop, "never said")))
    shown = "".join(stream)
    assert stream.answer is not None
    assert shown == stream.answer.text == whole.text.split(stop)[0]
    assert stream.answer.finish_reason == "stop"
    assert whole.tokens[: stream.answer.usage.new_tokens] == stream.answer.tokens
    assert len(stream.answer.tokens) < len(whole.tokens)


def test_the_stream_is_the_text(engine: Engine) -> None:
    stream = engine.stream(PROMPTS[2], sampling=Sampling(max_new_tokens=40))
    pieces = list(stream)
    assert stream.answer is not None
    assert "".join(pieces) == stream.answer.text
    assert len(pieces) > 5


# ---- prompts of every shape


def test_an_empty_prompt_is_refused(engine: Engine) -> None:
    with pytest.raises(InputError, match="empty"):
        engine.answer("")


def test_a_prompt_without_tokens_is_refused(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenizers may leave characters out, such as zero-width ones."""
    monkeypatch.setattr(model().text, "tokenize", lambda text, *, first=False: ())
    with pytest.raises(InputError, match="no tokens"):
        engine.answer("\u200b")


def test_a_prompt_that_fills_the_window_is_refused_before_anything_is_read() -> None:
    small = Model(model().network, tiny_tokenizer(), name="small", max_length=32)
    with Engine(small) as engine:
        assert len(engine.answer("a" * 25, sampling=Sampling(max_new_tokens=99)).tokens) == 32 - 26
        assert len(engine.answer("a" * 30).tokens) == 1
        with pytest.raises(ContextOverflow, match=r"33 tokens and the model reads 32.*fewer"):
            engine.answer("b" * 32, ["b" * 32])
        engine._caches.encoding = None  # type: ignore[method-assign, assignment]
        with pytest.raises(ContextOverflow):
            engine.answer("c" * 40 + " why?", ["c" * 40])


PREFIX = "Read this.\n\n"


def composed_prompt(parts: str) -> str:
    """A prompt in short: digits are documents, P the prefix, everything else is itself."""
    return "".join(PREFIX if c == "P" else DOCUMENTS[int(c)] if c.isdigit() else c for c in parts)


def oracle(found: Model, planned: Any, num: int) -> tuple[int, ...]:
    """Greedy tokens by the stock model with a mask: documents see the prefix and themselves, others all."""
    tokens, owner = [], []
    for number, span in enumerate(planned.spans):
        tokens += span.tokens
        owner += [(number if span.kind == "cached" else -1)] * len(span.tokens)
    size, before = len(tokens), len(planned.prefix.tokens) if planned.prefix else 0
    new: list[int] = []
    for _ in range(num):
        whole = torch.tensor([tokens + new])
        mask = torch.ones(whole.shape[1], whole.shape[1], dtype=torch.bool).tril()
        for row in range(size):
            if owner[row] >= 0:
                own = torch.tensor([o == owner[row] for o in owner] + [False] * len(new))
                own[:before] = True
                if row < size - 1:  # the last token is read as one of the question's
                    mask[row] &= own
        bias = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))[None, None]
        with torch.no_grad():
            logits = found.network(whole, attention_mask=bias, use_cache=False).logits
        new.append(int(logits[0, -1].argmax()))
    return tuple(new)


SHAPES = {
    "documents at the beginning": "P0 1 Why?",
    "fresh tokens between documents": "P0 and 1 and then 2 Why?",
    "a document ends the prompt": "PWhy? 0 1",
    "a document twice": "P0 0 Why? 0",
    "only a document": "P1",
    "nothing cached": "PWhy?",
    "no prefix": "Question. 0 1 Why?",
    "only the prefix": "P",
}


def greedy_from_caches(found: Model, prompt: str, *, num: int = 8) -> tuple[Any, tuple[int, ...]]:
    with Engine(found) as engine:
        answer = engine.answer(
            prompt, DOCUMENTS, prefix=PREFIX, sampling=Sampling(max_new_tokens=num, ignore_eos=True)
        )
    return answer, answer.tokens


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_prompts_of_every_shape_can_be_answered(engine: Engine, shape: str) -> None:
    prompt = composed_prompt(shape)
    sampling = Sampling(max_new_tokens=8, ignore_eos=True)
    answer = engine.answer(prompt, DOCUMENTS, prefix=PREFIX, sampling=sampling)
    expected = [c for c in shape if c.isdigit()]
    assert [d.key for d in answer.documents] == expected
    assert len(answer.tokens) == 8
    assert answer.plan.text == prompt
    assert (answer.plan.prefix is not None) == ("P" in shape)
    assert sum(d.mass for d in answer.documents) < 1.0001
    assert sum(d.focus for d in answer.documents) == pytest.approx(1 if answer.documents else 0)
    assert all(d.mass > 0 for d in answer.documents[:-1])
    usage = answer.usage
    assert usage.prompt_tokens == len(answer.plan.tokens)
    assert usage.read_tokens + usage.cached_tokens == usage.prompt_tokens
    assert usage.read_tokens >= max(1, answer.plan.num_read_tokens)


@pytest.mark.parametrize("shape", ["P0 1 Why?", "P0 and 1 and then 2 Why?", "PWhy? 0 1", "P0 0 Why? 0", "P1"])
def test_documents_stay_visible_wherever_they_stand(shape: str) -> None:
    """Against the stock model with an explicit mask; without positions, so that only visibility counts."""
    found = unrotated()
    answer, tokens = greedy_from_caches(found, composed_prompt(shape))
    assert tokens == oracle(found, answer.plan, 8)


@cache
def unrotated() -> Model:
    """Four layers, none of which rotates."""
    config = FAMILIES["smollm3"]()
    config.no_rope_layers = [0] * config.num_hidden_layers
    network = randomize(AutoModelForCausalLM.from_config(config)).eval()
    return Model(network, tiny_tokenizer(), name="no rotation")


def test_the_first_document_behind_the_prefix_is_exact() -> None:
    answer, tokens = greedy_from_caches(model(), composed_prompt("P0 Why?"))
    assert tokens == oracle(model(), answer.plan, 8)
    assert tokens == generated(model(), answer.plan.tokens, max_new_tokens=8, min_new_tokens=8)


def test_counts_tell_what_came_from_caches() -> None:
    prompt = composed_prompt("P0 1 Why?")
    with Engine(model(), MemoryStore()) as engine:
        first = engine.answer(prompt, DOCUMENTS, prefix=PREFIX, sampling=Sampling(max_new_tokens=2))
        again = engine.answer(prompt, DOCUMENTS, prefix=PREFIX, sampling=Sampling(max_new_tokens=2))
    prefix = len(again.plan.spans[0].tokens)
    assert [d.is_hit for d in first.documents] == [False, False]
    assert [d.is_hit for d in again.documents] == [True, True]
    assert first.usage.cached_tokens == prefix
    assert again.usage.cached_tokens == prefix + again.plan.num_cached_tokens
    assert again.usage.read_tokens == again.plan.num_read_tokens
    assert first.tokens == again.tokens


# ---- the table copied into one run


@pytest.mark.parametrize(
    ("family", "shape"),
    [
        ("llama", "P0 and 1 and then 2 Why?"),
        ("llama", "PWhy? 0 1"),
        ("mistral-window", "P0 and 1 and then 2 Why?"),
        ("gemma2", "PWhy? 0 1"),
        ("smollm3", "P0 and 1 and then 2 Why?"),
        ("cohere2", "P0 and 1 and then 2 Why?"),
        ("gpt_oss", "PWhy? 0 1"),
        ("deepseek_v3", "P0 and 1 and then 2 Why?"),
    ],
)
def test_decoding_over_one_run_changes_no_token(
    family: str, shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copied at once, in the middle, never: windows, layers without rotation and all."""
    prompt, answers, copies = composed_prompt(shape), {}, []
    behind = FreshRows.behind

    def counted(self: FreshRows, *args: Any) -> FreshRows:
        copies.append(len(self.positions))
        return behind(self, *args)

    monkeypatch.setattr(FreshRows, "behind", counted)
    for name, call_seconds in {"never": 0.0, "at once": 1e9, "later": None}.items():
        if call_seconds is None:  # spent at the fourth step
            monkeypatch.setattr(decode._Rent, "__init__", _rent_of(1.0, 3.5))
        else:
            monkeypatch.setattr(decode, "_CALL_SECONDS", call_seconds)
        answers[name], _ = greedy_from_caches(model(family), prompt, num=16)
    assert len(copies) == 2
    assert copies[1] == copies[0] + 3
    for other in (answers["at once"], answers["later"]):
        assert other.tokens == answers["never"].tokens
        masses = [[d.mass for d in answer.documents] for answer in (other, answers["never"])]
        assert masses[0] == pytest.approx(masses[1], abs=1e-4)


def _rent_of(per_step: float, price: float) -> Any:
    def init(self: Any, *_: Any) -> None:
        self._price, self._per_step, self._paid = price, per_step, 0.0

    return init


def test_rent_is_spent_once_it_reaches_the_price() -> None:
    (kv,) = encode(model(), [(10, 11, 12)])
    rent = decode._Rent(SegmentTable((Segment(kv, 0), Segment(kv, 3))), 4)
    rent._price = 2.5 * rent._per_step
    assert [rent.is_spent() for _ in range(4)] == [False, False, True, True]


def test_tables_that_will_change_and_answers_that_look_closely_are_never_copied() -> None:
    (kv,) = encode(model(), [(10, 11, 12)])
    table = SegmentTable((Segment(kv, 0), Segment(kv, 3)))
    for keep, looking, may_copy in ((True, None, True), (False, None, False), (True, Looking(), False)):
        behind = Behind(table, FreshRows(model().num_layers), model().specs, looking=looking)
        behind.change(table, for_good=keep)
        assert (behind._rent is not None) == may_copy


# ---- reading in strides


def test_strides_change_nothing() -> None:
    text = model().text
    planned = plan(
        composed_prompt("P0 and 1 and then 2 Why?"),
        dict(zip("012", DOCUMENTS, strict=True)),
        prefix=PREFIX,
        tokenize=text.tokenize,
    )
    assert planned.prefix is not None
    (prefix,) = encode(model(), [planned.prefix.tokens])
    kvs = encode(model(), [s.tokens for s in planned.cached], prefix)
    composed = compose(planned, prefix, kvs).composed()
    reads = []
    for stride in (1, 3, 2048):
        fresh = FreshRows(model().num_layers)
        reads.append(
            read_prompt(model(), composed.table, composed.tokens, composed.positions, fresh, stride=stride)
        )
    for other in reads[:2]:
        torch.testing.assert_close(other.logits, reads[2].logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(other.mass, reads[2].mass, rtol=1e-4, atol=1e-5)


def test_generate_still_works_beside_the_engine(engine: Engine) -> None:
    """Adopting a model leaves it usable by others: caches, batches, padding."""
    ids = torch.tensor([[0, 0, 1, 20, 21], [1, 20, 21, 22, 23]])
    mask = (ids != 0).long()
    with torch.no_grad():
        both: Any = model().network.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=6,
            do_sample=False,
            past_key_values=DynamicCache(config=model().network.config),
        )
    alone = generated(model(), (1, 20, 21), max_new_tokens=6)
    assert tuple(both[0, 5:].tolist()) == alone
