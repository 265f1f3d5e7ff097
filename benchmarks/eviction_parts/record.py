"""Records a trace: real questions, searched for in a real Chroma collection of real documents.

Who asks what when is made up, from a seed: sessions of a few questions whose popularity falls by Zipf's law.
In the order "steady" it stays as it is; in "drifting" a tenth of the ranks is dealt anew nine times.
"""

from __future__ import annotations

import gzip
import json
import random
import tempfile
from bisect import bisect
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import chromadb
from eviction_parts.trace import Trace
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from kvrag.index import Index

NQ, MUSIQUE = "nq_open_oracle_2000.jsonl.gz", "musique_100.jsonl.gz"
SEED = 4
QUESTIONS = 12_000
_EXPONENT = 0.8
_MEAN_SESSION = 4
_AGAIN = 0.25
_PHASES = 10
_VOCABULARY = 16_384


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Records of a compressed JSON Lines file."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def questions_and_documents(data: Path) -> tuple[list[str], list[str]]:
    """All questions, and every document once, in the order of the files."""
    questions, documents = [], []
    for line in read_lines(data / NQ):
        questions.append(line["question"])
        documents.append(f"{line['title']}\n{line['text']}")
    for line in read_lines(data / MUSIQUE):
        questions.append(line["question"])
        documents += [f"{c['title']}\n{c['text']}" for c in line["ctxs"]]
    return questions, list(dict.fromkeys(documents))


def token_counts(documents: Sequence[str]) -> list[int]:
    """Lengths under a byte-level BPE that is trained on the documents themselves."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=_VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(documents, trainer)
    return [len(encoding.ids) for encoding in tokenizer.encode_batch(list(documents))]


def retrieve(questions: Sequence[str], documents: Sequence[str], k: int) -> list[list[int]]:
    """Numbers of the nearest documents of each question."""
    with tempfile.TemporaryDirectory() as folder:
        index = Index.open(folder)
        try:
            ids = [str(number) for number in range(len(documents))]
            for start in range(0, len(ids), 1000):
                batch = slice(start, start + 1000)
                index.add(ids[batch], documents[batch], [{}] * len(ids[batch]))
            return [[int(hit.id) for hit in index.search(question, k)] for question in questions]
        finally:
            index.close()


def asked(num_questions: int, length: int, *, phases: int, seed: int) -> list[int]:
    """Question numbers in the order in which they are asked."""
    chance = random.Random(seed)
    ranked = list(range(num_questions))
    chance.shuffle(ranked)
    weights = list(accumulate(1 / (rank + 1) ** _EXPONENT for rank in range(num_questions)))
    order: list[int] = []
    session: list[int] = []
    for number in range(length):
        if phases > 1 and number and number % (length // phases) == 0:
            _deal_anew(ranked, chance)
        if session and chance.random() < 1 / _MEAN_SESSION:
            session = []
        if session and chance.random() < _AGAIN:
            question = chance.choice(session)
        else:
            question = ranked[bisect(weights, chance.random() * weights[-1])]
        session.append(question)
        order.append(question)
    return order


def _deal_anew(ranked: list[int], chance: random.Random) -> None:
    """Shuffle a tenth of the ranks among themselves, the popular ones as likely as others."""
    places = chance.sample(range(len(ranked)), len(ranked) // 10) + list(range(0, 100, 5))
    places = list(dict.fromkeys(places))
    moved = [ranked[place] for place in places]
    chance.shuffle(moved)
    for place, question in zip(places, moved, strict=True):
        ranked[place] = question


def record(data: Path, *, k: int = 5) -> Trace:
    """Search for every question once; its documents do not depend on who asks when."""
    questions, documents = questions_and_documents(data)
    made = {
        "data": f"{NQ}, {MUSIQUE}: questions, and documents with their titles",
        "search": f"chromadb {chromadb.__version__}, kvrag's lexical embedding, {k} documents a question",
        "tokens": f"byte-level BPE of {_VOCABULARY} pieces trained on the documents",
        "orders": f"Zipf {_EXPONENT}, sessions of {_MEAN_SESSION} on average, in which every "
        f"{round(1 / _AGAIN)}th question comes again, seed {SEED}; drifting: a tenth of the ranks and every "
        f"fifth of the first hundred are dealt anew {_PHASES - 1} times",
    }
    orders = {
        "steady": asked(len(questions), QUESTIONS, phases=1, seed=SEED),
        "drifting": asked(len(questions), QUESTIONS, phases=_PHASES, seed=SEED + 1),
    }
    return Trace(made, token_counts(documents), retrieve(questions, documents, k), orders)
