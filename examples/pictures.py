"""Draws the pictures of the README and the documentation, from an answer of the shipped reader and docs/data.

python examples/pictures.py [FOLDER]
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import matplotlib
from matplotlib import pyplot
from matplotlib.axes import Axes

from kvrag import Corpus, Engine, Index, ask, plots
from kvrag.focus import Placement, Policy, Pruning
from kvrag.model import quiet
from kvrag.plots.drawing import BLUE, GREY, VERMILION
from kvrag.rag import Reply, policy_of
from kvrag.reader.collection import documents

DOCS = Path(__file__).parent.parent / "docs"
QUESTION = "What is the main office of Jeix Tools?"
MOVING = Policy(name="moving", placement=Placement(order="sort"), pruning=Pruning(keep=2, start=1))


def answers() -> dict[str, Reply]:
    """The same question under three policies."""
    best = policy_of("cachefocus", keep=2, layers=(1,), rows="last", spans=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        engine = Engine.from_pretrained(store=Path(folder) / "caches")
        with engine, Corpus(Index.open(Path(folder) / "chroma"), engine.store, engine.encoder()) as corpus:
            texts = documents(num=40)
            corpus.add([d.text for d in texts], metadatas=[{"source": d.title} for d in texts])
            policies = {"plain": None, "best": best, "moving": MOVING}
            return {
                name: ask(engine, corpus, QUESTION, k=6, policy=policy).reply()
                for name, policy in policies.items()
            }


def first_token(axes: Axes) -> None:
    """What docs/data/ttft-float32.json says, as bars."""
    data = json.loads((DOCS / "data" / "ttft-float32.json").read_text())
    seconds, made = data["seconds_and_ratios"], data["conditions"]
    rows = (
        ("the question alone", seconds["question_alone"], GREY),
        ("from caches on disk", seconds["cached_cold"], BLUE),
        ("full prefill", seconds["full_prefill"], VERMILION),
    )
    bars = axes.barh([row[0] for row in rows], [row[1] for row in rows], 0.6, color=[row[2] for row in rows])
    axes.bar_label(bars, [f"{row[1]:.2f} s" for row in rows], padding=4)
    axes.set_xlim(0, 1.2 * seconds["full_prefill"])
    axes.set_xlabel("time to first token (s)")
    axes.set_title(
        f"{made['documents']} documents of {made['document_tokens']} tokens, "
        f"{made['parameters'] / 1e9:.2f}B parameters, {made['threads']} CPU cores",
        fontsize="medium",
    )
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """See above."""
    quiet()
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS / "img"
    # Letters stay letters, and the same figures give the same file.
    matplotlib.use("svg")
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "kvrag"}):
        draw(answers(), folder)


def draw(found: dict[str, Reply], folder: Path) -> None:
    """Write every picture into a folder."""
    _, (left, right) = pyplot.subplots(1, 2, figsize=(12, 3.4), layout="constrained", width_ratios=(5, 7))
    first_token(left)
    plots.answer(found["best"], axes=right)
    right.set_title(f"{QUESTION} “{found['best'].text}”", fontsize="medium")
    pictures = {
        "result": left,
        "segments": plots.segments(found["plain"]),
        "moving": plots.segments(found["moving"]),
        "masses": plots.masses(found["plain"], measure="focus"),
        "pruned": plots.masses(found["best"]),
        "answer": plots.answer(found["best"]),
    }
    for name, axes in pictures.items():
        axes.figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    pyplot.close("all")


if __name__ == "__main__":
    main()
