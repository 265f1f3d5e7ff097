"""A long text read in strides over a cascade, against causal attention to all of it; one layer's attention.

The strided side does all that the layer needs: attention over sinks, rings and the stride, exact scores of
the columns that can still compete, the tournament, and the moves of the rows. Tables of angles are made
before: a model makes them once per stride for all its layers.

Arithmetic allows T / (2 (S + N + q)): products of T rows with S + N + q columns, against those of T rows with
T / 2. Scores and whatever else is done are not counted, so they cost part of it. "with scores" counts their
product, too: the ratio at which the same rate of products would be reached.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import TypeVar

import torch
import torch.nn.functional as F
from kernels_parts import varlen
from kernels_parts.clock import is_alone, now, turns
from kernels_parts.limits import dtype_of, limits

from kvrag.memory.base import Run, Seen
from kvrag.memory.cascade import Cascade
from kvrag_kernels import Rows, Turn
from kvrag_kernels._backend import backend
from kvrag_kernels.cascade_update import first_competing
from kvrag_kernels.move_rows import Moving, Places, Spin, move_rows
from kvrag_kernels.strided_prefill import Scoring, ema_weights, reduce_heads, strided_prefill

NAME = "strided"

Row = dict[str, object]
Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is read: tokens, in strides, by heads of a size, with memories of some slots behind the sinks."""

    tokens: int
    stride: int
    budgets: tuple[int, ...]
    heads: int
    kv_heads: int
    dim: int
    rounds: int
    sinks: int = 4
    sub_caches: int = 4


GPU = Sizes(1 << 20, 4096, (65_536, 16_384), 32, 8, 128, rounds=2)
CPU = Sizes(32_768, 256, (2048, 512), 4, 2, 64, rounds=2)
SMALL = Sizes(256, 32, (64,), 4, 2, 16, rounds=1)


class Text:
    """Random queries, keys and values of one layer, and its frequencies."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        """Make them."""
        made = {"device": device, "dtype": dtype_of(device)}
        self.sizes, self.device, self.scale = sizes, device, sizes.dim**-0.5
        self.query = torch.randn(1, sizes.heads, sizes.tokens, sizes.dim, **made)
        self.keys, self.values = (
            torch.randn(1, sizes.kv_heads, sizes.tokens, sizes.dim, **made) for _ in range(2)
        )
        pairs = torch.arange(sizes.dim // 2, dtype=torch.float64)
        self.spin = Spin(tuple((500_000.0 ** (-2 * pairs / sizes.dim)).tolist()))
        self.frequencies = torch.tensor(self.spin.frequencies, device=device, dtype=torch.float64)

    def turn(self, runs: tuple[Run, ...], count: int) -> Turn:
        """From where runs lie to where they appear, and of the stride itself."""
        first = sum(run.length for run in runs)
        targets = torch.tensor([*(run.rank - run.slot for run in runs), 0], device=self.device)
        places = torch.arange(first, first + count, device=self.device)[None] - targets[:, None]
        angles = places.double()[..., None] * self.frequencies
        return Turn(angles.cos().float(), angles.sin().float())

    def full(self) -> torch.Tensor:
        """Causal attention to everything, by PyTorch's operator; it needs expanded heads on CPU."""
        groups = 1 if self.device.type == "cuda" else self.sizes.heads // self.sizes.kv_heads
        keys, values = (x.repeat_interleave(groups, dim=1) for x in (self.keys, self.values))
        return F.scaled_dot_product_attention(
            self.query, keys, values, is_causal=True, scale=self.scale, enable_gqa=groups == 1
        )


class Reading:
    """One layer that reads the text in strides."""

    def __init__(self, text: Text, budget: int) -> None:
        """Begin with an empty memory of `budget` slots and the sinks."""
        sizes = text.sizes
        self.text, self.policy = text, Cascade(budget + sizes.sinks, sizes.sub_caches, sizes.sinks)
        self.state = self.policy.start(1, sizes.kv_heads, device=text.device)
        shape = (1, sizes.kv_heads, self.state.capacity, sizes.dim)
        self.keys, self.values, self.raw = (torch.zeros(shape, **_like(text.keys)) for _ in range(3))
        self.turned = text.keys.dtype == torch.float32
        self.took: dict[str, list[float]] = {}

    def run(self) -> float:
        """Read everything; seconds without the tables of angles."""
        for start in range(0, self.text.sizes.tokens, self.text.sizes.stride):
            self._stride(slice(start, min(start + self.text.sizes.stride, self.text.sizes.tokens)))
        return sum(map(sum, self.took.values()))

    def _stride(self, rows: slice) -> None:
        text, runs, count = self.text, self.state.runs, rows.stop - rows.start
        query, keys, values = (x[:, :, rows] for x in (text.query, text.keys, text.values))
        kept = [slice(run.slot, run.slot + run.length) for run in runs]
        segments = [Rows(self.keys[:, :, part], self.values[:, :, part]) for part in kept]
        segments.append(Rows(keys, values, causal=True))
        turn, weights = text.turn(runs, count), ema_weights(count, self.policy.beta, device=text.device)
        scoring = Scoring(weights, (self._competing(runs, count),))
        attended = self._timed("attention and scores", lambda: strided_prefill(
            query, segments, turn, scale=text.scale, scoring=scoring
        ))  # fmt: skip
        assert attended.scores is not None
        scores = attended.scores
        moves = self._timed("tournament", lambda: self.state.take(count, self._seen(scores, runs)))
        places = Places(moves.slots, moves.sources, moves.num_before)
        self._timed("moves", lambda: move_rows(self._moving(keys[0], values[0]), places))

    def _competing(self, runs: tuple[Run, ...], count: int) -> tuple[int, int]:
        """All columns but the sinks and those in the last ring that are not its newest."""
        total = sum(run.length for run in runs)
        return min(total, self.text.sizes.sinks) + first_competing(self.state.stored), total + count

    def _seen(self, scores: torch.Tensor, runs: tuple[Run, ...]) -> Seen:
        reduced = reduce_heads(scores, self.text.sizes.kv_heads, self.policy.reduction)[None]
        slots = reduced.new_zeros((1, reduced.shape[1], self.state.capacity))
        for run in runs:
            slots[..., run.slot : run.slot + run.length] = reduced[..., run.rank : run.rank + run.length]
        return Seen(slots, reduced[..., sum(run.length for run in runs) :])

    def _moving(self, keys: torch.Tensor, values: torch.Tensor) -> list[Moving]:
        own, raw = self.keys[0], self.raw[0]
        found = [Moving(0, self.values[0], self.values[0], values)]
        if self.turned:
            return [*found, Moving(0, own, own, keys, self.text.spin, is_turned=True)]
        return [*found, Moving(0, own, raw, keys, self.text.spin), Moving(0, raw, raw, keys)]

    def outputs(self) -> dict[str, Callable[[], object]]:
        """The last stride's output without scores: ours, and the way PyTorch offers."""
        text, runs, stride = self.text, self.state.runs, self.text.sizes.stride
        query, *own = (x[:, :, -stride:] for x in (text.query, text.keys, text.values))
        parts = [slice(run.slot, run.slot + run.length) for run in runs]
        segments = [Rows(self.keys[:, :, part], self.values[:, :, part]) for part in parts]
        segments.append(Rows(own[0], own[1], causal=True))
        turn, memory = text.turn(runs, stride), (self.keys, self.values)
        return {
            "output": lambda: strided_prefill(query, segments, turn, scale=text.scale),
            "varlen": lambda: varlen.attend(query, memory, (own[0], own[1]), runs, turn, text.scale),
        }

    def _timed(self, name: str, work: Callable[[], Found]) -> Found:
        """Run one step; the device is done before and behind it."""
        _wait(self.text.device)
        started = now(self.text.device)
        found = work()
        _wait(self.text.device)
        self.took.setdefault(name, []).append(now(self.text.device) - started)
        return found


def _like(x: torch.Tensor) -> dict[str, object]:
    return {"device": x.device, "dtype": x.dtype}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _rate(text: Text, small: bool) -> float:
    """Operations per second of a large matrix product, by the same clock."""
    if not is_alone(text.device):
        return limits(text.device, small).flops[text.keys.dtype]
    side = 128 if small else 1024
    a, took = torch.randn(side, side), []
    for _ in range(8):
        started = now(text.device)
        a @ a
        took.append(now(text.device) - started)
    return 2 * side**3 / median(took)


def _full(text: Text) -> float:
    _wait(text.device)
    started = now(text.device)
    text.full()
    _wait(text.device)
    return now(text.device) - started


def run(device: torch.device, small: bool) -> list[Row]:
    """One row per budget; full attention and all budgets take turns."""
    sizes = SMALL if small else GPU if device.type == "cuda" else CPU
    text = Text(sizes, device)
    few = replace(sizes, tokens=min(sizes.tokens, 4 * sizes.stride))
    for budget in sizes.budgets:  # compiles, allocates
        Reading(Text(few, device), budget).run()
    full: list[float] = []
    readings: dict[int, list[Reading]] = {budget: [] for budget in sizes.budgets}
    for _ in range(sizes.rounds):
        full.append(_full(text))
        for budget, done in readings.items():
            done.append(Reading(text, budget))
            done[-1].run()
    rates = _rate(text, small)
    return [_row(text, budget, median(full), done, rates) for budget, done in readings.items()]


def _row(text: Text, budget: int, full: float, done: list[Reading], rate: float) -> Row:
    sizes = text.sizes
    steps = {name: median(sum(r.took[name]) for r in done) for name in done[0].took}
    steady = median(sorted(t for r in done for t in r.took["attention and scores"][-8:]))
    seconds = sum(steps.values())
    columns = sizes.sinks + budget + sizes.stride
    competing = columns - sizes.sinks - budget // sizes.sub_caches + 1
    allowed = sizes.tokens / (2 * columns)
    product = 2 * sizes.heads * sizes.stride * sizes.dim
    return {
        "backend": backend(text.device),
        "clock": "process" if is_alone(text.device) else "wall",
        "tokens": sizes.tokens,
        "slots": budget,
        "stride": sizes.stride,
        "full s": full,
        "strided s": seconds,
        **{f"{name} s": value for name, value in steps.items()},
        "times faster": full / seconds,
        "allowed": allowed,
        "share of allowed": full / seconds / allowed,
        "allowed with scores": sizes.tokens / (2 * columns + competing),
        "share with scores": full / seconds * (2 * columns + competing) / sizes.tokens,
        **_outputs(done[-1]),
        "full, of matrix rate": 2 * sizes.heads * sizes.dim * sizes.tokens**2 / full / rate,
        "steady stride, of matrix rate": product * (2 * columns + competing) / steady / rate,
    }


def _outputs(reading: Reading) -> Row:
    """On a GPU, a steady stride's output alone, beside PyTorch's operator if this version's can do it."""
    sides, device = reading.outputs(), reading.text.device
    if device.type != "cuda":
        return {}
    try:
        sides["varlen"]()
    except (ImportError, RuntimeError, TypeError) as error:  # what it takes differs from release to release
        print(f"varlen_attn: {error}")
        del sides["varlen"]
    return {f"{name} ms": 1e3 * took for name, took in turns(sides, device, repeat=5).items()}
