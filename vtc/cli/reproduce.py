# SPDX-License-Identifier: Apache-2.0
"""`vtc reproduce`: rerun published tables."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import error_console, output
from .options import fail, fail_of
from .progress import bar, kept, observer, stopped


def reproduce(
    name: Annotated[str, typer.Argument(help="A model with published tables: llava-1.5-7b.")],
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id of the checkpoint, if not the usual one.")
    ] = None,
    limit: Annotated[
        str | None, typer.Option(help="Samples per task: a number, or a fraction such as 0.5.")
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for results; finished cells are reused.")
    ] = Path("results"),
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would run.")] = False,
) -> None:
    """Rerun a model's published tables and print the difference to each published figure.

    Exit code 1 if a cell failed or something it needs is missing, 2 if an argument is invalid.
    """
    import json

    from vtc.core.errors import ArgumentError
    from vtc.eval.harness import reproduce as published
    from vtc.eval.harness.plan import parse_limit
    from vtc.eval.harness.results import of_this_run
    from vtc.eval.harness.run import BadInput, run

    try:
        samples = None if limit is None else parse_limit(limit)
    except BadInput as error:
        raise fail(error.option, error.message) from None
    try:
        plan = published.plan_reproduction(name)
    except ArgumentError as error:
        raise fail_of("NAME", error) from None
    console = output()
    if dry_run:
        console.print(f"tasks: {', '.join(plan.tasks)}", markup=False)
        for planned in plan.methods:
            what = f" ({planned.convention})" if planned.convention else ""
            console.print(f"{planned.tokens} tokens{what}: {planned.text}", markup=False)
        for what, why in plan.left_out:
            console.print(f"not run: {what}: {why}", markup=False)
        return
    try:
        published.require(plan, model)
    except published.MissingError as error:
        error_console().print(str(error), markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    options = {"limit": samples, "device": device} | ({"model": model} if model else {})
    settings = published.settings_of(plan, out, **options)
    try:
        with bar() as progress:
            results = run(settings, observer(progress))
    except BadInput as error:
        raise fail(error.option, error.message) from None
    except KeyboardInterrupt:
        stopped(kept(out))
    rows = published.compare(results, plan.tables)
    (out / "reproduced.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False), "utf-8")
    console.print(published.table_of(rows))
    for what, why in plan.left_out:
        console.print(f"not run: {what}: {why}", markup=False, style="dim")
    if any(cell["status"] != "done" for cell in of_this_run(results)):
        raise typer.Exit(1)
