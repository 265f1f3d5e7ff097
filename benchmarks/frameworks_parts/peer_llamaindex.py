"""The other side of benchmarks/frameworks.py: llama-index-llms-huggingface, in an environment of its own.

Knows nothing of kvrag. Reads one JSON object a line, {"prompt": ..., "messages": ...}, and answers each with
seconds to an answer of one token.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from typing import Any

import torch
from llama_index.core.llms import ChatMessage
from llama_index.llms.huggingface import HuggingFaceLLM


def load(folder: str) -> Any:
    """The model, as the integration's own documentation makes it."""
    return HuggingFaceLLM(
        model_name=folder,
        tokenizer_name=folder,
        context_window=8192,
        max_new_tokens=1,
        generate_kwargs={"do_sample": False},
        device_map="cpu",
        model_kwargs={"dtype": torch.float32},
    )


def main() -> None:
    """Answer until the other side closes."""
    torch.set_num_threads(int(sys.argv[2]))
    llm = load(sys.argv[1])
    names = ("llama-index-llms-huggingface", "llama-index-core", "transformers", "torch")
    print(json.dumps({n: version(n) for n in names}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        start = time.perf_counter()
        llm.complete(asked["prompt"], formatted=True)
        middle = time.perf_counter()
        llm.chat([ChatMessage(role=m["role"], content=m["content"]) for m in asked["messages"]])
        end = time.perf_counter()
        print(json.dumps({"text": middle - start, "chat": end - middle}), flush=True)


if __name__ == "__main__":
    main()
