"""Every model family: the composed path equals transformers' own forward pass, logits, masses and answers.

The oracle is the stock model with eager attention; none of kvrag's attention, rotation or masking runs in it.
What a document looks like at its place follows from RoPE's relative form: read by the stock model behind a
prefix that is moved along with it, its rows are those of the native reading, with keys at the new place. The
fresh tokens then go through the stock model over these rows, with explicit masks put into its attention.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from kvrag.config import Sampling
from kvrag.decode import Behind, Step, choice, steps
from kvrag.encoding import Run, encode, encode_runs
from kvrag.engine import Engine
from kvrag.fresh import FreshRows
from kvrag.model import Model
from kvrag.prefill import Read, read, read_prompt
from kvrag.segments import Segment, SegmentTable
from kvrag.testing.models import FAMILIES, MAX_LENGTHS, randomize, tiny, tiny_model, tiny_tokenizer

TOLERANCE = 1e-4
NEW_TOKENS = 10

each_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Matrices of 64 columns: a second thread costs more than it brings."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Placed:
    """A document of a prompt, for kvrag and for the oracle alike."""

    tokens: tuple[int, ...]
    target: int
    first_row: int = 0
    until_layer: int | None = None


@dataclass(frozen=True)
class Prompt:
    """A prefix, documents at their places, and fresh tokens around them."""

    prefix: tuple[int, ...]
    documents: tuple[Placed, ...]
    tokens: tuple[int, ...]
    positions: tuple[int, ...]

    def table(self, model: Model) -> SegmentTable:
        (prefix,) = encode(model, [self.prefix])
        kvs = encode(model, [d.tokens for d in self.documents], prefix)
        placed = (
            Segment(kv, d.target, d.first_row, number, d.until_layer)
            for number, (kv, d) in enumerate(zip(kvs, self.documents, strict=True))
        )
        return SegmentTable((Segment(prefix, 0), *placed))

    def extended(self, tokens: Sequence[int]) -> Prompt:
        """The prompt with more tokens behind its last one."""
        last = self.positions[-1]
        more = range(last + 1, last + 1 + len(tokens))
        return Prompt(self.prefix, self.documents, (*self.tokens, *tokens), (*self.positions, *more))


def words(*sizes: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(7)
    return [tuple(torch.randint(10, 300, (n,), generator=generator).tolist()) for n in sizes]


def prompt_of(*, gap: int = 0) -> Prompt:
    """Three documents, not in the order in which they were encoded, with a separator before each.

    Args:
        gap: positions left empty around every document.
    """
    prefix, first, second, third, separators, question = words(5, 11, 17, 9, 3, 7)
    at, documents, positions = len(prefix), [], []
    for number, tokens in enumerate((third, first, second)):
        positions.append(at)
        documents.append(Placed(tokens, at + 1 + gap, first_row=number + 1))
        at = documents[-1].target + len(tokens) + gap
    positions += range(at, at + len(question))
    return Prompt(prefix, tuple(documents), (*separators, *question), tuple(positions))


class Stock:
    """A model as transformers runs it, with eager attention and the masks that a test gives it."""

    def __init__(self, network: PreTrainedModel) -> None:
        network.set_attn_implementation("eager")
        self.network = network
        config = network.config
        types = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
        window = getattr(config, "sliding_window", None)
        self.windows = [window if t == "sliding_attention" else None for t in types]

    def __call__(self, ids: Sequence[int], **arguments: Any) -> Any:
        with torch.no_grad():
            return self.network(input_ids=torch.tensor([list(ids)]), **arguments)

    def rows(
        self, prefix: Sequence[int], text: Sequence[int], target: int
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """What the stock model caches of a text behind a prefix, keys standing at `target`."""
        kept = DynamicCache()
        start = target - len(prefix)
        where = torch.arange(start, target + len(text))[None]
        self([*prefix, *text], position_ids=where, past_key_values=kept, use_cache=True)
        return [(layer.keys[:, :, len(prefix) :], layer.values[:, :, len(prefix) :]) for layer in kept.layers]

    def read(self, prompt: Prompt) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [T, V] of the fresh tokens, and masses [L, 1 + documents, T] of prefix and documents."""
        pieces = [(Placed(prompt.prefix, 0), ())] + [(d, prompt.prefix) for d in prompt.documents]
        read = [self.rows(before, piece.tokens, piece.target) for piece, before in pieces]
        kept = DynamicCache()
        for layer, parts in enumerate(zip(*read, strict=True)):
            kept.update(torch.cat([k for k, _ in parts], 2), torch.cat([v for _, v in parts], 2), layer)
        masks = [self._mask(prompt, layer) for layer in range(len(self.windows))]
        with self._masked(masks):
            out = self(
                prompt.tokens,
                position_ids=torch.tensor([prompt.positions]),
                past_key_values=kept,
                use_cache=True,
                output_attentions=True,
            )
        sizes = [len(piece.tokens) for piece, _ in pieces] + [len(prompt.tokens)]
        masses = [
            torch.stack([p.sum(-1).mean(0) for p in probs[0].split(sizes, dim=-1)[:-1]])
            for probs in out.attentions
        ]
        return out.logits[0], torch.stack(masses)

    def _mask(self, prompt: Prompt, layer: int) -> torch.Tensor:
        """[T, n + T], bool: what fresh rows see of prefix, documents and each other."""
        rows = torch.arange(len(prompt.tokens))
        where = [torch.arange(len(prompt.prefix))]
        seen = [torch.ones(len(rows), len(prompt.prefix), dtype=torch.bool)]
        for d in prompt.documents:
            where.append(torch.arange(d.target, d.target + len(d.tokens)))
            is_read = (rows >= d.first_row) & (d.until_layer is None or layer < d.until_layer)
            seen.append(is_read[:, None].expand(-1, len(d.tokens)))
        own = torch.tensor(prompt.positions)
        where.append(own)
        seen.append(rows[:, None] >= rows)
        allowed = torch.cat(seen, 1)
        window = self.windows[layer]
        return allowed if window is None else allowed & (own[:, None] - torch.cat(where) < window)

    @contextmanager
    def _masked(self, masks: Sequence[torch.Tensor]) -> Iterator[None]:
        def put(module: Any, _args: Any, arguments: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            assert "attention_mask" in arguments
            hidden = torch.zeros(masks[module.layer_idx].shape, dtype=self.network.dtype)
            hidden.masked_fill_(~masks[module.layer_idx], torch.finfo(hidden.dtype).min)
            return _args, arguments | {"attention_mask": hidden[None, None]}

        modules = [
            m
            for m in self.network.modules()
            if type(m).__name__.endswith("Attention") and hasattr(m, "layer_idx")
        ]
        assert len(modules) == len(masks)
        handles = [m.register_forward_pre_hook(put, with_kwargs=True) for m in modules]
        yield
        for handle in handles:
            handle.remove()


@cache
def model_of(family: str) -> Model:
    return tiny(family)


@cache
def stock_of(family: str) -> Stock:
    """The oracle: for LongRoPE beyond its border, with the long frequencies at every length."""
    if family != "phi3-longrope-long":
        return Stock(tiny_model(family))
    config = copy.deepcopy(FAMILIES[family]())
    config.rope_parameters["short_factor"] = config.rope_parameters["long_factor"]
    return Stock(randomize(AutoModelForCausalLM.from_config(config, dtype=torch.float32)).eval())


def read_all(model: Model, prompt: Prompt) -> Read:
    """Logits of every fresh token."""
    fresh = FreshRows(model.num_layers)
    return read(model, prompt.table(model), prompt.tokens, prompt.positions, fresh, logits_to_keep=0)


def greedy(model: Model, prompt: Prompt, table: SegmentTable) -> list[Step]:
    fresh = FreshRows(model.num_layers)
    last = read_prompt(model, table, prompt.tokens, prompt.positions, fresh)
    chosen = choice(model, prompt.tokens, Sampling(max_new_tokens=NEW_TOKENS, ignore_eos=True))
    position = prompt.positions[-1] + 1
    behind = Behind(table.seen_from(fresh.num_rows), fresh, model.specs)
    documents = tuple(s.document for s in table)
    return list(steps(model, behind, prompt.tokens, last, documents, chosen, position=position))


def off(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest expected value."""
    assert got.shape == expected.shape
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).abs().max() / expected.abs().max())


def plain(tokens: Sequence[int]) -> Prompt:
    """A prompt without caches."""
    return Prompt((), (), tuple(tokens), tuple(range(len(tokens))))


def whole_text() -> tuple[int, ...]:
    (text,) = words(52)
    return text


@each_family
def test_prompt_without_caches_equals_the_stock_model(family: str) -> None:
    text, model = whole_text(), model_of(family)
    fresh = FreshRows(model.num_layers)
    got = read(model, SegmentTable(), text, range(len(text)), fresh, logits_to_keep=0).logits
    stock = Stock(tiny_model(family))
    assert off(got, stock(text, use_cache=False).logits[0]) < TOLERANCE


@each_family
def test_prompt_without_caches_is_answered_as_by_generate(family: str) -> None:
    text, model = whole_text(), model_of(family)
    network = tiny_model(family)
    network.set_attn_implementation("eager")  # SDPA, the default in some releases, leaves out soft caps
    network.generation_config.eos_token_id = None
    ids = torch.tensor([text])
    whole = network.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False
    )
    answer = [s.token for s in greedy(model, plain(text), SegmentTable())]
    assert answer == whole[0, len(text) :].tolist()


@each_family
def test_one_document_at_its_native_slot_equals_prefix_caching(family: str) -> None:
    prefix, document, question = words(5, 30, 7)
    at = len(prefix) + len(document)
    prompt = Prompt(prefix, (Placed(document, len(prefix)),), question, tuple(range(at, at + len(question))))
    got = read_all(model_of(family), prompt)
    stock = stock_of(family)
    kept = DynamicCache(config=stock.network.config)
    stock((*prefix, *document), past_key_values=kept, use_cache=True)
    expected = stock(question, past_key_values=kept, use_cache=True).logits[0]
    assert off(got.logits, expected) < TOLERANCE


@each_family
@pytest.mark.parametrize("gap", [0, 3])
def test_several_documents_equal_one_pass_with_a_block_mask(family: str, gap: int) -> None:
    prompt = prompt_of(gap=gap)
    got = read_all(model_of(family), prompt)
    logits, masses = stock_of(family).read(prompt)
    assert off(got.logits, logits) < TOLERANCE
    assert (got.mass - masses).abs().max() < TOLERANCE


@each_family
@pytest.mark.parametrize("copied", [False, True], ids=["in place", "copied into one run"])
def test_answer_over_documents_is_the_greedy_one(
    family: str, copied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvrag.decode._Rent.is_spent", lambda _: copied)
    prompt, model = prompt_of(), model_of(family)
    found = greedy(model, prompt, prompt.table(model))
    answer = [s.token for s in found]
    assert len(answer) == NEW_TOKENS
    logits, masses = stock_of(family).read(prompt.extended(answer[:-1]))
    assert answer == logits[-NEW_TOKENS:].argmax(-1).tolist()
    got = torch.stack([s.mass for s in found], dim=-1)
    assert (got - masses[..., -NEW_TOKENS:]).abs().max() < TOLERANCE


@each_family
def test_documents_dropped_from_a_layer_on_equal_masks_per_layer(family: str) -> None:
    prompt, model = prompt_of(gap=3), model_of(family)
    table = prompt.table(model).without([1], from_layer=2).without([0], from_layer=3)
    first, second, third = prompt.documents
    dropped = Prompt(
        prompt.prefix,
        (
            Placed(first.tokens, first.target, first.first_row, until_layer=3),
            Placed(second.tokens, second.target, second.first_row, until_layer=2),
            third,
        ),
        prompt.tokens,
        prompt.positions,
    )
    got = read(model, table, prompt.tokens, prompt.positions, FreshRows(model.num_layers), logits_to_keep=0)
    logits, masses = stock_of(family).read(dropped)
    assert off(got.logits, logits) < TOLERANCE
    assert (got.mass - masses).abs().max() < TOLERANCE
    complete = read_all(model, prompt)
    assert off(got.logits, complete.logits) > 100 * TOLERANCE, "attention does not matter in this model"


@each_family
def test_documents_gone_altogether_leave_nothing_behind(family: str) -> None:
    prompt, model = prompt_of(), model_of(family)
    table = prompt.table(model).without([0, 2])
    rest = Prompt(prompt.prefix, prompt.documents[1:2], prompt.tokens, prompt.positions)
    got = read(model, table, prompt.tokens, prompt.positions, FreshRows(model.num_layers), logits_to_keep=0)
    logits, masses = stock_of(family).read(rest)
    assert off(got.logits, logits) < TOLERANCE
    assert (got.mass - masses).abs().max() < TOLERANCE


@each_family
def test_texts_of_different_lengths_are_encoded_as_one_by_one(family: str) -> None:
    model = model_of(family)
    prefix_tokens, *texts = words(5, 11, 40, 1, 28, 3)
    (prefix,) = encode(model, [prefix_tokens])
    for before in (None, prefix):
        together = encode(model, texts, before, token_budget=120)
        for text, kv in zip(texts, together, strict=True):
            (alone,) = encode(model, [text], before)
            assert kv.tokens == alone.tokens == text
            for a, b in zip(kv.layers, alone.layers, strict=True):
                assert a.keys.is_contiguous()
                assert a.values.is_contiguous()
                assert off(a.keys, b.keys) < TOLERANCE
                assert off(a.values, b.values) < TOLERANCE


@each_family
def test_parts_of_one_run_are_encoded_as_one_by_one(family: str) -> None:
    """In one pass, and in strides that cut texts, each text has the rows it has behind what stands before."""
    model = model_of(family)
    prefix_tokens, separator, *texts = words(5, 2, 17, 1, 28, 3)
    tokens: tuple[int, ...] = ()
    borders, expected = [], []
    for text in texts:
        (before,) = encode(model, [prefix_tokens + tokens])
        expected += encode(model, [text], before)
        borders.append((len(tokens), len(tokens) + len(text)))
        tokens += text + separator
    run, alone = Run(tokens[: -len(separator)], tuple(borders)), Run(texts[0], ((0, len(texts[0])),))
    (prefix,) = encode(model, [prefix_tokens])
    for budget in (2048, 60, 13, 1):
        got, (first,) = encode_runs(model, [run, alone], prefix, token_budget=budget)
        for kv, wanted in zip([*got, first], [*expected, expected[0]], strict=True):
            assert kv.tokens == wanted.tokens
            for a, b in zip(kv.layers, wanted.layers, strict=True):
                assert a.keys.is_contiguous()
                assert off(a.keys, b.keys) < TOLERANCE
                assert off(a.values, b.values) < TOLERANCE
    assert [kv.tokens for kv in encode_runs(model, [run], None, token_budget=7)[0]] == list(texts)


@each_family
def test_reading_in_strides_equals_one_pass(family: str) -> None:
    model = model_of(family)
    prompt = prompt_of().extended(words(30)[0])
    table = prompt.table(model)
    expected = read_prompt(model, table, prompt.tokens, prompt.positions, FreshRows(model.num_layers))
    for stride in (1, 4, 7):
        fresh = FreshRows(model.num_layers, reserve=2)
        got = read_prompt(model, table, prompt.tokens, prompt.positions, fresh, stride=stride)
        assert fresh.positions == list(prompt.positions)
        assert off(got.logits, expected.logits) < TOLERANCE
        assert (got.mass - expected.mass).abs().max() < TOLERANCE


@each_family
def test_ordinary_calls_of_an_adopted_model_stay_stock(family: str) -> None:
    network, stock = model_of(family).network, Stock(tiny_model(family))
    text, short = whole_text(), words(45)[0]
    ids = torch.tensor([text, (0,) * (len(text) - len(short)) + short])
    seen = torch.ones_like(ids)
    seen[1, : len(text) - len(short)] = 0
    with torch.no_grad():
        got = network(input_ids=ids, attention_mask=seen, use_cache=False).logits
        expected = stock.network(input_ids=ids, attention_mask=seen, use_cache=False).logits
    assert off(got[0], expected[0]) < TOLERANCE
    assert off(got[1, -len(short) :], expected[1, -len(short) :]) < TOLERANCE
    settings = {"attention_mask": seen, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    assert network.generate(ids, **settings).tolist() == stock.network.generate(ids, **settings).tolist()


@pytest.mark.parametrize("family", ["llama", "llama-yarn", "mistral-window", "gemma3", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_the_truth_as_the_stock_model(family: str, dtype: torch.dtype) -> None:
    prompt = prompt_of()
    truth, masses = stock_of(family).read(prompt)
    stock, _ = Stock(tiny_model(family, dtype=dtype)).read(prompt)
    got = read_all(tiny(family, dtype=dtype), prompt)
    assert got.logits.dtype == dtype
    assert off(got.logits, truth) < 1.5 * off(stock, truth) + torch.finfo(dtype).eps
    assert (got.mass - masses).abs().max() < 16 * torch.finfo(dtype).eps


def test_frequencies_rounded_by_a_cast_are_made_anew() -> None:
    """`model.to(bfloat16)` rounds the rotary buffers; positions far out would be off by whole turns."""
    cast = Model(tiny_model("llama").to(torch.bfloat16), tiny_tokenizer())
    assert cast.specs == model_of("llama").specs


def test_longrope_is_used_in_the_regime_that_the_longest_prompt_decides() -> None:
    rotations = {
        f: model_of(f).specs[0].rotation for f in ("phi3", "phi3-longrope-short", "phi3-longrope-long")
    }
    base = rotations["phi3"].frequencies
    for family, factor in (("phi3-longrope-short", "short_factor"), ("phi3-longrope-long", "long_factor")):
        factors = FAMILIES[family]().rope_parameters[factor]
        expected = [b / f for b, f in zip(base, factors, strict=True)]
        assert rotations[family].frequencies == pytest.approx(expected, rel=1e-6)
    assert MAX_LENGTHS["phi3-longrope-short"] == 2048


def test_callers_at_the_same_time_get_the_same_answers_as_one_by_one() -> None:
    texts = [f"Document {i}: the colour of box {i} is number {i * 7}. " for i in range(8)]
    prompts = [
        f"Answer from these.\n\n{texts[i]}\n\n{texts[(i + 3) % 8]}\n\nQuestion {i}: which colour?\n"
        for i in range(8)
    ]
    settings = {
        "prefix": "Answer from these.\n\n",
        "sampling": Sampling(max_new_tokens=NEW_TOKENS, ignore_eos=True),
    }
    with Engine(tiny("mistral-window")) as engine:
        alone = [engine.answer(p, texts, **settings) for p in prompts]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(lambda p: engine.answer(p, texts, **settings), prompts))
    assert all(a.usage.cached_tokens > 0 for a in alone)
    assert [a.tokens for a in together] == [a.tokens for a in alone]
    assert [a.text for a in together] == [a.text for a in alone]
    assert len({a.tokens for a in alone}) > 1


def test_fresh_models_of_one_seed_are_equal() -> None:
    first, second, other = tiny_model("qwen3"), tiny_model("qwen3"), tiny_model("qwen3", seed=1)
    for a, b, c in islice(zip(first.parameters(), second.parameters(), other.parameters(), strict=True), 3):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
