"""The other side of benchmarks/frameworks.py: langchain-huggingface, in an environment of its own.

Knows nothing of kvrag. Reads one JSON object a line, {"prompt": ..., "messages": ...}, and answers each with
seconds to an answer of one token; "messages" may be null.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from typing import Any

import torch
from langchain_huggingface import ChatHuggingFace, HuggingFacePipeline
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline


def load(folder: str) -> Any:
    """The pipeline, as the integration's own documentation makes it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    made = pipeline("text-generation", model=model, tokenizer=tokenizer, max_new_tokens=1, do_sample=False)
    return HuggingFacePipeline(pipeline=made)


def main() -> None:
    """Answer until the other side closes."""
    torch.set_num_threads(int(sys.argv[2]))
    text = load(sys.argv[1])
    chat = ChatHuggingFace(llm=text)
    versions = {n: version(n) for n in ("langchain-huggingface", "langchain-core", "transformers", "torch")}
    print(json.dumps(versions), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        start = time.perf_counter()
        text.invoke(asked["prompt"])
        middle = time.perf_counter()
        chat.invoke([(m["role"], m["content"]) for m in asked["messages"]])
        end = time.perf_counter()
        print(json.dumps({"text": middle - start, "chat": end - middle}), flush=True)


if __name__ == "__main__":
    main()
