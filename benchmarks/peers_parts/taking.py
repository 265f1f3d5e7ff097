"""The cases that are measured, all sides taking turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from peers_parts.asked import Pool, Request, Took
from peers_parts.llama import SHORTEST_RUN, Llama
from peers_parts.ours import Ours
from peers_parts.plain import Plain
from peers_parts.turborag import TurboRag
from store_parts.corpus import forget

Case = tuple[str, str]
"""Side and what it is asked to do."""


@dataclass
class Sides:
    """Everybody who answers.

    Attributes:
        pool: what can be asked for.
        folder: where files are that are read while the clock runs.
        plain: transformers.
        stored: those who have every document in files, by name.
        llama: if there is one.
        new_tokens: of an answer whose further tokens are timed.
        quick: how often a case of less than a second is taken in a round.
    """

    pool: Pool
    folder: Path
    plain: Plain
    stored: dict[str, Ours | TurboRag]
    llama: Llama | None
    new_tokens: int
    quick: int
    found: dict[Case, list[Took]] = field(default_factory=dict)

    def note(self, side: str, case: str, took: Took) -> None:
        """One more of a case."""
        self.found.setdefault((side, case), []).append(took)


def documents(sides: Sides, count: int, rounds: int) -> dict[str, dict[str, Any]]:
    """All cases with so many documents: medians by side and case.

    `full`: nothing is known; `same`: the same documents in the same order, another question; `half`: the
    first half of them, others behind; `moved`: the first one left out, another one at the end; `warm` and
    `cold`: any documents in any order, from files that are in the page cache or not.
    """
    sides.found.clear()
    for _ in range(rounds):
        base = sides.pool.draw(count)
        others = sides.pool.draw(count, besides=base)
        _plain(sides, base, others)
        for kind in sides.llama.kinds if sides.llama else ():
            _llama(sides, kind, base, others)
        for name, side in sides.stored.items():
            _stored(sides, name, side, count)
    made: dict[str, dict[str, Any]] = {}
    for (side, case), taken in sides.found.items():
        made.setdefault(side, {})[case] = summary(taken)
    return made


def summary(taken: list[Took]) -> dict[str, Any]:
    """Medians, and what others on the machine disturbed least."""
    found: dict[str, Any] = {"reused": median(took.reused for took in taken), "runs": len(taken)}
    for name in ("first", "first_busy", "each", "each_busy"):
        times = [time for took in taken if (time := getattr(took, name)) is not None]
        if times:
            found |= {name: median(times), f"{name}_best": min(times)}
    return found


def _plain(sides: Sides, base: tuple[int, ...], others: tuple[int, ...]) -> None:
    plain, pool = sides.plain, sides.pool
    plain.forget()
    sides.note("transformers", "full", plain.ask(pool.prompt(pool.ask(base)), sides.new_tokens))
    for _ in range(sides.quick):
        sides.note("transformers", "same", plain.ask(pool.prompt(pool.ask(base)), 1))
    sides.note("transformers", "half", plain.ask(pool.prompt(_half(pool, base, others)), 1))
    plain.forget()


def _half(pool: Pool, base: tuple[int, ...], others: tuple[int, ...]) -> Request:
    kept = len(base) // 2
    return pool.ask((*base[:kept], *others[kept:]))


def _llama(sides: Sides, kind: str, base: tuple[int, ...], others: tuple[int, ...]) -> None:
    llama, pool, name = sides.llama, sides.pool, f"llama.cpp {kind}"
    assert llama is not None
    llama.forget(kind)
    sides.note(name, "full", llama.ask(kind, pool.prompt(pool.ask(base)), sides.new_tokens))
    for _ in range(sides.quick):
        sides.note(name, "same", llama.ask(kind, pool.prompt(pool.ask(base)), 1))
    slid = pool.prompt(pool.ask((*base[1:], others[0])))
    file = sides.folder / f"{kind}.state"
    llama.save(kind, file, len(base) * pool.document_tokens)
    sides.note(name, "moved", llama.ask(kind, slid, 1, shortest_run=min(SHORTEST_RUN, pool.document_tokens)))
    for case in ("file, cold", "file") * sides.quick:
        if case == "file, cold":
            forget(sides.folder)
        sides.note(name, case, llama.ask_file(kind, file, pool.prompt(pool.ask(base)), 1))
    sides.note(name, "half", llama.ask(kind, pool.prompt(_half(pool, base, others)), 1))


def _stored(sides: Sides, name: str, side: Ours | TurboRag, count: int) -> None:
    pool = sides.pool
    for turn in range(sides.quick):
        new_tokens = sides.new_tokens if turn == 0 else 1
        forget(sides.folder)
        sides.note(name, "cold", side.ask(pool.ask(pool.draw(count)), 1))
        warmed = pool.draw(count)
        side.ask(pool.ask(warmed), 1)
        sides.note(name, "warm", side.ask(pool.ask(warmed), new_tokens))


def turn(sides: Sides, requests: list[Request], kinds: Sequence[str]) -> dict[str, dict[str, float]]:
    """Requests one after the other, every side keeping what it can: median, sum, share that was not read.

    Args:
        sides: all.
        requests: in order.
        kinds: of llama.cpp's weights that take part.
    """
    sides.plain.forget()
    for kind in kinds:
        if sides.llama:
            sides.llama.forget(kind)
    taken: dict[str, list[Took]] = {}
    for request in requests:
        for name, ask in _asking(sides, kinds):
            taken.setdefault(name, []).append(ask(request))
    tokens = sum(len(request.documents) for request in requests) * sides.pool.document_tokens
    sides.plain.forget()
    return {
        name: {
            "median": median(took.first for took in answers),
            "median_busy": median(took.first_busy for took in answers),
            "total": sum(took.first for took in answers),
            "total_busy": sum(took.first_busy for took in answers),
            "reused": sum(took.reused for took in answers) / tokens,
        }
        for name, answers in taken.items()
    }


def _asking(sides: Sides, kinds: Sequence[str]) -> Iterator[tuple[str, Callable[[Request], Took]]]:
    prompt, llama = sides.pool.prompt, sides.llama
    yield "transformers", lambda request: sides.plain.ask(prompt(request), 1)
    for kind in kinds if llama else ():

        def ask(request: Request, kind: str = kind) -> Took:
            assert llama is not None
            took = llama.ask(kind, prompt(request), 1)
            llama.keep(kind)  # its server does so while the clock runs
            return took

        yield f"llama.cpp {kind}", ask
    for name, side in sides.stored.items():
        yield name, lambda request, side=side: side.ask(request, 1)  # type: ignore[misc]
