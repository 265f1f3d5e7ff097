"""What `import langchain_kvrag` offers, and what it loads."""

from __future__ import annotations

import json
import subprocess
import sys

import langchain_kvrag


def test_the_public_names() -> None:
    assert langchain_kvrag.__all__ == [
        "AnswerTimeout",
        "ChatKVCache",
        "ContextOverflowed",
        "KVCacheCompressor",
        "KVCacheLLM",
        "KVCacheMiddleware",
        "KVCacheRetriever",
        "KVChroma",
        "KVDocStore",
        "LexicalEmbeddings",
        "attach",
        "relevance",
    ]
    assert sorted(langchain_kvrag.__all__) == langchain_kvrag.__all__
    for name in langchain_kvrag.__all__:
        assert getattr(langchain_kvrag, name) is not None


def test_core_is_enough_for_the_models() -> None:
    code = """
import json, sys
for name in ("langchain", "langchain_chroma", "langchain_classic", "langgraph"):
    sys.modules[name] = None
from langchain_kvrag import ChatKVCache, KVCacheCompressor, KVCacheLLM, KVCacheRetriever, KVDocStore
failures = []
for name in ("KVChroma", "attach", "KVCacheMiddleware"):
    try:
        getattr(__import__("langchain_kvrag"), name)
    except ImportError as error:
        failures.append(str(error))
print(json.dumps(failures))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    chroma, _, agents = json.loads(done.stdout)
    assert chroma == "langchain-chroma is not installed; run: pip install 'kvrag[langchain]'"
    assert agents == "langchain is not installed; run: pip install 'kvrag[langchain-agents]'"
