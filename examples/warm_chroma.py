"""Gives a Chroma collection that is full already its caches, and asks a question from them.

    python examples/warm_chroma.py chroma/ notes --model Qwen/Qwen2.5-1.5B-Instruct --ask "Who leads it?"
    python examples/warm_chroma.py http://localhost:8000 notes

The collection stays as it is: nothing is written into it. It can be interrupted and run again, and goes on
where it was. A collection that was made with an embedding function of your own needs it here as well:
`Index.open(..., embedding=...)`. `kvrag warm` does the same on the command line.
"""

from __future__ import annotations

import argparse

from tqdm import tqdm

from kvrag import Corpus, Engine, Index, InputError, KVRagError, ask
from kvrag.model import READER, quiet


def warm(corpus: Corpus) -> None:
    """Read what has no cache yet, the longest documents first: they save most."""
    with tqdm(desc="reading documents", unit=" tokens", disable=None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        report = corpus.warm(only_missing=True, order=lambda _, num_tokens: -num_tokens, progress=show)
    print(f"{report.records} documents: {report.built} read now, {report.known} were there")
    for name in report.unencodable:
        print(f"{name} is empty, or too long for this model: cut it into chunks")


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("chroma", help="folder of a Chroma database, or address of a server")
    parser.add_argument("collection")
    parser.add_argument(
        "--model", default=READER, help="any decoder with rotary positions, by name or folder"
    )
    parser.add_argument("--store", default="caches", help="folder of the caches")
    parser.add_argument("--budget", type=int, metavar="BYTES", help="most bytes of all caches")
    parser.add_argument("--ask", metavar="QUESTION", help="answer this from the caches")
    arguments = parser.parse_args()

    quiet()
    if not Index.exists(arguments.chroma, arguments.collection):
        raise InputError(f"there is no collection {arguments.collection!r} in {arguments.chroma}")
    engine = Engine.from_pretrained(arguments.model, store=arguments.store, budget_bytes=arguments.budget)
    index = Index.open(arguments.chroma, arguments.collection)
    with engine, Corpus(index, engine.store, engine.encoder()) as corpus:
        warm(corpus)
        if arguments.ask is not None:
            reply = ask(engine, corpus, arguments.ask).reply()
            usage = reply.answer.usage
            print(f"{reply.text}\n{usage.cached_tokens} of {usage.prompt_tokens} tokens came from caches")


if __name__ == "__main__":
    try:
        main()
    except KVRagError as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        pass
