"""Policies on a whole question: what must be exact is exact, what is dropped is not read."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from kvrag.answer import Answer
from kvrag.attention import Looking
from kvrag.compose import Arrangement, Unit
from kvrag.config import Sampling
from kvrag.decode import Behind, choice, steps
from kvrag.encoding import encode
from kvrag.engine import Engine
from kvrag.errors import ConfigError, ContextOverflow
from kvrag.focus.placement import Placement
from kvrag.focus.policy import PLAIN, PRESETS, Policy, SecondLook, ape, cachefocus, epic, pcw, preset
from kvrag.focus.pruning import AttentionScore, GivenScore, Pruning, RandomScore, RankScore
from kvrag.focus.repair import Deviation, FirstRows, QueryDriven
from kvrag.fresh import FreshRows
from kvrag.looking import Look, deviations, look, place
from kvrag.model import Model
from kvrag.prefill import read_prompt
from kvrag.prompt import RagPrompt
from kvrag.store.disk import DiskStore
from kvrag.testing.models import tiny
from kvrag_kernels import Group

DOCUMENTS = [
    "The lighthouse of Varn was built in 1871.",
    "A ferry crosses the Mirrow twice a day, in winter once.",
    "The orchard at Lindal grows apples and plums.",
    "The library of Osted lends books on four floors.",
    "Nobody knows the age of the bridge.",
]
QUESTION = "\n\nWhen was the lighthouse built?"


@cache
def model(family: str = "llama") -> Model:
    return tiny(family)


@cache
def arrangement(
    num: int = 5, tail: str = "\n\n", family: str = "llama", lead_text: str = "\n"
) -> Arrangement:
    """Prefix, a lead, documents with a text behind each but the last, question."""
    found = model(family)
    text = found.text
    (prefix,) = encode(found, [text.tokenize("Read this.", first=True)])
    lead = text.tokenize(lead_text) if lead_text else ()
    units, at = [], prefix.num_tokens + len(lead)
    for i, kv in enumerate(encode(found, [text.tokenize(d) for d in DOCUMENTS[:num]], prefix)):
        unit = Unit(i, kv, at, text.tokenize(tail) if i < num - 1 else ())
        units.append(unit)
        at += unit.length
    return Arrangement(prefix, lead, tuple(units), text.tokenize(QUESTION), at)


def prompt_of(arranged: Arrangement) -> tuple[int, ...]:
    """Every token of the prompt, in order."""
    assert arranged.prefix is not None
    documents = [t for unit in arranged.units for t in (*unit.kv.tokens, *unit.tail)]
    return (*arranged.prefix.tokens, *arranged.lead, *documents, *arranged.question)


def full(found: Model, tokens: Sequence[int]) -> torch.Tensor:
    """The next token's logits by the stock model."""
    with torch.no_grad():
        logits: torch.Tensor = found.network(torch.tensor([list(tokens)]), use_cache=False).logits
    return logits[0, -1]


def greedy(found: Model, looked: Look, prompt: Sequence[int], num: int = 6) -> list[int]:
    """The answer's first tokens."""
    behind = Behind(looked.tables.seen_from(looked.fresh.num_rows), looked.fresh, found.specs)
    chosen = choice(found, prompt, Sampling(max_new_tokens=num, ignore_eos=True))
    documents = tuple(s.document for s in looked.composed.table)
    end = looked.composed.end
    return [s.token for s in steps(found, behind, prompt, looked.read, documents, chosen, position=end)]


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert float((found - expected).abs().max() / expected.abs().max()) < tolerance


# ---- reading everything again is full attention


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize(
    "policy",
    [
        Policy(repair=Deviation(1.0)),
        Policy(repair=QueryDriven(1.0)),
        Policy(max_risk=0.0),
        Policy(repair=QueryDriven(1.0), pruning=Pruning(keep=5)),
    ],
    ids=["deviation", "query-driven", "risk", "after pruning nobody"],
)
def test_all_rows_read_again_are_full_attention(policy: Policy, family: str) -> None:
    found, arranged = model(family), arrangement(family=family)
    looked = look(found, arranged, policy)
    prompt = prompt_of(arranged)
    close(looked.read.logits[-1], full(found, prompt))
    assert looked.recomputed == sum(unit.kv.num_tokens for unit in arranged.units)
    tokens = greedy(found, looked, prompt)
    for i, token in enumerate(tokens):
        assert int(full(found, (*prompt, *tokens[:i])).argmax()) == token


def test_the_survivors_read_again_are_full_attention_to_them_in_their_order() -> None:
    found, arranged = model(), arrangement(tail="")
    scores = GivenScore((3.0, 1.0, 5.0, 2.0, 4.0))
    pruning = Pruning(keep=3, scorer=scores)
    looked = look(
        found, arranged, Policy(placement=Placement(order="sort"), pruning=pruning, repair=QueryDriven(1.0))
    )
    assert [s.document for s in looked.composed.table][1:] == [0, 4, 2]  # the best next to the query
    documents = [t for i in (0, 4, 2) for t in arranged.units[i].kv.tokens]
    assert arranged.prefix is not None
    # what was pruned leaves a hole behind the prefix, which stays where it is
    prompt = torch.tensor([[*arranged.prefix.tokens, *arranged.lead, *documents, *arranged.question]])
    first = arranged.query - len(documents)
    before = arranged.start
    positions = [*range(before), *range(first, first + prompt.shape[1] - before)]
    # an explicit mask: transformers takes a jump of the positions for the border of another sequence
    mask = torch.full((prompt.shape[1],) * 2, float("-inf")).triu(1)[None, None]
    with torch.no_grad():
        expected = found.network(
            prompt, attention_mask=mask, position_ids=torch.tensor([positions]), use_cache=False
        ).logits[0, -1]
    close(looked.read.logits[-1], expected)


@pytest.mark.parametrize("policy", [epic(4), Policy(repair=Deviation(0.3)), Policy(repair=QueryDriven(0.3))])
def test_rows_read_again_see_what_stands_before_them(policy: Policy) -> None:
    """The first chosen row of the first document sees prefix and own rows only: nothing about it changes."""
    found, arranged = model(), arrangement(lead_text="")
    looked = look(found, arranged, policy)
    table = looked.composed.table
    assert looked.recomputed == sum(len(s.hidden) for s in table) > 0
    rows = {s.document: s for s in table if s.document is not None}
    first = rows[0]
    values = looked.fresh.values(1)
    for i, row in enumerate(first.hidden):
        torch.testing.assert_close(
            values[:, first.first_row + i], first.kv.layers[1].values[:, row], rtol=1e-3, atol=1e-5
        )
    later = rows[4]
    for i, row in enumerate(later.hidden):
        assert not torch.allclose(
            values[:, later.first_row + i], later.kv.layers[1].values[:, row], atol=1e-4
        )


def test_deviations_are_those_of_full_attention() -> None:
    found, arranged = model(), arrangement(lead_text="")
    changes = deviations(found, arranged, 1)
    assert float(changes[0].max()) < 1e-8  # the first document has nothing new before it
    assert all(float(changes[i].min()) > 1e-8 for i in range(1, 5))
    (whole,) = encode(found, [prompt_of(arranged)[: arranged.query]])
    start = arranged.units[3].start
    new = whole.layers[1].values[:, start : start + arranged.units[3].kv.num_tokens]
    expected = (new - arranged.units[3].kv.layers[1].values).square().sum((0, 2))
    torch.testing.assert_close(changes[3], expected, rtol=1e-3, atol=1e-6)


# ---- what changes nothing


@pytest.mark.parametrize("keep", [5, 1.0, 99])
@pytest.mark.parametrize("order", ["keep", "align", "sort"])
def test_pruning_that_keeps_all_changes_no_bit(keep: int | float, order: str) -> None:
    found, arranged = model(), arrangement()
    plain = look(found, arranged, PLAIN)
    policy = Policy(placement=Placement(order=order), pruning=Pruning(keep=keep))  # type: ignore[arg-type]
    looked = look(found, arranged, policy)
    assert torch.equal(looked.read.logits, plain.read.logits)
    assert looked.tables == plain.tables


def test_ape_without_temperature_and_scale_is_pcw_bit_for_bit() -> None:
    found, arranged = model(), arrangement()
    assert torch.equal(
        look(found, arranged, ape(1.0, 1.0)).read.logits, look(found, arranged, pcw()).read.logits
    )
    assert not torch.equal(
        look(found, arranged, ape(0.9, 0.9)).read.logits, look(found, arranged, pcw()).read.logits
    )


@pytest.mark.parametrize("policy", [PLAIN, pcw(), ape(), Policy(placement=Placement("slots"))])
def test_the_order_in_storage_changes_nothing(policy: Policy) -> None:
    found, arranged = model(), arrangement(tail="")
    placed, _ = place(arranged, policy.placement, 10_000)
    expected = look(found, arranged, policy).read.logits
    for order in ((4, 3, 2, 1, 0), (2, 0, 4, 1, 3)):
        shuffled = replace(placed, units=tuple(placed.units[i] for i in order))
        torch.testing.assert_close(
            _read_as_placed(found, shuffled, policy.group), expected, rtol=1e-4, atol=1e-4
        )


def _read_as_placed(found: Model, arranged: Arrangement, group: Group | None) -> torch.Tensor:
    composed = arranged.composed()
    fresh = FreshRows(found.num_layers)
    return read_prompt(
        found, composed.table, composed.tokens, composed.positions, fresh, looking=Looking(group)
    ).logits


def test_decoding_with_each_layers_own_places_differs_only_where_places_do() -> None:
    found, arranged = model(), arrangement()
    prompt = prompt_of(arranged)
    keep = Policy(pruning=Pruning(keep=2))
    same = look(found, arranged, replace(keep, per_layer=True))
    assert greedy(found, same, prompt) == greedy(found, look(found, arranged, keep), prompt)
    sorted_ = replace(keep, placement=Placement(order="sort"), per_layer=True)
    tables = look(found, arranged, sorted_).tables
    targets = [[s.target for s in tables.at(layer)] for layer in range(found.num_layers)]
    assert targets[0] != targets[-1]


# ---- who is read


def test_pruned_documents_are_gone_from_their_layer_on() -> None:
    found, arranged = model(), arrangement()
    pruning = Pruning(keep=2, start=1, scorer=GivenScore((1.0, 5.0, 2.0, 4.0, 3.0)))
    looked = look(found, arranged, Policy(pruning=pruning))
    dropped = looked.focus.dropped_at
    assert set(dropped) == {0, 2, 4}
    assert looked.focus.kept == (1, 3)
    documents = [s.document for s in looked.composed.table]
    for layer in range(found.num_layers):
        read = {documents[i] for i in range(1, 6) if float(looked.read.mass[layer, i].sum()) > 0}
        assert read == {n for n in range(5) if layer < dropped.get(n, 99)}
    assert {s.document for s in looked.tables} == {None, 1, 3}


@pytest.mark.parametrize(
    "scorer", [AttentionScore(), AttentionScore((1,), "last", squared=True), RankScore(), RandomScore(3)]
)
def test_scorers_keep_as_many_as_asked(scorer: object) -> None:
    found, arranged = model(), arrangement()
    looked = look(found, arranged, Policy(pruning=Pruning(keep=2, scorer=scorer)))  # type: ignore[arg-type]
    assert len(looked.focus.kept) == 2
    if isinstance(scorer, RankScore):
        assert looked.focus.kept == (0, 1)


def test_the_query_stays_where_it_is() -> None:
    found, arranged = model(), arrangement()
    plain = look(found, arranged, PLAIN)
    num = len(arranged.question)
    for order in ("keep", "align", "sort"):
        looked = look(
            found,
            arranged,
            cachefocus(1)
            if order == "sort"
            else Policy(
                placement=Placement("slots", order=order),
                pruning=Pruning(keep=1),  # type: ignore[arg-type]
            ),
        )
        query = looked.composed.positions[-num:]
        assert list(query) == list(range(query[0], query[0] + num))
        assert looked.fresh.positions[-num:] == list(query)
    assert plain.composed.positions[-num:] == tuple(range(arranged.query, arranged.query + num))


def test_beyond_the_window_documents_share_and_the_query_stays_inside() -> None:
    found, arranged = model(), arrangement()
    window = 120
    assert arranged.query > window
    looked = look(found, arranged, Policy(placement=Placement(window=window)), max_new_tokens=8)
    assert max(looked.composed.positions) < window
    assert all(s.end <= window for s in looked.composed.table)
    fewer = look(found, arranged, Policy(placement=Placement(window=window, beyond="truncate")))
    assert 0 < fewer.composed.table.num_documents < 5
    far = look(found, arranged, Policy(placement=Placement(window=window, beyond="extrapolate")))
    assert torch.equal(far.read.logits, look(found, arranged, PLAIN).read.logits)
    with pytest.raises(ContextOverflow, match="without its documents"):
        look(found, arranged, Policy(placement=Placement(window=20)))


def test_slots_that_exceed_the_window_leave_room_for_the_answer() -> None:
    found, arranged = model(), arrangement()
    window = arranged.query + len(arranged.question) + 10  # enough side by side, too little in equal slots
    looked = look(found, arranged, Policy(placement=Placement("slots", window=window)), max_new_tokens=16)
    assert window - looked.composed.end == 16


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_single_rows_sum_to_their_document_when_some_were_read_again(share: float) -> None:
    looked = look(model(), arrangement(), Policy(repair=Deviation(share), spans=True))
    rows = looked.read.mass[..., looked.composed.question :].mean(-1)
    for layer, columns in looked.columns.items():
        for i, segment in enumerate(looked.composed.table):
            if segment.document is not None:
                total = float(columns[segment.document].sum())
                assert total == pytest.approx(float(rows[layer, i]), rel=1e-4)


# ---- whole answers


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    return Engine(model(), tmp_path / "store")


def ask(engine: Engine, policy: Policy | None = None, num: int = 5, **sampling: int) -> Answer:
    prompt = "\n\n".join(["Read this.", *DOCUMENTS[:num], "Why?"])
    settings = Sampling(max_new_tokens=sampling.get("max_new_tokens", 8), ignore_eos=True)
    return engine.answer(prompt, DOCUMENTS[:num], prefix="Read this.\n\n", sampling=settings, policy=policy)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_answers_and_accounts_for_all_attention(engine: Engine, name: str) -> None:
    answer = ask(engine, preset(name))
    assert answer.policy == name
    assert len(answer.documents) == 5
    assert sum(u.focus for u in answer.documents) == pytest.approx(1)
    assert all(0 <= u.mass <= 1 and 0 <= u.question_mass <= 1 for u in answer.documents)
    read = [u for u in answer.documents if u.is_read]
    assert len(read) == (3 if name == "cachefocus" else 5)
    assert all((u.dropped_at is None) == u.is_read for u in answer.documents)
    assert answer.risk is not None
    assert 0 <= answer.risk.entropy <= 1


def test_an_answer_stays_inside_the_trained_window(engine: Engine) -> None:
    answer = ask(engine, Policy(placement=Placement(window=120)), max_new_tokens=50)
    assert answer.finish_reason == "length"
    assert len(answer.tokens) == 120 // 8
    far = ask(engine, Policy(placement=Placement(window=120, beyond="extrapolate")), max_new_tokens=50)
    assert len(far.tokens) == 50


def test_a_second_look_readmits_and_prunes(engine: Engine) -> None:
    plain = ask(engine)
    everyone = Policy(second_look=SecondLook(after=2, keep=5))
    assert ask(engine, everyone).tokens == plain.tokens
    one = ask(engine, Policy(second_look=SecondLook(after=2, keep=1)))
    assert sum(u.is_read for u in one.documents) == 1
    assert one.tokens[:3] == plain.tokens[:3]  # decided by the rows that chose these
    best = GivenScore((0.0, 0.0, 0.0, 9.0, 0.0))
    wrong = Pruning(keep=1, scorer=GivenScore((9.0, 0.0, 0.0, 0.0, 0.0)))
    again = ask(engine, Policy(pruning=wrong, second_look=SecondLook(after=2, keep=1, scorer=best)))
    assert [u.is_read for u in again.documents] == [False, False, False, True, False]
    assert again.documents[3].dropped_at is not None
    short = ask(engine, Policy(second_look=SecondLook(after=6, keep=1)), max_new_tokens=3)
    assert len(short.tokens) == 3


def test_spans_lie_in_the_best_documents(engine: Engine) -> None:
    answer = ask(engine, Policy(spans=True))
    with_span = [u for u in answer.documents if u.span is not None]
    assert len(with_span) == 3
    ranked = sorted(answer.documents, key=lambda u: u.focus, reverse=True)
    assert {u.key for u in with_span} == {u.key for u in ranked[:3]}
    for use in with_span:
        assert use.span is not None
        assert use.span.text.strip() in DOCUMENTS[int(use.key)]
        assert 0 < use.span.start < use.span.end <= use.num_tokens
        assert 0 < use.span.mass <= use.mass + 1e-6


def test_a_risky_answer_is_read_in_full(engine: Engine) -> None:
    plain = ask(engine)
    assert plain.risk is not None
    calm = ask(engine, Policy(max_risk=1.0))
    assert not calm.in_full
    assert calm.tokens == plain.tokens
    risky = ask(engine, Policy(max_risk=0.0))
    assert risky.in_full
    assert risky.usage.recomputed_tokens == sum(u.num_tokens for u in risky.documents)
    assert risky.tokens[0] == int(full(model(), risky.plan.tokens).argmax())
    assert sum(u.focus for u in risky.documents) == pytest.approx(1)


def test_deeper_layers_of_pruned_documents_are_never_read(tmp_path: Path) -> None:
    with Engine(model(), tmp_path / "store") as first:
        ask(first)
    pruning = Pruning(keep=1, start=1, scorer=GivenScore((9.0, 0.0, 0.0, 0.0, 0.0)), drop=4)
    with Engine(model(), tmp_path / "store") as engine:
        answer = ask(engine, Policy(pruning=pruning))
        assert all(u.is_hit for u in answer.documents)
        layers = model().num_layers
        per_layer = answer.usage.cached_bytes // layers
        kept = len(model().text.tokenize(DOCUMENTS[0])) / sum(u.num_tokens for u in answer.documents)
        expected = per_layer * (1 + kept * (layers - 1))
        assert answer.usage.read_bytes == pytest.approx(expected, rel=0.01)
        assert isinstance(engine.store, DiskStore)
        assert engine.store.stats().bytes_read == answer.usage.read_bytes


def test_damage_in_a_deep_layer_is_found_when_it_is_read_and_only_then(tmp_path: Path) -> None:
    with Engine(model(), tmp_path / "store") as engine:
        expected = ask(engine)
    for file in (tmp_path / "store").glob("*/*.safetensors"):
        raw = bytearray(file.read_bytes())
        count = next(len(model().text.tokenize(d)) for d in DOCUMENTS if _is_file_of(raw, d))
        raw[-4 * count - 1] ^= 0xFF  # the last row of the last layer
        file.write_bytes(raw)
    first = Pruning(keep=1, start=1, drop=4, scorer=GivenScore((0.0, 9.0, 0.0, 0.0, 0.0)))
    with Engine(model(), tmp_path / "store") as engine:
        answer = ask(engine, Policy(pruning=first))
        assert isinstance(engine.store, DiskStore)
        assert engine.store.stats().damaged == 1  # the survivor's; the others' damage lies where nobody reads
        assert [u.is_hit for u in answer.documents] == [True, False, True, True, True]
        assert ask(engine).tokens == expected.tokens
        assert engine.store.stats().damaged == 5


def _is_file_of(raw: bytearray, document: str) -> bool:
    tokens = model().text.tokenize(document)
    return bytes(raw).endswith(b"".join(t.to_bytes(4, "little", signed=True) for t in tokens))


def test_an_engine_has_a_policy_of_its_own(tmp_path: Path) -> None:
    with Engine(model(), policy="cachefocus") as engine:
        assert ask(engine).policy == "cachefocus"
        assert ask(engine, PLAIN).policy == "plain"
    with pytest.raises(ConfigError, match=r"no policy 'best'.*cachefocus"):
        Engine(model(), policy="best")


def test_contexts_are_part_of_what_is_kept(tmp_path: Path) -> None:
    """Rows behind other texts are other rows: never mixed, found again behind the same texts."""
    form = RagPrompt("Read this.\n\n", is_rendered=False)
    prompt = form.render(DOCUMENTS[:2], "Why?")
    one = {"0": form.before([DOCUMENTS[1]]), "1": form.before([DOCUMENTS[0]])}
    more = one | {"1": form.before([DOCUMENTS[2], DOCUMENTS[0]])}

    def answer(contexts: dict[str, tuple[str, ...]], policy: Policy = PLAIN) -> Answer:
        stream = engine.stream_rendered(
            prompt, DOCUMENTS[:2], prefix=form.prefix, policy=policy, contexts=contexts, is_rendered=False
        )
        for _ in stream:
            pass
        assert stream.answer is not None
        return stream.answer

    with Engine(model(), tmp_path / "store") as engine:
        alone = answer({})
        behind = answer(one)
        assert [u.is_hit for u in behind.documents] == [False, False]
        for policy in (PLAIN, preset("cachefocus"), preset("query-driven"), preset("epic"), preset("pcw")):
            assert [u.is_hit for u in answer(one, policy).documents] == [True, True]
        assert [u.is_hit for u in answer(more).documents] == [True, False]
        assert [u.is_hit for u in answer({}).documents] == [True, True]
        assert behind.documents[0].mass != alone.documents[0].mass


def test_the_last_row_may_decide_what_is_read_again() -> None:
    found, arranged = model(), arrangement()
    plain = look(found, arranged, Policy(repair=QueryDriven(0.2, layers=(1,))))
    last = look(found, arranged, Policy(repair=QueryDriven(0.2, layers=(1,), looked_by="last")))
    hidden = [[s.hidden for s in looked.composed.table] for looked in (plain, last)]
    assert hidden[0] != hidden[1]
    sums = {n: float(c.sum()) for n, c in last.columns[1].items()}
    places = {s.document: i for i, s in enumerate(look(found, arranged, PLAIN).composed.table)}
    mass = look(found, arranged, PLAIN).read.mass[1, :, -1]
    assert all(sums[n] == pytest.approx(float(mass[places[n]]), rel=1e-4) for n in sums)


def test_first_rows_leave_the_first_document_alone() -> None:
    arranged = arrangement()
    looked = look(model(), arranged, Policy(repair=FirstRows(3)))
    hidden = {s.document: s.hidden for s in looked.composed.table if s.document is not None}
    assert hidden == {0: (), 1: (0, 1, 2), 2: (0, 1, 2), 3: (0, 1, 2), 4: (0, 1, 2)}


def test_pruning_while_reading_is_reading_a_table_that_was_pruned_beforehand() -> None:
    found, arranged = model(), arrangement()
    looked = look(found, arranged, Policy(pruning=Pruning(keep=2, start=1)))
    table = arranged.composed().table
    for number, layer in looked.focus.dropped_at.items():
        table = table.without([number], from_layer=layer)
    composed = looked.composed
    fresh = FreshRows(found.num_layers)
    expected = read_prompt(found, table, composed.tokens, composed.positions, fresh)
    assert torch.equal(expected.logits, looked.read.logits)
    assert torch.equal(expected.mass, looked.read.mass)


def test_a_long_prompt_is_pruned_in_its_last_stride(monkeypatch: pytest.MonkeyPatch) -> None:
    found, arranged = model(), arrangement(tail="\n\nand then there is this:\n\n")
    policy = Policy(pruning=Pruning(keep=2, start=1, scorer=GivenScore((1.0, 5.0, 2.0, 4.0, 3.0))))
    expected = look(found, arranged, policy)
    monkeypatch.setattr("kvrag.looking.STRIDE", 40)
    looked = look(found, arranged, policy)
    assert looked.focus.dropped_at == expected.focus.dropped_at
    # earlier strides see every document in every layer, so that only the last one's rows are alike
    assert looked.read.mass.shape == expected.read.mass.shape


@pytest.mark.parametrize(
    "policy",
    [Policy(repair=Deviation(1.0)), Policy(max_risk=0.0), Policy(repair=Deviation(1.0), spans=True)],
    ids=["repair", "in full", "with spans"],
)
def test_rows_read_again_count_for_their_documents(engine: Engine, policy: Policy) -> None:
    """Read again or not, a document's share is that of its rows: here of full attention."""
    answer = ask(engine, policy)
    prompt = answer.plan.tokens
    network = copy.deepcopy(model().network)
    network.set_attn_implementation("eager")
    with torch.no_grad():
        found = network(torch.tensor([list(prompt)]), output_attentions=True, use_cache=False)
    at = 0
    first = ask(engine, policy, max_new_tokens=1)
    for span in answer.plan.spans:
        end = at + len(span.tokens)
        if span.kind == "cached":
            expected = torch.stack([a[0, :, -1, at:end].sum(-1).mean() for a in found.attentions]).mean()
            use = first.documents[int(span.key)]
            assert use.mass == pytest.approx(float(expected), rel=1e-3)
        at = end
    assert sum(u.focus for u in answer.documents) == pytest.approx(1)
    if policy.spans:
        assert sum(u.span is not None for u in answer.documents) == 3
