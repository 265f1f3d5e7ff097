"""kvrag ask: a question, its answer, and what the answer rests on."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from kvrag.cli.opening import load_engine, open_home
from kvrag.config import Sampling
from kvrag.errors import InputError
from kvrag.options import (
    ChromaOption,
    CollectionOption,
    DeviceOption,
    DtypeOption,
    HomeOption,
    JsonOption,
    LongestOption,
    ModelOption,
    SeedOption,
    TemperatureOption,
    TenantOption,
    check_layers,
    parse_keep,
    parse_layers,
)
from kvrag.terminal import print_json, print_reply, print_trace, stdout

# Written out, since help must not wait for torch; a test compares them with what there is.
POLICIES = "plain, cachefocus, naive, pcw, ape, epic, cacheblend, query-driven"


def ask(
    question: Annotated[str, typer.Argument(help="The question.", show_default=False, metavar="QUESTION")],
    k: Annotated[int, typer.Option("-k", help="Chunks to retrieve.", min=1, metavar="NUMBER")] = 4,
    model: ModelOption = None,
    folder: HomeOption = None,
    chroma: ChromaOption = None,
    collection: CollectionOption = "kvrag",
    tenant: TenantOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    max_new_tokens: LongestOption = 256,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = None,
    policy: Annotated[
        str, typer.Option(help=f"What is done with the documents: {POLICIES}.", metavar="POLICY")
    ] = "plain",
    keep: Annotated[
        str | None,
        typer.Option(help="Prune until so many documents are left: 4, or 0.5 for half.", metavar="NUMBER"),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(help="Prune by these layers' attention; kvrag doctor names them.", metavar="1,2,..."),
    ] = None,
    rows: Annotated[
        Literal["question", "last"],
        typer.Option(help="Prune by the attention of the whole question, or of its last row."),
    ] = "question",
    nearness: Annotated[
        float | None,
        typer.Option(
            help="Prune by the search's similarity, too; 4 is a good choice.", metavar="POWER", min=0
        ),
    ] = None,
    repair: Annotated[
        float | None,
        typer.Option(help="Share of the documents' rows to read again, 0 to 1.", metavar="SHARE"),
    ] = None,
    max_risk: Annotated[
        float | None,
        typer.Option(help="Read the documents in full if the risk is above this, 0 to 1.", metavar="RISK"),
    ] = None,
    spans: Annotated[bool, typer.Option("--spans", help="Quote what was looked at most.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Show which parts of the prompt were read.")] = False,
    trace: Annotated[
        bool, typer.Option("--trace", help="Show where each document's rows came from, and why.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Answer a question from the ingested documents.

    Example: kvrag ask "Where does Jane Doe live?" -k 6 --policy cachefocus
    """
    from kvrag.explain import explain  # noqa: PLC0415
    from kvrag.rag import ask as stream  # noqa: PLC0415
    from kvrag.rag import policy_of  # noqa: PLC0415

    if not question.strip():
        raise InputError("the question is empty")
    pruned_by = parse_layers(layers)
    chosen = policy_of(
        policy,
        keep=parse_keep(keep),
        layers=pruned_by,
        rows=rows,
        nearness=nearness,
        repair=repair,
        max_risk=max_risk,
        spans=spans,
    )
    place = open_home(folder, chroma, collection, tenant)
    place.must_exist()
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    out = stdout()
    with load_engine(place, model, device, dtype) as engine, place.corpus(engine) as corpus:
        check_layers(pruned_by, engine.model.num_layers)
        form = place.form(engine)
        asked = stream(engine, corpus, question, k=k, form=form, sampling=sampling, policy=chosen)
        for piece in asked:
            if not as_json:
                out.print(piece, end="")
        reply = asked.reply()
    if as_json:
        print_json(reply.as_dict())
        return
    out.print("\n")
    print_reply(reply)
    if plan:
        out.print(explain(reply.answer.plan, fits=out.width if out.is_terminal else None))
    if trace:
        print_trace(reply)
