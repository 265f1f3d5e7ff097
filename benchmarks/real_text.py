"""Real text: how far composed caches are from full attention, and whether the hit rate stays flat.

Agreement: MuSiQue questions over their own contexts and Natural Questions over their passage among others,
the data's answer read token by token behind the prompt; KL divergence and top-1 agreement with an ordinary
forward pass at each of its tokens. The shipped reader knows no real language and a random model none at all:
with them this checks mechanics only (100 % of rows read again must agree), and says nothing about quality.

Hit rate: every question asks for its passage and for others that were never asked for together with it, in
random order, through the real store on disk, which is closed and opened again after every 200 questions. The
model is tiny and random, since nothing here depends on what it knows.

    python benchmarks/real_text.py                          # the shipped reader
    python benchmarks/real_text.py --model FOLDER           # any model at hand
    python benchmarks/real_text.py --random-llama           # a random 0.5B-class shape, as in ttft.py
    python benchmarks/real_text.py --smoke                  # seconds; made-up text where there is no data
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
import transformers
from quality_parts.asking import Stock
from quality_parts.contexts import Form
from ttft import SMOKE, Shape, build

from kvrag.attention import Looking
from kvrag.caches import Caches
from kvrag.compose import compose
from kvrag.encoding import encode
from kvrag.focus import policy as presets
from kvrag.focus.policy import Policy
from kvrag.looking import look
from kvrag.model import READER, Model, quiet
from kvrag.prefill import read
from kvrag.store.disk import DiskStore

ROOT = Path(__file__).parent.parent
MUSIQUE, NQ = "musique_100.jsonl.gz", "nq_open_oracle_2000.jsonl.gz"
EVERY = 200


@dataclass(frozen=True, slots=True)
class Task:
    """A question over documents.

    Attributes:
        data: where it is from.
        documents: texts in the order of the data, or the question's own passage anywhere among others.
        question: as text.
        answer: the data's first one.
    """

    data: str
    documents: tuple[str, ...]
    question: str
    answer: str


def lines(file: Path) -> list[dict[str, Any]]:
    """Records of a file."""
    with gzip.open(file, "rt") as opened:
        return [json.loads(line) for line in opened]


def made_up(num: int) -> list[dict[str, Any]]:
    """Records in the form of Natural Questions, where the data is not there."""
    rng = random.Random(0)
    words = ["river", "stone", "lamp", "north", "harbour", "seven", "quiet", "wheel", "garden", "letter"]
    return [
        {
            "question": f"what is number {i}",
            "answers": [rng.choice(words)],
            "text": " ".join([f"Number {i}.", *rng.choices(words, k=30)]),
        }
        for i in range(num)
    ]


def tasks(folder: Path, num: int, num_documents: int, *, smoke: bool) -> list[Task]:
    """As many questions from each file, their documents drawn with a fixed seed."""
    rng, found = random.Random(1), []
    if (folder / MUSIQUE).exists():
        for record in rng.sample(lines(folder / MUSIQUE), num):
            texts = [context["text"] for context in record["ctxs"]][:num_documents]
            found.append(Task("MuSiQue", tuple(texts), record["question"], record["answers"][0]))
    records = passages(folder, smoke=smoke)
    for record in rng.sample(records, min(num, len(records))):
        texts = [record["text"], *(r["text"] for r in rng.sample(records, num_documents - 1))]
        rng.shuffle(texts)
        found.append(Task("Natural Questions", tuple(texts), record["question"], record["answers"][0]))
    return found


def passages(folder: Path, *, smoke: bool) -> list[dict[str, Any]]:
    """Natural Questions with their passages.

    Raises:
        SystemExit: they are not there, and this is no smoke run.
    """
    if (folder / NQ).exists():
        return lines(folder / NQ)
    if smoke:
        return made_up(60)
    raise SystemExit(f"{folder / NQ} is not there; say where with --data")


def policies() -> dict[str, Policy]:
    """What is compared with full attention."""
    repaired = presets.query_driven()
    return {
        "plain": presets.PLAIN,
        "cachefocus": presets.cachefocus(),
        "query-driven repair, 15 %": repaired,
        "cachefocus, query-driven repair, 15 %": presets.cachefocus(repair=repaired.repair),
        "all rows read again (check)": presets.query_driven(1.0),
    }


def agreement(model: Model, asked: Sequence[Task], num_tokens: int) -> list[dict[str, Any]]:
    """KL and top-1 agreement of each policy with full attention, by data set.

    Args:
        model: the decoder.
        asked: questions.
        num_tokens: documents are cut after so many tokens, so that all of them fit.
    """
    form, stock = Form(model), Stock(model)
    (prefix,) = encode(model, [form.prefix])
    found: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    for task in asked:
        units = [model.text.tokenize(text)[:num_tokens] for text in task.documents]
        plan, right = form.plan(units, task.question), form.answer(task.answer)
        arrangement = compose(plan, prefix, encode(model, units, prefix))
        full = _full(stock, plan.tokens, right)
        for name, policy in policies().items():
            ours, seconds = _composed(model, arrangement, policy, right)
            p, q = full.log_softmax(-1), ours.log_softmax(-1)
            kl = float((p.exp() * (p - q)).sum(-1).mean())
            top = float((full.argmax(-1) == ours.argmax(-1)).float().mean())
            found.setdefault((task.data, name), []).append((kl, top, seconds))
    return [
        {
            "data": data,
            "policy": name,
            "questions": len(values),
            "kl": max(0.0, round(fmean(v[0] for v in values), 5)),  # rounding can make it negative
            "top1": round(fmean(v[1] for v in values), 4),
            "median_ms": round(1e3 * median(v[2] for v in values), 2),
        }
        for (data, name), values in found.items()
    ]


@torch.inference_mode()
def _full(stock: Stock, prompt: Sequence[int], right: Sequence[int]) -> torch.Tensor:
    """[A, V]: what an ordinary forward pass says at each token of the answer."""
    ids = torch.tensor([[*prompt, *right[:-1]]], device=stock.device)
    logits: torch.Tensor = stock.network(ids, use_cache=False, logits_to_keep=len(right)).logits[0]
    return logits.float()


def _composed(
    model: Model, arrangement: Any, policy: Policy, right: Sequence[int]
) -> tuple[torch.Tensor, float]:
    """The same from composed caches, and the seconds to the first of them."""
    start = time.perf_counter()
    looked = look(model, arrangement, policy, max_new_tokens=len(right))
    seconds, logits = time.perf_counter() - start, [looked.read.logits[-1:]]
    if len(right) > 1:
        end, rows = looked.composed.end, looked.fresh
        behind = read(
            model,
            looked.tables.seen_from(rows.num_rows),
            right[:-1],
            range(end, end + len(right) - 1),
            rows,
            looking=Looking(policy.group) if policy.group else None,
            logits_to_keep=0,
        )
        logits.append(behind.logits)
    return torch.cat(logits).float(), seconds


def hit_rate(
    folder: Path, records: Sequence[dict[str, Any]], num_documents: int, num_tokens: int
) -> list[dict[str, Any]]:
    """Hits over time: per `EVERY` questions, uses of documents, first uses, and hits of all others.

    Args:
        folder: of the store.
        records: questions with their passages; asked in random order.
        num_documents: of each question, its own passage among others in random order.
        num_tokens: passages are cut after so many tokens.
    """
    rng, model = random.Random(2), build(SMOKE, torch.float32, "cpu")
    prefix = Form(model).prefix
    texts = [model.text.tokenize(record["text"])[:num_tokens] for record in records]
    order, used, found = rng.sample(range(len(texts)), len(texts)), set(), []
    for first in range(0, len(order), EVERY):
        store = DiskStore(folder)  # opened anew: nothing is left but what lies on disk
        caches = Caches(model, store)
        uses = first_uses = hits = 0
        start = time.perf_counter()
        for number in order[first : first + EVERY]:
            others = rng.sample([i for i in order if i != number], num_documents - 1)
            wanted = [texts[i] for i in rng.sample([number, *others], num_documents)]
            for tokens, loaded in zip(wanted, caches.documents(prefix, wanted), strict=True):
                uses += 1
                first_uses += tokens not in used
                hits += loaded.is_hit and tokens in used
            used.update(wanted)
        store.close()
        found.append(
            {
                "questions": min(first + EVERY, len(order)),
                "uses": uses,
                "first_uses": first_uses,
                "hits": hits,
                "hit_rate": round(hits / uses, 4),
                "after_first_use": round(hits / (uses - first_uses), 4) if uses > first_uses else None,
                "seconds": round(time.perf_counter() - start, 2),
            }
        )
    return found


def knows(args: argparse.Namespace) -> str:
    """What the agreement says about quality."""
    if args.random_llama:
        return "random weights: a mechanical check only"
    if args.model == READER:
        return "the shipped reader knows no real language: a mechanical check only"
    return "whatever the model given knows"


def printed(data: dict[str, Any]) -> str:
    """The figures as tables."""
    rows = [", ".join(f"{k}={v}" for k, v in data["conditions"].items()), ""]
    rows += [f"{'policy':<40}{'data':<20}{'KL':>10}{'top-1':>8}{'ms':>9}"]
    rows += [
        f"{r['policy']:<40}{r['data']:<20}{r['kl']:>10.4f}{r['top1']:>8.1%}{r['median_ms']:>9.1f}"
        for r in data["agreement"]
    ]
    rows += ["", f"{'questions':>9}{'uses':>8}{'first':>8}{'hits':>8}{'hit rate':>10}{'after first use':>18}"]
    for r in data["hit_rate"]:
        later = "" if r["after_first_use"] is None else f"{r['after_first_use']:.2%}"
        rows.append(
            f"{r['questions']:>9}{r['uses']:>8}{r['first_uses']:>8}{r['hits']:>8}{r['hit_rate']:>10.1%}{later:>18}"
        )
    return "\n".join(rows)


def main() -> None:
    """Measure both, print, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--model", default=READER)
    parser.add_argument("--random-llama", action="store_true", help="random weights instead of --model")
    parser.add_argument("--device")
    parser.add_argument("--questions", type=int, default=20, help="of each data set, for agreement")
    parser.add_argument("--documents", type=int, default=5, help="of each question")
    parser.add_argument("--tokens", type=int, default=256, help="documents are cut after so many")
    parser.add_argument("--store-tokens", type=int, default=128, help="the same for the hit rate")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=ROOT / "docs" / "data" / "real_text.json")
    parser.add_argument("--smoke", action="store_true", help="few questions, nothing is kept")
    args = parser.parse_args()
    quiet()
    torch.set_num_threads(args.threads)
    records = passages(args.data, smoke=args.smoke)
    if args.smoke:
        args.questions, args.documents, args.tokens, args.json = 2, 3, 64, None
        records = records[:60]
    # At 24 layers the published 0.5B shape takes minutes on a CPU; a third of them shows the same.
    shape = replace(Shape(), layers=8)
    model = (
        build(shape, torch.float32, "cpu")
        if args.random_llama
        else Model.load(args.model, device=args.device)
    )
    asked = tasks(args.data, args.questions, args.documents, smoke=args.smoke)
    with tempfile.TemporaryDirectory(prefix="kvrag-real-text-") as folder:
        data = {
            "conditions": conditions(args, model, len(records)),
            "agreement": agreement(model, asked, args.tokens),
            "hit_rate": hit_rate(Path(folder), records, args.documents, args.store_tokens),
        }
    print(printed(data))
    if any(row["after_first_use"] not in (None, 1) for row in data["hit_rate"]):
        raise SystemExit("a document was not found after its first use")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(data, indent=1) + "\n")


def conditions(args: argparse.Namespace, model: Model, num_records: int) -> dict[str, Any]:
    """Everything needed to read the figures."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "model": model.name,
        "says": knows(args),
        "parameters": sum(p.numel() for p in model.network.parameters()),
        "documents": args.documents,
        "document_tokens": args.tokens,
        "agreement_at": "each token of the data's answer, end mark included, mean over questions",
        "hit_rate_questions": num_records,
        "hit_rate_document_tokens": args.store_tokens,
        "store_opened_anew_every": EVERY,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


if __name__ == "__main__":
    main()
