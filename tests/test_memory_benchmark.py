"""The harness of benchmarks/memory.py against the package's own reading, and its data."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

from kvrag.memory.base import MemoryPolicy
from kvrag.memory.cascade import Cascade
from kvrag.memory.combined import LadderCascade
from kvrag.memory.full import Full
from kvrag.memory.ladder import Ladder
from kvrag.memory.reading import MemoryReader
from kvrag.memory.rows import MemoryRows
from kvrag.memory.salient import Salient
from kvrag.memory.window import Window
from kvrag.model import Model
from kvrag.reader.tokenizer import Encoder

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
NAMES = ("streams", "stack", "asking", "entries", "units", "records", "summary", "timing")


@pytest.fixture(scope="module")
def bench() -> Iterator[dict[str, ModuleType]]:
    """Modules of the benchmark, found as when it is run as a script."""
    before = set(sys.modules)
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield {n: import_module(f"memory_parts.{n}") for n in NAMES}
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in set(sys.modules) - before:
            if name.startswith(("memory_parts", "quality_parts")):
                del sys.modules[name]


@pytest.fixture(scope="module")
def model() -> Model:
    return Model.load()


@pytest.fixture(scope="module")
def encoder(model: Model) -> Encoder:
    return Encoder(model.text.tokenizer)


@pytest.mark.parametrize(
    "policy",
    [
        Full(),
        Window(96, sinks=9),
        Cascade(96, 4, sinks=9),
        Ladder(96, span=3, sinks=9),
        LadderCascade(96, 3, sinks=9, bonus=2.0),
        Salient(96, sinks=9, homogeneous=False),
    ],
    ids=lambda policy: policy.name,
)
def test_streams_side_by_side_are_read_as_the_package_reads_one(
    bench: dict[str, ModuleType], model: Model, encoder: Encoder, policy: MemoryPolicy
) -> None:
    make, length, stride = bench["streams"].passkey_stream, 240, 32
    streams = [make(f"same/{i}", encoder, 60, [length - 120], [1]) for i in range(2)]
    ids = torch.tensor([stream.ids for stream in streams])
    stack = bench["stack"].Stack(model, policy, len(streams))
    for first in range(0, length, stride):
        stack.read(ids[:, first : first + stride])
    question = list(streams[0].asked[0].prompt)
    together = stack.ask(torch.tensor([question] * len(streams)))[:, -1]
    config = model.network.config
    shape = (config.num_key_value_heads, config.head_dim, config.head_dim)
    for b, stream in enumerate(streams):
        state = policy.start(model.num_layers, config.num_key_value_heads)
        rows = MemoryRows(model.specs, [shape] * model.num_layers, dtype=model.dtype, device=model.device)
        reader = MemoryReader(model, state, rows, stride=stride)
        reader.read(stream.ids)
        reader.insert()
        heads = slice(b * shape[0], (b + 1) * shape[0])
        wide = stack.state.ids.shape[1] > 1
        assert torch.equal(stack.state.ids[:, heads] if wide else stack.state.ids, state.ids)
        assert torch.allclose(together[b], reader.read(question).logits[-1], atol=2e-3)


def test_streams_have_the_length_that_was_asked_for(bench: dict[str, ModuleType], encoder: Encoder) -> None:
    streams, units = bench["streams"], bench["units"]
    facts = streams.facts_stream("a", encoder, 1500, [256, 512], each=2)
    assert len(facts.ids) == 1500
    assert {asked.at for asked in facts.asked} == {1500}
    for asked in facts.asked:
        told = facts.messages[asked.gold]
        assert asked.distance == 1500 - told.end
        assert abs(asked.distance - asked.cell) <= asked.cell / 4
    for batch in (0, 5):
        distances = units.passkey_distances(batch, 64)
        hidden = streams.passkey_stream("b", encoder, 64, distances, units.TIMES)
        assert [asked.at for asked in hidden.asked] == [64 + 60 + d for d in distances]
        assert len(hidden.ids) == hidden.asked[-1].at
        key = encoder.special["<|end|>"]
        assert hidden.ids[hidden.messages[hidden.asked[0].gold].end - 1] == key


def test_every_depth_has_its_turn(bench: dict[str, ModuleType]) -> None:
    units = bench["units"]
    last = sorted(units.passkey_distances(batch, 256)[-1] for batch in range(units.DEPTHS))
    steps = [b - a for a, b in itertools.pairwise(last)]
    assert max(steps) - min(steps) < 256 * 16 / units.DEPTHS
    assert last[-1] > 0.9 * 256 * 16


def test_units_come_once_and_any_process_has_its_share(bench: dict[str, ModuleType]) -> None:
    units = bench["units"]
    every = list(units.units(units.TASKS, 256, 13))
    assert len({unit.key for unit in every}) == len(every)
    assert {unit.task for unit in every} == set(units.TASKS)
    assert {unit.batch for unit in every if unit.task == "passkey" and not unit.room} == set(range(13))


def test_records_survive_a_cut_line_and_an_archive(bench: dict[str, ModuleType], tmp_path: Path) -> None:
    records = bench["records"]
    folder = records.Folder(tmp_path / "run")
    folder.adopt("w", None)
    made = {"task": "near", "policy": "window", "budget": 64, "room": 0, "batch": 0, "results": []}
    folder.add(1, made)
    with (tmp_path / "run" / "records-1.jsonl").open("a") as file:
        file.write('{"task": "ne')
    folder.add(1, made | {"batch": 1})
    assert [record["batch"] for record in folder.records()] == [0, 1]
    records.pack(tmp_path / "a.xz", "w", folder.records())
    other = records.Folder(tmp_path / "other")
    other.adopt("w", tmp_path / "a.xz")
    assert other.records() == folder.records()
    with pytest.raises(SystemExit):
        other.adopt("another", None)


def test_shares_and_differences_are_counted(bench: dict[str, ModuleType]) -> None:
    summary = bench["summary"]

    def record(policy: str, right: list[int]) -> dict[str, object]:
        rows = [[128, 120, 0.5, {"nothing": [x, 0, 0]}] for x in right]
        return {"task": "near", "policy": policy, "budget": 64, "room": 0, "batch": 0, "results": rows}

    tables = summary.summary([record("window", [0, 0, 1, 0]), record("salient", [1, 1, 1, 0])])
    cells = {c["policy"]: c for c in summary.rows_of(tables["facts"])}
    assert (cells["window"]["right"], cells["salient"]["right"], cells["salient"]["asked"]) == (1, 3, 4)
    gains = {(c["policy"], c["other"]): c["gain"] for c in summary.rows_of(tables["against"])}
    assert gains["salient", "window"] == 0.5
    assert gains["window", "salient"] == -0.5


def test_growth_is_the_slope_of_the_longer_half(bench: dict[str, ModuleType]) -> None:
    lengths = [1, 2, 4, 8, 16]
    assert bench["timing"].exponent(lengths, [n**2 for n in lengths]) == pytest.approx(2)
    assert bench["timing"].exponent(lengths, [9, 9, 4, 8, 16]) == pytest.approx(1)
