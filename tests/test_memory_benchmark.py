"""The harness of benchmarks/memory.py against the package's own reading, and its data."""

from __future__ import annotations

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
from kvrag.memory.window import Window
from kvrag.model import Model
from kvrag.reader.tokenizer import Encoder

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
NAMES = ("streams", "stack", "asking", "entries", "units", "records", "summary")


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
    ],
    ids=lambda policy: policy.name,
)
def test_streams_side_by_side_are_read_as_the_package_reads_one(
    bench: dict[str, ModuleType], model: Model, encoder: Encoder, policy: MemoryPolicy
) -> None:
    make, length, stride = bench["streams"].passkey_stream, 400, 32
    streams = [make(f"same/{i}", encoder, length, 1) for i in range(3)]
    ids = torch.tensor([stream.ids for stream in streams])
    stack = bench["stack"].Stack(model, policy, len(streams))
    for first in range(0, length, stride):
        stack.read(ids[:, first : first + stride])
    question = list(streams[0].asked[0].prompt)
    together = stack.ask(torch.tensor([question] * 3))[:, -1]
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
