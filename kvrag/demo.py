"""The demo: a made-up collection is ingested, questions are asked, and both ways of answering are timed."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from kvrag.baseline import OrdinaryAnswer, ordinary_answer
from kvrag.config import Sampling
from kvrag.corpus import Corpus
from kvrag.documents import Document
from kvrag.engine import Engine
from kvrag.home import Home, ingest
from kvrag.model import READER
from kvrag.prompt import RagPrompt
from kvrag.rag import Asked, Reply, ask
from kvrag.reader.collection import DemoQuestion
from kvrag.reader.collection import documents as demo_documents
from kvrag.reader.collection import questions as demo_questions
from kvrag.terminal import count, loading, progress_bar, stderr

_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Row:
    """One question, answered both ways.

    Attributes:
        question: what was asked.
        kind: of question.
        expected: the right answer.
        cached: the answer from prebuilt caches.
        ordinary: the answer after full prefill by transformers' generate.
        cached_ttft: seconds to the first token from caches, planning and loading included.
        ordinary_ttft: the same after full prefill.
        prompt_tokens: length of the prompt.
        read_tokens: prompt tokens that were read in the cached run.
    """

    question: str
    kind: str
    expected: str
    cached: str
    ordinary: str
    cached_ttft: float
    ordinary_ttft: float
    prompt_tokens: int
    read_tokens: int

    @property
    def agree(self) -> bool:
        """Both ways gave the same text."""
        return self.cached == self.ordinary


def run(
    *,
    model: str | None,
    num_documents: int,
    num_questions: int,
    k: int,
    by_paragraph: bool,
    folder: Path | None,
    device: str | None,
    dtype: str,
    as_json: bool,
) -> list[Row]:
    """Run the demo and print what happens.

    Args:
        model: folder or hub name; None: the shipped reader.
        num_documents: size of the collection.
        num_questions: how many to ask.
        k: chunks retrieved for each.
        by_paragraph: cut documents at paragraphs; the second one never says whom it is about.
        folder: keep collection and caches here; None: a temporary folder.
        device: where to compute.
        dtype: element type.
        as_json: print one JSON object instead of text.
    """
    out = Console(highlight=False, quiet=as_json, markup=False, emoji=False)
    with _folder(folder) as path:
        home = Home(path)
        with loading(model or READER):
            engine = Engine.from_pretrained(model or READER, store=home.store(), device=device, dtype=dtype)
        with engine:
            out.print(_conditions(engine))
            _ingest(home, engine, num_documents, out, by_paragraph=by_paragraph)
            questions = demo_questions(num=num_questions, num_documents=num_documents)
            with home.corpus(engine) as corpus:
                rows = list(_ask_all(engine, corpus, home.form(engine), questions, k, out))
    if as_json:
        sys.stdout.write(
            json.dumps({"rows": [asdict(r) for r in rows], **summary(rows)}, ensure_ascii=False) + "\n"
        )
    else:
        out.print(_table(rows))
        for line in _conclusion(rows, is_reader=engine.model.name == READER):
            out.print(line)
    return rows


@contextmanager
def _folder(folder: Path | None) -> Iterator[Path]:
    if folder is not None:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="kvrag-demo-", ignore_cleanup_errors=True) as made:
        yield Path(made)


def _conditions(engine: Engine) -> str:
    model = engine.model
    parameters = sum(p.numel() for p in model.network.parameters())
    threads = f", {count(torch.get_num_threads(), 'thread')}" if model.device.type == "cpu" else ""
    dtype = str(model.dtype).removeprefix("torch.")
    return f"{model.name}: {parameters / 1e6:.1f}M parameters, {dtype}, {model.device}{threads}"


def _ingest(home: Home, engine: Engine, num_documents: int, out: Console, *, by_paragraph: bool) -> None:
    texts = [Document(d.text, d.title) for d in demo_documents(num=num_documents)]
    with progress_bar("reading documents once") as progress:
        report = ingest(home, engine, texts, by_paragraph=by_paragraph, progress=progress)
    stats = home.store().stats()
    out.print(
        f"{len(texts)} documents in {len(report.ids)} chunks; {report.added} read now, "
        f"{report.skipped} were there; {stats.num_bytes / 2**20:.1f} MiB of caches\n"
    )


def _ask_all(
    engine: Engine, corpus: Corpus, form: RagPrompt, questions: list[DemoQuestion], k: int, out: Console
) -> Iterator[Row]:
    sampling = Sampling(max_new_tokens=64)

    def both_ways(question: DemoQuestion, *, is_shown: bool) -> Row:
        asked = ask(engine, corpus, question.question, k=k, form=form, sampling=sampling)
        reply = _show(question, asked, out) if is_shown else asked.reply()
        with stderr().status("the same with full prefill") if is_shown else nullcontext():
            ordinary = engine.call(lambda: ordinary_answer(engine.model, reply.answer.plan.tokens, sampling))
        return _row(question, reply, ordinary)

    with stderr().status("warming up"):
        _warm_up(engine, corpus, form, k)
    for question in questions[:_SHOWN]:
        yield both_ways(question, is_shown=True)
    with progress_bar("asking the others") as progress:
        for number, question in enumerate(questions[_SHOWN:]):
            progress(number, len(questions) - _SHOWN)
            yield both_ways(question, is_shown=False)


def _show(question: DemoQuestion, asked: Asked, out: Console) -> Reply:
    """An answer as it is written, and what it rests on."""
    out.print(question.question, style="bold")
    for piece in asked:
        out.print(piece, end="", soft_wrap=True)
    reply = asked.reply()
    _print_sources(reply, out)
    return reply


def _warm_up(engine: Engine, corpus: Corpus, form: RagPrompt, k: int) -> None:
    """Both ways once, untimed: the first forward pass of a process pays for memory and threads."""
    prompt = (
        ask(engine, corpus, "?", k=k, form=form, sampling=Sampling(max_new_tokens=2))
        .reply()
        .answer.plan.tokens
    )
    engine.call(lambda: ordinary_answer(engine.model, prompt, Sampling(max_new_tokens=2)))
    if engine.store is not None:
        engine.store.close()  # forget the mappings, so that the timed loads begin at the files


def _row(question: DemoQuestion, reply: Reply, ordinary: OrdinaryAnswer) -> Row:
    return Row(
        question.question,
        question.kind,
        question.answer,
        reply.text,
        ordinary.text.strip(),
        reply.answer.timing.first_token,
        ordinary.first_token,
        reply.answer.usage.prompt_tokens,
        reply.answer.usage.read_tokens,
    )


def _print_sources(reply: Reply, out: Console) -> None:
    out.print()
    for source in reply.sources[:3]:
        line = f"   {source.focus:4.0%}  {source.name}: {' '.join(source.text.split())}"
        out.print(line, no_wrap=True, overflow="ellipsis")
    out.print()


def summary(rows: list[Row]) -> dict[str, float]:
    """Medians and shares over all questions."""
    return {
        "ttft_cached_ms": median(r.cached_ttft for r in rows) * 1e3,
        "ttft_ordinary_ms": median(r.ordinary_ttft for r in rows) * 1e3,
        "ttft_ratio": median(r.ordinary_ttft / r.cached_ttft for r in rows),
        "agree": sum(r.agree for r in rows) / len(rows),
        "right_cached": sum(r.cached == r.expected for r in rows) / len(rows),
        "right_ordinary": sum(r.ordinary == r.expected for r in rows) / len(rows),
    }


def _table(rows: list[Row]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", expand=True)
    table.add_column("question", overflow="ellipsis", no_wrap=True, ratio=1)
    for name, width in (("tokens", 6), ("read", 4), ("full", 8), ("cached", 8), ("ratio", 6)):
        table.add_column(name, justify="right", no_wrap=True, min_width=width)
    table.add_column("agree", no_wrap=True, min_width=5)
    for r in rows:
        table.add_row(
            r.question,
            str(r.prompt_tokens),
            str(r.read_tokens),
            f"{r.ordinary_ttft * 1e3:.0f} ms",
            f"{r.cached_ttft * 1e3:.0f} ms",
            f"{r.ordinary_ttft / r.cached_ttft:.1f}x",
            "yes" if r.agree else "no",
        )
    return table


def _conclusion(rows: list[Row], *, is_reader: bool) -> list[str]:
    found = summary(rows)
    lines = [
        "",
        "time to first token, median",
        f"  {found['ttft_ordinary_ms']:8.1f} ms with full prefill (transformers' generate)",
        f"  {found['ttft_cached_ms']:8.1f} ms from prebuilt caches: {found['ttft_ratio']:.1f}x",
        f"same answer both ways: {found['agree']:.0%} of {len(rows)} questions",
    ]
    if is_reader:  # the expected answers are in its words; another model would put them differently
        lines += [
            f"right: {found['right_ordinary']:.0%} with full prefill, "
            f"{found['right_cached']:.0%} from caches",
            "A model this small is mostly fixed costs; the README has the ratio for one of 0.4B parameters.",
        ]
    return lines
