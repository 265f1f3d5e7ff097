"""kvrag doctor, demo: what a model can do, and a tour of it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from kvrag.cli.opening import store_folder
from kvrag.config import home
from kvrag.options import DeviceOption, DtypeOption, HomeOption, JsonOption, ModelOption
from kvrag.terminal import loading, print_json, progress_bar, stdout


def doctor(
    model: Annotated[
        str, typer.Argument(help="Folder or hub name of a model.", metavar="MODEL")
    ] = "kvrag/reader",
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    questions: Annotated[
        int, typer.Option(help="Questions to compare policies on.", min=1, metavar="NUMBER")
    ] = 8,
    max_kl: Annotated[
        float, typer.Option(help="What a codec may lose, in nats.", min=0.0, metavar="NATS")
    ] = 0.01,
    folder: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Prove that a model's caches can be re-positioned, measure what each policy loses, and recommend one.

    The proof is exact; the measurements are small: sample documents against full attention. For a model of
    billions of weights on a CPU, ask fewer questions. The disk is measured where caches lie, or would.

    Example: kvrag doctor Qwen/Qwen2.5-0.5B-Instruct
    """
    from kvrag import doctor as clinic  # noqa: PLC0415
    from kvrag.engine import Engine  # noqa: PLC0415
    from kvrag.model import quiet  # noqa: PLC0415

    quiet()
    with store_folder(folder or home()) as store:
        with loading(model):
            engine = Engine.from_pretrained(model, store=store, device=device, dtype=dtype)
        with engine, progress_bar("examining") as progress:
            report = clinic.examine(engine, questions=questions, max_kl=max_kl, progress=progress)
    if as_json:
        print_json(asdict(report))
    else:
        stdout().print(clinic.describe(report))
    if not report.is_exact:
        raise typer.Exit(1)


def demo(
    model: ModelOption = None,
    documents: Annotated[
        int, typer.Option(help="Documents in the collection.", min=1, metavar="NUMBER")
    ] = 40,
    questions: Annotated[int, typer.Option(help="Questions to ask.", min=1, metavar="NUMBER")] = 20,
    k: Annotated[
        int, typer.Option("-k", help="Chunks to retrieve for each question.", min=1, metavar="NUMBER")
    ] = 8,
    by_paragraph: Annotated[
        bool, typer.Option("--by-paragraph", help="Cut documents; their second part names nobody.")
    ] = False,
    folder: Annotated[
        Path | None, typer.Option("--home", help="Keep collection and caches here.", metavar="FOLDER")
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Ingest a made-up collection, ask about it, and compare with ordinary full prefill.

    Example: kvrag demo --model Qwen/Qwen2.5-7B-Instruct
    """
    from kvrag import demo as show  # noqa: PLC0415
    from kvrag.model import quiet  # noqa: PLC0415

    quiet()
    show.run(
        model=model,
        num_documents=documents,
        num_questions=questions,
        k=k,
        by_paragraph=by_paragraph,
        folder=folder,
        device=device,
        dtype=dtype,
        as_json=as_json,
    )
