"""Measures the reader: `python -m kvrag.reader.evaluate`, by full prefill, on names never trained on.

An answer is right if greedy decoding gives exactly its tokens and then the end. That is checked without
decoding: the most likely token at every place of the right answer has to be the right one.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerFast

from kvrag.reader import chats, path, prose, questions, rows
from kvrag.reader.questions import Question, Span
from kvrag.reader.tokenizer import BLANK_LINE, SYSTEM_CHAT, SYSTEM_DOCUMENTS, Encoder
from kvrag.reader.world import Mix, World

SEED = 20_000
DISTANCES = (1, 5, 10, 20)
HAY_SENTENCES = (20, 80, 300)


def main() -> None:
    """Evaluate from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=path(), help="of the model")
    parser.add_argument("--contexts", type=int, default=150, help="contexts per number of documents")
    parser.add_argument("--documents", type=int, nargs="*", default=[1, 2, 5, 10])
    parser.add_argument("--chats", type=int, default=150, help="chats per cell")
    parser.add_argument("--seed", type=int, default=SEED, help="another one to choose between readers by")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    reader = Reader(arguments.folder)
    began = time.time()
    seed, cells = arguments.seed, []
    for num in arguments.documents:
        cells += document_cells(reader, num, arguments.contexts, seed)
    if arguments.chats:
        cells += chat_cells(reader, arguments.chats, seed)
        cells += passkey_cells(reader, arguments.chats, seed)
    report = {"conditions": conditions(seed, time.time() - began), "cells": cells}
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    for cell in cells:
        share = cell["right"] / cell["asked"]
        print(f"{cell['task']:<26} {cell['right']:>4} of {cell['asked']:>4} = {share:.3f}", end="")
        print(f", {cell['tokens']} tokens of context")


def conditions(seed: int, seconds: float) -> dict[str, Any]:
    """What the numbers were measured with."""
    return {
        "method": "full prefill, greedy, exact match of all answer tokens; names held out of training",
        "seed": seed,
        "mix": "kvrag.reader.world.Mix(), documents of about 100 to 300 tokens",
        "dtype": "float32",
        "machine": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "seconds": round(seconds),
    }


class Reader:
    """The model in `folder`, asked question after question about one context."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model.train(mode=False)
        self.encoder = Encoder(self.tokenizer)

    @torch.inference_mode()
    def read(self, row: rows.Row) -> tuple[DynamicCache, int]:
        """Prefill a conversation's beginning; gives its cache and length."""
        cache = DynamicCache()
        self.model(torch.tensor([row.ids]), past_key_values=cache, logits_to_keep=1)
        return cache, len(row.ids)

    @torch.inference_mode()
    def is_right(self, context: tuple[DynamicCache, int], question: Question) -> bool:
        """Whether greedy decoding would give the answer; leaves the context as it was."""
        cache, _ = context
        row = rows.Row(self.encoder)
        row.turn(question.text, question.spans)
        output = self.model(torch.tensor([row.ids]), past_key_values=cache)
        cache.crop(-len(row.ids))
        first = row.ids.index(self.encoder.special["<|assistant|>"])
        predicted = output.logits[0, first:-1].argmax(-1).tolist()
        return bool(predicted == row.ids[first + 1 :])


class Tally:
    """Counts right answers per task."""

    def __init__(self, **common: Any) -> None:
        self.common = common
        self.counts: dict[str, list[int]] = {}

    def add(self, task: str, num_tokens: int, *, right: bool) -> None:
        """Count one answer, given after `num_tokens` tokens."""
        count = self.counts.setdefault(task, [0, 0, 0])
        count[0] += right
        count[1] += 1
        count[2] += num_tokens

    def cells(self) -> Iterator[dict[str, Any]]:
        """One row of the report per task; `tokens` is the mean length of the contexts."""
        for task, (right, asked, tokens) in self.counts.items():
            yield {"task": task, **self.common, "right": right, "asked": asked, "tokens": tokens // asked}


def document_cells(reader: Reader, num: int, num_contexts: int, seed: int = SEED) -> list[dict[str, Any]]:
    """One question of every kind that each context offers."""
    world = World(seed + num, held_out=True, mix=Mix())
    tally = Tally(documents=num)
    for _ in range(num_contexts):
        documents = world.documents(num)
        row = rows.Row(reader.encoder)
        row.system(rows.system_text(documents))
        context = reader.read(row)
        for kind, offered in questions.every_kind(world, documents).items():
            if offered:
                tally.add(f"{kind}, {num} documents", context[1], right=reader.is_right(context, offered[0]))
    return sorted(tally.cells(), key=lambda cell: questions.KINDS.index(cell["task"].split(",")[0]))


def chat_cells(reader: Reader, num_chats: int, seed: int = SEED) -> list[dict[str, Any]]:
    """Facts told, or told and corrected, some turns ago; the user's own facts; what was never told."""
    world = World(seed, held_out=True)
    tally = Tally()
    for distance in DISTANCES:
        for kind in ("told", "corrected"):
            for _ in range(num_chats):
                chat = chats.distant(world, distance, kind=kind)
                _ask_last(reader, tally, chat, f"{kind} {distance} turns ago")
    extra: tuple[tuple[str, Callable[[chats.Chat], Any]], ...] = (
        ("mine", _tell_and_ask_mine),
        ("never told", chats.Chat.ask_unknown),
    )
    for task, add in extra:
        for _ in range(num_chats):
            chat = chats.distant(world, 8)
            add(chat)
            _ask_last(reader, tally, chat, f"{task}, in a chat")
    return list(tally.cells())


def _tell_and_ask_mine(chat: chats.Chat) -> None:
    chat.tell_mine()
    told = chat.told[-1][0]
    for _ in range(4):
        chat.talk()
    chat.ask(next(i for i, (fact, _) in enumerate(chat.told) if fact is told))


def _ask_last(reader: Reader, tally: Tally, chat: chats.Chat, task: str) -> None:
    row = rows.Row(reader.encoder)
    row.system(SYSTEM_CHAT)
    for turn in chat.turns[:-1]:
        row.turn(turn.user, [Span(turn.assistant)])
    question = chat.turns[-1].question
    assert question is not None
    tally.add(task, len(row.ids), right=reader.is_right(reader.read(row), question))


def passkey_cells(reader: Reader, num: int, seed: int = SEED) -> list[dict[str, Any]]:
    """A passkey in documents of hay."""
    world = World(seed, held_out=True)
    tally = Tally()
    for num_sentences in HAY_SENTENCES:
        for _ in range(num):
            key, texts = prose.hay_documents(world.rng, num_sentences)
            row = rows.Row(reader.encoder)
            row.system(BLANK_LINE.join((SYSTEM_DOCUMENTS, *texts)))
            question = chats.passkey_question(key)
            right = reader.is_right(reader.read(row), question)
            tally.add(f"passkey, {num_sentences} sentences", len(row.ids), right=right)
    return list(tally.cells())


def mean_exact(cells: Sequence[dict[str, Any]]) -> float:
    """Share of right answers over all cells, each counting the same."""
    return float(sum(cell["right"] / cell["asked"] for cell in cells) / len(cells))


if __name__ == "__main__":
    main()
