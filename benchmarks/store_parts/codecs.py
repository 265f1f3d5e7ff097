"""Bytes per token of each codec, and what it loses, by the doctor's measure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

import torch
from ttft import SMOKE, Shape, build

from kvrag.compose import Arrangement, Unit
from kvrag.encoding import encode
from kvrag.engine import Engine
from kvrag.model import Model
from kvrag.trial.codecs import CodecTrial
from kvrag.trial.prompts import Prepared, Prompts
from kvrag.trial.samples import cases


def measure(questions: int, *, smoke: bool) -> dict[str, object]:
    """Scores on the shipped reader, and on a random-weight shape, whose losses say little."""
    return {
        "reader": _scores_of_the_reader(questions),
        "random": _scores_of_random_weights(SMOKE if smoke else Shape(), smoke=smoke),
    }


def _scores_of_the_reader(questions: int) -> list[dict[str, object]]:
    with Engine.from_pretrained("kvrag/reader") as engine:
        form = engine.encoder().prompt

        def ask() -> list[dict[str, object]]:
            prompts = Prompts(engine.model, form)
            prepared = (prompts.prepare(case) for case in cases(engine.model.name, questions))
            return _scores(engine.model, (one for one in prepared if one is not None))

        return engine.call(ask)


def _scores_of_random_weights(shape: Shape, *, smoke: bool) -> list[dict[str, object]]:
    model = build(shape, torch.float32, "cpu")
    generator = torch.Generator().manual_seed(2)

    def draw(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(5, shape.vocabulary, (count,), generator=generator).tolist())

    units: list[Unit] = []
    length = 40 if smoke else 256
    for number, kv in enumerate(encode(model, [draw(length) for _ in range(4)])):
        units.append(Unit(number, kv, number * length))
    return _scores(model, iter([Prepared(Arrangement(None, (), tuple(units), draw(16), 4 * length), 0)]))


@torch.inference_mode()
def _scores(model: Model, prepared: Iterator[Prepared]) -> list[dict[str, object]]:
    trial = CodecTrial(model)
    for _ in trial.through(prepared):
        pass
    return [asdict(score) for score in trial.scores]
