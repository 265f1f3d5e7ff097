"""A stride's attention and the scores of its columns, on every path, against a dense softmax in float64."""

from __future__ import annotations

import random
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec

import pytest
import torch

from kvrag_kernels import RowMask, Rows, Turn
from kvrag_kernels._backend import using
from kvrag_kernels.segment_attention import gathered
from kvrag_kernels.strided_prefill import (
    Scoring,
    Strided,
    column_scores,
    column_scores_blockwise,
    column_scores_reference,
    columns,
    cpu,
    ema_weights,
    reduce_heads,
    rowwise,
    strided_prefill,
    strided_prefill_cpu,
    strided_prefill_gathered,
    strided_prefill_reference,
    strided_prefill_rowwise,
)

SCALE = 0.35
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Case:
    """Shapes; `lengths` are the memory's runs, the stride's own rows come behind them."""

    rows: int
    lengths: tuple[int, ...] = (4, 21, 0, 38)
    heads: int = 4
    kv_heads: int = 2
    dim: int = 32
    value_dim: int | None = None
    batch: int = 1
    softcap: float | None = None
    sinks: bool = False
    pairs: int | None = None
    start: int = 0
    interleaved: bool = False
    rotated: bool = True
    columns: tuple[tuple[int, int], ...] | None = None
    dtype: torch.dtype = torch.float32


CASES = {
    "several heads share": Case(29),
    "one head each, interleaved": Case(23, heads=2, interleaved=True),
    "seven share, all columns but some": Case(18, heads=7, kv_heads=1, columns=((4, 20), (50, 66), (70, 81))),
    "odd dimensions, partly rotated": Case(17, dim=24, pairs=5, start=3, value_dim=20),
    "nothing kept yet": Case(45, lengths=()),
    "one row": Case(1, columns=((2, 10),)),
    "no positions": Case(20, rotated=False),
    "soft cap and sinks": Case(20, softcap=1.5, sinks=True),
    "a batch": Case(19, batch=3, heads=2),
    "half precision": Case(33, dim=64, dtype=torch.float16, columns=((0, 70),)),
    "half precision, soft cap": Case(16, dtype=torch.float16, softcap=2.0, sinks=True, heads=6),
}


@dataclass(frozen=True)
class Given:
    query: torch.Tensor
    segments: list[Rows]
    turn: Turn | None
    sinks: torch.Tensor | None
    scoring: Scoring | None
    positions: list[torch.Tensor]
    frequencies: torch.Tensor
    case: Case

    @property
    def arguments(self) -> dict[str, object]:
        return {"scale": SCALE, "softcap": self.case.softcap, "sinks": self.sinks, "scoring": self.scoring}


def turned(x: torch.Tensor, angles: torch.Tensor, case: Case) -> torch.Tensor:
    """[..., n, D] by angles [n, R], in float64."""
    out, pairs = x.double().clone(), angles.shape[-1]
    if case.interleaved:
        first, second = case.start + 2 * torch.arange(pairs), case.start + 2 * torch.arange(pairs) + 1
    else:
        first, second = case.start + torch.arange(pairs), case.start + pairs + torch.arange(pairs)
    a, b, cos, sin = out[..., first], out[..., second], angles.cos(), angles.sin()
    out[..., first], out[..., second] = a * cos - b * sin, b * cos + a * sin
    return out


def make(case: Case, device: str = "cpu") -> Given:
    """Random inputs: runs lie in one buffer, keys rotated at their slots, and appear one behind the other."""
    seed = secrets.randbits(31)
    print("seed", seed)  # shown when a test fails
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    frequencies = torch.rand(case.pairs or case.dim // 2, generator=generator, device=device).double()
    slots = sum(case.lengths) + 3
    keys = normal(1, case.kv_heads, slots, case.dim).to(case.dtype)
    values = normal(1, case.kv_heads, slots, case.value_dim or case.dim).to(case.dtype)
    segments, positions, turns, slot, rank = [], [], [], 3, 1000
    own = torch.arange(rank + sum(case.lengths), rank + sum(case.lengths) + case.rows, device=device)
    for n in case.lengths:
        segments.append(Rows(keys[:, :, slot : slot + n], values[:, :, slot : slot + n]))
        # Turning this back by the slots and forward to the ranks must change nothing.
        positions.append(torch.arange(n, device=device) + rank)
        turns.append(own - (rank - slot))
        slot, rank = slot + n, rank + n
    mine = [
        normal(case.batch, case.kv_heads, case.rows, d).to(case.dtype) for d in (case.dim, values.shape[-1])
    ]
    segments.append(Rows(*mine, causal=True))
    positions.append(own)
    turns.append(own)
    angles = torch.stack(turns).double()[..., None] * frequencies
    scoring = None
    if case.batch == 1:
        scoring = Scoring(ema_weights(case.rows, 0.95, device=device), case.columns)
    return Given(
        normal(case.batch, case.heads, case.rows, case.dim).to(case.dtype),
        segments,
        Turn(angles.cos().float(), angles.sin().float(), case.start, case.interleaved)
        if case.rotated
        else None,
        normal(case.heads) if case.sinks else None,
        scoring,
        positions,
        frequencies,
        case,
    )


def dense(given: Given) -> Strided:
    """Everything at once in float64: keys turned from where they lie to where they appear."""
    case, slot, keys, values = given.case, 3, [], []
    for rows, places in zip(given.segments, given.positions, strict=True):
        n = rows.keys.shape[2]
        native = places if rows.causal else torch.arange(slot, slot + n, device=places.device)
        moved = (places - native).double()[:, None] * given.frequencies
        keys.append(turned(rows.keys, moved, case).expand(case.batch, -1, -1, -1))
        values.append(rows.values.double().expand(case.batch, -1, -1, -1))
        slot += 0 if rows.causal else n
    query = given.query.double()
    if case.rotated:
        query = turned(query, given.positions[-1].double()[:, None] * given.frequencies, case)
    else:
        keys = [rows.keys.double().expand(case.batch, -1, -1, -1) for rows in given.segments]
    groups = case.heads // case.kv_heads
    k, v = (torch.cat(x, dim=2).repeat_interleave(groups, dim=1) for x in (keys, values))
    scores = query @ k.transpose(-1, -2) * SCALE
    if case.softcap is not None:
        scores = case.softcap * (scores / case.softcap).tanh()
    num_kept = sum(case.lengths)
    seen = torch.ones(case.rows, num_kept + case.rows, dtype=torch.bool, device=k.device).tril(num_kept)
    scores = scores.masked_fill(~seen, float("-inf"))
    if given.sinks is not None:
        extra = given.sinks.double().view(1, -1, 1, 1).expand(case.batch, -1, case.rows, 1)
        scores = torch.cat((scores, extra), dim=-1)
    probs = scores.softmax(-1)[..., : k.shape[2]]
    mass = torch.stack([p.sum(-1) for p in probs.split([len(x) for x in given.positions], dim=-1)])
    sums = None
    if given.scoring is not None:
        everything = torch.einsum("t,htn->hn", given.scoring.weights.double(), probs[0])
        sums = everything if case.columns is None else torch.zeros_like(everything)
        for first, last in case.columns or ():
            sums[:, first:last] = everything[:, first:last]
    return Strided(probs @ v, scores.logsumexp(-1), mass, sums)


def assert_close(found: Strided, expected: Strided, dtype: torch.dtype) -> None:
    for name in ("out", "lse", "mass", "scores"):
        a, b = getattr(found, name), getattr(expected, name)
        if b is None:
            assert a is None
            continue
        assert a.shape == b.shape, name
        assert a.dtype == (dtype if name == "out" else torch.float32)
        assert_near(a, b, dtype, name)


def assert_near(
    found: torch.Tensor, expected: torch.Tensor | None, dtype: torch.dtype, name: str = ""
) -> None:
    assert expected is not None
    error = (found.double() - expected).norm() / expected.norm()
    assert error < TOLERANCE[dtype], f"{name} is off by {error:.2e}"


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory is full of NaN, so that what nobody writes is seen."""
    new_empty, empty, empty_like = torch.Tensor.new_empty, torch.empty, torch.empty_like

    def poison(make: Callable[..., torch.Tensor], *args: object, **options: object) -> torch.Tensor:
        made = make(*args, **options)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **o: poison(new_empty, *a, **o))
    monkeypatch.setattr(torch, "empty", partial(poison, empty))
    monkeypatch.setattr(torch, "empty_like", partial(poison, empty_like))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks so small that several are needed, and the last one is not full."""
    monkeypatch.setattr(columns, "_COLUMNS", 16)
    monkeypatch.setattr(columns, "_ROWS", 20)
    monkeypatch.setattr(rowwise, "_CELLS", 1000)
    monkeypatch.setattr(gathered, "_CELLS", 1000)
    monkeypatch.setattr(gathered, "_LEAST_ROWS", 1)
    monkeypatch.setattr(gathered, "_MOST_ELEMENTS", 1000)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["", "bfloat16"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.usefixtures("poisoned", "small_blocks")
def test_paths_in_pytorch_are_a_dense_softmax(case: Case, dtype: torch.dtype | None) -> None:
    case = replace(case, dtype=dtype or case.dtype)
    given = make(case)
    expected = dense(given)
    call = (given.query, given.segments, given.turn)
    assert_close(strided_prefill_reference(*call, **given.arguments), expected, case.dtype)
    assert_close(strided_prefill_rowwise(*call, **given.arguments), expected, case.dtype)
    assert_close(strided_prefill(*call, **given.arguments), expected, case.dtype)
    arguments = {name: value for name, value in given.arguments.items() if name != "softcap"}
    if cpu.is_supported(given.query, given.segments, case.softcap):
        assert_close(strided_prefill_cpu(*call, **arguments), expected, case.dtype)
    if case.softcap is None and case.batch == 1:
        assert gathered.is_supported(given.query, given.segments, given.turn)
        assert_close(strided_prefill_gathered(*call, **arguments), expected, case.dtype)
    if given.scoring is not None:
        for score in (column_scores, column_scores_reference, column_scores_blockwise):
            found = score(*call, expected.lse.float(), given.scoring, scale=SCALE, softcap=case.softcap)
            assert_near(found, expected.scores, case.dtype)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.usefixtures("poisoned", "small_blocks")
def test_scores_whose_exponentials_would_overflow(sinks: bool) -> None:
    """A maximum is looked for where exponents could leave float32."""
    given = make(Case(21, sinks=sinks))
    given = replace(given, query=given.query * 300)
    expected = dense(given)
    assert float(expected.lse.abs().max()) > 200
    arguments = {name: value for name, value in given.arguments.items() if name != "softcap"}
    found = strided_prefill_gathered(given.query, given.segments, given.turn, **arguments)
    # Scores of hundreds are known to hundreds of times float32's step, and so are their exponentials.
    for name in ("out", "lse", "mass", "scores"):
        away = (getattr(found, name).double() - getattr(expected, name)).norm()
        assert away / getattr(expected, name).norm() < 2e-3, name


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.usefixtures("poisoned", "small_blocks")
def test_sinks_of_heads_that_share_no_keys(rows: int) -> None:
    """Blocks of one row and groups of one head see the sinks themselves, not a copy."""
    given = make(Case(rows, sinks=True, heads=2, kv_heads=2))
    expected = dense(given)
    arguments = {name: value for name, value in given.arguments.items() if name != "softcap"}
    found = strided_prefill_gathered(given.query, given.segments, given.turn, **arguments)
    assert_close(found, expected, torch.float32)


@pytest.mark.parametrize("size", [-300.0, 300.0])
@pytest.mark.usefixtures("poisoned", "small_blocks")
def test_sinks_whose_exponentials_would_overflow(size: float) -> None:
    given = make(Case(5, sinks=True))
    arguments = {name: value for name, value in given.arguments.items() if name != "softcap"}
    far = arguments["sinks"] + size
    call = (given.query, given.segments, given.turn)
    found = strided_prefill_gathered(*call, **{**arguments, "sinks": far})
    expected = strided_prefill_reference(*call, **{**arguments, "sinks": far})
    for name in ("out", "lse", "mass", "scores"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-6)
    assert found.lse.isfinite().all()


def test_segments_that_are_turned_unlike_places_are_not_gathered() -> None:
    given = make(Case(9, lengths=(5, 7)))
    assert given.turn is not None
    assert gathered.is_supported(given.query, given.segments, given.turn)
    cos, sin = given.turn.cos.clone(), given.turn.sin.clone()
    cos[0, -1], sin[0, -1] = given.turn.cos[0, 0], given.turn.sin[0, 0]  # as if the row stood elsewhere
    elsewhere = replace(given.turn, cos=cos, sin=sin)
    assert not gathered.is_supported(given.query, given.segments, elsewhere)
    assert not gathered.is_supported(given.query.requires_grad_(), given.segments, given.turn)


@pytest.mark.usefixtures("poisoned", "small_blocks")
def test_masks_and_rows_that_see_nothing() -> None:
    """Rows behind a mask, rows before a segment begins, and a row that sees nothing at all."""
    given = make(Case(12, lengths=(9, 7)))
    allowed = torch.rand(12, 9) < 0.5
    allowed[2] = False
    late = torch.rand(8, 7) < 0.5
    own = torch.ones(12, 12, dtype=torch.bool).tril()
    own[2] = False
    segments = [
        replace(given.segments[0], mask=RowMask(allowed)),
        replace(given.segments[1], first_row=4, mask=RowMask(late)),
        replace(given.segments[2], causal=False, mask=RowMask(own)),
    ]
    call = (given.query, segments, given.turn)
    expected = strided_prefill_reference(*call, **given.arguments)
    assert expected.lse[0, :, 2].eq(float("-inf")).all()
    assert expected.out[0, :, 2].eq(0).all()
    for found in (
        strided_prefill(*call, **given.arguments),
        strided_prefill_rowwise(*call, **given.arguments),
    ):
        for name in ("out", "mass", "scores"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.lse.exp(), expected.lse.exp(), rtol=1e-5, atol=0)
    assert given.scoring is not None
    found_scores = column_scores(*call, expected.lse, given.scoring, scale=SCALE)
    torch.testing.assert_close(found_scores, expected.scores, rtol=1e-5, atol=1e-6)


@pytest.fixture
def triton_backend() -> Iterator[None]:
    with using("triton"):
        yield


needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


@needs_triton
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.usefixtures("poisoned")
def test_kernels_are_a_dense_softmax(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvrag_kernels.strided_prefill import launch

    # Query rows are scored in two launches, and rows and columns in several blocks.
    monkeypatch.setattr(launch, "_TURNED_BYTES", 1)
    monkeypatch.setattr(launch.Tiles, "of", lambda dim, dtype: launch.Tiles(16, 32))
    given = make(case)
    found = launch.strided_prefill_triton(given.query, given.segments, given.turn, **given.arguments)
    assert_close(found, dense(given), case.dtype)


def drawn(dim: int, seed: int, longest: int) -> Case:
    """Odd lengths, and query heads to a key head as they come."""
    draw = random.Random(seed)
    lengths = tuple(2 * draw.randrange(longest) + 1 for _ in range(draw.randrange(1, 4)))
    kv_heads, total = draw.randrange(1, 3), sum(lengths)
    rows = draw.randrange(1, longest + 2)
    case = Case(
        rows,
        lengths,
        heads=kv_heads * draw.randrange(1, 6),
        kv_heads=kv_heads,
        dim=dim,
        value_dim=draw.choice([None, dim - 15]),
        interleaved=draw.random() < 0.5,
        columns=((total // 3, total + rows),),
    )
    print(case)
    return case


HEADS = pytest.mark.parametrize("dim", [64, 80, 96, 112, 128, 160, 192, 256])


@HEADS
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.usefixtures("poisoned", "small_blocks")
def test_heads_of_models_and_any_group_of_them(dim: int, dtype: torch.dtype, fresh_numbers: int) -> None:
    case = replace(drawn(dim, fresh_numbers, 30), dtype=dtype)
    given = make(case)
    call, expected = (given.query, given.segments, given.turn), dense(given)
    for path in (strided_prefill, strided_prefill_reference, strided_prefill_rowwise):
        assert_close(path(*call, **given.arguments), expected, dtype)


@needs_triton
@HEADS
@pytest.mark.usefixtures("poisoned")
def test_heads_of_models_in_the_kernels(
    dim: int, fresh_numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvrag_kernels.strided_prefill import launch

    monkeypatch.setattr(launch.Tiles, "of", lambda dim, dtype: launch.Tiles(16, 32))
    given = make(drawn(dim, fresh_numbers, 12))
    found = launch.strided_prefill_triton(given.query, given.segments, given.turn, **given.arguments)
    assert_close(found, dense(given), torch.float32)


@needs_triton
@pytest.mark.usefixtures("poisoned", "triton_backend")
def test_the_backend_chooses_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """By way of the public functions; what the kernels cannot do is computed elsewhere."""
    from kvrag_kernels.strided_prefill import launch

    calls = []
    for name in ("strided_prefill_triton", "column_scores_triton"):
        inner = getattr(launch, name)
        monkeypatch.setattr(
            launch, name, lambda *a, inner=inner, name=name, **o: calls.append(name) or inner(*a, **o)
        )
    given = make(Case(5, lengths=(3,)))
    expected = dense(given)
    call = (given.query, given.segments, given.turn)
    assert_close(strided_prefill(*call, **given.arguments), expected, torch.float32)
    assert given.scoring is not None
    column_scores(*call, expected.lse.float(), given.scoring, scale=SCALE)
    assert calls.count("strided_prefill_triton") == 1
    assert calls.count("column_scores_triton") == 2
    masked = [
        *given.segments[:-1],
        replace(given.segments[-1], causal=False, mask=RowMask(torch.eye(5).bool())),
    ]
    found = strided_prefill(given.query, masked, given.turn, **given.arguments)
    torch.testing.assert_close(
        found.out, strided_prefill_reference(given.query, masked, given.turn, **given.arguments).out
    )
    assert calls.count("strided_prefill_triton") == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_kernels_on_a_gpu(case: Case, dtype: torch.dtype) -> None:
    case = replace(
        case, rows=case.rows * 9, lengths=tuple(11 * n for n in case.lengths), dtype=dtype, columns=None
    )
    given = make(case, "cuda")
    with using("triton"):
        found = strided_prefill(given.query, given.segments, given.turn, **given.arguments)
    assert_close(found, dense(given), dtype)


@pytest.mark.gpu
@HEADS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_heads_of_models_on_a_gpu(dim: int, dtype: torch.dtype, fresh_numbers: int) -> None:
    given = make(replace(drawn(dim, fresh_numbers, 700), dtype=dtype), "cuda")
    with using("triton"):
        found = strided_prefill(given.query, given.segments, given.turn, **given.arguments)
    assert_close(found, dense(given), dtype)


@pytest.mark.gpu
def test_a_hundred_runs_on_a_gpu_are_equal_bit_for_bit() -> None:
    given = make(Case(700, lengths=(4, 1000, 1333), heads=16, dim=128, dtype=torch.bfloat16), "cuda")
    with using("triton"):
        runs = (
            strided_prefill(given.query, given.segments, given.turn, **given.arguments) for _ in range(100)
        )
        first = next(runs)
        for run in runs:
            for name in ("out", "lse", "mass", "scores"):
                assert torch.equal(getattr(run, name), getattr(first, name)), name


def test_weights_are_those_of_a_moving_average() -> None:
    """Going on row by row gives the same: the score decays, then the row's share is added."""
    probs, beta = torch.rand(9, 5, dtype=torch.float64), 0.8
    score = torch.zeros(5, dtype=torch.float64)
    for p in probs:
        score = beta * score + (1 - beta) * p
    torch.testing.assert_close(ema_weights(9, beta).double() @ probs, score, rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="below 1, not 1"):
        ema_weights(9, 1)


def test_heads_are_reduced_by_key_head_or_all_together() -> None:
    scores = torch.tensor([[1.0, 9], [2, 8], [4, 7], [8, 6]])
    assert reduce_heads(scores, 2, "mean").tolist() == [[1.5, 8.5], [6, 6.5]]
    assert reduce_heads(scores, 1, "max").tolist() == [[8, 9]]
    assert reduce_heads(scores, 1, "median").tolist() == [[2, 7]]  # the lower one of the two in the middle
    with pytest.raises(ValueError, match="cannot be reduced to 3"):
        reduce_heads(scores, 3, "mean")
    with pytest.raises(ValueError, match="'min'"):
        reduce_heads(scores, 1, "min")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"segments": []}, "at least one column"),
        ({"query": torch.zeros(1, 3, 6, 8)}, "3 query heads"),
        ({"query": torch.zeros(2, 4, 6, 8)}, "batch of 2"),
        ({"scoring": Scoring(torch.ones(5))}, "as many weights"),
        ({"scoring": Scoring(torch.ones(6), ((0, 7),))}, "within 0..6"),
        ({"scoring": Scoring(torch.ones(6), ((3, 5), (4, 6)))}, "ascending"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    call = {
        "query": torch.zeros(1, 4, 6, 8),
        "segments": [Rows(torch.zeros(1, 2, 6, 8), torch.zeros(1, 2, 6, 8), causal=True)],
        "turn": None,
        "scoring": Scoring(torch.ones(6)),
    }
    with pytest.raises(ValueError, match=message):
        strided_prefill(**(call | change), scale=1.0)
