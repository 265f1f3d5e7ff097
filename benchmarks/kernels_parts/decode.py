"""A decode step of a whole model over cached documents, against its floor: weights and rows read once.

On a CPU the rate of reading is that of products of the model's own matrices with one row, without anything
else; on a GPU that of a copy. The step is taken the ordinary way, over one run after the documents were
copied together (what pays on a CPU), and replayed from a CUDA graph where there is one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from kernels_parts.clock import turns
from kernels_parts.limits import dtype_of, limits, weight_bytes
from transformers import AutoModelForCausalLM, LlamaConfig

from kvrag.fresh import FreshRows
from kvrag.model import Model, quiet
from kvrag.passes import Passes
from kvrag.prefill import Want
from kvrag.replay import DecodeStep
from kvrag.segments import KV, LayerKV, Segment, SegmentTable
from kvrag.testing.models import tiny_tokenizer

NAME = "decode"


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama shape, and the documents before it."""

    name: str
    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    vocabulary: int
    documents: int
    tokens: int


SMALL = Shape("tiny", 2, 64, 128, 4, 2, 512, 3, 24)
HALF = Shape("0.5B-class", 24, 896, 4864, 14, 2, 32_000, 10, 512)
LLAMA = Shape("Llama-3.1-8B", 32, 4096, 14_336, 32, 8, 128_256, 32, 512)


def build(shape: Shape, device: torch.device) -> Model:
    """A model of this shape with random weights, made where it computes."""
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=131_072,
        eos_token_id=None,
        pad_token_id=0,
    )
    with device:
        network = AutoModelForCausalLM.from_config(config, dtype=dtype_of(device))
    return Model(network.to(device), tiny_tokenizer(), name=shape.name)


class Answer:
    """A prompt that was read over random rows, and the ways to read one more token."""

    def __init__(self, model: Model, documents: int, tokens: int) -> None:
        """Make the rows and read a short question."""
        self.model, config = model, model.network.config.get_text_config(decoder=True)
        heads = config.num_key_value_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        made = {"device": model.device, "dtype": model.dtype}

        def rows() -> LayerKV:
            return LayerKV(*(torch.randn(heads, tokens, dim, **made) for _ in range(2)))

        texts = [KV((5,) * tokens, tuple(rows() for _ in model.specs)) for _ in range(documents)]
        self.table = SegmentTable(tuple(Segment(kv, i * tokens, document=i) for i, kv in enumerate(texts)))
        self.num_bytes = sum(kv.num_bytes for kv in texts) + weight_bytes(model.network, 1)
        self._end = documents * tokens
        self.apart, self.run = self._prompt(), self._prompt().behind(self.table, model.specs)
        self._passes = Passes(model, 1)
        self.replays = self._prompt()
        on_gpu = model.device.type == "cuda"
        self.step = DecodeStep(model, [self.table], [self.replays]) if on_gpu else None

    def _prompt(self) -> FreshRows:
        fresh = FreshRows(self.model.num_layers)
        Want(self.table, [5, 6, 7], [self._end + i for i in range(3)], fresh).read(self.model)
        return fresh

    def over_segments(self) -> object:
        """The ordinary step, over the documents where they lie."""
        return Want(self.table, [5], [self._end + self.apart.num_rows], self.apart).read(self.model)

    def over_one_run(self) -> object:
        """The step of a pass, over a copy in one run."""
        (found,) = self._passes.run([Want(SegmentTable(), [5], [self.run.positions[-1] + 1], self.run)])
        return found

    def replayed(self) -> object:
        """A step from a CUDA graph; at one place again and again, so that its room never ends."""
        assert self.step is not None
        found = self.step.read([5], [self._end + 3])
        self.replays.cut(3)
        return found


def products(model: Model) -> Callable[[], object]:
    """Every matrix of the model times one row, and nothing else."""
    layers = [m for m in model.network.modules() if isinstance(m, torch.nn.Linear)]
    inputs = [torch.randn(1, layer.in_features, device=model.device, dtype=model.dtype) for layer in layers]

    @torch.inference_mode()
    def run() -> None:
        for layer, row in zip(layers, inputs, strict=True):
            layer(row)

    return run


@torch.inference_mode()
def run(device: torch.device, small: bool) -> list[dict[str, Any]]:
    """One row per model."""
    quiet()
    if small:
        return [_measured(build(SMALL, device), SMALL.documents, SMALL.tokens, device, small)]
    shape = LLAMA if device.type == "cuda" else HALF
    return [
        _measured(Model.load(device=device), 10, 128, device, small),
        _measured(build(shape, device), shape.documents, shape.tokens, device, small),
    ]


def _measured(model: Model, documents: int, tokens: int, device: torch.device, small: bool) -> dict[str, Any]:
    answer = Answer(model, documents, tokens)
    sides: dict[str, Callable[[], object]] = {
        "segments": answer.over_segments,
        "run": answer.over_one_run,
        "products": products(model),
    }
    if answer.step is not None:
        sides["replayed"] = answer.replayed
    found = turns(sides, device, repeat=2 if small else 15)
    weights = weight_bytes(model.network, 1)
    rate = limits(device, small).copy if device.type == "cuda" else weights / found["products"]
    floor = answer.num_bytes / rate
    return {
        "model": model.name,
        "documents": documents,
        "tokens": tokens,
        "bytes": answer.num_bytes,
        "floor ms": floor * 1e3,
        "over segments ms": found["segments"] * 1e3,
        "over one run ms": found["run"] * 1e3,
        "replayed ms": found["replayed"] * 1e3 if "replayed" in found else None,
        "products alone ms": found["products"] * 1e3,
        "best of the floor": floor / min(v for k, v in found.items() if k != "products"),
    }
