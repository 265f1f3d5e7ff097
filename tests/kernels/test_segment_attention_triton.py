"""The Triton kernel equals a dense softmax in float64 over keys at the places where they appear.

Runs in Triton's interpreter; the tests marked `gpu` do the same on a device. Inputs are random every time,
and the seed is printed: SEED=... repeats a run.
"""

from __future__ import annotations

import os
import random
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest
import torch

from kvrag_kernels import (
    AnyRows,
    Attended,
    Group,
    PagedRows,
    QuantisedRows,
    RowMask,
    Rows,
    Turn,
    segment_attention,
    segment_attention_many,
    segment_attention_reference,
)
from kvrag_kernels._backend import using
from kvrag_kernels.quantise import dequantise_reference, quantise_reference
from kvrag_kernels.segment_attention.table import is_supported

pytest.importorskip("triton", reason="the extra kvrag[triton] is not installed")

from kvrag_kernels.segment_attention.launch import StaticAttention, Tuning

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")  # which only a compiler gives

CPU, GPU = "cpu", pytest.param("cuda", marks=pytest.mark.gpu)
SMALL = Tuning(queries=16, block=16, splits=3, merged=16)  # many blocks and splits of few rows
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True, scope="module")
def _poisoned_memory() -> Iterator[None]:
    """Memory that nobody wrote to is NaN, so that reading it shows."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Part:
    """One segment: its rows, where the first appears, how it lies and who sees it."""

    size: int
    target: int = 0
    form: str = "rows"
    first_row: int = 0
    hidden: float = 0.0
    grouped: bool = False


@dataclass(frozen=True)
class Case:
    """Shapes; fresh rows stand behind everything and see themselves causally."""

    parts: tuple[Part, ...] = (Part(37), Part(5, 12), Part(0, 3), Part(21, 900))
    rows: int = 3
    batch: int = 1
    shared: bool = True
    kv_heads: int = 2
    groups: int = 2
    dim: int = 16
    value_dim: int | None = None
    pairs: int | None = None
    start: int = 0
    interleaved: bool = False
    rotated: bool = True
    softcap: float | None = None
    sinks: bool = False
    group: Group | None = None


@dataclass
class Request:
    """What the kernel is given, and where each key really stands."""

    query: torch.Tensor
    segments: list[AnyRows]
    turn: Turn | None
    sinks: torch.Tensor | None
    position: torch.Tensor
    keys: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)
    visible: list[torch.Tensor] = field(default_factory=list)


class Maker:
    """Makes requests of a case from a seed that it prints."""

    def __init__(self, case: Case, dtype: torch.dtype, device: str) -> None:
        seed = int(os.environ.get("SEED") or secrets.randbits(31))
        print(f"SEED={seed}")
        self.case, self.dtype, self.device = case, dtype, device
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator).to(self.dtype)

    def angles(self, positions: torch.Tensor) -> torch.Tensor:
        pairs = self.pairs
        frequencies = (10_000.0 ** (-torch.arange(pairs, dtype=torch.float64) / pairs)).float().double()
        return positions.double()[..., None] * frequencies

    @property
    def pairs(self) -> int:
        return self.case.pairs or self.case.dim // 2

    def turn(self, positions: torch.Tensor) -> Turn | None:
        if not self.case.rotated:
            return None
        by = self.angles(positions)
        cos, sin = by.cos().float().to(self.device), by.sin().float().to(self.device)
        return Turn(cos, sin, self.case.start, self.case.interleaved)

    def turned(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """[..., T, D] rotated by complex multiplication, in float64."""
        out = x.double().clone()
        if not self.case.rotated:
            return out
        angles = self.angles(positions)
        phase = torch.polar(torch.ones_like(angles), angles)
        inner = out[..., self.case.start : self.case.start + 2 * self.pairs]
        if self.case.interleaved:
            z = torch.complex(inner[..., 0::2].clone(), inner[..., 1::2].clone()) * phase
            inner[..., 0::2], inner[..., 1::2] = z.real, z.imag
        else:
            z = torch.complex(inner[..., : self.pairs].clone(), inner[..., self.pairs :].clone()) * phase
            inner[..., : self.pairs], inner[..., self.pairs :] = z.real, z.imag
        return out

    def request(self) -> Request:
        case = self.case
        heads = case.kv_heads * case.groups
        position = 1000 + torch.arange(case.rows)
        sinks = torch.randn(heads, generator=self._generator).to(self.device) if case.sinks else None
        targets = torch.tensor([*(part.target for part in case.parts), 0])
        turn = self.turn(position[None] - targets[:, None])
        query = self.normal(case.batch, heads, case.rows, case.dim)
        made = Request(query.to(self.device), [], turn, sinks, position)
        for part in case.parts:
            self._add(made, part)
        own = self.turned(self.normal(case.batch, case.kv_heads, case.rows, case.dim), position).to(
            self.dtype
        )
        values = self.normal(case.batch, case.kv_heads, case.rows, case.value_dim or case.dim)
        made.segments.append(Rows(self.view(own), self.view(values), causal=case.rows > 1))
        made.keys.append(own.double())
        made.values.append(values.double())
        made.visible.append(torch.ones(case.rows, case.rows, dtype=torch.bool).tril())
        return made

    def view(self, x: torch.Tensor) -> torch.Tensor:
        """The same rows inside a larger buffer whose other rows nobody wrote."""
        buffer = torch.full((*x.shape[:2], x.shape[2] + 4, x.shape[3]), float("nan"), dtype=x.dtype)
        buffer[:, :, 2 : 2 + x.shape[2]] = x
        return buffer.to(self.device)[:, :, 2 : 2 + x.shape[2]]

    def _add(self, made: Request, part: Part) -> None:
        case, local = self.case, torch.arange(part.size)
        owners = 1 if case.shared or part.form != "rows" else case.batch
        flat = self.normal(owners, case.kv_heads, part.size, case.dim)
        values = self.normal(owners, case.kv_heads, part.size, case.value_dim or case.dim)
        keys = self.turned(flat, local).to(self.dtype)
        allowed = torch.rand(case.rows - part.first_row, part.size, generator=self._generator) >= part.hidden
        mask = RowMask(allowed.to(self.device)) if part.hidden else None
        rest = {"first_row": part.first_row, "mask": mask, "in_group": part.grouped}
        if part.form == "rows":
            made.segments.append(Rows(self.view(keys), self.view(values), **rest))
        elif part.form == "paged":
            made.segments.append(self._paged(keys, values, rest))
        else:
            packed = quantise_reference(flat[0], values[0], part.form)
            keys, values = (x[None] for x in dequantise_reference(packed, torch.float32))
            keys = self.turned(keys, local)
            there = {f: x.to(self.device) for f in ("keys", "values", "key_scale", "value_scale", "key_zero",
                     "value_zero", "key_rest") if (x := getattr(packed, f)) is not None}  # fmt: skip
            made.segments.append(QuantisedRows(replace(packed, **there), self.turn(local[None]), **rest))
        seen = torch.zeros(case.rows, part.size, dtype=torch.bool)
        seen[part.first_row :] = allowed
        at = torch.full((part.size,), part.target)
        made.keys.append(self.turned(keys, at).expand(case.batch, -1, -1, -1))
        made.values.append(values.double().expand(case.batch, -1, -1, -1))
        made.visible.append(seen)

    def _paged(self, keys: torch.Tensor, values: torch.Tensor, rest: dict[str, object]) -> PagedRows:
        page, size = 8, keys.shape[2]
        num_pages = -(-size // page)
        pages = torch.randperm(num_pages + 3, generator=self._generator)[:num_pages].int()
        pools = []
        for x in (keys, values):
            pool = torch.full((num_pages + 3, x.shape[1], page, x.shape[3]), float("nan"), dtype=x.dtype)
            for i, number in enumerate(pages.tolist()):
                rows = x[0, :, i * page : (i + 1) * page]
                pool[number, :, : rows.shape[1]] = rows
            pools.append(pool.to(self.device))
        return PagedRows(*pools, pages.to(self.device), size, **rest)


def dense(made: Request, maker: Maker) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and masses from one softmax in float64 over all keys at their places."""
    case = maker.case
    query = maker.turned(made.query.cpu(), made.position)
    keys, values = (torch.cat(x, 2).repeat_interleave(case.groups, 1) for x in (made.keys, made.values))
    scores = query @ keys.transpose(2, 3) * case.dim**-0.5
    if case.softcap is not None:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    sizes = [v.shape[1] for v in made.visible]
    if case.group is not None:
        inside = torch.tensor([p.grouped for p in case.parts for _ in range(p.size)] + [False] * case.rows)
        scores[..., inside] /= case.group.temperature
    scores = scores.masked_fill(~torch.cat(made.visible, 1), float("-inf"))
    if case.group is not None:
        whole = scores[..., inside].logsumexp(-1, keepdim=True)
        shift = (case.group.scale * case.group.temperature - 1) * whole
        scores[..., inside] += shift.nan_to_num(0.0, neginf=0.0, posinf=0.0)
    if made.sinks is not None:
        sink = made.sinks.cpu().double()[None, :, None, None].expand(case.batch, -1, case.rows, 1)
        scores = torch.cat((scores, sink), -1)
    probs = scores.softmax(-1)[..., : sum(sizes)]
    return probs @ values, torch.stack([part.sum(-1) for part in probs.split(sizes, -1)])


def close(found: Attended, expected: tuple[torch.Tensor, torch.Tensor], dtype: torch.dtype) -> None:
    """Errors relative to the largest value; masses are shares of one."""
    (out, mass), limit = expected, TOLERANCE[dtype]
    assert (found.out.dtype, found.mass.dtype) == (dtype, torch.float32)
    assert (found.out.shape, found.mass.shape) == (out.shape, mass.shape)
    assert float((found.out.cpu().double() - out).norm() / out.norm()) < limit
    assert float((found.out.cpu().double() - out).abs().max() / out.abs().max()) < limit
    assert float((found.mass.cpu().double() - mass).abs().max()) < limit


def attention(made: Request, case: Case, tuning: Tuning | None = SMALL) -> StaticAttention:
    assert is_supported(made.query, [made.segments], made.turn)
    return StaticAttention(
        made.query, [made.segments], [made.turn], scale=case.dim**-0.5, softcap=case.softcap,
        sinks=made.sinks, group=case.group, tuning=tuning,
    )  # fmt: skip


APE = Group(temperature=0.5, scale=0.8)
MIXED = (Part(70, form="fp8"), Part(33, 40), Part(19, 7, form="fp8", hidden=0.3))
CASES = {
    "plain": Case(),
    "decode": Case(rows=1, groups=4),
    "several blocks of queries": Case(parts=(Part(20), Part(9, 5)), rows=19),
    "first rows and masks": Case(
        parts=(Part(9, first_row=1), Part(18, 30, hidden=0.4), Part(5, 4, first_row=2, hidden=1.0)), rows=4
    ),
    "batch, keys of each": Case(batch=2, shared=False, kv_heads=1),
    "batch, keys shared": Case(batch=2, kv_heads=1),
    "seven query heads to one": Case(groups=7, kv_heads=1, parts=(Part(18), Part(9, 2))),
    "heads of 80": Case(dim=80, kv_heads=1, parts=(Part(18), Part(9, 2))),
    "heads of 96, values of 40": Case(dim=96, value_dim=40, kv_heads=1, parts=(Part(18), Part(9, 2))),
    "heads of 256": Case(dim=256, kv_heads=1, parts=(Part(18),), rows=1),
    "interleaved": Case(interleaved=True),
    "partial": Case(pairs=3),
    "partial, interleaved, in the middle": Case(pairs=3, start=5, interleaved=True),
    "partial, at the end": Case(pairs=4, start=8),
    "not rotated": Case(rotated=False),
    "soft cap and sinks": Case(softcap=2.0, sinks=True),
    "group": Case(parts=(Part(20), Part(18, grouped=True), Part(5, 9), Part(30, grouped=True)), group=APE),
    "group, blind rows, sinks": Case(
        parts=(Part(20, first_row=2, grouped=True), Part(18, hidden=1.0, grouped=True)), group=APE, sinks=True
    ),
    "paged": Case(parts=(Part(37, form="paged"), Part(9, 5), Part(16, 40, form="paged", hidden=0.2))),
    "fp8": Case(parts=MIXED),
    "int8": Case(parts=tuple(replace(p, form=p.form.replace("fp8", "int8")) for p in MIXED)),
    "int4": Case(parts=tuple(replace(p, form=p.form.replace("fp8", "int4")) for p in MIXED)),
    "int4, interleaved": Case(parts=(Part(70, form="int4"),), interleaved=True, kv_heads=1),
    "int4, partial": Case(parts=(Part(40, form="int4"),), pairs=2, start=4, kv_heads=1),
    "int8, interleaved, heads of 80": Case(
        parts=(Part(40, form="int8"),), dim=80, value_dim=48, interleaved=True, kv_heads=1
    ),
    "fp8, not rotated": Case(parts=(Part(40, form="fp8"),), rotated=False, kv_heads=1),
}  # fmt: skip


@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize("name", CASES)
def test_equals_a_dense_softmax(name: str, device: str) -> None:
    maker = Maker(CASES[name], torch.float32, device)
    made = maker.request()
    close(attention(made, maker.case)(made.query), dense(made, maker), torch.float32)


@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize("name", ["plain", "group", "fp8", "int4", "heads of 80"])
def test_in_half_precision(name: str, device: str) -> None:
    maker = Maker(CASES[name], torch.float16 if device == "cpu" else torch.bfloat16, device)
    made = maker.request()
    close(attention(made, maker.case)(made.query), dense(made, maker), maker.dtype)


@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize("dim", [64, 80, 96, 112, 128, 160, 192, 256])
def test_heads_of_models_and_any_group_of_them(dim: int, device: str, fresh_numbers: int) -> None:
    """Odd lengths, and query heads to a key head as they come."""
    draw = random.Random(fresh_numbers)
    longest = 30 if device == "cpu" else 3000
    case = Case(
        parts=tuple(Part(2 * draw.randrange(longest) + 1, draw.randrange(900)) for _ in range(2)),
        rows=draw.randrange(1, 5 if device == "cpu" else 70),
        kv_heads=draw.randrange(1, 3),
        groups=draw.randrange(1, 9),
        dim=dim,
        value_dim=draw.choice([None, dim - 15]),
        interleaved=draw.random() < 0.5,
    )
    print(case)
    tuning = SMALL if device == "cpu" else None
    for dtype in (torch.float32,) if device == "cpu" else (torch.float32, torch.bfloat16):
        maker = Maker(case, dtype, device)
        made = maker.request()
        close(attention(made, case, tuning)(made.query), dense(made, maker), dtype)


@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize("splits", [1, 2, 40])
def test_any_number_of_splits_gives_the_same(splits: int, device: str) -> None:
    """Fewer than segments, or more than blocks."""
    maker = Maker(Case(kv_heads=1), torch.float32, device)
    made = maker.request()
    close(
        attention(made, maker.case, replace(SMALL, splits=splits))(made.query),
        dense(made, maker),
        maker.dtype,
    )


@pytest.mark.parametrize("device", [CPU, GPU])
def test_every_run_gives_the_same_bits(device: str) -> None:
    """No atomics, no order left to chance: a difference would be a race."""
    case = Case(rows=5) if device == "cpu" else Case(
        parts=(Part(9000), Part(333, 12), Part(4000, 77)), rows=64, kv_heads=8, groups=4, dim=128
    )  # fmt: skip
    maker = Maker(case, torch.float32 if device == "cpu" else torch.bfloat16, device)
    made = maker.request()
    run = attention(made, case, SMALL if device == "cpu" else None)
    first = [x.clone() for x in _both(run(made.query))]
    for _ in range(2 if device == "cpu" else 100):
        run.out.fill_(float("nan"))
        run.mass.fill_(float("nan"))
        assert all(torch.equal(a, b) for a, b in zip(first, _both(run(made.query)), strict=True))


def _both(found: Attended) -> tuple[torch.Tensor, torch.Tensor]:
    return found.out, found.mass


@pytest.mark.parametrize("device", [CPU, GPU])
def test_lengths_and_turns_may_change_between_two_runs(device: str) -> None:
    """As in a CUDA graph of a decode step: the buffers stay, the device's own numbers change."""
    maker = Maker(Case(parts=(Part(30), Part(24, 40)), rows=1), torch.float32, device)
    made = maker.request()
    run = attention(made, maker.case)
    run(made.query)
    run.lengths[0, 1] = 7  # the second segment as it was before it grew
    assert made.turn is not None
    run.cos[0].copy_(made.turn.cos.flip(0))
    run.sin[0].copy_(made.turn.sin.flip(0))
    second = made.segments[1]
    assert isinstance(second, Rows)
    shorter = [made.segments[0], Rows(second.keys[:, :, :7], second.values[:, :, :7]), made.segments[2]]
    moved = Turn(made.turn.cos.flip(0), made.turn.sin.flip(0))
    expected = segment_attention_reference(made.query, shorter, moved, scale=0.25)
    close(run(made.query), (expected.out.cpu().double(), expected.mass.cpu().double()), torch.float32)


@pytest.mark.gpu
def test_runs_in_a_cuda_graph() -> None:
    maker = Maker(Case(parts=(Part(300), Part(24, 40)), rows=1), torch.bfloat16, "cuda")
    made = maker.request()
    run = attention(made, maker.case)
    expected = [x.clone() for x in _both(run(made.query))]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(made.query)
    run.out.fill_(float("nan"))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(expected, _both(Attended(run.out, run.mass)), strict=True))


@pytest.mark.parametrize("device", [CPU, GPU])
def test_requests_with_tables_of_their_own(device: str) -> None:
    grouped = (Part(20, grouped=True), Part(5, 3), Part(30, 9, grouped=True))
    cases = [
        Case(parts=parts, rows=2, group=APE) for parts in ((Part(21),), grouped, (Part(3), Part(18, 40)))
    ]
    makers = [Maker(case, torch.float32, device) for case in cases]
    made = [maker.request() for maker in makers]
    with using("triton"):
        found = segment_attention_many(
            torch.cat([m.query for m in made]), [m.segments for m in made], [m.turn for m in made],
            scale=0.25, group=APE,
        )  # fmt: skip
    for one, request, maker in zip(found, made, makers, strict=True):
        close(one, dense(request, maker), torch.float32)


@pytest.mark.parametrize("form", ["rows", "paged", "int8"])
@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_every_backend_reads_every_form(form: str, backend: str) -> None:
    maker = Maker(Case(parts=(Part(37, form=form), Part(9, 5)), kv_heads=1), torch.float32, "cpu")
    made = maker.request()
    with using(backend):
        found = segment_attention(made.query, made.segments, made.turn, scale=0.25)
    close(found, dense(made, maker), torch.float32)


def test_what_the_kernel_cannot_read_goes_the_plain_way() -> None:
    maker = Maker(Case(), torch.float32, "cpu")
    made = maker.request()
    assert is_supported(made.query, [made.segments], made.turn)
    first = made.segments[0]
    assert isinstance(first, Rows)
    others: dict[str, AnyRows] = {
        "another type": Rows(first.keys.double(), first.values.double()),
        "channels apart": Rows(first.keys.mT.contiguous().mT, first.values),
        "large heads": Rows(torch.zeros(1, 2, 3, 512), torch.zeros(1, 2, 3, 512)),
    }
    for rows in others.values():
        assert not is_supported(made.query, [[rows, *made.segments[1:]]], made.turn)
    assert not is_supported(made.query.clone().requires_grad_(), [made.segments], made.turn)
    channels_apart = [others["channels apart"], *made.segments[1:]]
    with using("triton"):
        found = segment_attention(made.query, channels_apart, made.turn, scale=0.25)
    close(found, dense(made, maker), torch.float32)


def test_another_shape_is_refused() -> None:
    maker = Maker(Case(kv_heads=1), torch.float32, "cpu")
    made = maker.request()
    with pytest.raises(ValueError, match="made for a query of"):
        attention(made, maker.case)(made.query[:, :, :1])
