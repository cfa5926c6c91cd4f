# SPDX-License-Identifier: Apache-2.0
"""The command line: `vtc eval | bench | autotune | reproduce | show | methods | ...`.

Heavy imports (PyTorch, transformers, lmms-eval) wait until a command needs them, so that `--help`
and bad input answer at once.
"""

from __future__ import annotations

import os
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperCommand

if TYPE_CHECKING:
    from rich.progress import Progress

    from vtc.core.spec import Keep
    from vtc.eval.harness.run import Observer, Settings


_FOLDERS_OR_IDS = ("model", "config")


class _Command(TyperCommand):
    """A command in which `~` is the home folder in every path, also after `--option=`, where shells
    leave it as it is. Warnings are lines of their own."""

    def invoke(self, ctx: Any) -> Any:
        for parameter in self.params:
            name = str(parameter.name)
            value = ctx.params.get(name)
            # Some releases of typer have paths as text until the function is called.
            kind = getattr(getattr(parameter, "type", None), "name", None)
            if isinstance(value, Path):
                ctx.params[name] = value.expanduser()
            elif (kind == "path" or name in _FOLDERS_OR_IDS) and str(value).startswith("~"):
                ctx.params[name] = str(Path(str(value)).expanduser())
        with warnings.catch_warnings():
            warnings.showwarning = _tell  # type: ignore[assignment]
            return super().invoke(ctx)


def _tell(message: Any, category: type, *where: Any) -> None:
    """A warning in a line of its own, without the place in the code that gave it."""
    sys.stderr.write(f"warning: {message}\n")


class _App(typer.Typer):
    def command(self, *args: Any, **kwargs: Any) -> Any:
        return super().command(*args, **{"cls": _Command, **kwargs})


app = _App(
    name="vtc",
    help="Compress the vision tokens of Hugging Face vision-language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


_WIDE = 160


def _console(wide: bool = False) -> Console:
    """Standard output, as it is now; where that is not a terminal and COLUMNS is not set, 120
    columns wide. `wide` has lines as long as they need be."""
    console = Console(highlight=False)
    if wide:
        return Console(highlight=False, width=max(console.width, _WIDE))
    known = console.is_terminal or "COLUMNS" in os.environ
    return console if known else Console(highlight=False, width=120)


_Wide = Annotated[bool, typer.Option("--wide", help="A table with one line a row.")]


def _wide_table(headers: Sequence[str], rows: Iterable[Sequence[str]], right: int = 0) -> None:
    """A table as wide as it gets, for wide terminals and pipes; `right` columns after the third are
    numbers."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for i, header in enumerate(headers):
        table.add_column(header, no_wrap=True, justify="right" if 3 <= i < 3 + right else "left")
    for row in rows:
        table.add_row(*map(escape, row))
    wide = Console(highlight=False, width=10_000)
    console = Console(highlight=False, width=max(80, wide.measure(table).maximum))
    console.print(table)


def _entry(console: Console, name: str, facts: Iterable[str]) -> None:
    """A name and what is to be said of it, stacked: lines break between words only."""
    width = min(console.width, 100)
    console.print(name, style="bold", markup=False, soft_wrap=True)
    for fact in facts:
        lines = textwrap.wrap(
            fact, width, initial_indent="  ", subsequent_indent="    ",
            break_long_words=False, break_on_hyphens=False,
        )  # fmt: skip
        for line in lines:
            console.print(line, markup=False, soft_wrap=True)


def _listed(option: str, text: str) -> tuple[str, ...]:
    """The parts of a list with commas."""
    from vtc.core.spec import split_list

    try:
        return tuple(split_list(text))
    except ValueError as error:
        raise _fail(option, str(error)) from None


def _budgets(text: str) -> tuple[Keep, ...]:
    """The parts of `--keep`."""
    from vtc.core.spec import parse_keep

    parts = _listed("--keep", text)
    try:
        return tuple(map(parse_keep, parts))
    except ValueError as error:
        raise _fail("--keep", str(error)) from None


def _fail(option: str, message: str) -> typer.BadParameter:
    return typer.BadParameter(message, param_hint=option)


def _version(wanted: bool) -> None:
    if wanted:
        from vtc import __version__

        print(__version__)
        raise typer.Exit()


@app.callback()
def main(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Compress the vision tokens of Hugging Face vision-language models."""
    # Threads that wait actively starve one another once another program takes a core: an evaluation
    # beside one took four times as long. Benchmarks are for idle machines.
    if ctx.invoked_subcommand != "bench":
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")


# ---- vtc doctor ---------------------------------------------------------------------------------
@app.command()
def doctor() -> None:
    """Print versions, extras and devices, and what is missing, too old or too new.

    Exit code 1 if something keeps vtc, or an extra that is installed, from working.
    """
    from vtc import __version__
    from vtc.cli import environment as look

    console = _console()
    console.print(f"vtc {__version__}, {look.system()}")
    for line in look.devices():
        console.print(f"  {line}", markup=False)
    bad = False
    groups: dict[str, list[look.Finding]] = {}
    for finding in look.findings():
        groups.setdefault(finding.extra, []).append(finding)
    for extra, found in groups.items():
        installed = [f"{f.name} {f.installed}" for f in found if f.installed]
        # A package or two of an extra may be there for another's sake.
        asked = 2 * len(installed) >= len(found)
        some = f"not installed, but for {', '.join(installed)}" if installed else "not installed"
        listed = ", ".join(installed) if asked else some
        console.print(f"{extra}: {listed}", markup=False)
        for finding in found:
            if finding.state == "ok" or not (asked or finding.bad):
                continue
            bad = bad or finding.bad
            what = f"  {finding.state}: {finding.name} {finding.installed or ''}".rstrip()
            console.print(f"{what} ({finding.remedy})", style="red" * finding.bad, markup=False)
    for module, reason in look.broken_imports():
        bad = True
        console.print(f"cannot import {module}: {reason}", style="red", markup=False)
    console.print("something needs attention" if bad else "all is well")
    raise typer.Exit(int(bad))


def _imported(modules: list[str]) -> list[str]:
    from vtc.core.plugins import import_modules

    try:
        import_modules(modules)
    except ValueError as error:
        raise _fail("--import", str(error).removeprefix("import: ")) from None
    return modules


Import = Annotated[
    list[str],
    typer.Option(
        "--import",
        metavar="MODULE",
        callback=_imported,
        is_eager=True,
        help="A module with methods of your own, by its name or as a .py file; repeatable.",
    ),
]


# ---- vtc methods, vtc models --------------------------------------------------------------------
@app.command()
def methods(wide: _Wide = False, imports: Import = []) -> None:  # noqa: B006
    """List the compression methods: stage, settings with their defaults, paper."""
    from vtc.cli.catalogue import catalogue

    console, rows = _console(), []
    for entry in catalogue(live=bool(imports)):
        year = f" ({entry.year})" if entry.year else ""
        stages = ", ".join(entry.stages) + ", trained" * entry.trained
        reads, settings = ", ".join(entry.reads), ", ".join(entry.settings)
        rows.append((entry.name, entry.title, stages, reads, settings, f"{entry.paper}{year}"))
    if wide:
        _wide_table(("method", "what it is", "stage", "reads", "settings", "paper"), rows)
    else:
        for name, title, stages, reads, settings, paper in rows:
            facts = [f"{title} {paper}".rstrip(), f"stage: {stages}" if stages else ""]
            facts += [f"reads: {reads}" if reads else "", f"settings: {settings}" * bool(settings)]
            _entry(console, name, filter(None, facts))
    notes = (
        "In text: name, name:setting=value:setting=value, and 'first|second' to compose.",
        "keep is a fraction in (0, 1] of an image's tokens, or a whole number of tokens per image.",
    )
    for note in notes:
        console.print(f"\n{note}" if note is notes[0] else note, style="dim", markup=False)


@app.command()
def models(
    markdown: Annotated[bool, typer.Option(help="Print the page MODELS.md.")] = False,
    wide: _Wide = False,
) -> None:
    """List the model families that vtc patches."""
    import vtc
    from vtc.models.page import COLUMNS, page, row

    if markdown:
        print(page(), end="")
        return
    rows = [row(family) for family in vtc.models()]
    if wide:
        _wide_table(COLUMNS, rows)
        return
    console = _console()
    for name, *facts in rows:
        labels = zip(COLUMNS[1:], facts, strict=True)
        _entry(console, name, ["; ".join(f"{label}: {fact}" for label, fact in labels)])


@app.command()
def presets(
    method: Annotated[str | None, typer.Argument(help="One method only.")] = None,
    target: Annotated[str | None, typer.Option(help="llava-1.5, llava-next, qwen2.5-vl.")] = None,
    wide: _Wide = False,
) -> None:
    """List published token targets, and what meeting them really costs the language model.

    KV MiB and TFLOPs are those of its prefill with one image and no text, 2 bytes a value and 2
    FLOPs a multiply-add.
    """
    import vtc
    from vtc.cli.catalogue import short

    try:
        found = vtc.presets(method, target)
    except ValueError as error:
        raise _fail(
            "METHOD" if str(error).startswith("method") else "--target", str(error)
        ) from None
    headers = ("method", "model", "which is", "target", "enter", "mean", "last", "KV MiB", "TFLOPs")
    rows, notes = [], []
    for each in found:
        seen = each.schedule()
        tokens = str(each.tokens) if isinstance(each.tokens, int) else f"{each.tokens:.4g}"
        counts = (str(seen.entering), f"{seen.average:.1f}", str(seen.kept))
        settings = ", ".join(f"{name}={short(value)}" for name, value in each.settings.items())
        if each.scope == "tile":
            settings += "; for each tile"
        cache = f"{seen.kv_bytes / 2**20:.1f}"
        flops = f"{seen.flops / 1e12:.2f}"  # of the language model's prefill, by vtc.cost
        rows.append((each.method, each.target, each.convention, tokens, *counts, cache, flops))
        notes.append((settings, each.source))
    if wide:
        every = [row + note for row, note in zip(rows, notes, strict=True)]
        _wide_table((*headers, "settings", "source"), every, right=6)
        return
    console = _console()
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        sized = zip(cells, widths, strict=True)
        return "  ".join(c.ljust(w) if i < 3 else c.rjust(w) for i, (c, w) in enumerate(sized))

    console.print(line(headers), style="dim", markup=False, soft_wrap=True)
    for row, note in zip(rows, notes, strict=True):
        _entry(console, line(row), ["; ".join(filter(None, note))])


# ---- vtc suite ----------------------------------------------------------------------------------
@app.command()
def suite(
    name: Annotated[str, typer.Argument(help="vtc_scenes, vtc_photo or vtc_mosaic.")],
    out: Annotated[Path, typer.Option(help="Folder to write to.")],
    limit: Annotated[int | None, typer.Option(min=1, help="Number of samples.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Generate a task of vtc's own suite: parquet and task file, for lmms-eval's --include_path."""
    from vtc.eval.harness.run import OWN_TASKS, write_task

    if name not in OWN_TASKS:
        from vtc.core.names import unknown

        raise _fail("NAME", unknown(name, OWN_TASKS))
    _console().print(str(write_task(name, out, limit, seed)))


# ---- vtc eval -----------------------------------------------------------------------------------
@app.command(name="eval")
def evaluate(
    model: Annotated[
        str | None,
        typer.Option(help="Folder, or id on the hub. Without it, the model that comes with vtc."),
    ] = None,
    methods: Annotated[
        str,
        typer.Option(help="Methods, with commas between: todre,fastv:layer=3,divprune@tile,blind."),
    ] = "todre,fastv",
    keep: Annotated[
        str, typer.Option(help="Fractions or numbers of tokens per image, with commas between.")
    ] = "0.25,0.1",
    tasks: Annotated[
        str | None,
        typer.Option(
            help="vtc_scenes, vtc_photo, vtc_mosaic, lmms-eval's (pope,mme,gqa), or a task file."
        ),
    ] = None,
    suite: Annotated[
        str | None, typer.Option(help="Tasks by name: embedded, image, doc, video, reasoning.")
    ] = None,
    include_path: Annotated[
        list[str], typer.Option(help="A folder with task files of your own; repeatable.")
    ] = [],  # noqa: B006
    limit: Annotated[
        str | None, typer.Option(help="Samples of each task: a number, or a share such as 0.5.")
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for results; finished cells are reused.")
    ] = Path("results"),
    batch_size: Annotated[int, typer.Option(help="For lmms-eval's class of the model.")] = 1,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1. Without it, a GPU if there is one.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16 or float16. Without it, float32 on a CPU, else the model's own."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of sampling methods and generated tasks.")] = 0,
    baselines: Annotated[
        bool,
        typer.Option(help="Add full, blind, random, pool and downsample for comparison."),
    ] = True,
    lmms_model: Annotated[
        str | None, typer.Option(help="lmms-eval's class, if the model's type does not tell.")
    ] = None,
    model_args: Annotated[
        str,
        typer.Option(
            help="Of that class, with commas between: attn_implementation=eager,quantization=4bit."
        ),
    ] = "",
    imports: Import = [],  # noqa: B006
    page: Annotated[
        bool, typer.Option(help="Write report.html, with samples and the tokens kept of them.")
    ] = True,
    processes: Annotated[
        int, typer.Option(min=1, help="Processes that share each task's samples.")
    ] = 1,
    wide: Annotated[
        bool, typer.Option("--wide", help="Print all columns, however long the lines.")
    ] = False,
) -> None:
    """Run methods on tasks through lmms-eval; print a table, write results.json and a picture.

    Finished (method, keep, task) cells in --out are not run again. Exit code 1 if a cell failed,
    2 if something given does not work.
    """
    from vtc.eval.harness import parallel
    from vtc.eval.harness.plan import parse_arguments, parse_limit
    from vtc.eval.harness.run import BadInput, Settings, plan, run

    keeps, names = _budgets(keep), _listed("--methods", methods)
    try:
        samples = None if limit is None else parse_limit(limit)
        arguments = parse_arguments(model_args)
    except BadInput as error:
        raise _fail(error.option, error.message) from None
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
        plan(settings)
        if processes > 1 and not parallel.launched():
            _shared(settings, processes, page, wide)
            return
        if parallel.rank() == 0:
            # Progress on the error stream, so that the table alone can be piped; on the stream
            # itself, as `sys.stderr` is redirected while lmms-eval talks.
            console = Console(file=sys.stderr, highlight=False)
            with _progress(console) as progress:
                results = run(settings, _observer(progress))
        else:
            results = run(settings)
    except BadInput as error:
        raise _fail(error.option, error.message) from None
    except KeyboardInterrupt:
        if parallel.launched() or parallel.rank() != 0:  # who started the processes says it
            raise
        _stopped(_kept(out))
    if parallel.rank() == 0 and not parallel.launched():
        _present(results, settings.out, started, page, wide)


def _tasks(tasks: str | None, suite: str | None) -> tuple[str, ...]:
    """The tasks that --tasks or --suite names; the generated scenes without either."""
    from vtc.eval.harness.suites import expand

    if tasks is not None and suite is not None:
        raise _fail("--suite", "expected --tasks or --suite, got both")
    if suite is None:
        return _listed("--tasks", tasks or "vtc_scenes")
    try:
        return tuple(expand(suite))
    except ValueError as error:
        raise _fail("--suite", str(error).removeprefix("suite: ")) from None


def _shared(settings: Settings, processes: int, page: bool, wide: bool) -> None:
    """This very command in several processes; prints what they have written."""
    import json

    from vtc.eval.harness import parallel

    started = time.perf_counter()
    code = parallel.launch(sys.argv[1:], processes)
    if code != 0:  # they have said why
        raise typer.Exit(code)
    results = json.loads((settings.out / "results.json").read_text("utf-8"))
    _present(results, settings.out, started, page, wide)


def _progress(console: Console) -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.progress import TimeRemainingColumn as TimeRemaining

    # lmms-eval's own output is redirected meanwhile; rich must not redirect it once more.
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemaining(),
        console=console,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )


def _stopped(message: str) -> NoReturn:
    """Say what Ctrl-C left behind, and end as shells expect it."""
    Console(file=sys.stderr, highlight=False).print(message, markup=False, soft_wrap=True)
    raise typer.Exit(130)


def _kept(out: Path, again: str = "The same command goes on from there.") -> str:
    """How far a run of `vtc eval` came that was stopped."""
    from vtc.eval.harness.journal import answers_in

    cells = sum(
        1 for file in (out / "cells").glob("*.json") if file.with_suffix(".jsonl").is_file()
    )
    answers = answers_in(out / "journal")
    return (
        f"stopped: {cells} finished cells and {answers} answers of unfinished ones are kept in "
        f"{out}. {again}"
    )


def _observer(
    progress: Progress, measured: Callable[[Mapping[str, Any]], None] | None = None
) -> Observer:
    from vtc.eval.harness.run import Observer

    class Bar(Observer):
        def __init__(self) -> None:
            self.bar = progress.add_task("starting", total=None)

        def planned(self, total: int, cells: int, finished: int) -> None:
            progress.update(self.bar, total=total)
            if finished:
                progress.console.print(f"{finished} of {cells} cells are finished already")

        def stage(self, text: str) -> None:
            progress.update(self.bar, description=text)

        def advanced(self, samples: int) -> None:
            progress.advance(self.bar, samples)

        def finished(self, cell: Mapping[str, Any]) -> None:
            if not progress.console.is_terminal:  # no bar moves there
                progress.console.print(f"{cell['label']}: {cell['status']}", markup=False)
            for warning in cell.get("warnings", ()):
                progress.console.print(f"{cell['label']}: {warning}", style="yellow")
            if cell["status"] != "done":
                progress.console.print(f"{cell['label']} failed: {cell['error']}", style="red")

        def measured(self, results: Mapping[str, Any]) -> None:
            if measured is not None:
                measured(results)

    return Bar()


def _present(
    results: Mapping[str, Any], out: Path, started: float, page: bool, wide: bool = False
) -> None:
    """Print the table, draw the picture, write the page; exit code 1 if a cell failed."""
    from vtc.eval.harness.results import grouped, of_this_run
    from vtc.eval.report.page import write_page
    from vtc.eval.report.table import table
    from vtc.viz.plots import tradeoff

    console = _console(wide)
    console.print(table(results, None if wide else console.width))
    written = ["results.json", "results.csv"]
    if any(c["status"] == "done" and c["tokens"] for c in results["cells"]):
        # Cells that must not be compared are not drawn into one panel.
        drawn = [{**c, "task": title} for title, rows in grouped(results["cells"]) for c in rows]
        try:
            tradeoff({**results, "cells": drawn}).savefig(out / "tradeoff.png")
            written.append("tradeoff.png")
        except OSError as error:
            console.print(f"no picture: {error}", style="red", markup=False)
    if page:
        try:
            written.append(write_page(out).name)
        except (OSError, ValueError) as error:  # the figures stand without it
            console.print(f"no page: {error}", style="red", markup=False)
        except KeyboardInterrupt:
            _stopped(f"stopped: no page; `python -m vtc.eval.report.page {out}` writes it")
    seconds = time.perf_counter() - started
    console.print(f"\n{out}: {', '.join(written)} ({seconds:.0f} s)", soft_wrap=True)
    if any(c["status"] != "done" for c in of_this_run(results)):
        raise typer.Exit(1)


# ---- vtc reproduce ------------------------------------------------------------------------------
@app.command()
def reproduce(
    name: Annotated[str, typer.Argument(help="A model with published tables: llava-1.5-7b.")],
    model: Annotated[
        str | None, typer.Option(help="Folder or id of the checkpoint, if not the usual one.")
    ] = None,
    limit: Annotated[
        str | None, typer.Option(help="Samples of each task: a number, or a share such as 0.5.")
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for results; finished cells are reused.")
    ] = Path("results"),
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would run.")] = False,
) -> None:
    """Run the published tables of a model, and print how far off each published figure is.

    Exit code 1 if a cell failed or something it needs is not here, 2 if something given does not
    work.
    """
    import json

    from vtc.eval.harness import reproduce as published
    from vtc.eval.harness.plan import parse_limit
    from vtc.eval.harness.results import of_this_run
    from vtc.eval.harness.run import BadInput, run

    try:
        samples = None if limit is None else parse_limit(limit)
    except BadInput as error:
        raise _fail(error.option, error.message) from None
    try:
        plan = published.plan_reproduction(name)
    except ValueError as error:
        raise _fail("NAME", str(error).removeprefix("name: ")) from None
    console = _console()
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
        Console(file=sys.stderr, highlight=False).print(str(error), markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    options = {"limit": samples, "device": device} | ({"model": model} if model else {})
    settings = published.settings_of(plan, out, **options)
    try:
        with _progress(Console(file=sys.stderr, highlight=False)) as progress:
            results = run(settings, _observer(progress))
    except BadInput as error:
        raise _fail(error.option, error.message) from None
    except KeyboardInterrupt:
        _stopped(_kept(out))
    rows = published.compare(results, plan.tables)
    (out / "reproduced.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False), "utf-8")
    console.print(published.table_of(rows))
    for what, why in plan.left_out:
        console.print(f"not run: {what}: {why}", markup=False, style="dim")
    if any(cell["status"] != "done" for cell in of_this_run(results)):
        raise typer.Exit(1)


# ---- vtc autotune -------------------------------------------------------------------------------
@app.command()
def autotune(
    model: Annotated[
        str | None,
        typer.Option(help="Folder, or id on the hub. Without it, the model that comes with vtc."),
    ] = None,
    methods: Annotated[str, typer.Option(help="Candidates, with commas between.")] = (
        "todre,divprune,visionzip,fastv"
    ),
    keep: Annotated[str, typer.Option(help="For each method.")] = "0.5,0.25,0.1",
    tasks: Annotated[
        str, typer.Option(help="Of vtc or lmms-eval; the loss is a mean over them.")
    ] = "vtc_scenes",
    loss: Annotated[float, typer.Option(help="Allowed loss of accuracy, in points.")] = 1.0,
    start: Annotated[int, typer.Option(help="Samples of each task in the first round.")] = 32,
    most: Annotated[int, typer.Option(help="Samples of each task in the last round.")] = 512,
    confidence: Annotated[float, typer.Option(help="Of what is dropped and of a winner.")] = 0.95,
    out: Annotated[
        Path, typer.Option(help="Folder for results; finished cells are reused.")
    ] = Path("results"),
    batch_size: Annotated[int, typer.Option(help="For lmms-eval's class of the model.")] = 1,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1.")] = None,
    seed: Annotated[int, typer.Option(help="Of sampling methods and generated tasks.")] = 0,
    imports: Import = [],  # noqa: B006
    wide: Annotated[
        bool, typer.Option("--wide", help="Print all columns, however long the lines.")
    ] = False,
) -> None:
    """Find the cheapest method and keep that loses at most so much against the full model.

    Writes autotune.json. Exit code 1 if a candidate failed, 2 if something given does not work.
    """
    from vtc.eval.harness import autotune as tuner
    from vtc.eval.harness.run import BadInput, Settings

    if not 0 <= loss < 100:
        raise _fail("--loss", f"expected points in [0, 100), got {loss:g}")
    keeps, names = _budgets(keep), _listed("--methods", methods)
    settings = Settings(
        out=out, model=model, methods=names, keeps=keeps, tasks=_listed("--tasks", tasks),
        batch_size=batch_size, device=device, seed=seed, imports=tuple(imports),
    )  # fmt: skip
    try:
        with _progress(Console(file=sys.stderr, highlight=False)) as progress:
            found = tuner.autotune(
                settings, loss / 100, start, most, confidence, _observer(progress)
            )
    except BadInput as error:
        raise _fail(error.option, error.message) from None
    except RuntimeError as error:  # the full model failed: there is nothing to compare with
        raise _fail("vtc autotune", str(error)) from None
    except KeyboardInterrupt:
        _stopped(_kept(out))
    console = _console(wide)
    console.print(tuner.table(found, None if wide else console.width))
    console.print(f"\n{out}: autotune.json", soft_wrap=True)
    if found["failed"]:
        raise typer.Exit(1)


# ---- vtc bench ----------------------------------------------------------------------------------
@app.command()
def bench(
    config: Annotated[
        str, typer.Option(help="speed-bar, llava-1.5-7b, ..., a folder, or an id on the hub.")
    ] = "speed-bar",
    layers: Annotated[int | None, typer.Option(help="Decoder layers, if not all.")] = None,
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="The checkpoint's weights, not random ones.")
    ] = False,
    methods: Annotated[
        str, typer.Option(help="Methods, with commas between: todre,fastv:layer=3.")
    ] = "todre,divprune,visionzip,fastv",
    keep: Annotated[
        str, typer.Option(help="Fractions or numbers of tokens per image, with commas between.")
    ] = "0.1",
    batch: Annotated[str, typer.Option(help="Batch sizes, with commas between: 1,4,8.")] = "1",
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, float16, with commas between.")
    ] = "float32",
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1. Without it, a GPU if there is one.")
    ] = None,
    image: Annotated[str | None, typer.Option(help="Height x width in pixels, 672x840.")] = None,
    text: Annotated[int, typer.Option(help="Tokens of text in the prompt.")] = 64,
    decode: Annotated[int, typer.Option(help="New tokens after each prefill.")] = 8,
    unpatched: Annotated[
        bool, typer.Option(help="Run the plain model on all tokens, which takes longest.")
    ] = True,
    warmup: Annotated[int, typer.Option(help="Turns that do not count.")] = 1,
    repeats: Annotated[int, typer.Option(help="Turns that count.")] = 7,
    threads: Annotated[int | None, typer.Option(help="Threads of PyTorch on a CPU.")] = None,
    seed: Annotated[int, typer.Option(help="Of weights, inputs and sampling methods.")] = 0,
    imports: Import = [],  # noqa: B006
    wide: Annotated[
        bool, typer.Option("--wide", help="Print all columns, however long the lines.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for bench.json and bench.csv.")] = Path(
        "results/bench"
    ),
) -> None:
    """Time prefill, selection and decoding, and the memory they take, beside the plain model.

    Every method also beside the plain model that was given the short sequence outright. Exit code
    1 if something failed, 2 if something given does not work.
    """
    from vtc.eval import bench as timing
    from vtc.eval.harness.run import BadInput

    keeps, names = _budgets(keep), _listed("--methods", methods)
    try:
        batches = tuple(map(int, _listed("--batch", batch)))
    except ValueError:
        raise _fail("--batch", f"expected whole numbers, got {batch!r}") from None
    size = None
    if image is not None:
        height, cross, width = image.partition("x")
        if not (cross and height.isdecimal() and width.isdecimal()):
            raise _fail("--image", f"expected height x width, as 672x840, got {image!r}")
        size = int(height), int(width)
    settings = timing.Settings(
        config=config, layers=layers, pretrained=pretrained, methods=names, keeps=keeps,
        batches=batches, dtypes=_listed("--dtype", dtype), device=device, image=size, text=text,
        decode=decode, unpatched=unpatched, warmup=warmup, repeats=repeats, threads=threads,
        seed=seed, out=out,
    )  # fmt: skip
    started = time.perf_counter()
    console = _console(wide)
    room = None if wide else console.width
    shown: list[int] = []

    def show_rows(found: Mapping[str, Any]) -> None:
        if not shown:
            console.print(timing.head(found))
        shown.append(len(found["rows"]))
        for block in timing.blocks(found, room):
            console.print(block)

    try:
        with _progress(Console(file=sys.stderr, highlight=False)) as progress:
            results = timing.run(settings, _observer(progress, show_rows))
    except BadInput as error:
        raise _fail(error.option, error.message) from None
    except KeyboardInterrupt:
        kept = f"{sum(shown)} rows are kept in {out}/bench.json" if shown else "nothing is kept"
        _stopped(f"stopped: {kept}; rows of a precision and batch size are measured together")
    console.print(timing.notes(results))
    seconds = time.perf_counter() - started
    console.print(f"\n{out}: bench.json, bench.csv ({seconds:.0f} s)", soft_wrap=True)
    if any(row["status"] != "done" for row in results["rows"]):
        raise typer.Exit(1)


# ---- vtc show -----------------------------------------------------------------------------------
def _check_picture(out: Path) -> None:
    """Refuse a file in which no picture can be written, before a model runs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    accepted = FigureCanvasAgg.get_supported_filetypes()
    if out.suffix.lstrip(".").lower() not in accepted:
        kinds = ", ".join(f".{kind}" for kind in sorted(accepted))
        raise _fail("--out", f"expected a file with one of the suffixes {kinds}, got {out}")
    if out.is_dir():
        raise _fail("--out", f"{out} is a folder; give a file in it")
    if not out.parent.is_dir():
        raise _fail("--out", f"no folder {out.parent}")
    if not os.access(out if out.exists() else out.parent, os.W_OK):
        raise _fail("--out", f"{out}: no permission to write it")


@app.command()
def show(
    image: Annotated[Path, typer.Argument(help="The image.")],
    question: Annotated[str, typer.Option(help="What the model is asked.")],
    method: Annotated[str, typer.Option(help="A method, with settings if need be.")] = "todre",
    keep: Annotated[
        str | None, typer.Option(help="Fraction or number of tokens; the method's own without it.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("kept.png"),
    model: Annotated[
        str | None,
        typer.Option(help="Folder, or id on the hub. Without it, the model that comes with vtc."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 24,
    imports: Import = [],  # noqa: B006
) -> None:
    """Draw which tokens of an image survive, and print the answers with all and with those."""
    from importlib.util import find_spec

    import torch

    from vtc.core.spec import parse_keep, parse_method
    from vtc.viz.pictures import PictureError, open_picture

    if find_spec("matplotlib") is None:  # said now, not after the model has run twice
        raise _fail("vtc show", "needs pip install vision-token-compression[eval]")
    try:
        amount = None if keep is None else parse_keep(keep)
        chosen = parse_method(method, amount)
    except (ValueError, TypeError) as error:
        option = "--keep" if str(error).startswith("keep") else "--method"
        raise _fail(option, str(error)) from None
    _check_picture(out)
    try:
        picture = open_picture(image)
    except PictureError as error:
        raise _fail("IMAGE", str(error)) from None
    from vtc.eval.embedded.vlm import embedded_path
    from vtc.eval.harness.quiet import hub_answers, offline
    from vtc.viz.trace import trace

    if device is not None:
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise _fail("--device", f"{device}: {str(error).splitlines()[0]}") from None
    local = model is None or Path(model).is_dir()
    try:
        with offline(local or not hub_answers()):
            folder = str(embedded_path()) if model is None else model
            found = trace(folder, picture, question, chosen, device, max_new_tokens)
    except OSError as error:
        raise _fail("--model", f"{model}: {str(error).splitlines()[0]}") from None
    except (ValueError, TypeError, RuntimeError) as error:
        raise _fail("--method", str(error).splitlines()[0]) from None
    from vtc.viz.plots import kept_views

    title = f"{method}{'' if keep is None else f', keep {keep}'}: {question}"
    figure = kept_views(found.views, title=title)
    try:
        figure.savefig(out)
    except (OSError, ValueError) as error:
        raise _fail("--out", f"{out}: {error}") from None
    console = _console()
    if found.note is not None:
        console.print(found.note, style="yellow", soft_wrap=True)
    for name, count in found.counts.items():
        console.print(f"{name}: {count} of {found.total} tokens")
    console.print(f"all tokens: {found.answer_full!r}", markup=False)
    console.print(f"compressed: {found.answer!r}", markup=False)
    console.print(f"{out}", soft_wrap=True)
