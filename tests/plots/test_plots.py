"""Pictures show what the answer says, into whose axes they are told, and fail with a way out."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import colors, pyplot
from matplotlib.axes import Axes

from kvrag import Answer, Corpus, Engine, Index, InputError, MissingExtra, Sampling, ask, plots
from kvrag.focus import Heats, Placement, Policy, Pruning
from kvrag.memory.window import Window
from kvrag.plots.drawing import PALETTE
from kvrag.plots.places import stays
from kvrag.rag import Reply
from kvrag.reader.collection import documents

QUESTION = "What is the main office of Jeix Tools?"
PRUNED = Policy(placement=Placement(order="sort"), pruning=Pruning(keep=2, start=1), spans=True)
SHORT = Sampling(max_new_tokens=8)


@pytest.fixture(autouse=True)
def figures() -> Iterator[None]:
    with matplotlib.rc_context({"backend": "agg"}):
        yield
    pyplot.close("all")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with Engine.from_pretrained(store=tmp_path_factory.mktemp("caches")) as engine:
        yield engine


@pytest.fixture(scope="module")
def corpus(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Corpus]:
    assert engine.store is not None
    with Corpus(Index.open(tmp_path_factory.mktemp("chroma")), engine.store, engine.encoder()) as corpus:
        texts = documents(num=20)
        corpus.add([d.text for d in texts], metadatas=[{"source": d.title} for d in texts])
        yield corpus


@pytest.fixture(scope="module")
def plain(engine: Engine, corpus: Corpus) -> Reply:
    return ask(engine, corpus, QUESTION, k=6, sampling=SHORT).reply()


@pytest.fixture(scope="module")
def pruned(engine: Engine, corpus: Corpus) -> Reply:
    return ask(engine, corpus, QUESTION, k=6, sampling=SHORT, policy=PRUNED).reply()


def texts_of(axes: Axes) -> str:
    axes.figure.canvas.draw()
    return " ".join(t.get_text() for t in axes.texts)


def row_names(axes: Axes) -> list[str]:
    return [label.get_text() for label in axes.get_yticklabels()]


def test_layers_say_who_was_read_where(plain: Reply, pruned: Reply) -> None:
    full, answer = plain.answer, pruned.answer
    assert [len(layer) for layer in full.layers] == [6] * 5
    starts = {tuple(seen.start for seen in layer if seen) for layer in full.layers}
    places, at = [], 0
    for span in full.plan.spans:
        places += [at] if span.kind == "cached" else []
        at += len(span.tokens)
    assert starts == {tuple(places)}
    assert full.question_at == full.plan.num_tokens - len(full.plan.spans[-1].tokens)
    for number, use in enumerate(answer.documents):
        seen = [layer[number] for layer in answer.layers]
        read = len(seen) if use.dropped_at is None else use.dropped_at
        assert [one is not None for one in seen] == [layer < read for layer in range(len(seen))]
        mean = sum(one.mass for one in seen if one) / len(seen)
        assert mean == pytest.approx(use.question_mass, rel=1e-4)
        assert all(0 <= one.focus <= one.mass + 1e-6 for one in seen if one)


def test_layers_of_a_repaired_answer_are_those_that_pruned(engine: Engine, corpus: Corpus) -> None:
    policy = Policy(placement=PRUNED.placement, pruning=PRUNED.pruning, repair=_repair())
    found = ask(engine, corpus, QUESTION, k=6, sampling=SHORT, policy=policy).reply().answer
    assert found.usage.recomputed_tokens > 0
    dropped = [use.dropped_at for use in found.documents]
    assert sum(layer is not None for layer in dropped) == 4
    for number, layer in enumerate(dropped):
        assert (found.layers[-1][number] is None) == (layer is not None)


def _repair() -> Any:
    from kvrag.focus import QueryDriven

    return QueryDriven(0.2)


def test_layers_without_documents(engine: Engine) -> None:
    found = engine.answer("Where?", [], sampling=SHORT)
    assert found.layers == ((),) * 5
    with pytest.raises(InputError, match="rests on no documents"):
        plots.answer(found)


def test_answer_shows_shares_and_what_became_of_documents(pruned: Reply) -> None:
    axes = plots.answer(pruned)
    uses = pruned.answer.documents
    assert row_names(axes) == [next(s.name for s in pruned.sources if s.id == use.key) for use in uses]
    wide, thin = axes.containers
    assert [bar.get_width() for bar in wide] == pytest.approx([100 * use.focus for use in uses])
    assert [bar.get_width() for bar in thin] == pytest.approx([100 * use.mass for use in uses])
    said = texts_of(axes)
    assert said.count("dropped at layer") == 4
    assert said.count("“") == 3
    assert "(%)" in axes.get_xlabel()


def test_segments_show_where_rows_lie_and_appear(plain: Reply, pruned: Reply) -> None:
    axes = plots.segments(plain)
    drawn = {(round(bar.get_x()), round(bar.get_width())) for bar in axes.patches if bar.get_width()}
    for use, seen in zip(plain.answer.documents, plain.answer.layers[0], strict=True):
        assert seen is not None
        assert {(0, use.num_tokens), (seen.start, use.num_tokens)} <= drawn
    assert axes.get_xlabel() == "position (tokens)"
    moved = [stays(pruned.answer, n) for n in range(6)]
    assert any(len(places) > 1 for places in moved)
    last = [places[-1].last for places in moved]
    assert sorted(last)[-2:] == [4, 4]
    assert "only" in texts_of(plots.segments(pruned))


def test_segments_of_a_document_that_lost_its_heat(engine: Engine, corpus: Corpus) -> None:
    policy = Policy(placement=Placement(window=700), pruning=Pruning(keep=1, heats=Heats()))
    found = ask(engine, corpus, QUESTION, k=8, sampling=SHORT, policy=policy).reply()
    assert "lost its heat" in texts_of(plots.segments(found))
    assert np.isnan(np.array(plots.masses(found).images[0].get_array().filled(np.nan))).any()


def test_masses_are_those_of_the_layers(pruned: Reply) -> None:
    axes = plots.masses(pruned, measure="focus")
    shown = axes.images[0].get_array()
    assert shown is not None
    for (row, layer), share in np.ndenumerate(np.ma.filled(shown, np.nan)):
        seen = pruned.answer.layers[layer][row]
        assert np.isnan(share) if seen is None else share == pytest.approx(100 * seen.focus)
    with pytest.raises(InputError, match="expected 'mass' or 'focus'"):
        plots.masses(pruned, measure="heat")  # type: ignore[arg-type]


def test_ttft_takes_answers_and_pairs(plain: Reply, pruned: Reply) -> None:
    runs = {"cached": [plain, plain.answer, pruned], "full": [(2, 0.5), (4, 1.5), (4, 2.5), (4, 9.0)]}
    axes = plots.ttft(runs, log=True)
    lines = {str(line.get_label()): line for line in axes.lines}
    assert list(lines["full"].get_ydata()) == [500, 2500]
    assert list(lines["cached"].get_xdata()) == [6]
    assert axes.get_yscale() == "log"
    for wrong in ({}, {"a": []}, {"a": ["text"]}, {"a": [3]}):
        with pytest.raises(InputError):
            plots.ttft(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("style", ["default", "dark_background"])
def test_every_picture_can_be_written(style: str, pruned: Reply, tmp_path: Path) -> None:
    with pyplot.style.context(style):
        for number, draw in enumerate((plots.answer, plots.segments, plots.masses)):
            figure, axes = pyplot.subplots()
            assert draw(pruned.answer, axes=axes) is axes
            figure.savefig(tmp_path / f"{number}.png")
            assert (tmp_path / f"{number}.png").stat().st_size > 5000


def test_a_memory_shows_what_every_layer_holds(engine: Engine) -> None:
    session = engine.session(Window(32, sinks=2))
    with pytest.raises(InputError, match="nothing was said"):
        plots.memory(session)
    session.send("The ferry to Varn leaves at nine, says the keeper of the light. " * 8, sampling=SHORT)
    held = session.held()
    assert held.shape == (engine.model.num_layers, session.num_tokens)
    image = plots.memory(session).images[0]
    assert list(image.get_extent()[:2]) == [0, session.num_tokens]
    shown = np.asarray(image.get_array())
    assert shown.max() == 100
    assert shown.sum() == pytest.approx(100 * float(held.sum()))
    last = plots.memory(session, tokens=(session.num_tokens - 10, session.num_tokens)).images[0]
    assert np.asarray(last.get_array()).tolist() == [[100.0] * 10] * engine.model.num_layers
    with pytest.raises(InputError, match="has those from 0 up to"):
        plots.memory(session, tokens=(5, session.num_tokens + 1))


def test_many_tokens_share_columns(engine: Engine) -> None:
    from kvrag.plots.memory import _columns

    held = torch.rand(3, 1001)
    shown = _columns(held)
    assert shown.shape == (3, 400)
    assert torch.allclose(shown.mean(), held.mean(), atol=0.01)
    assert torch.allclose(shown[:, 0], held[:, :3].mean(1))


def test_documents_are_called_by_name_or_by_their_words(engine: Engine) -> None:
    texts = [
        "Neiia Kleiski. She lives in $Naihaven$ of old.",
        "Peor Tools. The company sells boats and more.",
    ]
    found = engine.answer("\n".join([*texts, "Who?"]), texts, sampling=SHORT)
    assert row_names(plots.answer(found, names={"1": "the second"})) == [
        r"Neiia Kleiski. She lives…",
        "the second",
    ]
    pyplot.gcf().canvas.draw()


@pytest.mark.parametrize("wrong", ["text", None, 3])
def test_what_is_no_answer_is_refused(wrong: Any) -> None:
    for draw in (plots.answer, plots.segments, plots.masses):
        with pytest.raises(InputError, match="finished answer"):
            draw(wrong)


def test_an_answer_without_layers_is_refused(plain: Reply) -> None:
    from dataclasses import replace

    old: Answer = replace(plain.answer, layers=())
    for draw in (plots.segments, plots.masses):
        with pytest.raises(InputError, match="does not say what its layers read"):
            draw(old)


def test_without_matplotlib_the_extra_is_named(plain: Reply, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtra, match=r"kvrag\[plots\]"):
        plots.answer(plain)


def luminance(color: str) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colors.to_rgb(color)]
    return float(np.dot((0.2126, 0.7152, 0.0722), linear))


def test_colours_stand_out_from_light_and_dark() -> None:
    for color in PALETTE:
        light, dark = 1.05 / (luminance(color) + 0.05), (luminance(color) + 0.05) / 0.05
        assert min(light, dark) >= 3, color
