"""What a stride is said to have seen: exact sums of exact probabilities, however the stride was read."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from kvrag.attention import Looking, TableReading
from kvrag.backbone import AttentionCall
from kvrag.fresh import FreshRows
from kvrag.memory.base import Seen, Watching
from kvrag.memory.reading import MemoryReader
from kvrag.model import Model
from kvrag.prefill import read
from kvrag.rotary import rotate
from kvrag.testing.models import tiny
from kvrag.testing.rings import Ring, RingState, memory_reader
from kvrag_kernels import using

TEXT = tuple(int(x) for x in torch.randint(6, 300, (70,), generator=torch.Generator().manual_seed(5)))
FAMILIES = ["llama", "mistral-window", "gemma2", "smollm3", "gpt_oss", "glm4", "llama-yarn", "deepseek_v3"]


@cache
def model(family: str = "llama") -> Model:
    return tiny(family)


class Everything:
    """Keeps all probabilities, computed from explicit scores with keys rotated at their real places."""

    def __init__(self, found: Model) -> None:
        self.model = found
        self.calls: dict[int, AttentionCall] = {}

    def note(self, layer: int, row: int, call: AttentionCall, lse: torch.Tensor) -> None:
        self.calls[layer] = call


def told(reader: MemoryReader) -> Seen:
    state: Any = reader.state
    assert isinstance(state, RingState)
    seen = state.told[-1]
    assert seen is not None
    return seen


def probabilities(
    found: Model, reader: MemoryReader, calls: dict[int, AttentionCall], layer: int
) -> torch.Tensor:
    """[H, q, m + q]: of the stride's queries, to what is in memory, oldest first, and to the stride."""
    call, spec = calls[layer], found.specs[layer]
    rows = reader.rows.layers[layer]
    keys: list[torch.Tensor] = []
    places: list[int] = []
    for run in reader.state.runs:
        part = slice(run.slot, run.slot + run.length)
        turned = rows.keys[:, part]
        if spec.rotation is not None:  # back to where no key is rotated
            turned = _rotated(turned, spec.rotation.turn(-torch.arange(part.start, part.stop)))
        keys.append(turned)
        places += range(run.rank, run.rank + run.length)
    num, start = call.query.shape[2], len(places)
    keys.append(call.key[0])
    places += range(start, start + num)
    positions = torch.tensor(places)
    raw, query = torch.cat(keys, dim=1), call.query[0]
    if spec.rotation is not None:
        turn = spec.rotation.turn(positions)
        raw, query = _rotated(raw, turn), _rotated(query, spec.rotation.turn(positions[start:]))
    groups = query.shape[0] // raw.shape[0]
    scores = query @ raw.repeat_interleave(groups, dim=0).transpose(1, 2)
    scores = scores * call.scale * spec.score_factor(torch.float32)
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    distance = positions[start:, None] - positions[None]
    hidden = distance < 0
    if spec.window is not None:
        hidden |= distance >= spec.window
    scores = scores.masked_fill(hidden, float("-inf"))
    if call.sinks is not None:
        scores = torch.cat((scores, call.sinks.float()[:, None, None].expand(-1, num, 1)), dim=-1)
    return scores.softmax(-1)[..., : len(places)]


def _rotated(x: torch.Tensor, turn: Any) -> torch.Tensor:
    return rotate(x[None], turn)[0]


@pytest.mark.parametrize(
    ("family", "reduction", "homogeneous"),
    [
        *((family, "max", False) for family in FAMILIES),
        ("llama", "mean", False),
        ("llama", "median", False),
        ("llama", "mean", True),
        ("llama", "max", True),
        ("llama", "median", True),
    ],
)
def test_seen_is_what_explicit_probabilities_give(family: str, reduction: Any, homogeneous: bool) -> None:
    found, beta = model(family), 0.9
    watching = Watching(beta, reduction, homogeneous)
    reader = memory_reader(found, Ring(30, 3, watching), stride=11)
    reader.read(TEXT[:55])
    reader.insert()
    runs, everything = reader.state.runs, Everything(found)
    # The same pass once more, for its queries: nothing of it is kept.
    looking = Looking(watch=everything)
    read(found, reader.table, TEXT[55:66], range(30, 41), FreshRows(found.num_layers), looking=looking)
    parts = [probabilities(found, reader, everything.calls, i) for i in range(found.num_layers)]
    reader.read(TEXT[55:66])
    reader.insert()
    seen = told(reader)
    weights = torch.tensor([(1 - beta) * beta ** (10 - j) for j in range(11)])
    for layer, probs in enumerate(parts):
        sums = (probs * weights[:, None]).sum(1)
        grouped = sums.reshape(1 if homogeneous else found.shapes[layer][0], -1, sums.shape[-1])
        values = {
            "mean": grouped.mean(1),
            "max": grouped.amax(1),
            "median": grouped.sort(1).values[:, (grouped.shape[1] - 1) // 2],
        }[reduction]
        expected = torch.zeros(values.shape[0], 30)
        for run in runs:
            expected[:, run.slot : run.slot + run.length] = values[:, run.rank : run.rank + run.length]
        torch.testing.assert_close(seen.slots[layer], expected, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(seen.fresh[layer], values[:, 30:], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sizes", [(1,) * 11, (4, 1, 6)])
def test_several_passes_see_what_one_does(family: str, sizes: tuple[int, ...]) -> None:
    found = model(family)
    watching = Watching(0.97)
    one, other = (memory_reader(found, Ring(30, 3, watching), stride=11) for _ in range(2))
    for reader in (one, other):
        reader.read(TEXT[:44])
        reader.insert()
    one.read(TEXT[44:55])
    at = 44
    for size in sizes:
        other.read(TEXT[at : at + size])
        at += size
    for reader in (one, other):
        reader.insert()
    torch.testing.assert_close(told(other).slots, told(one).slots, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(told(other).fresh, told(one).fresh, atol=1e-6, rtol=1e-4)


def test_all_that_is_seen_sums_to_what_the_weights_do() -> None:
    """One head: 1 - beta^q, sinks and all (the fourteenth of the cascade's invariants)."""
    found, beta = model(), 0.95
    for stride in (1, 6, 11):
        reader = memory_reader(found, Ring(30, 3, Watching(beta, "mean", True)), stride=stride)
        reader.read(TEXT)
        reader.insert()
        num = 70 % stride or stride
        seen = told(reader)
        total = seen.slots.sum(-1) + seen.fresh.sum(-1)
        torch.testing.assert_close(total, torch.full_like(total, 1 - beta**num), atol=1e-5, rtol=1e-5)


def test_without_decay_attention_is_summed_up() -> None:
    found = model()
    reader = memory_reader(found, Ring(30, 3, Watching(1.0, "mean", True)), stride=11)
    reader.read(TEXT[:33])
    reader.insert()
    seen = told(reader)
    total = seen.slots.sum(-1) + seen.fresh.sum(-1)
    torch.testing.assert_close(total, torch.full_like(total, 11.0), atol=1e-4, rtol=1e-5)


def test_kernels_see_what_plain_operators_see() -> None:
    found, told_by = model(), {}
    for name in ("cpu", "reference", "triton"):
        with using(name):  # type: ignore[arg-type]
            reader = memory_reader(found, Ring(30, 3, Watching(0.9)), stride=11)
            reader.read(TEXT[:44])
            reader.insert()
            told_by[name] = told(reader)
    for name in ("reference", "triton"):
        torch.testing.assert_close(told_by[name].slots, told_by["cpu"].slots, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(told_by[name].fresh, told_by["cpu"].fresh, atol=1e-5, rtol=1e-4)


def test_a_pass_that_failed_and_is_read_again_counts_once() -> None:
    found = model()
    watching = Watching(0.9)
    one, other = (memory_reader(found, Ring(30, 3, watching), stride=11) for _ in range(2))
    for reader in (one, other):
        reader.read(TEXT[:5])
    fresh = other.fresh
    want = other._want(TEXT[5:9])
    tables = TableReading(
        found.specs, _Breaks(want.table), fresh, want.positions, device=found.device, looking=want.looking
    )
    with pytest.raises(RuntimeError, match="broken"), torch.inference_mode():
        found.run(torch.tensor([TEXT[5:9]]), tables)
    fresh.cut(5)
    for reader in (one, other):
        reader.read(TEXT[5:11])
        reader.insert()
    assert torch.equal(told(other).fresh, told(one).fresh)


class _Breaks:
    """Tables that fail in the third layer."""

    def __init__(self, table: Any) -> None:
        self.table = table

    def at(self, layer: int) -> Any:
        if layer == 2:
            raise RuntimeError("broken")
        return self.table

    def note(self, layer: int, mass: torch.Tensor, focus: torch.Tensor) -> None:
        pass


def test_what_was_taken_back_is_not_seen() -> None:
    found = model()
    watching = Watching(0.9)
    one, other = (memory_reader(found, Ring(30, 3, watching), stride=11) for _ in range(2))
    one.read(TEXT[:7])
    other.read(TEXT[:5])
    other.read(TEXT[5:10])
    assert other.drop(3)
    for reader in (one, other):
        reader.insert()
    torch.testing.assert_close(told(other).fresh, told(one).fresh, atol=1e-6, rtol=1e-4)
