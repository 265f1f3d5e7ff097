"""The doctor: exact models are found exact, and a model whose layers are misunderstood is not."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import cache

import pytest
import torch

from kvrag.doctor import Report, describe, examine
from kvrag.engine import Engine
from kvrag.model import Model
from kvrag.testing.models import tiny, tiny_model, tiny_tokenizer


@cache
def report(family: str = "llama", dtype: torch.dtype = torch.float32) -> Report:
    with Engine(tiny(family, dtype=dtype)) as engine:
        return examine(engine)


@pytest.mark.parametrize("family", ["llama", "gemma2", "smollm3", "gpt_neox", "deepseek_v3", "gpt_oss"])
def test_good_models_are_exact(family: str) -> None:
    found = report(family)
    assert found.is_exact
    assert found.full_error < 1e-4
    assert found.kl >= 0
    assert 0 <= found.top1 <= 1
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


def test_the_description_fits_a_terminal() -> None:
    text = describe(report())
    assert max(map(len, text.splitlines())) <= 80
    assert "tiny llama" in text
    assert set(asdict(report())) >= {"model", "layers", "kl", "top1", "tolerance"}
