"""Time to first token and per token: prebuilt caches from the store's files against transformers' generate.

Both sides run in one process, taking turns, on one random-weight model; medians and their ratio are printed.

    python benchmarks/ttft.py                       # 0.5B-class shape, 8 documents x 512 tokens, float32
    python benchmarks/ttft.py --dtype bfloat16
    python benchmarks/ttft.py --smoke               # seconds, for continuous integration
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
import transformers
from kernels_parts.limits import limits, weight_bytes
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, LlamaConfig

from kvrag import backbone
from kvrag.baseline import OrdinaryAnswer, ordinary_answer
from kvrag.config import Sampling
from kvrag.decode import Behind, choice, steps
from kvrag.encoding import encode
from kvrag.fresh import FreshRows
from kvrag.model import Model, quiet
from kvrag.prefill import Read, read
from kvrag.segments import KV, LayerKV, Segment, SegmentTable
from kvrag.store.disk import DiskStore
from kvrag.store.key import EntryKey
from kvrag.testing.models import tiny_tokenizer


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama shape; the default is that of a 0.5B-class model."""

    layers: int = 24
    hidden: int = 896
    inner: int = 4864
    heads: int = 14
    kv_heads: int = 2
    head_dim: int = 64
    vocabulary: int = 32_000
    tied: bool = True


SHAPES = {
    "0.5B": Shape(),
    "0.1B": Shape(12, 512, 1536, 8, 2, 64, 8192),
    "Llama-3.1-8B": Shape(32, 4096, 14_336, 32, 8, 128, 128_256, tied=False),
}
SMOKE = Shape(layers=2, hidden=64, inner=128, heads=4, kv_heads=2, head_dim=16, vocabulary=512)


def build(shape: Shape, dtype: torch.dtype, device: str) -> Model:
    """A random-weight model of this shape."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=32_768,
        tie_word_embeddings=shape.tied,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    with torch.device(device):
        network = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return Model(network.to(device), tiny_tokenizer(), name="random Llama")


def timed(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, the device's work included."""
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def drop_pages(folder: Path) -> None:
    """Ask the system to forget the files' pages, so that the next read comes from the disk."""
    os.sync()
    for path in folder.rglob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


class Bench:
    """One model, its documents in a store on disk, and both ways to the first token."""

    def __init__(
        self, model: Model, folder: Path, num_documents: int, doc_tokens: int, question: int
    ) -> None:
        """Encode random documents and put them into the store."""
        generator = torch.Generator().manual_seed(1)
        vocabulary = model.network.config.vocab_size

        def draw(count: int) -> tuple[int, ...]:
            return tuple(torch.randint(5, vocabulary, (count,), generator=generator).tolist())

        self.model, self.folder = model, folder
        self.backend: SDPBackend | None = None  # PyTorch's choice
        self.documents = [draw(doc_tokens) for _ in range(num_documents)]
        self.question = draw(question)
        self.prompt = [t for document in self.documents for t in document] + list(self.question)
        fingerprint = model.fingerprint()
        self.keys = [EntryKey(fingerprint, tokens) for tokens in self.documents]
        store = DiskStore(folder)
        for key, kv in zip(self.keys, encode(model, self.documents), strict=True):
            store.put(key, kv)
        store.close()
        self.num_bytes = sum(f.stat().st_size for f in folder.rglob("*.safetensors"))
        self.end = num_documents * doc_tokens

    @torch.inference_mode()
    def from_files(self) -> tuple[SegmentTable, FreshRows, Read]:
        """Open the store, load and verify every entry, read the question, choose the first token."""
        store = DiskStore(self.folder)
        segments, at = [], 0
        for number, key in enumerate(self.keys):
            kv = store.get(key).to(self.model.device)
            segments.append(Segment(kv, at, document=number))
            at += kv.num_tokens
        table, fresh = SegmentTable(tuple(segments)), FreshRows(self.model.num_layers)
        return table, fresh, self._read(table, fresh)

    def held(self, *, pinned: bool) -> list[KV]:
        """Every document in the device's memory, or in memory that it copies from without help."""
        store = DiskStore(self.folder)
        loaded = [store.get(key) for key in self.keys]
        if not pinned:
            return [kv.to(self.model.device) for kv in loaded]
        return [
            KV(kv.tokens, tuple(LayerKV(x.keys.pin_memory(), x.values.pin_memory()) for x in kv.layers))
            for kv in loaded
        ]

    @torch.inference_mode()
    def from_memory(self, held: Sequence[KV]) -> None:
        """Bring what is not there yet to the device, read the question, choose the first token."""
        segments, at = [], 0
        for number, kv in enumerate(held):
            segments.append(Segment(kv.to(self.model.device), at, document=number))
            at += kv.num_tokens
        self._read(SegmentTable(tuple(segments)), FreshRows(self.model.num_layers))

    def question_alone(self) -> None:
        """The floor: the question with no documents at all."""
        self._read(SegmentTable(), FreshRows(self.model.num_layers))

    def _read(self, table: SegmentTable, fresh: FreshRows) -> Read:
        positions = range(self.end, self.end + len(self.question))
        found = read(self.model, table, self.question, positions, fresh)
        int(found.logits[-1].argmax())  # the token itself is part of the time
        return found

    def choose_backend(self) -> None:
        """Let the ordinary side use the fastest of PyTorch's own operators, of those that do not refuse."""
        found: dict[SDPBackend, float] = {}
        for self.backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            try:
                self.ordinary(2)
                found[self.backend] = self.ordinary(2).first_token
            except RuntimeError as error:
                print(f"{self.backend}: {error}")
        self.backend = min(found, key=lambda backend: found[backend]) if found else None

    def ordinary(self, new_tokens: int) -> OrdinaryAnswer:
        """The whole prompt by transformers' generate, with its stock attention."""
        self.model.network.set_attn_implementation("sdpa")
        wanted = sdpa_kernel(self.backend) if self.backend is not None else nullcontext()
        try:
            with wanted:
                return ordinary_answer(
                    self.model, self.prompt, Sampling(max_new_tokens=new_tokens, ignore_eos=True)
                )
        finally:
            self.model.network.set_attn_implementation(backbone.NAME)

    @torch.inference_mode()
    def decode(self, table: SegmentTable, fresh: FreshRows, last: Read, count: int) -> float:
        """Seconds per token of `count` tokens behind the first, as the engine decodes."""
        prompt = self.prompt
        chosen = choice(self.model, self.prompt, Sampling(max_new_tokens=count + 1, ignore_eos=True))
        behind = Behind(table.seen_from(fresh.num_rows), fresh, self.model.specs)
        documents = tuple(s.document for s in table)
        tokens = steps(self.model, behind, prompt, last, documents, chosen, position=len(prompt))
        next(tokens)
        return timed(lambda: list(tokens), self.model.device) / count


def measure(bench: Bench, repeat: int, full_repeat: int, decode_tokens: int) -> dict[str, float]:
    """Medians in seconds, and the ratios that matter."""
    device = bench.model.device
    bench.from_files()
    bench.question_alone()
    if device.type == "cuda":
        bench.choose_backend()
    warm: list[float] = []
    alone, cold, load, full, ours, theirs = ([*warm] for _ in range(6))
    for i in range(max(repeat, full_repeat)):
        if i < full_repeat:
            answer = bench.ordinary(decode_tokens + 1)
            full.append(answer.first_token)
            theirs.append(answer.decode / decode_tokens)
            ours.append(bench.decode(*bench.from_files(), decode_tokens))
        if i < repeat:
            warm.append(timed(bench.from_files, device))
            alone.append(timed(bench.question_alone, device))
            store = DiskStore(bench.folder)
            load.append(timed(lambda store=store: [store.get(key) for key in bench.keys], device))  # type: ignore[misc]
    for _ in range(3):
        drop_pages(bench.folder)
        cold.append(timed(bench.from_files, device))
    found = {
        "full_prefill": median(full),
        "cached_warm": median(warm),
        "cached_cold": median(cold),
        "load_and_verify": median(load),
        "question_alone": median(alone),
        "decode": median(ours),
        "decode_ordinary": median(theirs),
    }
    found |= in_memory(bench, repeat)
    found["ratio_warm"] = found["full_prefill"] / found["cached_warm"]
    found["ratio_cold"] = found["full_prefill"] / found["cached_cold"]
    found["ratio_floor"] = found["full_prefill"] / found["question_alone"]
    found["ratio_decode"] = found["decode_ordinary"] / found["decode"]
    for name in ("resident", "pinned"):
        if name in found:
            found[f"ratio_{name}"] = found["full_prefill"] / found[name]
    return found


def in_memory(bench: Bench, repeat: int) -> dict[str, float]:
    """Seconds with documents in memory, and on a GPU what bounds them.

    `least`: weights and rows read once at the rate of a copy; `link`: rows copied from pinned memory alone.
    """
    device = bench.model.device
    resident = bench.held(pinned=False)

    def middle(run: Callable[[], object]) -> float:
        timed(run, device)
        return median(timed(run, device) for _ in range(repeat))

    found = {"resident": middle(lambda: bench.from_memory(resident))}
    if device.type == "cuda":
        weights = weight_bytes(bench.model.network, len(bench.question))
        found["least"] = (weights + sum(kv.num_bytes for kv in resident)) / limits(device, small=False).copy
        pinned = bench.held(pinned=True)
        found["pinned"] = middle(lambda: bench.from_memory(pinned))
        found["link"] = middle(lambda: [kv.to(device) for kv in pinned])
    return found


def conditions(args: argparse.Namespace, bench: Bench, shape: Shape) -> dict[str, object]:
    """Everything needed to read the figures."""
    parameters = sum(p.numel() for p in bench.model.network.parameters())
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if bench.model.device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "dtype": args.dtype,
        "parameters": parameters,
        "shape": asdict(shape),
        "documents": len(bench.documents),
        "document_tokens": len(bench.documents[0]),
        "question_tokens": len(bench.question),
        "store_bytes": bench.num_bytes,
        "repeat": args.repeat,
        "full_repeat": args.full_repeat,
    }


def processor() -> str:
    """The CPU by its own name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "CPU")


def report(made: dict[str, object], found: dict[str, float]) -> str:
    """The figures as a table."""
    rows = [
        ("full prefill, transformers' generate", "full_prefill", None),
        ("prebuilt caches, files in the page cache", "cached_warm", "ratio_warm"),
        ("prebuilt caches, page cache dropped", "cached_cold", "ratio_cold"),
        ("  of which load and verify (warm)", "load_and_verify", None),
        ("prebuilt caches, on the device", "resident", "ratio_resident"),
        ("prebuilt caches, from pinned memory", "pinned", "ratio_pinned"),
        ("  of which the link alone", "link", None),
        ("  least: weights and rows read once", "least", None),
        ("floor: the question alone", "question_alone", "ratio_floor"),
        ("decode, per token, transformers' generate", "decode_ordinary", None),
        ("decode, per token, kvrag", "decode", "ratio_decode"),
    ]
    lines = [", ".join(f"{k}={v}" for k, v in made.items()), ""]
    for title, name, ratio in rows:
        if name not in found:
            continue
        times = f"{found[ratio]:6.1f}x" if ratio else ""
        lines.append(f"{title:<44}{found[name] * 1e3:>10.1f} ms  {times}")
    return "\n".join(lines)


def main() -> None:
    """Parse arguments, measure, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=SHAPES, default="0.5B", help="of the random model")
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512, help="per document")
    parser.add_argument("--question", type=int, default=32, help="tokens")
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--full-repeat", type=int, default=3, help="runs of the full prefill")
    parser.add_argument("--decode", type=int, default=24, help="tokens")
    parser.add_argument("--threads", type=int, default=0, help="0: PyTorch's default")
    parser.add_argument("--json", type=Path, help="write conditions and figures here")
    parser.add_argument("--smoke", action="store_true", help="a tiny shape, once")
    args = parser.parse_args()
    quiet()
    if args.threads:
        torch.set_num_threads(args.threads)
    shape = SMOKE if args.smoke else SHAPES[args.shape]
    if args.smoke:
        args.documents, args.tokens, args.repeat, args.full_repeat, args.decode = 2, 32, 2, 1, 4
    with tempfile.TemporaryDirectory(prefix="kvrag-ttft-") as folder:
        model = build(shape, getattr(torch, args.dtype), args.device)
        bench = Bench(model, Path(folder), args.documents, args.tokens, args.question)
        found = measure(bench, args.repeat, args.full_repeat, args.decode)
        made = conditions(args, bench, shape)
    print(report(made, found))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"conditions": made, "seconds_and_ratios": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
