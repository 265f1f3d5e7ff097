"""How long it takes to read and to answer, by length and by budget: processor seconds of one thread."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from kvrag.memory.base import MemoryPolicy, Seen
from kvrag.memory.cascade import Cascade
from kvrag.memory.full import Full
from kvrag.memory.reading import MemoryReader
from kvrag.memory.rows import MemoryRows
from kvrag.memory.window import Window
from kvrag.model import READER, Model

LENGTHS = (1024, 2048, 4096, 8192, 16_384)
BUDGETS = (1024, 4096, 16_384, 65_536)
BUDGET, STRIDE = 1024, 256


def long_reader(positions: int) -> Model:
    """A model of the reader's shape with random weights and as many positions as wanted."""
    known = Model.load(READER)
    made = known.network.config.to_dict()
    torch.manual_seed(0)
    config = LlamaConfig(**{**made, "max_position_embeddings": positions})
    return Model(LlamaForCausalLM(config), known.text.tokenizer, name="the reader's shape")


def memory_reader(model: Model, policy: MemoryPolicy, stride: int) -> MemoryReader:
    """An empty memory and what reads into it."""
    config = model.network.config
    shape = (config.num_key_value_heads, config.head_dim, config.head_dim)
    state = policy.start(model.num_layers, config.num_key_value_heads)
    rows = MemoryRows(model.specs, [shape] * model.num_layers, dtype=model.dtype, device=model.device)
    return MemoryReader(model, state, rows, stride=stride)


def seconds(work: Callable[[], object]) -> float:
    """Of the processor."""
    began = time.process_time()
    work()
    return time.process_time() - began


def measure(*, smoke: bool = False) -> dict[str, Any]:
    """Everything; `smoke` takes seconds."""
    lengths, budgets = (LENGTHS[:1], (256,)) if smoke else (LENGTHS, BUDGETS)
    repeat, budget, stride = (1, 128, 64) if smoke else (3, BUDGET, STRIDE)
    model = long_reader(2 * max((*lengths, *budgets)) + 4096)
    reading = _reading(model, lengths, budget, stride, repeat)
    return {
        "conditions": {
            "date": time.strftime("%Y-%m-%d"),
            "parameters": sum(p.numel() for p in model.network.parameters()),
            "budget": budget,
            "stride": stride,
            "repeat": repeat,
            "threads": torch.get_num_threads(),
            "load": round(os.getloadavg()[0], 1),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "reading": reading,
        "exponents": {name: exponent(lengths, times) for name, times in reading["seconds"].items()},
        "decoding": _decoding(model, budgets, 16 if smoke else 64, repeat),
    }


def _reading(model: Model, lengths: Sequence[int], budget: int, stride: int, repeat: int) -> dict[str, Any]:
    """Processor seconds for texts of each length, the ways taking turns."""
    tokens = torch.randint(300, 3000, (max(lengths),), generator=torch.Generator().manual_seed(1)).tolist()

    @torch.inference_mode()
    def whole(length: int) -> None:
        model.network(torch.tensor([tokens[:length]]), logits_to_keep=1)

    def by_strides(policy: MemoryPolicy) -> Callable[[int], None]:
        return lambda length: memory_reader(model, policy, stride).read(tokens[:length]) and None

    ways: dict[str, Callable[[int], None]] = {
        "full attention, transformers": whole,
        "window": by_strides(Window(budget)),
        "cascade 4": by_strides(Cascade(budget, 4)),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for length in lengths:
        runs: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(repeat):
            for name, way in ways.items():
                runs[name].append(seconds(partial(way, length)))
        for name, times in runs.items():
            found[name].append(round(median(times), 4))
    return {"lengths": list(lengths), "seconds": found}


def exponent(lengths: Sequence[int], times: Sequence[float]) -> float | None:
    """Of the growth: the slope of log seconds over log length, by least squares over the longer half."""
    points = [(math.log(n), math.log(t)) for n, t in zip(lengths, times, strict=True)][len(lengths) // 2 :]
    if len(points) < 2:
        return None
    x, y = (sum(p[i] for p in points) / len(points) for i in (0, 1))
    return round(sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points), 3)


def _filled(model: Model, policy: MemoryPolicy, num: int) -> MemoryReader:
    """A memory of so many tokens that were never read: rows at random."""
    reader = memory_reader(model, policy, 128)
    generator = torch.Generator().manual_seed(2)
    for first in range(0, num, 4096):
        size = min(4096, num - first)
        shape = (*reader.state.ids.shape[:2], size)
        seen = None
        if reader.state.watching is not None:
            seen = Seen(torch.zeros(reader.state.ids.shape), torch.rand(shape, generator=generator))
        heads, dim = model.network.config.num_key_value_heads, model.network.config.head_dim
        made = [torch.randn(heads, size, dim, generator=generator) for _ in range(2 * model.num_layers)]
        moves = reader.state.take(size, seen)
        reader.rows.apply(
            moves, made[: model.num_layers], made[model.num_layers :], capacity=reader.state.capacity
        )
    return MemoryReader(model, reader.state, reader.rows, stride=128)


def _decoding(model: Model, budgets: Sequence[int], num: int, repeat: int) -> list[dict[str, Any]]:
    """Tokens per processor second, one token a pass, the insertion of the stride included."""
    found = []
    for budget in budgets:
        policies: dict[str, tuple[MemoryPolicy, int]] = {
            "full": (Full(), budget),
            "window": (Window(budget), 2 * budget),
            "cascade 4": (Cascade(budget, 4), 2 * budget),
        }
        rates = {}
        for name, (policy, filled) in policies.items():
            reader = _filled(model, policy, filled)

            def decode(reader: MemoryReader = reader) -> None:
                for token in range(300, 300 + num):
                    reader.read([token])
                reader.insert()

            rates[name] = round(num / median(seconds(decode) for _ in range(repeat)), 1)
        found.append({"budget": budget, "tokens_per_second": rates})
    return found
