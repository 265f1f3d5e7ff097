"""Time to first token through the frameworks, against the bare engine and the frameworks' own local models.

    python benchmarks/frameworks.py                          # against the bare engine
    python benchmarks/frameworks.py --peer peer/bin/python   # and against langchain-huggingface
    python benchmarks/frameworks.py --llama-index-peer peer/bin/python   # and llama-index-llms-huggingface
    python benchmarks/frameworks.py --smoke                  # seconds, for continuous integration

All sides get the same random-weight model, documents and questions, and take turns, question by question.
What is timed is an answer of one token, which is the same on every side whether or not it streams. Questions
are new every time; documents are in the store.

The peers want other versions of what this environment has; so each runs in an environment of its own, as a
process that takes its turns:

    python -m venv peer && peer/bin/pip install langchain-huggingface transformers torch
    python -m venv peer && peer/bin/pip install llama-index-llms-huggingface torch
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from langchain_core.messages import HumanMessage, SystemMessage
from llama_index.core.llms import ChatMessage
from transformers import AutoModelForCausalLM, LlamaConfig

from kvrag import Engine, Sampling
from kvrag.ingested import known_of
from kvrag.model import quiet
from kvrag.testing.models import VOCAB_SIZE, tiny_tokenizer
from langchain_kvrag import ChatKVCache, KVCacheLLM
from llama_index.llms.kvrag import KVCacheLLM as LlamaIndexLLM


@dataclass(frozen=True, slots=True)
class Setting:
    """What is measured: a Llama shape, documents, questions."""

    layers: int = 8
    hidden: int = 512
    inner: int = 1408
    heads: int = 8
    kv_heads: int = 2
    documents: int = 4
    document_tokens: int = 512
    turns: int = 21


SMOKE = Setting(layers=2, hidden=64, inner=96, heads=4, documents=2, document_tokens=64, turns=2)
VERSIONS = ("torch", "transformers", "langchain-core", "llama-index-core")
PEERS = {
    "langchain-huggingface": "peer_langchain.py",
    "llama-index-llms-huggingface": "peer_llamaindex.py",
}
INSTRUCTION = "Answer from the documents.\n\n"


def save_model(setting: Setting, folder: Path) -> None:
    """A random-weight model on disk, so that every side loads the same."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=setting.hidden,
        intermediate_size=setting.inner,
        num_hidden_layers=setting.layers,
        num_attention_heads=setting.heads,
        num_key_value_heads=setting.kv_heads,
        max_position_embeddings=8192,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def documents_of(setting: Setting) -> list[str]:
    """Texts of about so many tokens: letters are tokens of their own here."""
    letters = "bcdfghjklmnpqrsvwxyz"
    return [
        "".join(letters[(n * 7 + i * i) % 20] for i in range(setting.document_tokens))
        for n in range(setting.documents)
    ]


class Sides:
    """The ways to ask that are compared; each takes a question and gives seconds to its first token."""

    def __init__(self, engine: Engine, documents: list[str]) -> None:
        self.engine, self.documents = engine, documents
        known_of(engine).add(documents)
        self.chat = ChatKVCache(engine=engine, max_tokens=1)
        self.text = KVCacheLLM(engine=engine, max_tokens=1)
        self.llama = LlamaIndexLLM(engine=engine, max_tokens=1)
        self.chunks = {str(n): text for n, text in enumerate(documents)}
        self.prefix = engine.model.text.opening

    def messages(self, question: str) -> list[dict[str, str]]:
        """What is said."""
        context = INSTRUCTION + "\n\n".join(self.documents)
        return [{"role": "system", "content": context}, {"role": "user", "content": question}]

    def prompt(self, question: str) -> str:
        """The same as the template writes it."""
        return self.engine.render(self.messages(question))

    def bare(self, question: str) -> None:
        """The engine as adapters use it: rendering is its own work and counts for every side."""
        sampling = Sampling(max_new_tokens=1)
        stream = self.engine.stream_rendered(
            self.prompt(question), self.chunks, prefix=self.prefix, sampling=sampling
        )
        for _ in stream:
            pass

    def _langchain(self, question: str) -> list[Any]:
        said = self.messages(question)
        return [SystemMessage(said[0]["content"]), HumanMessage(said[1]["content"])]

    def chat_invoke(self, question: str) -> None:
        """The chat model."""
        self.chat.invoke(self._langchain(question))

    def chat_stream(self, question: str) -> None:
        """The chat model's first piece."""
        next(self.chat.stream(self._langchain(question)))

    def chat_async(self, question: str) -> None:
        """The chat model in an event loop."""
        self.loop.run_until_complete(self.chat.ainvoke(self._langchain(question)))

    def text_invoke(self, question: str) -> None:
        """The text model."""
        self.text.invoke(self.prompt(question))

    def _llama_index(self, question: str) -> list[ChatMessage]:
        return [ChatMessage(**said) for said in self.messages(question)]

    def llama_chat(self, question: str) -> None:
        """LlamaIndex's model."""
        self.llama.chat(self._llama_index(question))

    def llama_stream(self, question: str) -> None:
        """Its first piece."""
        next(self.llama.stream_chat(self._llama_index(question)))

    def llama_async(self, question: str) -> None:
        """It in an event loop."""
        self.loop.run_until_complete(self.llama.achat(self._llama_index(question)))

    def llama_text(self, question: str) -> None:
        """It with a text that is formatted already."""
        self.llama.complete(self.prompt(question), formatted=True)

    @contextmanager
    def all(self) -> Iterator[dict[str, Callable[[str], None]]]:
        """Ways by name."""
        self.loop = asyncio.new_event_loop()
        yield {
            "engine": self.bare,
            "ChatKVCache.invoke": self.chat_invoke,
            "ChatKVCache.stream": self.chat_stream,
            "ChatKVCache.ainvoke": self.chat_async,
            "KVCacheLLM.invoke": self.text_invoke,
            "LlamaIndex KVCacheLLM.chat": self.llama_chat,
            "LlamaIndex KVCacheLLM.stream_chat": self.llama_stream,
            "LlamaIndex KVCacheLLM.achat": self.llama_async,
            "LlamaIndex KVCacheLLM.complete": self.llama_text,
        }
        self.loop.close()


class Peer:
    """Another integration in its own process."""

    def __init__(self, name: str, python: str, folder: Path, threads: int) -> None:
        self.name = name
        script = Path(__file__).parent / "frameworks_parts" / PEERS[name]
        command = [python, str(script), str(folder), str(threads)]
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.versions = self._read()

    def ask(self, prompt: str, messages: list[dict[str, str]]) -> dict[str, float]:
        """Seconds by side."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompt": prompt, "messages": messages}) + "\n")
        self._process.stdin.flush()
        return {f"{self.name} {way}": s for way, s in self._read().items()}

    def _read(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        self._process.communicate("")


def measure(setting: Setting, pythons: dict[str, str], threads: int) -> dict[str, Any]:
    """Run all sides in turns."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        save_model(setting, folder)
        peers = [Peer(name, python, folder, threads) for name, python in pythons.items()]
        with Engine.from_pretrained(folder, store=Path(place) / "store", device="cpu") as engine:
            sides = Sides(engine, documents_of(setting))
            with sides.all() as ways:
                seconds, busy = run(setting, sides, ways, peers)
        for peer in peers:
            peer.close()
    return summary(setting, seconds, busy, threads, {peer.name: peer.versions for peer in peers})


Seconds = dict[str, list[float]]
"""By side, turn by turn."""


def run(
    setting: Setting, sides: Sides, ways: dict[str, Callable[[str], None]], peers: list[Peer]
) -> tuple[Seconds, Seconds]:
    """Seconds on the clock and of the processor (all threads, which says more on a busy machine).

    The first two turns fill the store and warm up, and do not count.
    """
    seconds: Seconds = {}
    busy: Seconds = {}
    names = list(ways)
    for turn in range(-2, setting.turns):
        question = f"What does document {turn} say?"
        taken: dict[str, float] = {}
        used: dict[str, float] = {}
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start, start_busy = time.perf_counter(), time.process_time()
            ways[name](question)
            taken[name], used[name] = time.perf_counter() - start, time.process_time() - start_busy
        for peer in peers:
            taken |= peer.ask(sides.prompt(question), sides.messages(question))
        if turn >= 0:
            _note(seconds, taken)
            _note(busy, used)
    return seconds, busy


def _note(seconds: Seconds, taken: dict[str, float]) -> None:
    for name, value in taken.items():
        seconds.setdefault(name, []).append(value)


def above(seconds: Seconds) -> dict[str, float]:
    """Each side's median difference from the engine in the same turn, in milliseconds."""
    own = seconds["engine"]
    return {
        name: 1000 * median(v - o for v, o in zip(values, own, strict=True))
        for name, values in seconds.items()
        if name != "engine"
    }


def summary(
    setting: Setting, seconds: Seconds, busy: Seconds, threads: int, others: dict[str, Any]
) -> dict[str, Any]:
    """Medians, and what each side takes above the engine."""
    return {
        "setting": asdict(setting),
        "conditions": {
            "cpu": cpu_name(),
            "threads": threads,
            "load": os.getloadavg()[0],
            "versions": {
                n: version(n) for n in ("torch", "transformers", "langchain-core", "llama-index-core")
            },
            "peer_versions": others,
        },
        "median_seconds": {name: median(values) for name, values in seconds.items()},
        "overhead_ms": above(seconds),
        "cpu_overhead_ms": above(busy),
    }


def cpu_name() -> str:
    """Of this machine's processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    """Measure, print, and keep the result where it is asked to."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--smoke", action="store_true", help="seconds, and nothing is kept")
    parser.add_argument("--peer", help="Python of an environment with langchain-huggingface")
    parser.add_argument("--llama-index-peer", help="Python of one with llama-index-llms-huggingface")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="where to keep the result as JSON, under frameworks")
    args = parser.parse_args()
    quiet()
    torch.set_num_threads(args.threads)
    given = {"langchain-huggingface": args.peer, "llama-index-llms-huggingface": args.llama_index_peer}
    pythons = {name: python for name, python in given.items() if python}
    result = measure(SMOKE if args.smoke else Setting(), pythons, args.threads)
    print(json.dumps(result, indent=2))
    if args.out and not args.smoke:
        before = json.loads(args.out.read_text()) if args.out.exists() else {}
        args.out.write_text(json.dumps({**before, "frameworks": result}, indent=2) + "\n")


if __name__ == "__main__":
    main()
