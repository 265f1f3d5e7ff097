"""A decode step beside transformers' own: `generate` over a static cache, for 1, 4 and 16 requests.

Both sides have the same model and as many random rows before the token, both choose the likeliest token, and
they take turns. Every request has rows of its own on both sides. On a CPU kvrag reads the first tokens over
the documents where they lie, and then copies them into one run: what is compared are the steps behind that,
and what the copy costs is said in such steps. `generate` compiles the model by itself on a
GPU (with CUDA graphs); on a CPU it is measured as it comes and, where that works, compiled as well. The floor
is the model's weights read once for all requests (of the table of embeddings only the rows that are looked
up) and everybody's rows, at the rate of reading.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from kernels_parts.clock import now, seconds
from kernels_parts.decode import HALF, LLAMA, SMALL, Shape, build, products
from kernels_parts.limits import limits, weight_bytes
from transformers import CompileConfig, GenerationConfig, StaticCache

from kvrag import backbone
from kvrag.decode import Behind
from kvrag.fresh import FreshRows
from kvrag.model import Model, quiet
from kvrag.passes import Passes
from kvrag.prefill import Read, Want
from kvrag.segments import KV, LayerKV, Segment, SegmentTable

NAME = "generate"

SIX = replace(HALF, name="six layers of the 0.5B class", layers=6)  # what a CPU compiles in a minute

_BEFORE = 3  # tokens of the prompt behind the rows
_WARM = 4  # first tokens of a run, which compile, capture and allocate
_UNTIL_COPIED = 40  # tokens after which documents have been copied together, if they ever are

Row = dict[str, Any]


class Requests:
    """Several answers over documents of their own, as the engine's passes read them."""

    def __init__(self, model: Model, num: int, documents: int, tokens: int) -> None:
        """Make random rows and read a short question for each request."""
        self.model, self.end = model, documents * tokens
        self._passes = Passes(model, num * _BEFORE)
        self._behind = [self._answer(documents, tokens) for _ in range(num)]
        self._at = self.end + _BEFORE

    def _answer(self, documents: int, tokens: int) -> Behind:
        texts = [KV((5,) * tokens, tuple(_rows(self.model, tokens))) for _ in range(documents)]
        table = SegmentTable(tuple(Segment(kv, i * tokens, document=i) for i, kv in enumerate(texts)))
        fresh = FreshRows(self.model.num_layers)
        Want(table, [5] * _BEFORE, range(self.end, self.end + _BEFORE), fresh).read(self.model)
        return Behind(table, fresh, self.model.specs)

    def copied(self) -> float | None:
        """Read on until the documents are copied together; seconds of that step, None if they never are."""
        if self.model.device.type == "cuda":
            return None
        for _ in range(_UNTIL_COPIED):
            (took,) = self.run(1)
            if all(behind.fresh.parts is not None for behind in self._behind):
                return took
        return None

    @torch.inference_mode()
    def run(self, count: int) -> list[float]:
        """Seconds of each of `count` steps; a step reads one token of every request and chooses the next."""
        tokens, found = [5] * len(self._behind), []
        for _ in range(count):
            start = now(self.model.device)
            wants = [b.want(t, self._at) for b, t in zip(self._behind, tokens, strict=True)]
            outcomes = self._passes.run(wants)
            tokens = [int(_read(outcome).logits[-1].argmax()) for outcome in outcomes]
            self._at += 1
            found.append(now(self.model.device) - start)
        return found


class Static:
    """The same by transformers: a static cache that is full of random rows, and `generate`."""

    def __init__(self, model: Model, num: int, length: int, room: int, *, compiled: bool) -> None:
        """Make the cache; `compiled` asks for it on a device where `generate` would not compile."""
        self.model, self.length, self.num = model, length, num
        self._cache = StaticCache(config=model.network.config, max_cache_len=length + room)
        self._config = GenerationConfig(
            do_sample=False, use_cache=True, pad_token_id=0, eos_token_id=None, disable_compile=not compiled
        )
        if compiled:
            self._config.compile_config = CompileConfig()
            self._config.compile_config._compile_all_devices = True

    @torch.inference_mode()
    def run(self, count: int) -> list[float]:
        """Seconds between the tokens of an answer."""
        self._cache.reset()
        for layer in range(self.model.num_layers):
            rows = [_rows(self.model, self.length, layers=1)[0] for _ in range(self.num)]
            keys, values = (torch.stack([getattr(kv, name) for kv in rows]) for name in ("keys", "values"))
            self._cache.update(keys, values, layer)
        ids = torch.full((self.num, self.length + _BEFORE), 5, device=self.model.device)
        watch = _Watch(self.model.device)
        self._config.max_new_tokens = count + 1
        network: Any = self.model.network
        network.set_attn_implementation("sdpa")
        try:
            network.generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=self._config,
                past_key_values=self._cache, streamer=watch,
            )  # fmt: skip
        finally:
            network.set_attn_implementation(backbone.NAME)
        times = watch.times[1:]  # the prompt came first
        return [b - a for a, b in pairwise(times)]


class _Watch:
    """A streamer that notes when tokens arrive, for any number of requests."""

    def __init__(self, device: torch.device) -> None:
        self.times: list[float] = []
        self._device = device

    def put(self, value: Any) -> None:
        self.times.append(now(self._device))

    def end(self) -> None:
        """Nothing is held back."""


def _read(outcome: Read | Exception) -> Read:
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _rows(model: Model, tokens: int, layers: int | None = None) -> list[LayerKV]:
    """Random rows of some layers, all of them by default."""
    config = model.network.config.get_text_config(decoder=True)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (config.num_key_value_heads, tokens, size)
    made = {"device": model.device, "dtype": model.dtype}
    return [
        LayerKV(torch.randn(shape, **made), torch.randn(shape, **made))
        for _ in range(model.num_layers if layers is None else layers)
    ]


def _compiles(side: Static) -> bool:
    """Whether `generate` runs compiled here."""
    try:
        side.run(2)
    except Exception as error:  # whatever a compiler raises
        print(f"generate, compiled: {type(error).__name__}: {str(error).splitlines()[0]}")
        return False
    return True


def _measured(model: Model, num: int, shape: Shape, device: torch.device, small: bool) -> Row:
    """One row: steps of both sides, in turns of several tokens."""
    steps, rounds = (2, 1) if small else (24, 3) if device.type == "cuda" else (10, 2)
    length = shape.documents * shape.tokens
    room = _BEFORE + steps + _WARM + 8
    ours = Requests(model, num, shape.documents, shape.tokens)
    copying = ours.copied()
    on_gpu = device.type == "cuda"
    sides: dict[str, Callable[[int], list[float]]] = {"kvrag": ours.run}
    sides["generate"] = Static(model, num, length, room, compiled=on_gpu).run
    if not on_gpu and not small:
        compiled = Static(model, num, length, room, compiled=True)
        if _compiles(compiled):
            sides["generate, compiled"] = compiled.run
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            times[name] += run(steps + _WARM)[_WARM:]
    found = {name: median(each) for name, each in times.items()}
    rows = num * sum(kv.keys.nbytes + kv.values.nbytes for kv in _rows(model, 1)) * length
    row = _row(model, num, shape, found, weight_bytes(model.network, num) + rows, device, small)
    return row if copying is None else row | {"copy, in steps": copying / found["kvrag"] - 1}


def _row(
    model: Model,
    num: int,
    shape: Shape,
    found: dict[str, float],
    num_bytes: int,
    device: torch.device,
    small: bool,
) -> Row:
    if device.type == "cuda":
        rate = limits(device, small).copy
    else:
        rate = weight_bytes(model.network, 1) / seconds(products(model), device, repeat=7)
    best = min(each for name, each in found.items() if name != "kvrag")
    return {
        "model": model.name,
        "requests": num,
        "documents": shape.documents,
        "tokens": shape.tokens,
        "bytes": num_bytes,
        "floor ms": num_bytes / rate * 1e3,
        **{f"{name} ms": each * 1e3 for name, each in found.items()},
        "of the floor": num_bytes / rate / found["kvrag"],
        "generate / kvrag": best / found["kvrag"],
    }


def run(device: torch.device, small: bool) -> list[Row]:
    """One row for each number of requests."""
    quiet()
    shape = SMALL if small else (LLAMA if device.type == "cuda" else SIX)
    model = build(shape, device)
    # Sixteen times as many rows would not fit beside another copy of them.
    few = replace(shape, documents=max(1, shape.documents // 4))
    sides = [(1, shape), (3, few)] if small else [(1, shape), (4, few), (16, few)]
    return [_measured(model, num, each, device, small) for num, each in sides]
