"""A chat of a million tokens through one session: does its memory stay as large, and its time per token?

Messages of a few hundred tokens (facts, small talk, hay) and short answers, turn after turn; resident memory
and time of every hundredth of the way. Ends after `--minutes` at the latest and says how far it came.

    python benchmarks/soak.py --json docs/data/soak.json
    python benchmarks/soak.py --smoke                # seconds, for continuous integration; writes nothing
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
import transformers
from memory_parts.streams import Writer
from tqdm import tqdm

from kvrag import Engine, Sampling
from kvrag.model import READER, quiet
from kvrag.reader import chats
from kvrag.reader.chats import Chat
from kvrag.reader.tokenizer import Encoder
from kvrag.reader.world import World

PARTS = 100


def resident() -> int:
    """Bytes of this process that are in main memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def message(seed: int, encoder: Encoder, length: int) -> str:
    """What a user says: statements and talk of about so many tokens, a question at the end."""
    chat, writer = Chat(World(seed, held_out=True)), Writer(encoder)
    while len(writer) < length:
        num = len(chat.turns)
        chats.small_turn(chat)
        for turn in chat.turns[num:]:
            writer.add(turn)
    if chat.told:
        chat.ask()
    said = [turn.user for turn in chat.turns]
    return " ".join(said)


def soak(args: argparse.Namespace) -> dict[str, Any]:
    """Talk, and note memory and time."""
    points: list[dict[str, Any]] = []
    with Engine.from_pretrained(READER) as engine:
        encoder = Encoder(engine.model.text.tokenizer)
        session = engine.session(args.memory, budget=args.budget, stride=args.stride, keeps_log=False)
        began, turns, said = time.monotonic(), 0, 0
        # Messages are made beforehand, so that only the session's own time is counted.
        texts = [message(seed, encoder, args.message) for seed in range(64)]
        bar = tqdm(total=args.tokens, unit="token", disable=args.smoke)
        marks = [args.tokens * (i + 1) // PARTS for i in range(PARTS)]
        mark = _Mark(said)
        while said < args.tokens and time.monotonic() - began < 60 * args.minutes:
            answer = session.send(texts[turns % len(texts)], sampling=Sampling(max_new_tokens=args.answer))
            assert answer.memory is not None
            turns += 1
            bar.update(answer.memory.said - said)
            said = answer.memory.said
            if said >= marks[len(points)]:
                points.append(mark.point(said))
                mark = _Mark(said)
            if len(points) == PARTS:
                break
        bar.close()
        return {
            "conditions": _conditions(args) | {"bytes": session.num_bytes},
            "tokens": said,
            "turns": turns,
            "minutes": round((time.monotonic() - began) / 60, 2),
            "points": points,
            **verdict(points),
        }


class _Mark:
    """Where a part of the way began."""

    def __init__(self, said: int) -> None:
        self.said, self.wall, self.processor = said, time.monotonic(), time.process_time()

    def point(self, said: int) -> dict[str, Any]:
        num = said - self.said
        return {
            "tokens": said,
            "resident": resident(),
            "wall_us_per_token": round(1e6 * (time.monotonic() - self.wall) / num, 2),
            "cpu_us_per_token": round(1e6 * (time.process_time() - self.processor) / num, 2),
        }


def verdict(points: list[dict[str, Any]]) -> dict[str, Any]:
    """The last tenth against the second one."""
    tenth = len(points) // 10
    if not tenth:
        return {}
    second, last = points[tenth : 2 * tenth], points[-tenth:]
    memory = fmean(p["resident"] for p in last) / fmean(p["resident"] for p in second) - 1
    cpu = median(p["cpu_us_per_token"] for p in last) / median(p["cpu_us_per_token"] for p in second) - 1
    return {
        "memory_growth": round(memory, 5),
        "cpu_growth": round(cpu, 4),
        "memory_is_flat": abs(memory) < 0.01,
    }


def _conditions(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "date": time.strftime("%Y-%m-%d"),
        "model": READER,
        "memory": args.memory,
        "budget": args.budget,
        "stride": args.stride,
        "message": args.message,
        "answer": args.answer,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def main() -> None:
    """Talk, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--memory", default="cascade")
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--stride", type=int, default=128)
    parser.add_argument("--message", type=int, default=400, help="tokens of what the user says, about")
    parser.add_argument("--answer", type=int, default=12, help="most tokens of an answer")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    quiet()
    torch.set_num_threads(args.threads)
    if args.smoke:
        args.tokens, args.message, args.budget, args.stride, args.json = 2000, 60, 96, 32, None
    found = soak(args)
    print({name: value for name, value in found.items() if name != "points"})
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
