# SPDX-License-Identifier: Apache-2.0
"""`vtc autotune`: the cheapest method within an allowed loss."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import output
from .options import Import, WideTable, budgets, fail, listed
from .progress import bar, kept, observer, stopped


def autotune(
    model: Annotated[
        str | None,
        typer.Option(help="Folder or hub id. Default: the model that comes with vtc."),
    ] = None,
    methods: Annotated[str, typer.Option(help="Candidate methods, comma-separated.")] = (
        "todre,divprune,visionzip,fastv"
    ),
    keep: Annotated[str, typer.Option(help="Budgets for each method.")] = "0.5,0.25,0.1",
    tasks: Annotated[
        str, typer.Option(help="Tasks of vtc or lmms-eval; the loss is the mean over them.")
    ] = "vtc_scenes",
    loss: Annotated[float, typer.Option(help="Allowed loss of accuracy, in points.")] = 1.0,
    start: Annotated[int, typer.Option(help="Samples per task in the first round.")] = 32,
    most: Annotated[int, typer.Option(help="Samples per task in the last round.")] = 512,
    confidence: Annotated[
        float, typer.Option(help="Confidence for dropping a candidate and for a winner.")
    ] = 0.95,
    out: Annotated[
        Path, typer.Option(help="Folder for results; finished cells are reused.")
    ] = Path("results"),
    batch_size: Annotated[int, typer.Option(help="Batch size of lmms-eval's model class.")] = 1,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of sampling methods and generated tasks.")] = 0,
    imports: Import = [],  # noqa: B006
    wide: WideTable = False,
) -> None:
    """Find the cheapest method and keep within an allowed loss against the full model.

    Writes autotune.json. Exit code 1 if a candidate failed, 2 if an argument is invalid.
    """
    from vtc.eval.harness import autotune as tuner
    from vtc.eval.harness.run import BadInput, Settings

    if not 0 <= loss < 100:
        raise fail("--loss", f"expected points in [0, 100), got {loss:g}")
    keeps, names = budgets(keep), listed("--methods", methods)
    settings = Settings(
        out=out, model=model, methods=names, keeps=keeps, tasks=listed("--tasks", tasks),
        batch_size=batch_size, device=device, seed=seed, imports=tuple(imports),
    )  # fmt: skip
    try:
        with bar() as progress:
            found = tuner.autotune(
                settings, loss / 100, start, most, confidence, observer(progress)
            )
    except BadInput as error:
        raise fail(error.option, error.message) from None
    except RuntimeError as error:  # the full model failed, so nothing can be compared
        raise fail("vtc autotune", str(error)) from None
    except KeyboardInterrupt:
        stopped(kept(out))
    console = output(wide)
    console.print(tuner.table(found, None if wide else console.width))
    console.print(f"\n{out}: autotune.json", soft_wrap=True)
    if found["failed"]:
        raise typer.Exit(1)
