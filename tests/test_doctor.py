"""The doctor: what is exact and what is not, what policies cost, which layers find the document."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cache

import pytest
import torch

from kvrag.doctor import Report, describe, examine
from kvrag.doctor.layers import LayerScores, scored
from kvrag.doctor.policies import PolicyScore, compare, divergence, examined, recommend
from kvrag.engine import Engine
from kvrag.errors import ConfigError
from kvrag.focus.policy import PRESETS, Policy
from kvrag.focus.repair import Deviation
from kvrag.model import READER, Model
from kvrag.prompt import RagPrompt
from kvrag.testing.models import tiny, tiny_model, tiny_tokenizer
from kvrag.trial.codecs import CodecScore, smallest
from kvrag.trial.prompts import CONTINUATION, Prompts, full_attention
from kvrag.trial.samples import Case, cases


@cache
def report(family: str = "llama", dtype: torch.dtype = torch.float32) -> Report:
    with Engine(tiny(family, dtype=dtype)) as engine:
        return examine(engine, questions=1)


@cache
def reader() -> Report:
    with Engine.from_pretrained() as engine:
        return examine(engine, questions=4)


def scores_of(found: Report) -> dict[str, PolicyScore]:
    return {score.name: score for score in found.policies}


# ---- exactness


@pytest.mark.parametrize("family", ["llama", "gemma2", "smollm3", "gpt_neox", "deepseek_v3", "gpt_oss"])
def test_good_models_are_exact(family: str) -> None:
    found = report(family)
    assert found.is_exact
    assert found.full_error < 1e-4
    for score in found.policies:
        assert 0 <= score.kl < math.inf
        assert 0 <= score.top1 <= 1
    assert found.recommended is not None
    assert sum(found.layers.values()) == 4
    assert "exact to rounding" in describe(found)


def test_rounding_of_a_smaller_type_is_allowed_for() -> None:
    found = report(dtype=torch.bfloat16)
    assert found.is_exact
    assert found.tolerance == pytest.approx(5e-2)
    assert found.full_error > 1e-5


def test_the_kinds_of_layers_are_told() -> None:
    assert report("gemma2").layers == {
        "rotation of 16 dimensions (half), window of 24": 2,
        "rotation of 16 dimensions (half), full attention": 2,
    }
    assert "no rotation, full attention" in report("smollm3").layers


@pytest.mark.parametrize("change", ["frequencies", "layout", "sign", "window"])
def test_a_misunderstood_model_is_not_exact(change: str) -> None:
    model = tiny()
    (spec,) = set(model.specs)
    assert spec.rotation is not None
    rotation = spec.rotation
    wrong = {
        "frequencies": replace(
            spec, rotation=replace(rotation, frequencies=tuple(f * 1.05 for f in rotation.frequencies))
        ),
        "layout": replace(spec, rotation=replace(rotation, layout="interleaved")),
        "sign": replace(spec, rotation=replace(rotation, sign=-1)),
        "window": replace(spec, window=64),
    }[change]
    model.specs = type(model.specs)([wrong, *model.specs[1:]])
    with Engine(model) as engine:
        found = examine(engine)
    assert not found.is_exact
    assert "NOT exact: do not use this model" in describe(found)
    # What wrong rows cost says nothing about policies.
    assert (found.policies, found.layer_scores, found.recommended) == ((), None, None)


def test_not_a_number_is_not_exact() -> None:
    network = tiny_model("llama")
    model = Model(network, tiny_tokenizer(), name="broken")
    with torch.no_grad():
        network.lm_head.weight[5] = float("nan")
    with Engine(model) as engine:
        assert not examine(engine).is_exact


def test_a_model_without_template_can_be_examined() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with Engine(Model(tiny_model("llama"), tokenizer, name="plain")) as engine:
        assert examine(engine).is_exact


# ---- policies


def test_every_policy_is_compared() -> None:
    names = set(scores_of(report()))
    assert names >= {*PRESETS, "cachefocus+query-driven"}
    assert "cacheblend" not in {policy.name for policy in examined(1)}  # it compares values of layer 1


def test_policies_of_the_reader() -> None:
    found = scores_of(reader())
    assert found["plain"].kl < 0.02
    assert found["plain"].top1 > 0.9
    shares = {name: score.recomputed for name, score in found.items()}
    for name in ("plain", "naive", "pcw", "ape", "cachefocus"):
        assert shares[name] == 0
    assert shares["cacheblend"] == shares["query-driven"] == pytest.approx(0.15, abs=0.001)
    assert 0.05 < shares["epic"] < 0.15  # 16 rows of all documents but one
    assert shares["cachefocus+query-driven"] == pytest.approx(
        0.15 * found["cachefocus+query-driven"].kept, abs=0.001
    )
    assert 0.3 < found["cachefocus"].kept < 0.7
    assert found["plain"].kept == 1
    assert all(score.seconds > 0 for score in found.values())


def test_reading_everything_again_is_full_attention() -> None:
    with Engine.from_pretrained() as engine:
        form = engine.encoder().prompt
        prepared = [p for case in cases(READER, 2) if (p := Prompts(engine.model, form).prepare(case))]
        (score,), seconds = compare(engine.model, prepared, [Policy(name="all", repair=Deviation(1.0))])
    assert score.kl < 1e-6
    assert score.top1 == 1
    assert score.recomputed == 1
    assert seconds > 0


def test_full_attention_is_that_of_one_forward_pass() -> None:
    model = Model(tiny_model("llama"), tiny_tokenizer(), name="plain")
    tokens = model.text.tokenize("The lighthouse of Varn")
    full = full_attention(model, tokens)
    assert full.logits.shape[0] == len(full.answer) + 1 == CONTINUATION + 1
    with torch.inference_mode():
        whole = model.network(input_ids=torch.tensor([[*tokens, *full.answer]])).logits[0]
    torch.testing.assert_close(full.logits, whole[len(tokens) - 1 :], rtol=1e-4, atol=1e-5)
    assert divergence(full.logits, full.logits) == 0
    assert divergence(full.logits, full.logits.flip(-1)) > 0


def policy_score(
    name: str, kl: float, top1: float, recomputed: float = 0.0, kept: float = 1.0
) -> PolicyScore:
    return PolicyScore(name, kl, top1, recomputed, kept, 0.1)


@pytest.mark.parametrize(
    ("scores", "chosen"),
    [
        # as good as the best: the cheapest
        ([policy_score("a", 0.100, 0.95, 0.15), policy_score("b", 0.14, 0.92)], "b"),
        # too far away in KL, or in agreement
        ([policy_score("a", 0.100, 0.95, 0.15), policy_score("b", 0.16, 0.95)], "a"),
        ([policy_score("a", 0.100, 0.95, 0.15), policy_score("b", 0.10, 0.89)], "a"),
        # both next to nothing: what is read decides
        ([policy_score("a", 1e-6, 1.0), policy_score("b", 1e-4, 1.0, kept=0.5)], "b"),
        # the best KL has the worst agreement
        ([policy_score("a", 0.1, 0.5), policy_score("b", 0.9, 0.9)], "a"),
        # a control is never recommended
        ([policy_score("naive", 0.0, 1.0), policy_score("b", 0.9, 0.5)], "b"),
    ],
)
def test_the_cheapest_of_the_good_is_recommended(scores: list[PolicyScore], chosen: str) -> None:
    found = recommend(scores)
    assert found is not None
    assert found.policy == chosen
    assert found.why.startswith("the cheapest with a KL of at most ")


def test_without_scores_nothing_is_recommended() -> None:
    assert recommend([]) is None


# ---- codecs


def test_fewer_bits_lose_more_and_write_less() -> None:
    found = {score.name: score for score in reader().codecs}
    assert list(found) == ["raw", "fp8", "int8", "int4"]
    assert found["raw"].kl < 1e-6  # one token at a time against all at once
    assert found["raw"].top1 == 1
    assert 0 < found["int8"].kl < found["int4"].kl
    assert found["raw"].bytes_per_token == 5 * 2 * (32 + 32) * 4  # layers, heads, key and value, float32
    assert found["int4"].bytes_per_token < found["int8"].bytes_per_token < 0.4 * found["raw"].bytes_per_token
    assert reader().codec in found


def test_the_budget_chooses_the_smallest_codec() -> None:
    scores = [
        CodecScore("raw", 200.0, 1e-9, 1.0),
        CodecScore("a", 90.0, 0.004, 1.0),
        CodecScore("b", 50.0, 0.02, 0.9),
    ]
    chosen = [smallest(scores, budget) for budget in (0.0, 0.01, 0.5)]
    assert [score.name for score in chosen if score] == ["raw", "a", "b"]
    assert smallest([], 1.0) is None
    with Engine.from_pretrained() as engine, pytest.raises(ConfigError, match="max_kl"):
        examine(engine, max_kl=-1.0)


# ---- layers


def test_the_readers_best_layer_beats_chance() -> None:
    found = reader().layer_scores
    assert found is not None
    assert len(found.question) == len(found.last) == 5
    assert all(0 <= share <= 1 for share in (*found.question, *found.last))
    assert found.chance == pytest.approx(1 / 8)
    assert found.best
    assert found.best_precision > 3 * found.chance
    assert max(found.best) < 4
    pruning = found.pruning
    assert pruning is not None
    assert pruning.start == max(found.best) + 1
    assert scores_of(reader())["cachefocus, best layers"].kl < 0.01


def masses(right: Sequence[float], num: int = 40, seed: int = 0) -> list[tuple[torch.Tensor, int]]:
    """Questions of eight documents that each layer finds so often, and else another."""
    rng = random.Random(seed)
    found = []
    for _ in range(num):
        gold = rng.randrange(8)
        mass = torch.rand(len(right), 8, generator=torch.Generator().manual_seed(rng.randrange(10**6))) * 0.1
        for layer, share in enumerate(right):
            mass[layer, gold if rng.random() < share else (gold + rng.randrange(1, 8)) % 8] += 1
        found.append((mass, gold))
    return found


def test_the_best_layer_and_its_rows_are_found() -> None:
    found = scored(masses([0.1, 0.2, 0.1, 1.0]), masses([0.1, 0.9, 0.1, 1.0]))
    assert (found.best, found.best_rows) == ((1,), "last")  # the last layer comes too late for pruning
    assert found.best_precision == found.last[1] > 0.8
    assert found.question[3] == found.last[3] == 1


def test_two_layers_that_know_half_are_taken_together() -> None:
    halves = []
    for number, (_, gold) in enumerate(masses([0.0, 0.0, 0.0], num=60)):
        mass = torch.full((3, 8), 0.1)
        mass[number % 2, gold] = 1.0  # this one knows, the other one guesses a little
        mass[1 - number % 2, (gold + 1) % 8] = 0.2
        halves.append((mass, gold))
    found = scored(halves, masses([0.1, 0.1, 0.1], num=60))
    assert (found.best, found.best_rows, found.best_precision) == ((0, 1), "question", 1.0)


@pytest.mark.parametrize("num_layers", [1, 4, 40])
def test_chance_is_not_taken_for_knowledge(num_layers: int) -> None:
    guesses = [1 / 8] * num_layers
    found = scored(masses(guesses), masses(guesses, seed=1))
    assert found.best == ()
    assert found.pruning is None
    assert found.best_precision == 0


# ---- samples


@pytest.mark.parametrize("model", [READER, "another"])
def test_cases_are_many_and_in_all_orders(model: str) -> None:
    found = cases(model, 40)
    assert found == cases(model, 40)
    assert found != cases(model, 40, seed=1)
    assert len(found) == 40
    assert len({case.question for case in found}) >= 8
    assert {case.gold for case in found} == set(range(8))
    assert all(len(set(case.documents)) == 8 for case in found)


def test_each_sample_question_is_about_its_document() -> None:
    for case in cases("another", 8):
        names = [word for word in case.question.strip("?").split()[1:] if word[0].isupper()]
        told = [all(name.rstrip(",") in text for name in names) for text in case.documents]
        assert told == [i == case.gold for i in range(8)]


def test_the_reader_is_asked_for_what_its_document_tells() -> None:
    for case in cases(READER, 12):
        title = case.documents[case.gold].split(".")[0]
        assert title in case.question


def test_documents_that_do_not_fit_are_left_out() -> None:
    small = Model(tiny_model("llama"), tiny_tokenizer(), name="small", max_length=700)
    prompts = Prompts(small, RagPrompt.of(small.text))
    for case in cases("small", 8):
        found = prompts.prepare(case)
        assert found is not None
        units = found.arrangement.units
        assert 2 <= len(units) < 8
        assert units[found.gold].kv.tokens == small.text.tokenize(case.documents[case.gold])
        assert len(found.tokens) + CONTINUATION < 700
        assert found.arrangement.query == len(found.tokens) - len(found.arrangement.question)
    assert prompts.prepare(Case(("word " * 800, "other " * 800), "Who?", 0)) is None


def test_a_window_too_short_for_samples_is_said() -> None:
    with Engine(Model(tiny_model("llama"), tiny_tokenizer(), name="short", max_length=250)) as engine:
        found = examine(engine)
    assert found.policies == ()
    assert "no two sample documents fit" in describe(found)


# ---- words


def test_the_description_fits_a_terminal() -> None:
    for found in (report(), reader()):
        text = describe(found)
        assert max(map(len, text.splitlines())) <= 80
        for score in found.policies:
            assert f"  {score.name} " in text
        assert found.recommended is not None
        assert f"recommended: {found.recommended.policy}\n" in text
    assert "tiny llama" in describe(report())
    assert "kvrag ask --policy cachefocus --layers " in describe(reader())


def test_many_layers_are_told_in_several_lines() -> None:
    shares = tuple(i / 100 for i in range(41))
    scores = LayerScores(32, 0.125, shares, shares, (), "question", 0.0)
    text = describe(replace(reader(), layer_scores=scores))
    assert max(map(len, text.splitlines())) <= 80
    assert "layers 30 to 39" in text
    assert "layer 40 " in text
    assert "no layer that pruning can use is better than chance" in text


def test_progress_is_told() -> None:
    seen: list[tuple[int, int]] = []
    with Engine(tiny("llama")) as engine:
        examine(engine, questions=1, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 5) for i in range(1, 6)]


def test_the_report_as_a_dictionary() -> None:
    found = asdict(report())
    assert set(found) >= {"model", "layers", "tolerance", "policies", "layer_scores", "recommended"}
    assert set(found["policies"][0]) == {"name", "kl", "top1", "recomputed", "kept", "seconds"}
