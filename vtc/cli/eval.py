# SPDX-License-Identifier: Apache-2.0
"""`vtc eval`: evaluate methods on tasks."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import output
from .options import Import, WideTable, budgets, fail, fail_of, listed
from .progress import bar, kept, observer, stopped

if TYPE_CHECKING:
    from vtc.eval.harness.run import Settings


def evaluate(
    model: Annotated[
        str | None,
        typer.Option(help="Folder or hub id. Default: the model that comes with vtc."),
    ] = None,
    methods: Annotated[
        str,
        typer.Option(help="Methods, comma-separated: todre,fastv:layer=3,divprune@tile,blind."),
    ] = "todre,fastv",
    keep: Annotated[
        str, typer.Option(help="Fractions or numbers of tokens per image, comma-separated.")
    ] = "0.25,0.1",
    tasks: Annotated[
        str | None,
        typer.Option(
            help="vtc_scenes, vtc_photo, vtc_mosaic, lmms-eval tasks (pope,mme,gqa), task files."
        ),
    ] = None,
    suite: Annotated[
        str | None, typer.Option(help="Named task list: embedded, image, doc, video, reasoning.")
    ] = None,
    include_path: Annotated[
        list[str], typer.Option(help="Folder with your own task files; repeatable.")
    ] = [],  # noqa: B006
    limit: Annotated[
        str | None, typer.Option(help="Samples per task: a number, or a fraction such as 0.5.")
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for results; finished cells are reused.")
    ] = Path("results"),
    batch_size: Annotated[int, typer.Option(help="Batch size of lmms-eval's model class.")] = 1,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1. Default: a GPU if there is one.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16 or float16. Default: float32 on a CPU, else the model's own."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of sampling methods and generated tasks.")] = 0,
    baselines: Annotated[
        bool,
        typer.Option(help="Add full, blind, random, pool and downsample for comparison."),
    ] = True,
    lmms_model: Annotated[
        str | None, typer.Option(help="lmms-eval's model class, if the model's type is ambiguous.")
    ] = None,
    model_args: Annotated[
        str,
        typer.Option(help="Options of that class: attn_implementation=eager,quantization=4bit."),
    ] = "",
    imports: Import = [],  # noqa: B006
    page: Annotated[
        bool, typer.Option(help="Write report.html, with samples and their kept tokens.")
    ] = True,
    processes: Annotated[
        int, typer.Option(min=1, help="Processes that share each task's samples.")
    ] = 1,
    wide: WideTable = False,
) -> None:
    """Evaluate methods on tasks with lmms-eval; print a table, write results.json and a plot.

    Finished (method, keep, task) cells in --out do not run again. Exit code 1 if a cell failed,
    2 if an argument is invalid.
    """
    from vtc.eval.harness import parallel
    from vtc.eval.harness.plan import parse_arguments, parse_limit
    from vtc.eval.harness.run import BadInput, Settings, check, run

    keeps, names = budgets(keep), listed("--methods", methods)
    try:
        samples = None if limit is None else parse_limit(limit)
        arguments = parse_arguments(model_args)
    except BadInput as error:
        raise fail(error.option, error.message) from None
    settings = Settings(
        out=out,
        model=model,
        methods=names,
        keeps=keeps,
        tasks=_tasks(tasks, suite),
        limit=samples,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        seed=seed,
        baselines=baselines,
        lmms_model=lmms_model,
        model_args=arguments,
        include_paths=tuple(include_path),
        imports=tuple(imports),
    )
    started = time.perf_counter()
    try:
        check(settings)
        if processes > 1 and not parallel.launched():
            _shared(settings, processes, page, wide)
            return
        if parallel.rank() == 0:
            with bar() as progress:
                results = run(settings, observer(progress))
        else:
            results = run(settings)
    except BadInput as error:
        raise fail(error.option, error.message) from None
    except KeyboardInterrupt:
        if parallel.launched() or parallel.rank() != 0:  # the launching process reports it
            raise
        stopped(kept(out))
    if parallel.rank() == 0 and not parallel.launched():
        _present(results, settings.out, started, page, wide)


def _tasks(tasks: str | None, suite: str | None) -> tuple[str, ...]:
    """The tasks of --tasks or --suite; by default the generated scenes."""
    from vtc.core.errors import ArgumentError
    from vtc.eval.harness.suites import expand

    if tasks is not None and suite is not None:
        raise fail("--suite", "expected --tasks or --suite, got both")
    if suite is None:
        return listed("--tasks", tasks or "vtc_scenes")
    try:
        return tuple(expand(suite))
    except ArgumentError as error:
        raise fail_of("--suite", error) from None


def _shared(settings: Settings, processes: int, page: bool, wide: bool) -> None:
    """Run this command in several processes and print their results."""
    import json

    from vtc.eval.harness import parallel

    started = time.perf_counter()
    code = parallel.launch(sys.argv[1:], processes)
    if code != 0:  # the processes have reported why
        raise typer.Exit(code)
    results = json.loads((settings.out / "results.json").read_text("utf-8"))
    _present(results, settings.out, started, page, wide)


def _present(
    results: Mapping[str, Any], out: Path, started: float, page: bool, wide: bool = False
) -> None:
    """Print the table, draw the plot, write the page; exit code 1 if a cell failed."""
    from vtc.eval.harness.results import grouped, of_this_run
    from vtc.eval.report.page import write_page
    from vtc.eval.report.table import table
    from vtc.viz.plots import tradeoff

    console = output(wide)
    console.print(table(results, None if wide else console.width))
    written = ["results.json", "results.csv"]
    if any(c["status"] == "done" and c["tokens"] for c in results["cells"]):
        # Cells that are not comparable go into separate panels.
        drawn = [{**c, "task": title} for title, rows in grouped(results["cells"]) for c in rows]
        try:
            tradeoff({**results, "cells": drawn}).savefig(out / "tradeoff.png")
            written.append("tradeoff.png")
        except OSError as error:
            console.print(f"no picture: {error}", style="red", markup=False)
    if page:
        try:
            written.append(write_page(out).name)
        except (OSError, ValueError) as error:  # the results are valid without it
            console.print(f"no page: {error}", style="red", markup=False)
        except KeyboardInterrupt:
            stopped(f"stopped: no page; `python -m vtc.eval.report.page {out}` writes it")
    seconds = time.perf_counter() - started
    rest = " with start, imports and the page" if page else " with start and imports"
    console.print(f"\n{out}: {', '.join(written)} ({seconds:.0f} s{rest})", soft_wrap=True)
    if any(c["status"] != "done" for c in of_this_run(results)):
        raise typer.Exit(1)
