"""The other side of benchmarks/peers.py: llama.cpp by its C interface, in an environment of its own.

Knows nothing of kvrag. Arguments: a folder with a transformers model, one for files, threads, tokens of a
context, kinds of weights. Reads a JSON object a line, {"do": ..., "kind": ..., ...}, and answers with one.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as api
import numpy as np
import peer_gguf

Time = tuple[float, float]


def now() -> Time:
    """Seconds on the wall and on the processor, of all threads."""
    return time.perf_counter(), time.process_time()


def common(a: Sequence[int], b: Sequence[int], a_from: int = 0, b_from: int = 0) -> int:
    """How far two lists are alike from a place of each on."""
    length = min(len(a) - a_from, len(b) - b_from)
    return next((i for i in range(length) if a[a_from + i] != b[b_from + i]), length)


class Slot:
    """A model with one kind of weights, a context of one sequence, and earlier prompts' states in memory.

    What a prompt has in common with what lies in the context, or in one of the states, is not read again;
    so does llama.cpp's server with one slot and `--cache-ram`. Everything that is not said is the default.
    """

    def __init__(self, path: Path, threads: int, num_tokens: int) -> None:
        """Load a file."""
        model = api.llama_model_load_from_file(str(path).encode(), api.llama_model_default_params())
        settings = api.llama_context_default_params()
        settings.n_ctx, settings.n_batch = num_tokens, min(2048, num_tokens)
        settings.n_threads = settings.n_threads_batch = threads
        self._context = api.llama_init_from_model(model, settings)
        if not self._context:
            raise SystemExit(f"llama.cpp cannot make a context of {num_tokens} tokens for {path}")
        self._memory = api.llama_get_memory(self._context)
        self._vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
        self._batch = settings.n_batch
        self.num_bytes = api.llama_model_size(model)
        self._tokens: list[int] = []
        self._kept: list[tuple[list[int], Any, int]] = []

    def forget(self) -> None:
        """As after a start."""
        api.llama_memory_clear(self._memory, True)
        self._tokens = []
        self._kept.clear()

    def ask(self, tokens: list[int], new_tokens: int, shortest_run: int) -> dict[str, Any]:
        """Answer with what is there.

        Args:
            tokens: the prompt.
            new_tokens: greedy.
            shortest_run: tokens that are moved when they stand elsewhere (`--cache-reuse`); 0: none are.
        """
        start = now()
        reused = self._beginning(tokens)
        if shortest_run:
            reused = self._moved(tokens, reused, shortest_run)
        return self._answer(tokens, reused, new_tokens, start)

    def _beginning(self, tokens: list[int]) -> int:
        """Have the longest known beginning in the context; its length."""
        found = common(self._tokens, tokens)
        lengths = [common(held, tokens) for held, _, _ in self._kept]
        if max(lengths, default=0) > found:
            found = max(lengths)
            self._tokens, state, size = self._kept[lengths.index(found)]
            if api.llama_state_seq_set_data(self._context, state, size, 0) != size:
                raise SystemExit("llama.cpp does not take its state back")
        return found

    def _moved(self, tokens: list[int], at: int, shortest: int) -> int:
        """Move runs to where the prompt has them, as llama.cpp's server does; tokens that are there then."""
        held = at
        while held < len(self._tokens) and at < len(tokens):
            length = common(self._tokens, tokens, held, at)
            if length < shortest:
                held += 1
                continue
            api.llama_memory_seq_rm(self._memory, 0, at, held)
            api.llama_memory_seq_add(self._memory, 0, held, held + length, at - held)
            at, held = at + length, held + length
        return at

    def _answer(self, tokens: list[int], reused: int, new_tokens: int, start: Time) -> dict[str, Any]:
        reused = min(reused, len(tokens) - 1)  # one token has to be read for its logits
        api.llama_memory_seq_rm(self._memory, 0, reused, -1)
        for at in range(reused, len(tokens), self._batch):
            self._read(tokens[at : at + self._batch])
        chosen = int(self.logits().argmax())
        first, answer = now(), [chosen]
        for _ in range(new_tokens - 1):
            self._read(answer[-1:])
            answer.append(int(self.logits().argmax()))
        last, more = now(), new_tokens - 1
        self._tokens = tokens + answer[:-1]
        return {
            "first": first[0] - start[0],
            "first_busy": first[1] - start[1],
            "each": (last[0] - first[0]) / more if more else None,
            "each_busy": (last[1] - first[1]) / more if more else None,
            "reused": reused,
            "token": chosen,
        }

    def _read(self, tokens: list[int]) -> None:
        given = (api.llama_token * len(tokens))(*tokens)
        failed = api.llama_decode(self._context, api.llama_batch_get_one(given, len(tokens)))
        if failed:
            raise SystemExit(f"llama_decode: {failed}")

    def logits(self) -> np.ndarray[Any, Any]:
        """Of the last token."""
        pointer = api.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(pointer, shape=(self._vocabulary,))

    def keep(self) -> dict[str, Any]:
        """Hold the state of what is in the context, for other prompts that begin alike."""
        size = api.llama_state_seq_get_size(self._context, 0)
        state = (ctypes.c_uint8 * size)()
        api.llama_state_seq_get_data(self._context, state, size, 0)
        self._kept.append((list(self._tokens), state, size))
        return {"bytes": size}

    def save(self, path: str, num_tokens: int) -> dict[str, Any]:
        """Write the state of the first tokens into a file."""
        api.llama_memory_seq_rm(self._memory, 0, num_tokens, -1)
        self._tokens = self._tokens[:num_tokens]
        given = (api.llama_token * num_tokens)(*self._tokens)
        size = api.llama_state_seq_save_file(self._context, path.encode(), 0, given, num_tokens)
        return {"bytes": size}

    def ask_file(self, path: str, tokens: list[int], new_tokens: int) -> dict[str, Any]:
        """Answer from a file of `save`, with nothing in the context."""
        self.forget()
        held, count = (api.llama_token * len(tokens))(), ctypes.c_size_t()
        start = now()
        size = api.llama_state_seq_load_file(
            self._context, path.encode(), 0, held, len(tokens), ctypes.byref(count)
        )
        if not size:
            raise SystemExit(f"llama.cpp does not load {path}")
        self._tokens = list(held[: count.value])
        return self._answer(tokens, common(self._tokens, tokens), new_tokens, start)


def serve(slots: dict[str, Slot], asked: dict[str, Any]) -> dict[str, Any]:
    """Do one thing."""
    slot, what = slots[asked.pop("kind")], asked.pop("do")
    if what == "logits":
        slot.ask(asked["tokens"], 1, 0)
        np.save(asked["path"], slot.logits())
        return {}
    done: dict[str, Any] | None = getattr(slot, what)(**asked)
    return done or {}


def main() -> None:
    """Answer until the other side closes."""
    model, folder, threads, num_tokens, *kinds = sys.argv[1:]
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print goes elsewhere
    api.llama_backend_init()
    files = peer_gguf.write(Path(model), Path(folder), kinds)
    slots = {kind: Slot(path, int(threads), int(num_tokens)) for kind, path in files.items()}
    told = {
        "versions": {name: version(name) for name in ("llama-cpp-python", "gguf")},
        "system": api.llama_print_system_info().decode().strip(),
        "weights": {kind: slot.num_bytes for kind, slot in slots.items()},
    }
    print(json.dumps(told), file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(serve(slots, json.loads(line))), file=out, flush=True)


if __name__ == "__main__":
    main()
